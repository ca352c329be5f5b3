"""Backbones and trunks of the papers' networks."""

from .bn_inception import BNInception, InceptionBlock, build_bn_inception_backbone

__all__ = ["BNInception", "InceptionBlock", "build_bn_inception_backbone"]
