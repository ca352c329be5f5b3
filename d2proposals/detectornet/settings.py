"""Parts of DetectorNet that several modules build from the configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from ..backbones.alexnet import HIDDEN_CHANNELS, AlexNet, scaled_channels
from ..backbones.crop_trunk import CropTrunk
from ..backbones.trunks import build_registered_trunk
from ..proposals.pixel_normalization import PixelNormalization
from .detection import SearchGrid

# Of the trunk, in Detectron2's names.
NORMS = ("", "BN", "FrozenBN", "GN", "LN", "SyncBN")


def search_grid(node: CfgNode, stage: CfgNode, key: str) -> SearchGrid:
    """The boxes that a stage searches, by MODEL.DETECTORNET and the part of it that says them."""
    return SearchGrid(
        mean_dimensions=tuple(stage.MEAN_DIMENSIONS),
        aspect_ratios=tuple(stage.ASPECT_RATIOS),
        stride=stage.STRIDE,
        ring=node.RING,
        ring_weight=node.RING_WEIGHT,
        halves_weight=node.HALVES_WEIGHT,
        key=key,
    )


def prunes_before_suppression(cfg: CfgNode) -> bool:
    """Whether the generator has a classifier of its own, which prunes boxes (Sec. 5.2)."""
    node = cfg.MODEL.DETECTORNET.CLASSIFIER
    return node.ENABLED and node.PRUNING_BUDGET > 0


def trunk_maker(cfg: CfgNode) -> Callable[[], nn.Module]:
    """What builds the trunk that the configuration describes.

    Raises:
        ValueError: an unknown trunk or normalisation.
    """
    node = cfg.MODEL.DETECTORNET
    if node.TRUNK == "alexnet":
        if node.NORM not in NORMS:
            raise ValueError(f"unknown MODEL.DETECTORNET.NORM '{node.NORM}', choose one of {NORMS}")
        return alexnet_maker(
            input_size=node.INPUT_SIZE,
            width_factor=node.WIDTH_FACTOR,
            norm=node.NORM,
            dropout=node.DROPOUT,
        )
    if node.TRUNK not in BACKBONE_REGISTRY:
        raise ValueError(
            f"unknown MODEL.DETECTORNET.TRUNK '{node.TRUNK}': choose 'alexnet' or a registered "
            "backbone, such as build_torchvision_backbone"
        )
    return lambda: CropTrunk(
        build_registered_trunk(cfg, node.TRUNK, node, sees_crops=True),
        input_size=node.INPUT_SIZE,
        out_channels=scaled_channels(HIDDEN_CHANNELS, node.WIDTH_FACTOR),
        dropout=node.DROPOUT,
    )


def alexnet_maker(**settings: Any) -> Callable[[], AlexNet]:
    """What builds :class:`AlexNet` of these settings, its keyword arguments."""
    return functools.partial(AlexNet, **settings)


def make_normalization(cfg: CfgNode) -> PixelNormalization:
    """From the model's pixels to those that the trunk's weights are for."""
    node = cfg.MODEL.DETECTORNET
    if not all(x > 0 for x in node.PIXEL_STD):
        raise ValueError(f"MODEL.DETECTORNET.PIXEL_STD must be positive, got {node.PIXEL_STD}.")
    return PixelNormalization.from_config(cfg, node)
