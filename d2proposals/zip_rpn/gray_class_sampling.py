"""Which anchors ZIP learns from: IoU bands with a gray class, and equilibrium sampling.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.3 and 5.1.

Shape shorthand in this module:

    N: number of images
    R: number of anchors, of one level or of all
    M: number of ground-truth boxes of an image

Naming convention:

    labels: int64, one of NEGATIVE, POSITIVE, GRAY and IGNORED
"""

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, pairwise_iou

IGNORED, NEGATIVE, POSITIVE, GRAY = -1, 0, 1, 2

# Elements of the IoU matrix that are held at once. Images with more objects are matched in parts.
MAX_IOU_ELEMENTS = 2**25


@dataclass(frozen=True)
class GrayClassLabeler:
    """Labels anchors by their best IoU with an object (Sec. 3.3, "grayCls").

    Attributes:
        positive_iou: positives have at least this IoU.
        negative_iou: negatives have less than this.
        negative_iou_min: and at least this.
        gray_iou: (low, high), gray anchors have an IoU in [low, high]; None for two classes.
        low_quality_match: whether the best anchors of every object are positive whatever their
            IoU, as in Faster R-CNN.
    """

    positive_iou: float = 0.6
    negative_iou: float = 0.25
    negative_iou_min: float = 0.0
    gray_iou: tuple[float, float] | None = (0.35, 0.55)
    low_quality_match: bool = False

    def __post_init__(self):
        gray = self.gray_iou or (self.negative_iou, self.positive_iou)
        bounds = (0, self.negative_iou_min, self.negative_iou, *gray, self.positive_iou, 1)
        if any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(
                "MODEL.ZIP's IoU bands overlap: NEGATIVE_IOU_MIN <= NEGATIVE_IOU <= GRAY_CLASS.IOU "
                f"<= POSITIVE_IOU must hold within [0, 1], got {bounds[1:-1]}"
            )

    def __call__(
        self, anchors: Boxes, gt_boxes: Boxes, is_valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            anchors: R boxes.
            gt_boxes: M boxes, M may be 0.
            is_valid: (R,) bool, False for the anchors that must not be sampled.

        Returns:
            (R,) labels, and (R,) int64 index of each anchor's best ground truth (0 where none).
        """
        best_iou, best_index, is_best_of_object = match_anchors(
            anchors, gt_boxes, is_valid, with_best_of_object=self.low_quality_match
        )
        labels = torch.full_like(best_index, IGNORED)
        labels[(best_iou >= self.negative_iou_min) & (best_iou < self.negative_iou)] = NEGATIVE
        if self.gray_iou is not None:
            low, high = self.gray_iou
            labels[(best_iou >= low) & (best_iou <= high)] = GRAY
        labels[best_iou >= self.positive_iou] = POSITIVE
        if is_best_of_object is not None:
            labels[is_best_of_object] = POSITIVE
        return labels.masked_fill(~is_valid, IGNORED), best_index


def match_anchors(
    anchors: Boxes, gt_boxes: Boxes, is_valid: torch.Tensor, *, with_best_of_object: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Match every anchor with the ground truth that it overlaps most.

    Args:
        anchors: R boxes.
        gt_boxes: M boxes, M may be 0.
        is_valid: (R,) bool; other anchors overlap nothing.
        with_best_of_object: whether the third result is wanted.

    Returns:
        (R,) best IoU, (R,) index of that ground truth (the first of equals), and (R,) bool:
        whether no other anchor has a higher IoU with some object, or None.
    """
    num_anchors, device = len(anchors), anchors.device
    best_iou = torch.zeros(num_anchors, device=device)
    best_index = torch.zeros(num_anchors, dtype=torch.int64, device=device)
    is_best_of_object = None
    if with_best_of_object:
        is_best_of_object = torch.zeros(num_anchors, dtype=torch.bool, device=device)
    step = max(MAX_IOU_ELEMENTS // max(num_anchors, 1), 1)
    for start in range(0, len(gt_boxes), step):
        iou = pairwise_iou(gt_boxes[start : start + step], anchors) * is_valid  # (step, R)
        part_iou, part_index = iou.max(dim=0)
        is_better = part_iou > best_iou
        best_iou = torch.where(is_better, part_iou, best_iou)
        best_index = torch.where(is_better, part_index + start, best_index)
        if is_best_of_object is not None:
            best_of_object = iou.amax(dim=1, keepdim=True)
            # An object that touches no anchor has no best one.
            is_best_of_object |= ((iou == best_of_object) & (best_of_object > 0)).any(dim=0)
    return best_iou, best_index, is_best_of_object


@dataclass(frozen=True)
class EquilibriumSampler:
    """Draws the anchors of a level that take part in the loss (Sec. 3.3 "equilibrium", 5.1).

    At most ``batch_size_per_class`` positives. Negatives: at most ``negative_ratio`` per positive
    and ``batch_size_per_class``. Gray anchors: ``gray_ratio`` of the positives and negatives
    together. Without equilibrium the negatives fill the batch. Never more than ``batch_size``:
    positives come first, then negatives, then gray ones (without equilibrium gray before negative).

    Unlike the paper, which would leave a level without positives no negatives at all, such a level
    gets a share of the batch (as in the released training code): else it never sees background.

    Attributes:
        batch_size: samples of one level in one image.
        batch_size_per_class: of which one class may take.
        equilibrium: whether the negatives are limited by the positives.
        negative_ratio: negatives per positive.
        share_without_positives: of the batch, for negatives on a level without positives.
        gray_ratio: gray samples per positive or negative one.
    """

    batch_size: int = 300
    batch_size_per_class: int = 100
    equilibrium: bool = True
    negative_ratio: float = 2.0
    share_without_positives: float = 0.25
    gray_ratio: float = 0.5

    def quotas(
        self, num_positive: torch.Tensor, num_negative: torch.Tensor, num_gray: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many of each class to draw, given how many there are; all (N,) int64."""
        cap = min(self.batch_size_per_class, self.batch_size)
        positive = num_positive.clamp(max=cap)
        if self.equilibrium:
            limit = (positive * self.negative_ratio).long()
            alone = int(self.batch_size * self.share_without_positives)
            limit = torch.where(positive > 0, limit, alone).clamp(max=cap)
            limit = torch.minimum(limit, self.batch_size - positive)
            negative = torch.minimum(num_negative, limit)
            limit = ((positive + negative) * self.gray_ratio).long().clamp(max=cap)
            limit = torch.minimum(limit, self.batch_size - positive - negative)
            return positive, negative, torch.minimum(num_gray, limit)
        share = self.gray_ratio / (1 + self.gray_ratio)
        limit = (self.batch_size - positive).clamp(max=min(int(self.batch_size * share), cap))
        gray = torch.minimum(num_gray, limit)
        return positive, torch.minimum(num_negative, self.batch_size - positive - gray), gray

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        """Set the labels that were not drawn to IGNORED.

        Args:
            labels: (N, R) of one level.

        Returns:
            Tensor: (N, R) labels of the sample.
        """
        is_class = [labels == c for c in (POSITIVE, NEGATIVE, GRAY)]
        quotas = self.quotas(*(mask.sum(dim=1) for mask in is_class))
        sampled = torch.full_like(labels, IGNORED)
        most = min(self.batch_size, labels.shape[1])
        for label, mask, quota in zip((POSITIVE, NEGATIVE, GRAY), is_class, quotas, strict=True):
            # The highest of random keys are a uniform draw, for all images at once; anchors of
            # other classes have key 0 and come last.
            keys = torch.rand(labels.shape, device=labels.device).add_(1.0) * mask
            drawn = keys.topk(most, dim=1).indices  # (N, most)
            is_drawn = torch.arange(most, device=labels.device) < quota[:, None]
            sampled.scatter_(1, drawn, torch.where(is_drawn, label, sampled.gather(1, drawn)))
        return sampled
