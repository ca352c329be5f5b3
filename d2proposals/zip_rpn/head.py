"""Detection heads of ZIP: class scores and box offsets of every anchor, one head per level.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.2.

Shape shorthand in this module:

    N: number of images, A: anchors per cell, K: number of classes (2, or 3 with the gray class)
    Hi, Wi: size of the feature map of level i; R = Hi * Wi * A
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn

from ..proposals.sampled_convolution import predict_at


class ZIPHead(nn.Module):
    """A 3x3 convolution with ReLU, then 1x1 convolutions for classes and box offsets.

    "We further feed them into a subsequent convolution layer and conduct the anchor detection in
    the final RPN layer" (Sec. 3.2).
    """

    def __init__(self, *, in_channels: int, channels: int, num_anchors: int, num_classes: int):
        """
        Args:
            in_channels: of the feature map.
            channels: after the 3x3 convolution.
            num_anchors: A.
            num_classes: K.
        """
        super().__init__()
        self.num_classes = num_classes
        self.conv = Conv2d(in_channels, channels, kernel_size=3, padding=1, activation=F.relu)
        self.class_logits = Conv2d(channels, num_anchors * num_classes, kernel_size=1)
        self.anchor_deltas = Conv2d(channels, num_anchors * 4, kernel_size=1)
        for layer in (self.conv, self.class_logits, self.anchor_deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, 0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: (N, C, Hi, Wi).

        Returns:
            (N, R, K) class logits and (N, R, 4) offsets, anchors in the order of Detectron2's
            anchor generators (row, column, anchor of the cell).
        """
        x = self.conv(x)
        # (N, A*K, Hi, Wi) -> (N, Hi, Wi, A*K) -> (N, R, K)
        logits = self.class_logits(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.num_classes)
        deltas = self.anchor_deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
        return logits, deltas

    def at_anchors(
        self, x: torch.Tensor, is_wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`forward`, but zero at the anchors of cells with none that is wanted.

        Args:
            x: (N, C, Hi, Wi).
            is_wanted: (N, R) bool.
        """
        num_anchors = self.anchor_deltas.out_channels // 4
        of_cells = is_wanted.unflatten(1, (-1, num_anchors)).any(dim=2)
        predictors = (self.class_logits, self.anchor_deltas)
        logits, deltas = predict_at(self.conv, predictors, x, of_cells)
        return (
            logits.reshape(len(x), -1, self.num_classes),
            deltas.reshape(len(x), -1, 4),
        )


class ZIPLevelHeads(nn.Module):
    """The heads of all levels: one each ("each level have its own classifier"), or one for all."""

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        channels: int,
        num_anchors: Sequence[int],
        num_classes: int,
        shared: bool = False,
    ):
        """
        Args:
            in_channels: of the feature map of each level.
            channels: after the 3x3 convolutions.
            num_anchors: per cell, of each level.
            num_classes: K.
            shared: whether all levels use one head.

        Raises:
            ValueError: the levels differ in channels or anchors, but are to share a head.
        """
        super().__init__()
        settings = list(zip(in_channels, num_anchors, strict=True))
        if shared and len(set(settings)) > 1:
            raise ValueError(
                "MODEL.ZIP.SHARED_HEAD needs the same channels and anchors per cell on all levels, "
                f"got channels {list(in_channels)} and anchors {list(num_anchors)}"
            )
        self.num_levels = len(settings)
        self.heads = nn.ModuleList(
            ZIPHead(in_channels=c, channels=channels, num_anchors=a, num_classes=num_classes)
            for c, a in (settings[:1] if shared else settings)
        )

    def forward(
        self, features: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Class logits and offsets of each level, as :class:`ZIPHead` returns them."""
        outputs = [head(x) for head, x in zip(self._of_levels(), features, strict=True)]
        return [logits for logits, _ in outputs], [deltas for _, deltas in outputs]

    def at_anchors(
        self, features: Sequence[torch.Tensor], is_wanted: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """As :meth:`forward`, but zero where :meth:`ZIPHead.at_anchors` is."""
        levels = zip(self._of_levels(), features, is_wanted, strict=True)
        outputs = [head.at_anchors(x, wanted) for head, x, wanted in levels]
        return [logits for logits, _ in outputs], [deltas for _, deltas in outputs]

    def are_simple(self) -> bool:
        """Whether all heads are :class:`ZIPHead` itself, with plain convolutions."""
        return all(type(x) is ZIPHead and type(x.conv) is Conv2d for x in self.heads)

    def _of_levels(self) -> list[ZIPHead]:
        return list(self.heads) if len(self.heads) > 1 else [self.heads[0]] * self.num_levels
