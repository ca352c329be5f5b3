"""Hard negatives: what a classifier takes for an object and is none.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 7: "two rounds of hard negative mining on the training set".

Shape shorthand in this module:

    R: number of detections of one image
    Q: number of hard negatives of one image
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.structures.boxes import pairwise_intersection


def hard_negatives(
    detections: Instances, record: Mapping[str, Any], max_iou: float, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best-scored detections of an image that are negative crops by the rule of Sec. 6.

    Args:
        detections: with ``pred_boxes`` in pixels of the original image and ``scores``, of any
            class.
        record: the image's dictionary in Detectron2's dataset format.
        max_iou: a negative has less Jaccard similarity than this with every object, and touches no
            crowd region.
        number: of hard negatives at most.

    Returns:
        (Q, 4) float32 XYXY, best score first.
        (Q,) float32 their scores.
    """
    boxes, scores = detections.pred_boxes.tensor.cpu(), detections.scores.cpu()
    best = pairwise_iou(Boxes(boxes), _boxes_of(record, crowd=False))  # (R, M)
    crowd = pairwise_intersection(Boxes(boxes), _boxes_of(record, crowd=True))
    is_negative = (best < max_iou).all(dim=1) & (crowd == 0).all(dim=1)
    order = scores.argsort(descending=True, stable=True)
    chosen = order[is_negative[order]][:number]
    return boxes[chosen].float().numpy(), scores[chosen].float().numpy()


def merge_rounds(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The hard negatives of two rounds, those of the same box once; boxes (Q, 4), scores (Q,).

    Each round's scores are of another classifier: they stay, and the best comes first.
    """
    boxes, scores = (np.concatenate(x) for x in zip(first, second, strict=True))
    order = np.argsort(-scores, kind="stable")
    boxes, scores = boxes[order], scores[order]
    _, index = np.unique(boxes, axis=0, return_index=True)
    index.sort()
    return boxes[index], scores[index]


def _boxes_of(record: Mapping[str, Any], crowd: bool) -> Boxes:
    """XYXY of the image's objects, or of its crowd regions."""
    boxes = [
        BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS)
        for x in record.get("annotations", [])
        if bool(x.get("iscrowd", 0)) == crowd
    ]
    return Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
