"""Max-IoU assigner: the sampling that Size-Aware Dynamic Sampling replaces.

Source: S. Ren, K. He, R. Girshick and J. Sun, "Faster R-CNN", NIPS 2015; the baseline of Tables
III, IV, VI and VII of W. Zou et al., "SC-RPN: A Strong Correlation Learning Framework for Region
Proposal", IEEE Transactions on Image Processing 30, 2021. The matching is Detectron2's own.
"""

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from .locations import Assignment, GroundTruth


def build_max_iou_matcher(thresholds: tuple[float, float]) -> Matcher:
    """Matcher that keeps each object's best samples whatever their IoU.

    Args:
        thresholds: (negative, positive). A sample is positive from the second on, negative below
            the first and ignored in between.

    Raises:
        ValueError: thresholds are not increasing numbers of [0, 1].
    """
    negative, positive = thresholds
    if not 0 <= negative <= positive <= 1:
        raise ValueError(
            "IoU thresholds of MODEL.SCRPN must be 0 <= negative <= positive <= 1, "
            f"got {tuple(thresholds)}"
        )
    if negative == positive:
        return Matcher([positive], [0, 1], allow_low_quality_matches=True)
    return Matcher([negative, positive], [0, -1, 1], allow_low_quality_matches=True)


@torch.no_grad()
def assign_max_iou(
    matcher: Matcher,
    boxes: torch.Tensor,
    is_valid: torch.Tensor,
    ground_truth: GroundTruth,
    min_best_iou: float = 0.3,
) -> Assignment:
    """Label boxes by their best IoU with an object of their image.

    Args:
        matcher: see :func:`build_max_iou_matcher`.
        boxes: (N, R, 4) XYXY, pixels of the network input; anchors or initial proposals.
        is_valid: (N, R) bool. Other boxes are labelled -1 and cannot be an object's best.
        ground_truth: the objects of the batch.
        min_best_iou: an object whose best IoU is lower has no positive. Without this bound every
            sample inside a tiny or slender object would be its best, with hardly any overlap.
    """
    labels = torch.full(is_valid.shape, -1, dtype=torch.int8, device=boxes.device)
    matched = torch.full(is_valid.shape, -1, dtype=torch.int64, device=boxes.device)
    # One image at a time, as Detectron2's RPN: the IoU matrix is the largest tensor here.
    for image in range(len(boxes)):
        objects, gt_boxes = ground_truth.of_image(image)
        valid = is_valid[image].nonzero().squeeze(1)
        quality = pairwise_iou(Boxes(gt_boxes), Boxes(boxes[image, valid]))
        # The matcher's low-quality matches have no bound of their own, so objects out of reach are
        # kept from it. Samples on them are negatives either way: the bound is not above the
        # negative threshold.
        best = quality.amax(dim=1)
        is_reached = (best >= min_best_iou) & (best > 0)
        objects, quality = objects[is_reached], quality[is_reached]
        matches, labels_i = matcher(quality)
        labels[image, valid] = labels_i.to(torch.int8)
        if len(objects):
            matched[image, valid] = torch.where(labels_i == 1, objects[matches], -1)
    return Assignment(labels, matched)
