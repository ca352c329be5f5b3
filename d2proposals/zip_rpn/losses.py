"""The losses of ZIP's generator, and what it logs of the samples they are taken over.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.2, Eq. 6.

Shape shorthand in this module:

    N: number of images in the batch
    Ri: anchors of level i, of all cells
    K: number of classes, 2 or (with the gray class) 3
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage

from .gray_class_sampling import GRAY, IGNORED, NEGATIVE, POSITIVE


@dataclass(frozen=True)
class ZoomLoss:
    """Eq. 6, summed over levels: cross-entropy of the classes, regression loss of the positives.

    Unlike the paper, which sums over the samples of a level, their mean: the learning rate then
    does not depend on how many samples equilibrium leaves.

    Attributes:
        box2box_transform: encoding of boxes relative to anchors.
        box_reg_loss_type: "squared_l2" (Eq. 6) or "smooth_l1".
        smooth_l1_beta: of "smooth_l1".
    """

    box2box_transform: Box2BoxTransform
    box_reg_loss_type: str = "squared_l2"
    smooth_l1_beta: float = 1.0

    def __post_init__(self):
        if self.box_reg_loss_type not in ("squared_l2", "smooth_l1"):
            raise ValueError(
                "MODEL.ZIP.BBOX_REG_LOSS_TYPE must be 'squared_l2' or 'smooth_l1', "
                f"got '{self.box_reg_loss_type}'"
            )

    def __call__(
        self,
        anchors: Sequence[Boxes],
        pred_class_logits: Sequence[torch.Tensor],
        pred_anchor_deltas: Sequence[torch.Tensor],
        gt_labels: Sequence[torch.Tensor],
        gt_boxes: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            anchors: of each level, Ri boxes.
            pred_class_logits: of each level, (N, Ri, K).
            pred_anchor_deltas: of each level, (N, Ri, 4).
            gt_labels: of each level, (N, Ri), IGNORED where an anchor was not sampled.
            gt_boxes: of each level, (N, Ri, 4).

        Returns:
            The scalar losses of classes and of boxes, not weighted.
        """
        class_loss, box_loss = 0.0, 0.0
        for anchors_i, logits_i, deltas_i, labels_i, boxes_i in zip(
            anchors, pred_class_logits, pred_anchor_deltas, gt_labels, gt_boxes, strict=True
        ):
            labels = labels_i.flatten()
            # Indices, not masks: the host waits for a device's each time that a mask picks.
            sampled = (labels != IGNORED).nonzero()[:, 0]
            positive = (labels == POSITIVE).nonzero()[:, 0]
            num_sampled = max(len(sampled), 1)
            class_loss = class_loss + (
                F.cross_entropy(
                    logits_i.flatten(0, 1)[sampled].float(), labels[sampled], reduction="sum"
                )
                / num_sampled
            )
            gt_deltas = self.box2box_transform.get_deltas(
                anchors_i.tensor[positive % len(anchors_i)], boxes_i.flatten(0, 1)[positive]
            )
            box_loss = box_loss + (
                self._box_loss(deltas_i.flatten(0, 1)[positive].float(), gt_deltas) / num_sampled
            )
        return class_loss, box_loss

    def _box_loss(self, pred_deltas: torch.Tensor, gt_deltas: torch.Tensor) -> torch.Tensor:
        """Sum over boxes of the regression loss; both (number of positives, 4)."""
        if self.box_reg_loss_type == "smooth_l1":
            return F.smooth_l1_loss(
                pred_deltas, gt_deltas, beta=self.smooth_l1_beta, reduction="sum"
            )
        return F.mse_loss(pred_deltas, gt_deltas, reduction="sum")


def log_sample_counts(gt_labels: Sequence[torch.Tensor], level_names: Sequence[str]) -> None:
    """Log the numbers of samples per image and class, of all levels, and positives of each.

    Args:
        gt_labels: of each level, (N, Ri).
        level_names: of the feature maps, as many.
    """
    storage = get_event_storage()
    names = {POSITIVE: "pos", NEGATIVE: "neg", GRAY: "gray"}
    counts = torch.stack(
        [torch.stack([(labels == c).sum() for c in names]) for labels in gt_labels]
    ).float() / len(gt_labels[0])  # (L, 3)
    counts = counts.tolist()
    for column, name in enumerate(names.values()):
        storage.put_scalar(f"zip/num_{name}_anchors", sum(row[column] for row in counts))
    for level_name, row in zip(level_names, counts, strict=True):
        storage.put_scalar(f"zip/num_pos_anchors_{level_name}", row[0])
