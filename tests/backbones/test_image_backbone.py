"""The backbone that is none."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from tests.common import make_cfg


def test_images_pass_through():
    backbone = build_backbone(make_cfg(None, "MODEL.BACKBONE.NAME", "build_image_backbone"))
    images = torch.randn(2, 3, 17, 5)
    features = backbone(images)
    assert list(features) == ["image"] and features["image"] is images
    assert backbone.output_shape() == {"image": ShapeSpec(channels=3, stride=1)}
    assert backbone.size_divisibility == 0
    assert not list(backbone.parameters())
