"""Images with their objects and proposals, as the gallery's page reads them: small, and exact.

Numbers travel as arrays in base64, little-endian. What is only drawn is rounded: boxes to a tenth
of a pixel, masks to their outlines, photographs to a size for the screen. What is counted is not:
IoUs and areas are the evaluator's own float32.

Shape shorthand:
    G, R: objects and proposals of an image
"""

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..evaluation.mask_overlaps import mask_iou
from ..evaluation.measurement import scorable_boxes
from ..evaluation.proposal_checks import ImageProposals, usable_of
from ..evaluation.recall import box_iou
from .coverage import check_rgb_image
from .mask_outlines import outline_path
from .pairs import Pairs, find_pairs

# Longer side of a photograph in the page, and WebP's quality: half a COCO image's bytes.
_LONGER_SIDE = 640
_QUALITY = 75
# Of boxes, in pixels, where 16 bits reach; of larger images as fine as they allow.
_BOX_UNIT = 0.1
_LARGEST_BOX_VALUE = 2**16 - 1


class Objects(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: (G, 4) float32 XYXY in pixels of the image.
        areas: (G,) float32, annotated area in square pixels.
        categories: (G,) int.
        masks: G run-length encodings, None of an object without; None if masks are not compared.
    """

    boxes: np.ndarray
    areas: np.ndarray
    categories: np.ndarray
    masks: list[dict[str, Any] | None] | None = None


class GalleryImage(NamedTuple):
    """An image of the gallery.

    Attributes:
        name: of the image, e.g. its id.
        image: (H, W, 3) uint8 RGB.
        proposals: of each run, in pixels of ``image``.
        objects: None if nobody knows them.
    """

    name: str
    image: np.ndarray
    proposals: Sequence[ImageProposals]
    objects: Objects | None = None


def entry_of(image: GalleryImage, keep: int) -> dict[str, Any]:
    """What the page reads of an image, for JSON.

    Args:
        image: with its objects and proposals.
        keep: number of best-scored proposals of each run that the page holds.

    Raises:
        ValueError: for an image that is not RGB bytes.
    """
    check_rgb_image(image.name, image.image)
    size = image.image.shape[:2]
    objects = image.objects
    return {
        "name": image.name,
        "height": size[0],
        "width": size[1],
        "unit": _box_unit(size),
        "photograph": _photograph(image.image),
        "objects": None if objects is None else _objects_entry(objects, size),
        "runs": [_run_entry(run, objects, size, keep) for run in image.proposals],
    }


def _objects_entry(objects: Objects, size: tuple[int, int]) -> dict[str, Any]:
    masks = objects.masks
    return {
        "boxes": _boxes_text(objects.boxes, size),
        "areas": _text(objects.areas, "<f4"),
        "categories": [int(category) for category in objects.categories],
        "masks": None if masks is None else [mask and outline_path(mask) for mask in masks],
    }


def _run_entry(
    proposals: ImageProposals, objects: Objects | None, size: tuple[int, int], keep: int
) -> dict[str, Any]:
    usable = usable_of(proposals)[:keep]
    boxes = scorable_boxes(proposals, usable, keep)
    masks = None if proposals.masks is None else proposals.masks[:keep]
    logits = np.nan_to_num(proposals.objectness_logits[:keep].astype(np.float32))
    entry = {"boxes": _boxes_text(boxes, size), "logits": _text(logits, "<f4"), "masks": None}
    # Of proposals that play no part no mask is shown.
    shown = range(len(masks or ()))
    if objects is not None:
        pairs = find_pairs(box_iou(np.asarray(objects.boxes, np.float32).reshape(-1, 4), boxes))
        entry["box"] = _pairs_entry(pairs)
        shown = ()
        if masks is not None and objects.masks is not None:
            pairs = _mask_pairs(objects.masks, masks, usable)
            entry["mask"] = _pairs_entry(pairs)
            shown = np.union1d(pairs.rank, pairs.best_rank).tolist()
    if len(shown):
        entry["masks"] = {rank: outline_path(masks[rank]) for rank in shown}
    return entry


def _mask_pairs(
    gt_masks: list[dict[str, Any] | None], masks: list[dict[str, Any]], usable: np.ndarray
) -> Pairs:
    """Pairs by the IoU of masks, among the objects that have one."""
    having = np.array([index for index, mask in enumerate(gt_masks) if mask is not None], np.int64)
    overlaps = mask_iou([gt_masks[index] for index in having], masks)
    pairs = find_pairs(np.where(usable[: overlaps.shape[1]], overlaps, np.float32(0)))
    return pairs._replace(gt=having[pairs.gt], best_gt=having[pairs.best_gt])


def _pairs_entry(pairs: Pairs) -> dict[str, str]:
    types = {"gt": "<u2", "rank": "<u2", "iou": "<f4"}
    types |= {f"best_{name}": kind for name, kind in types.items()}
    return {name: _text(getattr(pairs, name), kind) for name, kind in types.items()}


def _box_unit(size: tuple[int, int]) -> float:
    """How many pixels one step of a box's coordinates is."""
    return max(_BOX_UNIT, max(size) / _LARGEST_BOX_VALUE)


def _boxes_text(boxes: np.ndarray, size: tuple[int, int]) -> str:
    """(number, 4) XYXY boxes, cut off at the image's ends, in steps of its unit."""
    height, width = size
    inside = np.clip(np.asarray(boxes).reshape(-1, 4), 0, (width, height, width, height))
    return _text((inside / _box_unit(size)).round(), "<u2")


def _photograph(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_LONGER_SIDE, _LONGER_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="WebP", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _text(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, kind).tobytes()).decode("ascii")
