"""The one contract of all generators: what Detectron2's meta-architectures ask of them.

Source: Detectron2's ``RPN``, whose signature and fields a generator has, so that the stock
``ProposalNetwork`` and ``GeneralizedRCNN`` host it unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import ImageList, Instances
from torch import nn

from .candidates import make_empty_proposals


class ProposalGenerator(nn.Module):
    """Decides which of a generator's jobs are wanted: to learn, to propose, or both.

    Subclasses have ``proposals_in_training``, and say what their :meth:`training_losses` are, what
    they :meth:`propose`, and, where both start from the same maps, how they :meth:`predict`.

    Attributes:
        proposals_in_training: whether proposals are decoded in training, where R-CNN heads need
            them and nothing else does.
        stays_in_python: why no trace of the generator is right for other images than its own, for
            those who want to export it; None where one is.
    """

    proposals_in_training: bool
    stays_in_python: str | None = None

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: N images, normalised and padded.
            features: maps of the backbone by name, (N, C, Hi, Wi).
            gt_instances: of each image, with ``gt_boxes`` in pixels of the network input and what
                else the generator learns from; needed in training.

        Returns:
            list[Instances]: of each image, ``proposal_boxes`` (XYXY, pixels of the network input,
            clipped, not empty) and ``objectness_logits`` (of the score, descending), and in
            evaluation what else the generator proposes. Empty in training without
            ``proposals_in_training``.
            dict[str, Tensor]: losses by name, weighted; empty in evaluation.

        Raises:
            ValueError: ground truth that lacks what the generator learns from, or features without
                a map of ``in_features``.
        """
        missing = [name for name in getattr(self, "in_features", ()) if name not in features]
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs the feature maps {', '.join(missing)} (in_features), "
                f"and the backbone has {', '.join(features)}."
            )
        if not self.training:
            return self.propose(self.predict(images, features)), {}
        assert gt_instances is not None, f"{type(self).__name__} needs gt_instances in training"
        if not self.proposals_in_training:
            losses = self.losses_alone(images, features, gt_instances)
            return make_empty_proposals(images.image_sizes, images.tensor.device), losses
        predictions = self.predict(images, features)
        losses = self.training_losses(predictions, gt_instances)
        return self.propose(predictions), losses

    def head_parts(self) -> list[nn.Module]:
        """Modules that only compute on feature maps, to be compiled; by default none."""
        return []

    def predict(self, images: ImageList, features: dict[str, torch.Tensor]) -> Any:
        """What learning and proposing both start from.

        By default the images themselves: a generator with a trunk of its own learns from parts of
        them, and ignores the features.
        """
        return images

    def losses_alone(
        self, images: ImageList, features: dict[str, torch.Tensor], gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """The losses of a training that wants no proposals; arguments as :meth:`forward`.

        By default those of all predictions; a generator may compute less.
        """
        return self.training_losses(self.predict(images, features), gt_instances)

    def training_losses(
        self, predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """Weighted losses by name.

        Args:
            predictions: of :meth:`predict`.
            gt_instances: of each image.
        """
        raise NotImplementedError

    def propose(self, predictions: Any) -> list[Instances]:
        """The proposals of each image; by default of what ``predict_proposals`` makes of them.

        Args:
            predictions: of :meth:`predict`.
        """
        return self.predict_proposals(predictions)
