"""The networks of DetectorNet: regression of box masks, and classification of crops.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 4, 5.1 and 5.2.

Shape shorthand in this module:

    P: number of crops
    S: side of a crop at the network's input, in pixels
    K: number of classes
    d: cells per side of a mask
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .box_masks import MASK_TYPES

NETWORKS = ("shared", "per_mask", "per_class_and_mask")


class BoxMaskNetwork(nn.Module):
    """Regresses the five box masks of each class from a crop (Sec. 4, 5.1).

    One or several networks, each a trunk with a linear layer in place of the classifier. Outputs
    are linear; whoever takes them for coverages clamps them to [0, 1].
    """

    def __init__(
        self,
        *,
        make_trunk: Callable[[], nn.Module],
        num_classes: int = 1,
        mask_size: int = 24,
        networks: str = "per_mask",
    ):
        """
        Args:
            make_trunk: builds a new trunk with ``input_size`` and ``out_channels``, from
                (P, 3, S, S) to (P, out_channels).
            num_classes: K; 1 for class-agnostic masks.
            mask_size: d.
            networks: "per_mask" (one for each type of mask, Sec. 5.1), "per_class_and_mask" (one
                for each class and type, as in the paper's experiments) or "shared" (one for all,
                which Sec. 5.1 suggests).

        Raises:
            ValueError: another name in ``networks``, or masks without cells.
        """
        super().__init__()
        if mask_size < 1:
            raise ValueError(f"MODEL.DETECTORNET.MASK_SIZE must be at least 1, got {mask_size}.")
        if networks not in NETWORKS:
            raise ValueError(
                f"unknown MODEL.DETECTORNET.NETWORKS '{networks}', choose one of {NETWORKS}"
            )
        self.num_classes = num_classes
        self.mask_size = mask_size
        self.classes_at_once = 1 if networks == "per_class_and_mask" else num_classes
        self.masks_at_once = len(MASK_TYPES) if networks == "shared" else 1
        num_outputs = self.classes_at_once * self.masks_at_once * mask_size**2
        num_networks = num_classes * len(MASK_TYPES) * mask_size**2 // num_outputs
        self.networks = nn.ModuleList(
            _TrunkWithOutput(make_trunk(), num_outputs) for _ in range(num_networks)
        )
        self.input_size = self.networks[0].trunk.input_size

    def forward(self, crops: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            crops: (P, 3, S, S), normalised for the trunk.
            classes: (P,) int64, the one class of each crop whose masks are wanted; None for all.
                Networks of other classes are not run, in training on no crops: distributed
                training needs a gradient for each of their parameters.

        Returns:
            Tensor: (P, K, 5, d, d), mask types in the order of :data:`MASK_TYPES`;
            (P, 1, 5, d, d) with ``classes``.
        """
        num_groups = self.num_classes // self.classes_at_once
        if classes is None:
            return torch.cat([self._run_group(i, crops) for i in range(num_groups)], dim=1)
        if num_groups == 1:
            row = torch.arange(len(crops), device=crops.device)
            return self._run_group(0, crops)[row, classes][:, None]
        order = classes.argsort(stable=True)
        sizes = classes.bincount(minlength=num_groups).tolist()
        masks = [
            self._run_group(i, crops_i)
            for i, crops_i in enumerate(crops[order].split(sizes))
            if len(crops_i) or len(crops) == 0 or self.training
        ]
        return torch.cat(masks)[order.argsort()]

    def _run_group(self, index: int, crops: torch.Tensor) -> torch.Tensor:
        """Masks (P, classes_at_once, 5, d, d) of the classes that share their networks."""
        shape = (len(crops), self.classes_at_once, self.masks_at_once) + (self.mask_size,) * 2
        size = len(MASK_TYPES) // self.masks_at_once
        networks = self.networks[index * size : (index + 1) * size]
        return torch.cat([network(crops).view(shape) for network in networks], dim=2)


class CropClassifier(nn.Module):
    """The classifier that prunes detections: K classes and the background (Sec. 5.2)."""

    def __init__(self, trunk: nn.Module, num_classes: int):
        """
        Args:
            trunk: with ``input_size`` and ``out_channels``, from (P, 3, S, S) to (P, out_channels).
            num_classes: K.
        """
        super().__init__()
        self.network = _TrunkWithOutput(trunk, num_classes + 1)
        self.input_size = trunk.input_size

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """
        Args:
            crops: (P, 3, S, S), normalised for the trunk.

        Returns:
            Tensor: (P, K + 1) logits, the background last.
        """
        return self.network(crops)


class _TrunkWithOutput(nn.Module):
    """A trunk and a linear output layer, whose weights are small: outputs begin near 0."""

    def __init__(self, trunk: nn.Module, num_outputs: int):
        super().__init__()
        self.trunk = trunk
        self.output = nn.Linear(trunk.out_channels, num_outputs)
        nn.init.normal_(self.output.weight, std=0.001)
        nn.init.zeros_(self.output.bias)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return self.output(self.trunk(crops))
