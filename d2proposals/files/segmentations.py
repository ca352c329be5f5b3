"""Segmentations of annotations, whatever their kind: polygons, run-length encodings, bitmaps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import PolygonMasks
from pycocotools import mask as mask_util

from .run_length_encodings import check_size, make_encodings

# x and y of three points.
_LEAST_COORDINATES = 6


def usable_segmentation(segmentation: Any, size: tuple[int, int] | None) -> Any:
    """The part of a segmentation that is a mask; None if there is none.

    Of polygons the invalid ones are left out, as Detectron2's and pycocotools' users expect: those
    with fewer than three points, an odd number of coordinates, or coordinates that are no finite
    numbers. An encoding must fill its own size, and that must be the image's.

    Args:
        segmentation: as in an annotation.
        size: (height, width) of the image in pixels, None if unknown.
    """
    if isinstance(segmentation, np.ndarray):
        is_bitmap = segmentation.ndim == 2 and (size is None or segmentation.shape == tuple(size))
        return segmentation if is_bitmap and segmentation.size else None
    if isinstance(segmentation, dict):
        try:
            encode_segmentation(segmentation, size, "")
        except ValueError:
            return None
        return segmentation
    if isinstance(segmentation, (list, tuple)):
        polygons = [polygon for polygon in segmentation if _is_polygon(polygon)]
        return polygons or None
    return None


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, (list, tuple, np.ndarray)) or len(polygon) % 2:
        return False
    try:
        # Of numbers that are all finite, and below the largest, the sum is finite, too.
        return len(polygon) >= _LEAST_COORDINATES and math.isfinite(sum(polygon))
    except (TypeError, ValueError, OverflowError):
        return False


def is_dropped_by_detectron2(segmentation: Any) -> bool:
    """Whether ``load_coco_json`` leaves an annotation out: none of its polygons is valid."""
    return (
        isinstance(segmentation, list)
        and len(segmentation) > 0
        and all(isinstance(polygon, list) for polygon in segmentation)
        and not any(len(x) >= _LEAST_COORDINATES and len(x) % 2 == 0 for x in segmentation)
    )


def is_given(segmentation: Any) -> bool:
    """Whether an annotation says anything where its mask should be."""
    # Not by truth alone: a bitmap is an array.
    return segmentation is not None and (
        not isinstance(segmentation, (list, tuple, dict, str, np.ndarray)) or len(segmentation) > 0
    )


def encode_segmentation(
    segmentation: list | dict | np.ndarray, size: tuple[int, int] | None, image_id: int | str
) -> dict[str, Any]:
    """Polygons, a run-length encoding (compressed or not) or a bitmap as an encoding.

    Args:
        segmentation: as in a dataset's dictionaries.
        size: (height, width) of the image in pixels, which polygons need.
        image_id: named in errors.

    Raises:
        ValueError: if it is none of these, or its size is not the image's.
    """
    if isinstance(segmentation, np.ndarray):
        mask = mask_util.encode(np.asfortranarray(segmentation > 0, np.uint8))
    elif isinstance(segmentation, dict):
        size_of_mask = check_size(segmentation.get("size"))
        mask = make_encodings([segmentation.get("counts")], [size_of_mask])[0]
    elif size is None:
        raise ValueError(
            f"image {image_id} has polygons but no height and width in its dataset dictionary, "
            "which masks need"
        )
    else:
        mask = _encode_polygons(segmentation, size, image_id)
    if size is not None and tuple(mask["size"]) != tuple(size):
        raise ValueError(
            f"a mask of image {image_id} has the size {tuple(mask['size'])}, the image has "
            f"{tuple(size)}"
        )
    return mask


def _encode_polygons(
    polygons: Sequence, size: tuple[int, int], image_id: int | str
) -> dict[str, Any]:
    """The union of polygons (x1, y1, x2, y2, ...) as an encoding."""
    try:
        arrays = [np.asarray(polygon, np.float64).reshape(-1) for polygon in polygons]
    except (TypeError, ValueError):
        arrays = []
    # pycocotools takes any list that is shorter for something else.
    if not arrays or any(
        len(a) < _LEAST_COORDINATES or len(a) % 2 or not np.isfinite(a).all() for a in arrays
    ):
        raise ValueError(
            f"a segmentation of image {image_id} is neither polygons of at least three points, nor "
            "a run-length encoding, nor a bitmap"
        )
    return mask_util.merge(mask_util.frPyObjects([a.tolist() for a in arrays], *size))


def segmentation_area(segmentation: list | dict | np.ndarray) -> float:
    """Area of polygons, of a bitmap or of a run-length encoding, in square pixels."""
    if isinstance(segmentation, np.ndarray):
        return float(np.count_nonzero(segmentation))
    if isinstance(segmentation, dict):
        return float(mask_util.area(encode_segmentation(segmentation, None, "")))
    return float(PolygonMasks([[np.asarray(x, np.float64) for x in segmentation]]).area()[0])


def segmentation_box(segmentation: list | dict | np.ndarray) -> list[float]:
    """The box (x, y, width, height) around a mask, in pixels."""
    if isinstance(segmentation, (np.ndarray, dict)):
        return mask_util.toBbox(encode_segmentation(segmentation, None, "")).tolist()
    points = np.concatenate([np.asarray(x, np.float64).reshape(-1, 2) for x in segmentation])
    corner = points.min(axis=0)
    return [*corner.tolist(), *(points.max(axis=0) - corner).tolist()]


def is_outside(segmentation: list | dict | np.ndarray, size: tuple[int, int] | None) -> bool:
    """Whether polygons have no part in their image; encodings and bitmaps lie in it."""
    if size is None or isinstance(segmentation, (np.ndarray, dict)):
        return False
    height, width = size
    return all(
        max(x[0::2]) <= 0 or max(x[1::2]) <= 0 or min(x[0::2]) >= width or min(x[1::2]) >= height
        for x in segmentation
    )


def filled_boxes(boxes: np.ndarray, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Boxes as masks: the pixels whose centre is inside, as of polygons.

    Args:
        boxes: (R, 4) XYXY in pixels of the image. One of a negative side is empty; NaN is taken
            for 0.
        size: (height, width) of the image in pixels.

    Returns:
        R run-length encodings.
    """
    if not len(boxes):
        return []
    height, width = size
    edges = np.ceil(np.nan_to_num(boxes.astype(np.float64)) - 0.5)
    edges = edges.clip(0, [width, height, width, height])
    corners = np.concatenate([edges[:, :2], (edges[:, 2:] - edges[:, :2]).clip(0)], axis=1)
    return mask_util.frPyObjects(corners, height, width)
