"""Precision and recall before and after the refinement, as in the paper's Fig. 4.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 7, Fig. 4.

Shape shorthand in this module:

    R: number of boxes of one image
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..files.figure_file import write_figure


class ScoredBoxes(NamedTuple):
    """The boxes of one image.

    Attributes:
        boxes: (R, 4) XYXY, pixels of the original image.
        scores: (R,).
    """

    boxes: np.ndarray
    scores: np.ndarray


class PrecisionRecall(NamedTuple):
    """A curve, of class-agnostic boxes at one IoU threshold.

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


def precision_recall(
    records: Sequence[Mapping[str, Any]], boxes: Sequence[ScoredBoxes], iou_threshold: float = 0.5
) -> PrecisionRecall:
    """Match boxes with objects by COCO's evaluation, all categories as one.

    Args:
        records: dictionaries of Detectron2's dataset format.
        boxes: of each image, in the same order.
        iou_threshold: of a match.

    Raises:
        ValueError: there are no objects.
    """
    annotations = [
        _annotation(x, image_id)
        for image_id, record in enumerate(records)
        for x in record.get("annotations", [])
    ]
    if not any(not x["iscrowd"] for x in annotations):
        raise ValueError("precision and recall need a dataset with objects")
    results = [
        {"image_id": image_id, "category_id": 1, "bbox": box, "score": score}
        for image_id, found in enumerate(boxes)
        for box, score in zip(_to_xywh(found.boxes).tolist(), found.scores.tolist(), strict=True)
    ]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image_id} for image_id in range(len(records))],
        "annotations": [{"id": i + 1, **x} for i, x in enumerate(annotations)],
        "categories": [{"id": 1}],
    }
    # It reports its progress on the standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        if not results:
            evaluation.params.imgIds, evaluation.params.catIds = list(range(len(records))), [1]
        evaluation.params.iouThrs = np.array([iou_threshold])
        evaluation.params.maxDets = [max([len(x.boxes) for x in boxes], default=1) or 1]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, 0, 0, 0].clip(min=0)
    return PrecisionRecall(
        evaluation.params.recThrs,
        precision,
        float(precision.mean()),
        float(max(evaluation.eval["recall"][0, 0, 0, 0], 0)),
    )


def plot_precision_recall(
    path: str | os.PathLike, curves: Mapping[str, PrecisionRecall], title: str
) -> None:
    """Draw curves into one PNG, atomically.

    Args:
        path: of the PNG file.
        curves: by what the legend calls them.
        title: of the picture.
    """
    figure = Figure(figsize=(5, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(
            curve.recall, curve.precision, label=f"{name}, AP {100 * curve.average_precision:.1f}"
        )
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, figure)


def _annotation(x: Mapping[str, Any], image_id: int) -> dict[str, Any]:
    """An object in COCO's format; DetectorNet's boxes are class-agnostic: one category."""
    x1, y1, w, h = BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYWH_ABS)
    return {
        "image_id": image_id,
        "category_id": 1,
        "bbox": [x1, y1, w, h],
        "area": w * h,
        "iscrowd": int(x.get("iscrowd", 0)),
    }


def _to_xywh(boxes: np.ndarray) -> np.ndarray:
    """(R, 4) XYXY to XYWH."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
