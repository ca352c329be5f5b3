"""SPOP's networks and refinement from a configuration.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016.
"""

from __future__ import annotations

from detectron2.config import CfgNode

from ..backbones.deeplab_largefov import DeepLabLargeFOV
from ..proposals.pixel_normalization import PixelNormalization
from .networks import ConfidenceNetwork, LocalizationNetwork
from .pixel_networks import PixelNetworks
from .superpixel_refinement import SuperpixelRefinement


def build_networks(cfg: CfgNode) -> PixelNetworks:
    """The networks of MODEL.SPOP.

    Raises:
        ValueError: a value is not allowed.
    """
    node = cfg.MODEL.SPOP
    if not all(x > 0 for x in node.TRUNK.PIXEL_STD):
        raise ValueError(
            f"MODEL.SPOP.TRUNK.PIXEL_STD must be positive, got {node.TRUNK.PIXEL_STD}."
        )
    one_size = len(cfg.INPUT.WARP_SIZE) > 0 and not node.TRAIN_AT_NATIVE_SIZE
    if node.TRUNK.NORM == "SyncBN" and not one_size:
        raise ValueError(
            "MODEL.SPOP.TRUNK.NORM 'SyncBN' needs INPUT.WARP_SIZE, and MODEL.SPOP."
            "TRAIN_AT_NATIVE_SIZE False: images of different sizes go through the networks one by "
            "one, and processes would wait for one another."
        )

    def build_trunk() -> DeepLabLargeFOV:
        return DeepLabLargeFOV(
            width_factor=node.TRUNK.WIDTH_FACTOR,
            norm=node.TRUNK.NORM,
            dropout=node.TRUNK.DROPOUT,
        )

    def build_localization() -> LocalizationNetwork:
        return LocalizationNetwork(
            build_trunk(),
            normalizer=node.NORMALIZER,
            new_layer_lr_factor=node.NEW_LAYER_LR_FACTOR,
        )

    names = ("large_size", "small_size") if node.SCALE_AWARE else ("all_sizes",)
    return PixelNetworks(
        confidence=ConfidenceNetwork(
            build_trunk(),
            hidden_channels=node.HEAD_CHANNELS,
            has_size_branch=node.SCALE_AWARE,
            new_layer_lr_factor=node.NEW_LAYER_LR_FACTOR,
        ),
        localization={name: build_localization() for name in names},
        pixel_normalization=PixelNormalization(
            model_format=cfg.INPUT.FORMAT,
            model_mean=cfg.MODEL.PIXEL_MEAN,
            model_std=cfg.MODEL.PIXEL_STD,
            trunk_format=node.TRUNK.FORMAT,
            trunk_mean=node.TRUNK.PIXEL_MEAN,
            trunk_std=node.TRUNK.PIXEL_STD,
        ),
        localization_at_test=node.LOCALIZATION,
        tile_size=node.TILE_SIZE,
    )


def build_refinement(cfg: CfgNode) -> SuperpixelRefinement | None:
    """The refinement of MODEL.SPOP.REFINEMENT; None if it is off.

    Raises:
        ValueError: a value is not allowed.
    """
    node = cfg.MODEL.SPOP.REFINEMENT
    if not node.ENABLED:
        return None
    return SuperpixelRefinement(
        num_superpixels=node.NUM_SUPERPIXELS,
        compactness=node.COMPACTNESS,
        sigma=node.SIGMA,
        straddling=node.STRADDLING,
    )
