"""Pictures of what the map attention decision (MAD) unit does to a level's maps, as in Fig. 4.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.2, Fig. 4 (e)-(h).

Shape shorthand in this module:

    H, W: height and width of the image in pixels
    h, w: height and width of the network input in pixels, without padding
    Hm, Wm: size of the maps of the level in cells, up to the end of the image
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import nn

from ..files.figure_file import write_figure
from ..pictures.sheet import COLOUR_MAP, add_colour_bar, image_rows, title_cell
from .head import ZIPLevelHeads
from .zoom_network import ZoomNetwork

_OPACITY = 0.65
_MAX_NAME_LENGTH = 30


class AttentionMaps(NamedTuple):
    """Mean activations over the channels of one level's maps, each (Hm, Wm) float32.

    Attributes:
        zoom_out: F, Fig. 4 (e).
        zoom_in: H, Fig. 4 (f).
        convolved: the head's 3x3 convolution (with its ReLU) of the concatenated map X, that is
            without attention, Fig. 4 (g).
        attended: the same convolution of Y, with attention, Fig. 4 (h). The same weights: they
            were trained with attention.
    """

    zoom_out: torch.Tensor
    zoom_in: torch.Tensor
    convolved: torch.Tensor
    attended: torch.Tensor


class AttentionPicture(NamedTuple):
    """One image with its maps.

    Attributes:
        name: of the image, in the picture's title.
        image: (H, W, 3) uint8 RGB.
        heat_maps: (4, H, W) in [0, 1], see :func:`heat_maps`.
    """

    name: str
    image: np.ndarray
    heat_maps: np.ndarray


@torch.no_grad()
def attention_maps(model: nn.Module, image: torch.Tensor, level: int = 2) -> AttentionMaps:
    """Run a model up to the maps of Fig. 4.

    Args:
        model: Detectron2's ``ProposalNetwork`` or ``GeneralizedRCNN`` in evaluation, with a
            :class:`ZoomNetwork` that zooms in, and with the generator ZIP on its maps.
        image: (3, h, w) network input before normalisation, as a dataset mapper returns it.
        level: 1 (stride 8) or 2 (stride 16).

    Raises:
        ValueError: for another level, or a model that has no such maps.
    """
    backbone, convolution = _check_model(model, level)
    image = (image.to(model.device) - model.pixel_mean) / model.pixel_std
    images = ImageList.from_tensors([image], backbone.size_divisibility)
    image_sizes = torch.as_tensor([tuple(image.shape[-2:])], device=image.device)
    maps = backbone.zoom_maps(backbone.zoom_out(images.tensor, image_sizes), image_sizes)
    stride = backbone.strides[level - 1]
    rows, columns = (-(-side // stride) for side in image.shape[-2:])
    means = [
        x[0].float().mean(dim=0)[:rows, :columns].cpu()
        for x in (
            maps["zoom_out"][level - 1],
            maps["zoom_in"][level - 1],
            convolution(maps["concatenated"][level - 1]),
            convolution(maps["attended"][level - 1]),
        )
    ]
    return AttentionMaps(*means)


def heat_maps(
    maps: AttentionMaps, input_size: tuple[int, int], stride: int, image_size: tuple[int, int]
) -> np.ndarray:
    """Resize maps to the image, each scaled to [0, 1] by its own least and greatest activation.

    Args:
        maps: of :func:`attention_maps`.
        input_size: (h, w).
        stride: pixels of the network input per cell.
        image_size: (H, W).

    Returns:
        (4, H, W) float32 in the order of :class:`AttentionMaps`; 0 for a constant map.
    """
    stacked = torch.stack(list(maps))[:, None]  # (4, 1, Hm, Wm)
    least, greatest = stacked.amin(dim=(2, 3), keepdim=True), stacked.amax(dim=(2, 3), keepdim=True)
    scaled = (stacked - least) / (greatest - least).clamp(min=torch.finfo(stacked.dtype).tiny)
    # The last cells reach beyond the image by less than a stride.
    full_size = [cells * stride for cells in stacked.shape[-2:]]
    full = F.interpolate(scaled, size=full_size, mode="bilinear", align_corners=False)
    inside = full[..., : input_size[0], : input_size[1]]
    resized = F.interpolate(inside, size=image_size, mode="bilinear", align_corners=False)
    return resized[:, 0].clamp(0, 1).numpy()


def write_attention_sheet(
    path: str | os.PathLike, pictures: Sequence[AttentionPicture], level: int = 2
) -> None:
    """Write a row per image - the image, then its four maps over it - as one PNG, atomically.

    Args:
        path: of the PNG file.
        pictures: at least one.
        level: 1 or 2, for the titles.

    Raises:
        ValueError: without pictures.
    """
    titles = [
        f"$F_{level}$ (zoom out)",
        f"$H_{level}$ (zoom in)",
        f"convolution of $[F_{level}, H_{level}]$",
        f"the same with MAD ($Y_{level}$)",
    ]
    figure, grid = image_rows([x.image for x in pictures], 5, "attention maps", bar=True)
    for row, picture in zip(grid, pictures, strict=True):
        # Grey under the maps, whose colours it would mix with.
        grey = picture.image.mean(axis=2)
        for axes in row:
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
        row[0].imshow(picture.image)
        title_cell(row[0], picture.name, max_length=_MAX_NAME_LENGTH)
        for axes, heat_map, title in zip(row[1:], picture.heat_maps, titles, strict=True):
            axes.imshow(heat_map, cmap=COLOUR_MAP, vmin=0, vmax=1, alpha=_OPACITY)
            axes.set_title(title, fontsize=11)
    bar = add_colour_bar(figure, grid, "mean activation, each map on its own scale")
    bar.set_ticks([0, 1], labels=["least", "greatest"])
    write_figure(path, figure)


def _check_model(model: nn.Module, level: int) -> tuple[ZoomNetwork, nn.Module]:
    """The zoom network and the 3x3 convolution of the level's head; ValueError if one lacks."""
    if level not in (1, 2):
        raise ValueError(
            f"level must be 1 or 2, not {level}: level 3 has no zoom-in map and no attention"
        )
    backbone, generator = model.backbone, getattr(model, "proposal_generator", None)
    if not isinstance(backbone, ZoomNetwork):
        raise ValueError(
            f"attention maps need a zoom network, but the backbone is a {type(backbone).__name__}; "
            "set MODEL.BACKBONE.NAME to build_zoom_network_backbone"
        )
    if backbone.zoom_in_path is None:
        raise ValueError(
            "attention maps need a zoom-in path, but this zoom network only zooms out; set "
            "MODEL.ZOOM_NETWORK.ZOOM_IN to True"
        )
    if len(backbone.projections):
        raise ValueError(
            "attention maps are those of the head's own channels, but this zoom network gives "
            "other ones; set MODEL.ZOOM_NETWORK.OUT_CHANNELS to 0"
        )
    heads = getattr(generator, "heads", None)
    name = f"zoom{level}"
    if not isinstance(heads, ZIPLevelHeads) or name not in generator.in_features:
        raise ValueError(
            f"attention maps of level {level} need the generator ZIP on '{name}'; set "
            "MODEL.PROPOSAL_GENERATOR.NAME and MODEL.ZIP.IN_FEATURES accordingly"
        )
    # One head for all levels stands first.
    index = generator.in_features.index(name) if len(heads.heads) > 1 else 0
    return backbone, heads.heads[index].conv
