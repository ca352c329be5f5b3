"""SPOP's networks and refinement from a configuration.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.utils import comm

from ..backbones.deeplab_largefov import DeepLabLargeFOV
from ..backbones.trunks import build_registered_trunk
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
    key, norm = "MODEL.SPOP.TRUNK.NORM", node.TRUNK.NORM
    if node.TRUNK.NAME == "build_torchvision_backbone":
        key, norm = "MODEL.TORCHVISION.NORM", cfg.MODEL.TORCHVISION.NORM
    if norm == "SyncBN" and not one_size and comm.get_world_size() > 1:
        raise ValueError(
            f"{key} 'SyncBN' in several processes needs INPUT.WARP_SIZE, and MODEL.SPOP."
            "TRAIN_AT_NATIVE_SIZE False: images of different sizes go through the networks one by "
            "one, and processes would wait for one another."
        )

    def build_localization() -> LocalizationNetwork:
        return LocalizationNetwork(
            build_trunk(cfg),
            normalizer=node.NORMALIZER,
            new_layer_lr_factor=node.NEW_LAYER_LR_FACTOR,
        )

    names = ("large_size", "small_size") if node.SCALE_AWARE else ("all_sizes",)
    return PixelNetworks(
        confidence=ConfidenceNetwork(
            build_trunk(cfg),
            hidden_channels=node.HEAD_CHANNELS,
            has_size_branch=node.SCALE_AWARE,
            new_layer_lr_factor=node.NEW_LAYER_LR_FACTOR,
        ),
        localization={name: build_localization() for name in names},
        pixel_normalization=PixelNormalization.from_config(cfg, node.TRUNK),
        localization_at_test=node.LOCALIZATION,
        tile_size=node.TILE_SIZE,
    )


def build_trunk(cfg: CfgNode) -> Backbone:
    """The trunk of MODEL.SPOP.TRUNK.

    Raises:
        ValueError: an unknown trunk, or one whose cells are not where the networks take them to be.
    """
    node = cfg.MODEL.SPOP.TRUNK
    if node.NAME == "deeplab_largefov":
        return DeepLabLargeFOV(width_factor=node.WIDTH_FACTOR, norm=node.NORM, dropout=node.DROPOUT)
    key = f"MODEL.SPOP.TRUNK.NAME '{node.NAME}'"
    if node.NAME not in BACKBONE_REGISTRY:
        raise ValueError(
            f"Unknown {key}: choose 'deeplab_largefov' or a registered backbone, such as "
            "build_torchvision_backbone."
        )
    trunk = build_registered_trunk(cfg, node.NAME, node)
    if not hasattr(trunk, "reach") or len(trunk.output_shape()) != 1:
        raise ValueError(
            f"{key}: SPOP reads one map and needs to know what its cells see: use "
            "build_torchvision_backbone with one map in MODEL.TORCHVISION.OUT_FEATURES."
        )
    if trunk.reach.first_centre != 0:
        raise ValueError(
            f"{key}: cell i of its map is centred on pixel {trunk.stride} * i + "
            f"{trunk.reach.first_centre:g}, where SPOP's coordinates begin at 0: take a network "
            "whose kernels are all odd, such as mobilenet_v2 or resnet18."
        )
    return trunk


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
