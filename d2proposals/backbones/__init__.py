"""Backbones and trunks of the papers' networks."""

from .bn_inception import BNInception, InceptionBlock, build_bn_inception_backbone
from .image import ImageBackbone, build_image_backbone

__all__ = [
    "BNInception",
    "ImageBackbone",
    "InceptionBlock",
    "build_bn_inception_backbone",
    "build_image_backbone",
]
