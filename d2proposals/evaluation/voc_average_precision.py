"""Average precision of detections as PASCAL VOC defines it, of each class.

Source: M. Everingham, L. Van Gool, C. K. I. Williams, J. Winn, A. Zisserman, "The PASCAL Visual
Object Classes (VOC) Challenge", IJCV 2010, Sec. 4.2.

Shape shorthand in this module:

    G: number of objects of an image
    R: number of detections of an image
    M: number of detections of one class, of all images
    T: number of IoU thresholds
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from torchvision.ops import box_iou

# Thresholds of "AP", their mean; VOC's own measure is the first.
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100


@dataclass(frozen=True)
class Objects:
    """Annotated objects of an image.

    Attributes:
        boxes: (G, 4) float64 XYXY, pixels of the original image.
        categories: (G,) int64 class of each.
        is_difficult: (G,) bool. What hits one of these is neither right nor wrong.
    """

    boxes: np.ndarray
    categories: np.ndarray
    is_difficult: np.ndarray


@dataclass(frozen=True)
class Detections:
    """Detections of an image.

    Attributes:
        boxes: (R, 4) float64 XYXY, pixels of the original image.
        scores: (R,) float64, comparable over images.
        categories: (R,) int64 class of each.
    """

    boxes: np.ndarray
    scores: np.ndarray
    categories: np.ndarray


def average_precisions(
    objects: Sequence[Objects],
    detections: Sequence[Detections],
    num_classes: int,
    *,
    eleven_points: bool,
) -> np.ndarray:
    """AP of each class and IoU threshold.

    A detection belongs to the object of its class and image that it overlaps most, difficult ones
    among them. Above the threshold it is right if it is the best-scored one of that object, wrong
    if it is not, and counts for nothing if the object is difficult; below, it is wrong. Detections
    of one score keep their order.

    Args:
        objects: of each image.
        detections: of each image, in the same order.
        num_classes: K; classes are 0 to K - 1.
        eleven_points: the mean of the best precisions at recalls 0, .1 ... 1 (VOC until 2009), or
            the area under the curve of best precisions (since 2010).

    Returns:
        (K, T) float64 in [0, 1], T as in IOU_THRESHOLDS; NaN for classes without objects that are
        not difficult.
    """
    result = np.full((num_classes, len(IOU_THRESHOLDS)), np.nan)
    best_objects, best_ious = _best_objects(objects, detections)
    scores = _concatenate([d.scores for d in detections])
    categories = _concatenate([d.categories for d in detections])
    object_categories = _concatenate([o.categories for o in objects])
    is_difficult = _concatenate([o.is_difficult for o in objects]).astype(bool)
    for category in range(num_classes):
        num_objects = np.count_nonzero((object_categories == category) & ~is_difficult)
        if num_objects == 0:
            continue
        index = np.flatnonzero(categories == category)
        index = index[np.argsort(-scores[index], kind="stable")]
        for column, threshold in enumerate(IOU_THRESHOLDS):
            is_right, is_wrong = _judge(
                best_objects[index], best_ious[index] > threshold, is_difficult
            )
            right, wrong = is_right.cumsum(), is_wrong.cumsum()
            precision = right / np.maximum(right + wrong, np.finfo(np.float64).eps)
            result[category, column] = voc_ap(right / num_objects, precision, eleven_points)
    return result


def _judge(
    best_objects: np.ndarray, is_hit: np.ndarray, is_difficult: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of a class are right and which wrong; both (M,) bool.

    Args:
        best_objects: (M,) object of each detection, best score first.
        is_hit: (M,) whether the overlap is above the threshold.
        is_difficult: of all objects.
    """
    is_right = np.zeros(len(best_objects), bool)
    hits = np.flatnonzero(is_hit)
    _, first = np.unique(best_objects[hits], return_index=True)
    is_right[hits[first]] = True
    is_ignored = np.zeros(len(best_objects), bool)
    is_ignored[hits] = is_difficult[best_objects[hits]]
    return is_right & ~is_ignored, ~is_right & ~is_ignored


def _best_objects(
    objects: Sequence[Objects], detections: Sequence[Detections]
) -> tuple[np.ndarray, np.ndarray]:
    """The object of its class that each detection overlaps most, and the IoU.

    Returns:
        Of all detections, image by image: index among the objects of all images, and IoU in
        [0, 1]. Where the image has none of the class the IoU is 0, and the index says nothing.
    """
    best_objects, best_ious, start = [], [], 0
    for objects_i, detections_i in zip(objects, detections, strict=True):
        if len(objects_i.boxes) == 0:
            best_objects.append(np.full(len(detections_i.boxes), -1))
            best_ious.append(np.zeros(len(detections_i.boxes)))
            continue
        overlaps = box_iou(
            torch.as_tensor(detections_i.boxes), torch.as_tensor(objects_i.boxes)
        )  # (R, G)
        is_of_class = detections_i.categories[:, None] == objects_i.categories
        # NaN, of boxes that are not finite, is above no threshold either.
        overlaps = np.where(is_of_class, overlaps.numpy(), -1)
        best, iou = overlaps.argmax(axis=1), overlaps.max(axis=1)
        best_objects.append(start + best)
        best_ious.append(np.maximum(iou, 0))
        start += len(objects_i.boxes)
    return _concatenate(best_objects).astype(np.int64), _concatenate(best_ious)


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays of all images behind each other; of no images, none."""
    return np.concatenate(arrays) if arrays else np.zeros(0)
