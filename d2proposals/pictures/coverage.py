"""Pictures of what proposals cover and what they miss.

Shape shorthand:
    H, W: height and width of an image in pixels
    G: objects of an image
    R: proposals of an image
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from pycocotools import mask as mask_util

from ..evaluation.mask_overlaps import mask_iou
from ..files.figure_file import write_figure
from .sheet import shorten


class _Line(NamedTuple):
    """How the boxes of one meaning are drawn; widths in points."""

    colour: str
    style: str
    width: float


# Of Okabe and Ito's colours, told apart under all common forms of colour blindness, the bright
# ones; line width and dashes say the same once more.
_COVERED = _Line("#56B4E9", "-", 2.0)
_BEST_PROPOSAL = _Line("#F0E442", "-", 1.2)
_MISSED = _Line("#D55E00", "--", 2.4)
_DARK = "#202020"

# In inches, at a resolution at which a COCO image keeps nearly all of its pixels.
_CELL_WIDTH = 4.5
_TITLE_HEIGHT = 0.5
_LEGEND_HEIGHT = 0.5
_MAX_ASPECT = 2.0
_DOTS_PER_INCH = 120
_MAX_NAME_LENGTH = 40
_TINT = 0.4  # opacity of masks


class ProposalPicture(NamedTuple):
    """One image with its objects and proposals.

    Attributes:
        name: of the image in the picture's title, e.g. its id.
        image: (H, W, 3) uint8 RGB.
        gt_boxes: (G, 4) XYXY in pixels of ``image``.
        proposal_boxes: (R, 4) XYXY in pixels of ``image``, best score first.
        gt_masks, proposal_masks: G and R run-length encodings; if both are there, objects are
            covered by the IoU of masks, and masks are drawn.
    """

    name: str
    image: np.ndarray
    gt_boxes: np.ndarray
    proposal_boxes: np.ndarray
    gt_masks: list[dict[str, Any]] | None = None
    proposal_masks: list[dict[str, Any]] | None = None


class Coverage(NamedTuple):
    """Which objects proposals cover. Several objects may share a proposal.

    Attributes:
        is_covered: (G,) bool, whether an object's best IoU reaches the threshold.
        best_iou: (G,) float32, highest IoU with any of the proposals; 0 without proposals.
        best_proposal: (G,) int, rank of that proposal, the better of equal ones; -1 for none with
            an IoU above 0.
    """

    is_covered: np.ndarray
    best_iou: np.ndarray
    best_proposal: np.ndarray


def find_covered(
    gt_boxes: np.ndarray,
    proposal_boxes: np.ndarray,
    top: int,
    iou_threshold: float = 0.5,
    overlaps: np.ndarray | None = None,
) -> Coverage:
    """Find each object's best proposal.

    Args:
        gt_boxes: (G, 4) XYXY.
        proposal_boxes: (R, 4) XYXY in the same pixels, best score first.
        top: number of best-scored proposals that take part.
        iou_threshold: in (0, 1], from which on an object is covered.
        overlaps: (G, R) IoU, of masks, instead of the boxes'.

    Raises:
        ValueError: for a number or a threshold out of range.
    """
    if top < 1:
        raise ValueError(f"the number of top proposals must be at least 1, not {top}")
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"the IoU threshold must be above 0 and at most 1, not {iou_threshold}")
    gt_boxes, proposal_boxes = (
        torch.as_tensor(np.asarray(boxes, np.float32)).reshape(-1, 4)
        for boxes in (gt_boxes, proposal_boxes[:top])
    )
    if len(gt_boxes) == 0 or len(proposal_boxes) == 0:
        num_gt = len(gt_boxes)
        return Coverage(
            np.zeros(num_gt, bool), np.zeros(num_gt, np.float32), np.full(num_gt, -1, np.int64)
        )
    if overlaps is None:
        overlaps = pairwise_iou(Boxes(gt_boxes), Boxes(proposal_boxes)).numpy()  # (G, R)
    overlaps = overlaps[:, :top]
    best_iou = overlaps.max(axis=1)
    return Coverage(
        # float32 as the IoU itself: 7 / 10 must reach the threshold .7.
        is_covered=best_iou >= np.float32(iou_threshold),
        best_iou=best_iou,
        best_proposal=np.where(best_iou > 0, overlaps.argmax(axis=1), -1),
    )


def object_boxes(record: dict) -> np.ndarray:
    """(G, 4) float32 XYXY of the objects of a dataset's dictionary, crowd regions left out."""
    boxes = [
        BoxMode.convert(list(item["bbox"]), item["bbox_mode"], BoxMode.XYXY_ABS)
        for item in record.get("annotations", [])
        if not item.get("iscrowd", 0)
    ]
    return np.array(boxes, np.float32).reshape(-1, 4)


def spread_evenly(number: int, total: int) -> list[int]:
    """Indices of at most ``number`` items, evenly spread over ``total``, first and last among them.

    Raises:
        ValueError: if ``number`` is not positive.
    """
    if number < 1:
        raise ValueError(f"the number of images must be at least 1, not {number}")
    return np.linspace(0, total - 1, min(number, total)).round().astype(int).tolist()


def check_rgb_image(name: str, image: np.ndarray) -> None:
    """Check that an image is what pictures are drawn on.

    Raises:
        ValueError: if it is not (H, W, 3) uint8.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image {name} has the shape {image.shape} and type {image.dtype}; pictures are drawn "
            "on (H, W, 3) uint8 RGB"
        )


def draw_proposals(
    axes: Axes, picture: ProposalPicture, top: int, iou_threshold: float = 0.5
) -> Coverage:
    """Draw an image, its covered objects with their best proposals, and its missed objects.

    Args:
        axes: where to draw; they get the image's title.
        picture: what to draw.
        top: number of best-scored proposals that take part.
        iou_threshold: in (0, 1].

    Returns:
        what was found.

    Raises:
        ValueError: for an image that is not RGB bytes, a number or a threshold out of range.
    """
    image = picture.image
    check_rgb_image(picture.name, image)
    height, width = image.shape[:2]
    gt_boxes = np.asarray(picture.gt_boxes, np.float32).reshape(-1, 4)
    proposal_boxes = np.asarray(picture.proposal_boxes, np.float32).reshape(-1, 4)
    overlaps = None
    if picture.gt_masks is not None and picture.proposal_masks is not None:
        overlaps = mask_iou(picture.gt_masks, picture.proposal_masks[:top])
    found = find_covered(gt_boxes, proposal_boxes, top, iou_threshold, overlaps)
    # The image's corner, not the middle of its first pixel, is (0, 0), as for boxes.
    axes.imshow(image, extent=(0, width, height, 0), interpolation="antialiased")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    # The titles of a row stand at one height, whatever the images' shapes.
    axes.set_anchor("N")
    used = np.unique(found.best_proposal[found.is_covered])
    if overlaps is not None:
        _fill_masks(axes, picture.image.shape[:2], [picture.proposal_masks[i] for i in used],
                    _BEST_PROPOSAL)  # fmt: skip
        missed = [picture.gt_masks[i] for i in np.flatnonzero(~found.is_covered)]
        _fill_masks(axes, picture.image.shape[:2], missed, _MISSED)
    _draw_boxes(axes, gt_boxes[found.is_covered], _COVERED)
    _draw_boxes(axes, proposal_boxes[used], _BEST_PROPOSAL)
    # Last, above everything: they are what the picture is for.
    _draw_boxes(axes, gt_boxes[~found.is_covered], _MISSED)
    axes.set_title(_title(picture.name, found, top), fontsize=10, parse_math=False)
    return found


def picture_pixels(
    picture: ProposalPicture, top: int, iou_threshold: float = 0.5, side: float = 6.0
) -> np.ndarray:
    """An image with its covered and missed objects, without a title.

    Args:
        picture: what to draw.
        top: number of best-scored proposals that take part.
        iou_threshold: in (0, 1].
        side: the longer one, in units of 120 pixels.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        ValueError: as :func:`draw_proposals`.
    """
    height, width = picture.image.shape[:2]
    scale = side / max(height, width)
    # A figure of at least some dots, however thin the image.
    size = (max(width * scale, 0.5), max(height * scale, 0.5))
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_proposals(axes, picture, top, iou_threshold)
    axes.set_title("")
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def write_contact_sheet(
    path: str | os.PathLike,
    pictures: Sequence[ProposalPicture],
    *,
    top: int = 100,
    iou_threshold: float = 0.5,
    title: str = "",
) -> None:
    """Write pictures of several images, beside and below each other, as one PNG, atomically.

    Args:
        path: of the PNG file.
        pictures: at least one.
        top: number of best-scored proposals that take part.
        iou_threshold: in (0, 1], from which on an object is covered.
        title: of the whole sheet; the number of covered objects of all images follows it.

    Raises:
        ValueError: without pictures, and as :func:`draw_proposals`.
    """
    if not pictures:
        raise ValueError("a sheet of proposal pictures needs at least one image")
    # About as wide as a screen: twice as many columns as rows, up to 4.
    columns = min(len(pictures), max(1, round(math.sqrt(2 * len(pictures)))), 4)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    row_heights = [
        _TITLE_HEIGHT + _CELL_WIDTH * max(_aspect(picture) for picture in row) for row in rows
    ]
    figure = Figure(
        figsize=(_CELL_WIDTH * columns, sum(row_heights) + 2 * _LEGEND_HEIGHT),
        dpi=_DOTS_PER_INCH,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=row_heights)
    num_covered = num_objects = 0
    for axes, picture in zip(grid.flat, pictures, strict=False):
        found = draw_proposals(axes, picture, top, iou_threshold)
        num_covered += int(found.is_covered.sum())
        num_objects += len(found.is_covered)
    for axes in grid.flat[len(pictures) :]:
        axes.set_axis_off()
    total = f"{num_covered} of {num_objects} objects covered"
    figure.suptitle(f"{title}: {total}" if title else total, fontsize=12, parse_math=False)
    by_masks = all(None not in (x.gt_masks, x.proposal_masks) for x in pictures)
    _add_legend(figure, top, iou_threshold, columns, "mask IoU" if by_masks else "IoU")
    write_figure(path, figure)


def _draw_boxes(axes: Axes, boxes: np.ndarray, line: _Line) -> None:
    """Draw (number, 4) XYXY boxes as outlines."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    axes.add_collection(
        PolyCollection(
            corners,
            facecolors="none",
            edgecolors=line.colour,
            linestyles=line.style,
            linewidths=line.width,
            # A dark rim keeps the colours apart from a background of the same colour.
            path_effects=[withStroke(linewidth=line.width + 1, foreground=_DARK)],
        ),
        autolim=False,
    )


def _fill_masks(
    axes: Axes, image_size: tuple[int, int], masks: list[dict[str, Any]], line: _Line
) -> None:
    """Tint what masks cover, all of them in one colour."""
    masks = [mask for mask in masks if tuple(mask["size"]) == tuple(image_size)]
    if not masks:
        return
    tint = np.zeros((*image_size, 4), np.float32)
    tint[mask_util.decode(mask_util.merge(masks)) > 0] = to_rgba(line.colour, _TINT)
    axes.imshow(tint, extent=(0, image_size[1], image_size[0], 0), interpolation="nearest")


def _title(name: str, found: Coverage, top: int) -> str:
    """Two lines that fit the width of a cell."""
    name = shorten(name, _MAX_NAME_LENGTH)
    num_objects = len(found.is_covered)
    if num_objects == 0:
        return f"image {name}\nno objects"
    return (
        f"image {name}\ncovered {found.is_covered.sum()} of {num_objects} objects with the top "
        f"{top}"
    )


def _aspect(picture: ProposalPicture) -> float:
    """Height / width of an image; a very tall one is made smaller instead of its row taller."""
    height, width = picture.image.shape[:2]
    return min(height / width, _MAX_ASPECT)


def _add_legend(figure: Figure, top: int, iou_threshold: float, columns: int, measure: str) -> None:
    """Explain the three kinds of boxes at the bottom."""
    labels = {
        f"object covered at {measure} {iou_threshold:g} by the top {top}": _COVERED,
        "its best proposal": _BEST_PROPOSAL,
        "missed object": _MISSED,
    }
    handles = [
        Line2D(
            [], [], color=line.colour, linestyle=line.style, linewidth=line.width, label=label,
            path_effects=[withStroke(linewidth=line.width + 1, foreground=_DARK)],
        )
        for label, line in labels.items()
    ]  # fmt: skip
    figure.legend(
        handles=handles,
        loc="outside lower center",
        # On one line where it has the width of two images.
        ncols=3 if columns > 1 else 1,
        fontsize=10,
        handlelength=3.5,
        frameon=False,
    )
