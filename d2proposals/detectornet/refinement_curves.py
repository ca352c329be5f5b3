"""Precision and recall before and after the refinement, as in the paper's Fig. 4.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 7, Fig. 4.

Shape shorthand in this module:

    R: number of boxes of one image
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Instances
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..evaluation.voc_average_precision import Objects
from ..files.figure_file import write_figure

_MAX_COLUMNS = 4


class ScoredBoxes(NamedTuple):
    """The boxes of one image.

    Attributes:
        boxes: (R, 4) XYXY, pixels of the original image.
        scores: (R,).
        classes: (R,) int; 0 for class-agnostic boxes.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


class PrecisionRecall(NamedTuple):
    """A curve, of the boxes of one class at one IoU threshold.

    Attributes:
        recall: (101,) from 0 to 1.
        precision: (101,) the highest at this recall or more, 0 beyond the last.
        average_precision: its mean.
        greatest_recall: of all boxes together.
    """

    recall: np.ndarray
    precision: np.ndarray
    average_precision: float
    greatest_recall: float


def detections_of(proposals: Instances, nms_thresh: float) -> ScoredBoxes:
    """What the detector makes of proposals: those that its suppression leaves of each class.

    Args:
        proposals: of an image, in pixels of the original image; ``proposal_classes`` where masks
            are of each class.
        nms_thresh: IoU threshold of the heads (``MODEL.ROI_HEADS.NMS_THRESH_TEST``).
    """
    boxes, scores = proposals.proposal_boxes.tensor, proposals.objectness_logits
    classes = torch.zeros_like(scores, dtype=torch.int64)
    if proposals.has("proposal_classes"):
        classes = proposals.proposal_classes
    keep = batched_nms(boxes, scores, classes, nms_thresh)
    return ScoredBoxes(*(x[keep].cpu().numpy() for x in (boxes, scores, classes)))


def precision_recall(
    objects: Sequence[Objects],
    boxes: Sequence[ScoredBoxes],
    iou_threshold: float = 0.5,
    *,
    class_agnostic: bool = True,
) -> dict[int, PrecisionRecall]:
    """Match boxes with objects by COCO's evaluation, where difficult objects stand as crowds: a box
    that lies in one to the share of ``iou_threshold`` is neither right nor wrong.

    Args:
        objects: of each image.
        boxes: of each image, in the same order.
        iou_threshold: of a match.
        class_agnostic: whether all categories are one, class 0; else boxes are matched with objects
            of their own class.

    Returns:
        a curve for each class that has objects which are not difficult.

    Raises:
        ValueError: there are none.
    """
    annotations = [
        x
        for image_id, of_image in enumerate(objects)
        for x in _annotations(of_image, image_id, class_agnostic)
    ]
    classes = sorted({x["category_id"] for x in annotations if not x["iscrowd"]})
    if not classes:
        raise ValueError("precision and recall need a dataset with objects")
    results = [
        {"image_id": image_id, "category_id": class_id, "bbox": box, "score": score}
        for image_id, found in enumerate(boxes)
        for box, score, class_id in zip(
            _to_xywh(found.boxes).tolist(), found.scores.tolist(), found.classes.tolist(),
            strict=True,
        )
    ]  # fmt: skip
    evaluation = _evaluate(
        annotations,
        results,
        classes,
        num_images=len(objects),
        iou_threshold=iou_threshold,
        max_boxes=max([len(x.boxes) for x in boxes], default=0),
    )
    precisions = evaluation.eval["precision"][0, :, :, 0, 0].clip(min=0).T  # (classes, 101)
    recalls = evaluation.eval["recall"][0, :, 0, 0].clip(min=0)
    return {
        class_id: PrecisionRecall(
            evaluation.params.recThrs, precision, float(precision.mean()), float(recall)
        )
        for class_id, precision, recall in zip(classes, precisions, recalls, strict=True)
    }


def _evaluate(
    annotations: list[dict[str, Any]],
    results: list[dict[str, Any]],
    classes: list[int],
    *,
    num_images: int,
    iou_threshold: float,
    max_boxes: int,
) -> COCOeval:
    """COCO's evaluation of results at one IoU threshold, accumulated."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image_id} for image_id in range(num_images)],
        "annotations": [{"id": i + 1, **x} for i, x in enumerate(annotations)],
        "categories": [{"id": class_id} for class_id in classes],
    }
    # It reports its progress on the standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds, evaluation.params.catIds = list(range(num_images)), classes
        evaluation.params.iouThrs = np.array([iou_threshold])
        evaluation.params.maxDets = [max(max_boxes, 1)]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def plot_precision_recall(
    path: str | os.PathLike, panels: Mapping[str, Mapping[str, PrecisionRecall]]
) -> None:
    """Draw curves into one PNG, atomically: a panel for each class, as in Fig. 4.

    Args:
        path: of the PNG file.
        panels: by title, the curves by what the legend calls them; at least one.
    """
    columns = min(len(panels), _MAX_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for name, curve in curves.items():
            average = 100 * curve.average_precision
            axes.plot(curve.recall, curve.precision, label=f"{name}, AP {average:.1f}")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
        axes.set_title(title, parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    write_figure(path, figure)


def _annotations(objects: Objects, image_id: int, class_agnostic: bool) -> list[dict[str, Any]]:
    """The objects of an image in COCO's format."""
    boxes = _to_xywh(objects.boxes)
    return [
        {
            "image_id": image_id,
            "category_id": 0 if class_agnostic else category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(is_difficult),
        }
        for box, category, is_difficult in zip(
            boxes.tolist(), objects.categories.tolist(), objects.is_difficult.tolist(), strict=True
        )
    ]


def _to_xywh(boxes: np.ndarray) -> np.ndarray:
    """(R, 4) XYXY to XYWH."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
