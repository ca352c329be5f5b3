"""Backbones and trunks of the papers' networks."""

from .bn_inception import BNInception, build_bn_inception_backbone
from .image import ImageBackbone, build_image_backbone
from .inception_block import InceptionBlock
from .torchvision_backbone import (
    TorchvisionBackbone,
    build_torchvision_backbone,
    build_torchvision_fpn_backbone,
)
from .trunks import build_registered_trunk
from .vgg import VGG, build_vgg_backbone

__all__ = [
    "BNInception",
    "ImageBackbone",
    "InceptionBlock",
    "TorchvisionBackbone",
    "VGG",
    "build_bn_inception_backbone",
    "build_image_backbone",
    "build_registered_trunk",
    "build_torchvision_backbone",
    "build_torchvision_fpn_backbone",
    "build_vgg_backbone",
]
