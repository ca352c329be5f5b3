"""IoU of masks by run-length encodings, exact to the pixel.

Shape shorthand: G ground truths and R proposals of an image.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util


def mask_iou(gt_masks: Sequence[dict[str, Any]], masks: Sequence[dict[str, Any]]) -> np.ndarray:
    """IoU of all pairs.

    float32 keeps the order of intersection and threshold: of masks below a megapixel no quotient
    other than the threshold itself rounds to it.

    Args:
        gt_masks, masks: G and R encodings of pycocotools. Masks of different sizes do not overlap.

    Returns:
        (G, R) float32 in [0, 1].
    """
    if not len(gt_masks) or not len(masks):
        return np.zeros((len(gt_masks), len(masks)), np.float32)
    overlaps = mask_util.iou(list(masks), list(gt_masks), [0] * len(gt_masks))  # (R, G)
    # pycocotools has -1 for masks of different sizes, and NaN for two empty ones.
    overlaps = np.nan_to_num(np.asarray(overlaps, np.float64).T, nan=0)
    return np.ascontiguousarray(np.maximum(overlaps, 0), np.float32)


def mask_overlaps(
    gt_masks: Iterable[Sequence[dict[str, Any]]], masks: Iterable[Sequence[dict[str, Any]]]
) -> Iterator[np.ndarray]:
    """IoU of masks image by image; see :func:`mask_iou`.

    Args:
        gt_masks: per image G encodings.
        masks: per image R encodings, best score first.

    Yields:
        Per image (G, R) float32.
    """
    for gt_masks_i, masks_i in zip(gt_masks, masks, strict=True):
        yield mask_iou(gt_masks_i, masks_i)
