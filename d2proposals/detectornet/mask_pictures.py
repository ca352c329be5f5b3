"""Pictures of the five masks and the boxes found in them, as in the paper's Fig. 3.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 7, Fig. 3.

Shape shorthand in this module:

    H, W: height and width of the network input in pixels, without padding
    R: number of boxes
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import ImageList
from matplotlib.patches import Rectangle
from torch import nn

from ..files.figure_file import write_figure
from ..pictures.sheet import image_rows, title_cell
from .box_masks import MASK_TYPES
from .generator import DetectorNet
from .windows import MergedMasks, make_windows, merge_masks

# "in terms of the strength of the colors red, green, blue and yellow" (Fig. 3).
_HALF_COLOURS = {
    "bottom": (1.0, 0.0, 0.0),
    "top": (0.0, 1.0, 0.0),
    "left": (0.0, 0.0, 1.0),
    "right": (1.0, 1.0, 0.0),
}
_CELL_WIDTH = 3.2  # inches
_MAX_NAME_LENGTH = 30


class MaskPicture(NamedTuple):
    """One image with its masks.

    Attributes:
        name: of the image, in the picture's title.
        image: (H, W, 3) uint8 RGB.
        masks: (5, H, W) in [0, 1], in the order of :data:`MASK_TYPES`.
        boxes: (R, 4) XYXY in pixels, best first.
    """

    name: str
    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


@torch.no_grad()
def picture_masks(
    model: nn.Module,
    image: torch.Tensor,
    *,
    name: str,
    scale: int = 2,
    top: int = 5,
    class_id: int = 0,
) -> MaskPicture:
    """Run a model up to the merged masks of a scale, and to its boxes.

    Args:
        model: Detectron2's ``ProposalNetwork`` or ``GeneralizedRCNN`` in evaluation, with the
            generator :class:`DetectorNet`.
        image: (3, H, W) network input before normalisation, as a dataset mapper returns it.
        name: of the image.
        scale: of the windows, 1 for the whole image, 2 for halves of its sides, and so on.
        top: boxes of the class with the best scores.
        class_id: whose masks; 0 for class-agnostic ones.

    Raises:
        ValueError: for another generator, and a scale or class that it does not have.
    """
    generator = getattr(model, "proposal_generator", None)
    if not isinstance(generator, DetectorNet):
        raise ValueError(
            f"box masks need the generator DetectorNet, not {type(generator).__name__}; set "
            "MODEL.PROPOSAL_GENERATOR.NAME"
        )
    for what, number, first, last in (
        ("scale", scale, 1, generator.num_scales),
        ("class", class_id, 0, generator.network.num_classes - 1),
    ):
        if not first <= number <= last:
            raise ValueError(f"{what} must be from {first} to {last}, got {number}")
    pixels = (image.to(model.device) - model.pixel_mean) / model.pixel_std
    images = ImageList.from_tensors([pixels])
    size = tuple(image.shape[-2:])
    windows = make_windows(size, generator.num_scales, generator.window_overlap)[scale - 1]
    masks = generator.predict_masks(images, 0, windows.boxes().to(pixels.device))
    (proposals,) = generator.predict_proposals(images)
    if proposals.has("proposal_classes"):
        proposals = proposals[proposals.proposal_classes == class_id]
    return MaskPicture(
        name=name,
        image=generator.normalization.to_rgb(pixels).permute(1, 2, 0).cpu().numpy(),
        masks=pixel_masks(merge_masks(masks, windows), size, class_id),
        boxes=proposals.proposal_boxes.tensor[:top].cpu().numpy(),
    )


def pixel_masks(masks: MergedMasks, image_size: tuple[int, int], class_id: int = 0) -> np.ndarray:
    """Merged masks of a class at the middle of each pixel, (5, H, W)."""
    rows, columns = (
        torch.searchsorted(
            edges, torch.arange(side, device=edges.device, dtype=edges.dtype) + 0.5
        ).clamp(1, len(edges) - 1)
        - 1
        for edges, side in zip((masks.y_edges, masks.x_edges), image_size, strict=True)
    )
    return masks.values[class_id][:, rows[:, None], columns].cpu().numpy()


def half_colours(masks: np.ndarray) -> np.ndarray:
    """The four half masks as one picture.

    Args:
        masks: (5, H, W) in [0, 1].

    Returns:
        (H, W, 3) in [0, 1] RGB: the sum of each mask's colour in its strength, scaled down where
        it exceeds 1.
    """
    colours = np.stack([_HALF_COLOURS.get(name, (0.0, 0.0, 0.0)) for name in MASK_TYPES])
    mixed = np.einsum("mhw,mc->hwc", masks, colours)
    return mixed / np.maximum(mixed.max(axis=2, keepdims=True), 1.0)


def write_mask_sheet(path: str | os.PathLike, pictures: Sequence[MaskPicture]) -> None:
    """Write a row per image - boxes, full mask, four halves - as one PNG, atomically.

    Args:
        path: of the PNG file.
        pictures: at least one.

    Raises:
        ValueError: without pictures.
    """
    figure, grid = image_rows([x.image for x in pictures], 3, "box masks", _CELL_WIDTH)
    for row, picture in zip(grid, pictures, strict=True):
        row[0].imshow(picture.image)
        for rank, (x1, y1, x2, y2) in enumerate(picture.boxes):
            colour, width = ("red", 2.5) if rank == 0 else ("white", 1.0)
            row[0].add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=width)
            )
        title_cell(row[0], picture.name, 10, _MAX_NAME_LENGTH)
        row[1].imshow(picture.masks[MASK_TYPES.index("full")], cmap="gray", vmin=0, vmax=1)
        row[1].set_title("full", fontsize=10)
        row[2].imshow(half_colours(picture.masks))
        row[2].set_title("bottom red, top green, left blue, right yellow", fontsize=8)
    write_figure(path, figure)
