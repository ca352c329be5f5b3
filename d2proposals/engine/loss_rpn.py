"""Detectron2's RPN where its losses are all that a training wants of it.

The stock ``ProposalNetwork`` throws the proposals of a training away, and the losses read a few
hundred anchors of each image, chosen by the ground truth alone. So nothing is decoded, and on a CPU
the head looks at the cells of those anchors only. Losses and gradients are Detectron2's but for
rounding.

Shape shorthand in this module:

    N: number of images in the batch
    A: number of anchors per cell
    Hi, Wi: height and width of feature map i
"""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances

from ..proposals.candidates import make_empty_proposals
from ..proposals.sampled_convolution import is_watched, predict_at


class LossRPN(RPN):
    """RPN that makes no proposals in training; in evaluation it is Detectron2's."""

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """As Detectron2's; in training with one empty ``Instances`` per image."""
        maps = [features[name] for name in self.in_features]
        if not self.training or not self._can_predict_at_samples(maps[0].device):
            return super().forward(images, features, gt_instances)
        anchors = self.anchor_generator(maps)
        gt_labels, gt_boxes = self.label_and_sample_anchors(anchors, gt_instances)
        logits, deltas = self._predict_at_samples(maps, torch.stack(gt_labels) >= 0)
        losses = self.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        return make_empty_proposals(images.image_sizes, maps[0].device), losses

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """As Detectron2's; in training one empty ``Instances`` per image."""
        if self.training:
            return make_empty_proposals(image_sizes, pred_objectness_logits[0].device)
        return super().predict_proposals(
            anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
        )

    def _can_predict_at_samples(self, device: torch.device) -> bool:
        """On a CPU, with the head that has one hidden convolution, while nobody watches it."""
        head = self.rpn_head
        is_simple = type(head) is StandardRPNHead and type(head.conv) is Conv2d
        return device.type == "cpu" and is_simple and not is_watched(head)

    def _predict_at_samples(
        self, maps: list[torch.Tensor], is_sampled: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the head predicts at sampled anchors, zero elsewhere.

        Args:
            maps: one (N, C, Hi, Wi) per feature map.
            is_sampled: (N, sum of Hi * Wi * A) bool.

        Returns:
            list[Tensor]: (N, Hi * Wi * A) logits of each feature map.
            list[Tensor]: (N, Hi * Wi * A, 4) deltas of each feature map.
        """
        head, num_anchors = self.rpn_head, self.anchor_generator.num_anchors[0]
        sizes = [x.shape[-2] * x.shape[-1] * num_anchors for x in maps]
        all_logits, all_deltas = [], []
        for x, own in zip(maps, is_sampled.split(sizes, dim=1), strict=True):
            has_sample = own.unflatten(1, (-1, num_anchors)).any(dim=2)  # (N, Hi * Wi)
            predictors = (head.objectness_logits, head.anchor_deltas)
            logits, deltas = predict_at(head.conv, predictors, x, has_sample)
            all_logits.append(logits.flatten(1))
            all_deltas.append(deltas.unflatten(2, (num_anchors, -1)).flatten(1, 2))
        return all_logits, all_deltas
