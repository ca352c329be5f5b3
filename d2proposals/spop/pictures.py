"""Pictures of what SPOP's networks say of each pixel, as in Fig. 1 and 14.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Fig. 1, Fig. 14, Sec. IV-C.

Shape shorthand in this module:

    H, W: height and width of the network input, in pixels, without padding
    Hm, Wm: height and width of the networks' maps, in cells
    K: number of cells on an object, those with an objectness above 0.5
    R: number of drawn boxes
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from torch import nn

from ..files.figure_file import write_figure
from ..pictures.sheet import COLOUR_MAP, add_colour_bar, image_rows, title_cell
from ..proposals.candidates import clip_candidates
from ..proposals.image_pyramid import scaled_size
from ..proposals.ranking import first_of_nms
from .localization_error import find_spop
from .pixel_proposals import to_image_pixels

# The paper's colours: cells on a large object, and on a small one.
LARGE_COLOUR, SMALL_COLOUR = "yellow", "magenta"
_MAX_NAME_LENGTH = 30


class SPOPPicture(NamedTuple):
    """One image and what the networks say of it at one scale.

    Attributes:
        name: of the image, in the picture's title.
        image: (H, W, 3) uint8 RGB.
        objectness: (Hm, Wm) probabilities of an object.
        size: (Hm, Wm) probabilities of a large object; None without scale-awareness.
        extent: (x, y) pixels of the image that the maps cover.
        cells: (K, 2) x, y of the cells on an object, pixels of the image.
        centres: (K, 2) x, y of the centres of the boxes that they predict.
        is_large: (K,) bool, whether their large-size confidence is above 0.5.
        boxes: (R, 4) XYXY, the best boxes of those cells that NMS keeps.
        box_is_large: (R,) bool.
    """

    name: str
    image: np.ndarray
    objectness: np.ndarray
    size: np.ndarray | None
    extent: tuple[float, float]
    cells: np.ndarray
    centres: np.ndarray
    is_large: np.ndarray
    boxes: np.ndarray
    box_is_large: np.ndarray


@torch.no_grad()
def make_picture(
    model: nn.Module,
    network_input: torch.Tensor,
    *,
    name: str = "",
    scale: float = 1.0,
    num_boxes: int = 20,
) -> SPOPPicture:
    """Run a model's networks on an image.

    Args:
        model: Detectron2's ``ProposalNetwork`` or ``GeneralizedRCNN`` in evaluation, with SPOP.
        network_input: (3, H, W) before normalisation, as a dataset mapper returns it.
        name: of the image.
        scale: factor on the image as it was taken (where that is said, see
            :class:`~d2proposals.proposals.native_size.NativeSizes`).
        num_boxes: boxes to keep at most.

    Raises:
        ValueError: the model has another generator, or the scale is not positive.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"the scale (--scale) must be a positive factor, got {scale}")
    generator = find_spop(model)
    networks = generator.networks
    image = (network_input.to(model.pixel_mean.device) - model.pixel_mean) / model.pixel_std
    (native_size,) = generator.native_sizes([tuple(image.shape[-2:])])
    maps = networks.predict_maps(image, scaled_size(native_size, scale))
    boxes = to_image_pixels(maps.coordinates, networks.normalizer, maps.scale)
    logits = maps.objectness.flatten()
    rows, columns = maps.objectness.shape
    step_y, step_x = (networks.stride / factor for factor in maps.scale)
    y, x = (
        torch.arange(n, device=boxes.device) * step
        for n, step in ((rows, step_y), (columns, step_x))
    )
    cells = torch.cartesian_prod(y, x).flip(1)
    is_object = logits > 0
    # Without scale-awareness all cells are drawn alike.
    is_large = torch.ones_like(is_object) if maps.size is None else maps.size.flatten() > 0
    best = logits.masked_fill(~is_object, -torch.inf).argsort(descending=True, stable=True)
    best = best[: int(is_object.sum())]
    drawn, index = clip_candidates(boxes[best], logits[best], tuple(image.shape[-2:]), 0.0)
    keep = first_of_nms(drawn, generator.nms_thresh, num_boxes)
    rgb = networks.pixel_normalization.to_rgb(image)
    return SPOPPicture(
        name=name,
        image=rgb.permute(1, 2, 0).cpu().numpy(),
        objectness=maps.objectness.sigmoid().cpu().numpy(),
        size=None if maps.size is None else maps.size.sigmoid().cpu().numpy(),
        extent=(columns * step_x, rows * step_y),
        cells=cells[is_object].cpu().numpy(),
        centres=((boxes[:, :2] + boxes[:, 2:]) / 2)[is_object].cpu().numpy(),
        is_large=is_large[is_object].cpu().numpy(),
        boxes=drawn[keep].cpu().numpy(),
        box_is_large=is_large[best[index[keep]]].cpu().numpy(),
    )


def write_sheet(path: str | os.PathLike, pictures: Sequence[SPOPPicture]) -> None:
    """Write a row per image as one PNG, atomically.

    The image, its objectness, its large-size confidence, offsets to the centre, and boxes.

    Args:
        path: of the PNG file.
        pictures: at least one.

    Raises:
        ValueError: without pictures.
    """
    figure, grid = image_rows([x.image for x in pictures], 5, "SPOP's maps", bar=True)
    for row, picture in zip(grid, pictures, strict=True):
        for axes in row:
            axes.imshow(picture.image)
        title_cell(row[0], picture.name, max_length=_MAX_NAME_LENGTH)
        _draw_map(row[1], picture.objectness, picture, "objectness")
        if picture.size is None:
            row[2].set_title("(one network for all sizes)", fontsize=11)
        else:
            _draw_map(row[2], picture.size, picture, "large-size confidence")
        _draw_offsets(row[3], picture)
        _draw_boxes(row[4], picture)
        for axes in row:
            # Arrows and maps reach beyond the image.
            axes.set_xlim(-0.5, picture.image.shape[1] - 0.5)
            axes.set_ylim(picture.image.shape[0] - 0.5, -0.5)
    add_colour_bar(figure, grid, "probability")
    write_figure(path, figure)


def _draw_map(axes: Axes, probability: np.ndarray, picture: SPOPPicture, title: str) -> None:
    """A map over the whole image; a cell is drawn around the pixel that it looks at."""
    width, height = picture.extent
    half_x, half_y = width / probability.shape[1] / 2, height / probability.shape[0] / 2
    extent = (-half_x, width - half_x, height - half_y, -half_y)
    axes.imshow(probability, cmap=COLOUR_MAP, vmin=0, vmax=1, extent=extent)
    axes.set_title(title, fontsize=11)


def _draw_offsets(axes: Axes, picture: SPOPPicture) -> None:
    """Arrows from the cells on an object to the centres of the boxes that they predict."""
    offsets = picture.centres - picture.cells
    colours = np.where(picture.is_large, LARGE_COLOUR, SMALL_COLOUR)
    if len(offsets):
        axes.quiver(
            *picture.cells.T,
            *offsets.T,
            color=colours,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.004,
        )
    axes.set_title("offsets to object centre", fontsize=11)


def _draw_boxes(axes: Axes, picture: SPOPPicture) -> None:
    """The best boxes, in the colours of the sizes."""
    corners = picture.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    colours = np.where(picture.box_is_large, LARGE_COLOUR, SMALL_COLOUR)
    axes.add_collection(
        PolyCollection(corners, facecolors="none", edgecolors=colours, linewidths=1.5)
    )
    axes.set_title("object proposals", fontsize=11)
