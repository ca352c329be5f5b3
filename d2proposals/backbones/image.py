"""The backbone of a model whose proposal generator reads the images themselves."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone


class ImageBackbone(Backbone):
    """Hands the images on as they are, as the feature map "image" of stride 1.

    Generators with a trunk of their own (DeepMask, SPOP, DetectorNet) ignore the feature maps, so
    that they run alone without a backbone's work being thrown away.
    """

    def __init__(self, channels: int = 3):
        """
        Args:
            channels: of the images.
        """
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: (N, C, H, W).

        Returns:
            dict: {"image": x}.
        """
        return {"image": x}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the one map's channels and stride."""
        return {"image": ShapeSpec(channels=self.channels, stride=1)}


@BACKBONE_REGISTRY.register()
def build_image_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ImageBackbone:
    """Build :class:`ImageBackbone` for MODEL.BACKBONE.NAME "build_image_backbone"."""
    return ImageBackbone(input_shape.channels)
