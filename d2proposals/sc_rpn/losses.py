"""Losses of SC-RPN, Eq. 4-7, before their weights.

Source: W. Zou, Z. Zhang, Y. Peng, C. Xiang, S. Tian and L. Zhang, "SC-RPN: A Strong Correlation
Learning Framework for Region Proposal", IEEE Transactions on Image Processing 30, 2021,
Sec. III-A and III-D.

Shape shorthand in this module:

    S: number of samples
    M: number of ground-truth objects in the batch
"""

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from fvcore.nn import smooth_l1_loss

from .locations import GroundTruth

BOX_REG_LOSS_TYPES = ("iou", "smooth_l1")
# IoU below which -ln IoU would be constant: it is 13.8 here.
_MIN_IOU = 1e-6
# Shortest side of a predicted box whose deltas are compared, in pixels.
_MIN_SIDE = 1e-2
# IoUs (samples x objects) that are in memory at once.
_MAX_IOUS = 1 << 22


def iou_loss(pred_boxes: torch.Tensor, gt_boxes: torch.Tensor) -> torch.Tensor:
    """IoU loss -ln(IoU) of J. Yu et al., "UnitBox", ACM MM 2016 (the paper's [47]).

    Unlike the paper, boxes that do not overlap get a gradient too, that of the generalized IoU on
    top of the largest -ln IoU. UnitBox's boxes always hold their pixel, while points can leave
    their object, and with a loss that is constant there they would never come back.

    Args:
        pred_boxes: (S, 4) XYXY.
        gt_boxes: (S, 4) XYXY with area, same unit.

    Returns:
        Tensor: (S,) in [0, 13.8] with an overlap, otherwise in (14.8, 15.8].
    """
    # Both IoUs of one intersection: beside torchvision's loss it would be computed twice, by 58
    # operators instead of 25, and a GPU waits for their launches.
    (pred_low, pred_high), (gt_low, gt_high) = (
        boxes.split(2, dim=1) for boxes in (pred_boxes, gt_boxes)
    )
    overlap = torch.minimum(pred_high, gt_high) - torch.maximum(pred_low, gt_low)
    intersection = _product_of_sides(overlap.clamp(min=0))
    areas = _product_of_sides(pred_high - pred_low) + _product_of_sides(gt_high - gt_low)
    union = areas - intersection
    hull = _product_of_sides(
        torch.maximum(pred_high, gt_high) - torch.minimum(pred_low, gt_low)
    )  # (S,), of the smallest box around both
    iou = intersection / union
    loss = -iou.clamp(min=_MIN_IOU).log()
    apart = loss.detach() + 1 - (iou - (hull - union) / hull)
    return torch.where(iou < _MIN_IOU, apart, loss)


def _product_of_sides(sides: torch.Tensor) -> torch.Tensor:
    """Areas (S,) of sides (S, 2)."""
    return sides[:, 0] * sides[:, 1]


def delta_loss(
    pred_boxes: torch.Tensor, gt_boxes: torch.Tensor, source_boxes: torch.Tensor, beta: float
) -> torch.Tensor:
    """Smooth L1 loss of the deltas from the source boxes (anchors or initial boxes).

    Args:
        pred_boxes, gt_boxes, source_boxes: (S, 4) XYXY with width and height.
        beta: where L2 turns into L1.

    Returns:
        Tensor: (S,) sums over the four deltas.
    """
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    source_boxes = source_boxes.detach()
    # Far from the origin, float32 rounds the far edge of a very narrow box onto the near one; the
    # logarithm of its width would be infinite.
    pred_boxes = torch.cat(
        [pred_boxes[:, :2], torch.maximum(pred_boxes[:, 2:], pred_boxes[:, :2] + _MIN_SIDE)], dim=1
    )
    pred_deltas = transform.get_deltas(source_boxes, pred_boxes)
    gt_deltas = transform.get_deltas(source_boxes, gt_boxes)
    return smooth_l1_loss(pred_deltas, gt_deltas, beta=beta, reduction="none").sum(dim=1)


def iou_mask_logits(iou_mask: torch.Tensor, num_sigmoid: int) -> torch.Tensor:
    """The number whose sigmoid is the IoU mask: all sigmoids but the last (Sec. III-A).

    Args:
        iou_mask: output of the branch's convolution, any shape.
        num_sigmoid: 2 in the paper, "to get a smaller distribution variance": the mask is then
            in (0.5, 0.731). 1: in (0, 1).
    """
    for _ in range(num_sigmoid - 1):
        iou_mask = iou_mask.sigmoid()
    return iou_mask


def iou_mask_loss(iou_mask: torch.Tensor, gt_iou: torch.Tensor, num_sigmoid: int) -> torch.Tensor:
    """Binary cross entropy between the IoU mask and the IoU of the refined proposals (Eq. 5).

    Args:
        iou_mask: (S,) output of the branch's convolution.
        gt_iou: (S,) in [0, 1].
        num_sigmoid: see :func:`iou_mask_logits`.

    Returns:
        Tensor: (S,).
    """
    logits = iou_mask_logits(iou_mask, num_sigmoid)
    return F.binary_cross_entropy_with_logits(logits, gt_iou, reduction="none")


@torch.no_grad()
def iou_mask_targets(
    refined_boxes: torch.Tensor,
    image_index: torch.Tensor,
    matched: torch.Tensor,
    ground_truth: GroundTruth,
) -> torch.Tensor:
    """IoU of refined proposals with their object, or with the nearest one if they have none.

    Args:
        refined_boxes: (S, 4) XYXY, pixels of the network input.
        image_index: (S,) image of each sample.
        matched: (S,) object of each sample, index into ``ground_truth``; -1 for negatives, whose
            IoU is the highest one with any object of their image.
        ground_truth: M objects.

    Returns:
        Tensor: (S,) float32 in [0, 1]; 0 in images without objects.
    """
    targets = refined_boxes.new_zeros(len(refined_boxes), dtype=torch.float32)
    negative = (matched < 0).nonzero()[:, 0]
    gt_boxes, gt_image = ground_truth.boxes, ground_truth.image_index
    # With all objects of the batch: on a GPU a loop over images takes longer than their IoUs.
    for chunk in negative.split(_MAX_IOUS // max(len(gt_boxes), 1) + 1) if len(gt_boxes) else ():
        iou = pairwise_iou(Boxes(refined_boxes[chunk]), Boxes(gt_boxes))
        is_other = image_index[chunk][:, None] != gt_image
        targets[chunk] = iou.masked_fill_(is_other, 0).amax(dim=1)
    positive = (matched >= 0).nonzero()[:, 0]
    targets[positive] = matched_pairwise_iou(
        Boxes(refined_boxes[positive]), Boxes(ground_truth.boxes[matched[positive]])
    )
    return targets
