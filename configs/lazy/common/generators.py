"""Each generator by its explicit constructor, with the values of its YAML configuration.

Every function returns a new LazyCall, so that one configuration's changes stay its own.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead

from d2proposals.backbones.deeplab_largefov import DeepLabLargeFOV
from d2proposals.backbones.vgg import VGG
from d2proposals.deepmask.generator import DeepMask
from d2proposals.deepmask.mask_head import MaskHead
from d2proposals.deepmask.network import DeepMaskNetwork
from d2proposals.deepmask.patch_sampling import PatchSampler
from d2proposals.deepmask.score_head import ScoreHead
from d2proposals.detectornet.crop_sampling import CropSampler
from d2proposals.detectornet.detection import SearchGrid
from d2proposals.detectornet.generator import DetectorNet
from d2proposals.detectornet.network import BoxMaskNetwork
from d2proposals.detectornet.settings import alexnet_maker
from d2proposals.proposals.native_size import NativeSizes
from d2proposals.proposals.pixel_normalization import PixelNormalization
from d2proposals.sc_rpn.generator import SCRPN
from d2proposals.sc_rpn.head import SCRPNHead
from d2proposals.sc_rpn.point_representation import PointRepresentation
from d2proposals.sc_rpn.stage_sampling import StageSampler
from d2proposals.spop.generator import SPOP
from d2proposals.spop.networks import ConfidenceNetwork, LocalizationNetwork
from d2proposals.spop.pixel_networks import PixelNetworks
from d2proposals.spop.pixel_targets import PixelLabeler
from d2proposals.spop.superpixel_refinement import SuperpixelRefinement
from d2proposals.zip_rpn.generator import ZIP
from d2proposals.zip_rpn.gray_class_sampling import EquilibriumSampler, GrayClassLabeler
from d2proposals.zip_rpn.head import ZIPLevelHeads

# What ImageNet weights of torchvision expect.
TORCHVISION_PIXELS = {
    "trunk_format": "RGB",
    "trunk_mean": [123.675, 116.28, 103.53],
    "trunk_std": [58.395, 57.12, 57.375],
}


def rpn():
    """Detectron2's own, on the maps of an FPN of 256 channels."""
    return L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[[0.5, 1.0, 2.0]],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000),
        post_nms_topk=(2000, 2000),
        nms_thresh=0.7,
    )


def sc_rpn(channels=256, loss_weight=1.0, **settings):
    """SC-RPN on the maps of an FPN.

    Args:
        channels: of the maps.
        loss_weight: on all losses.
        **settings: further keyword arguments of ``SCRPN``.
    """
    return L(SCRPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        strides=[4, 8, 16, 32, 64],
        head=L(SCRPNHead)(
            in_channels=channels,
            channels=256,
            num_convs=0,
            representation=L(PointRepresentation)(side=8.0),
            num_stages=2,
            alignment="point",
            alignment_gradient=0.1,
            iou_mask_feature="reg",
        ),
        sampler=L(StageSampler)(),
        loss_weight={
            "loss_scrpn_cls": 2.0 * loss_weight,
            "loss_scrpn_iou_mask": loss_weight,
            "loss_scrpn_init": 0.5 * loss_weight,
            "loss_scrpn_refined": 10.0 * loss_weight,
        },
        **settings,
    )


def zip_rpn(in_features=("zoom1", "zoom2", "zoom3"), in_channels=(640, 1216, 1024), **settings):
    """ZIP, by default on the zoom network over BN-Inception.

    Args:
        in_features: maps of strides 8, 16 and 32.
        in_channels: their channels.
        **settings: further keyword arguments of ``ZIP``.
    """
    return L(ZIP)(
        in_features=list(in_features),
        strides=[8, 16, 32],
        heads=L(ZIPLevelHeads)(
            in_channels=list(in_channels), channels=512, num_anchors=[10, 10, 10], num_classes=3
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[16, 32], [64, 128], [256, 512]],
            aspect_ratios=[[0.25, 0.5, 1.0, 2.0, 4.0]],
            strides=[8, 16, 32],
            offset=0.0,
        ),
        labeler=L(GrayClassLabeler)(),
        sampler=L(EquilibriumSampler)(gray_ratio=0.5),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        loss_weight={"loss_zip_cls": 1.0, "loss_zip_loc": 1.0},
        multi_nms_thresholds=[0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5],
        multi_nms_topks=[3000, 2000, 1000, 800, 400, 200, 100, 50],
        **settings,
    )


def deepmask(pixels, native_short_edge=0, **settings):
    """DeepMask on VGG-A.

    Args:
        pixels: ``model_format``, ``model_mean`` and ``model_std`` of the host.
        native_short_edge: of :class:`NativeSizes`.
        **settings: further keyword arguments of ``DeepMask``.
    """
    return L(DeepMask)(
        network=L(DeepMaskNetwork)(
            trunk=L(VGG)(out_features=["stage5"]),
            mask_head=L(MaskHead)(
                in_channels=512,
                map_size=14,
                patch_size=224,
                channels=512,
                code_dim=512,
                mask_size=56,
                upsampling="bilinear",
            ),
            score_head=L(ScoreHead)(
                in_channels=512, map_size=14, hidden_dims=(512, 1024), dropout=0.5
            ),
        ),
        pixel_normalization=L(PixelNormalization)(**pixels, **TORCHVISION_PIXELS),
        sampler=L(PatchSampler)(),
        native_sizes=L(NativeSizes)(node="MODEL.DEEPMASK", short_edge=native_short_edge),
        **settings,
    )


def spop(pixels, native_short_edge=0, **settings):
    """SPOP on three DeepLab-LargeFOV networks. Arguments as of :func:`deepmask`."""

    def trunk():
        return L(DeepLabLargeFOV)(width_factor=1.0, norm="", dropout=0.5)

    def localization():
        return L(LocalizationNetwork)(trunk=trunk(), normalizer=513.0, new_layer_lr_factor=10.0)

    return L(SPOP)(
        networks=L(PixelNetworks)(
            confidence=L(ConfidenceNetwork)(
                trunk=trunk(), hidden_channels=1024, has_size_branch=True, new_layer_lr_factor=10.0
            ),
            localization=L("builtins.dict")(large_size=localization(), small_size=localization()),
            pixel_normalization=L(PixelNormalization)(**pixels, **TORCHVISION_PIXELS),
        ),
        labeler=L(PixelLabeler)(stride=8, normalizer=513.0, large_area=2000.0),
        refinement=L(SuperpixelRefinement)(),
        native_sizes=L(NativeSizes)(node="MODEL.SPOP", short_edge=native_short_edge),
        **settings,
    )


def detectornet(pixels, **settings):
    """DetectorNet on five AlexNets. Arguments as of :func:`deepmask`."""
    return L(DetectorNet)(
        network=L(BoxMaskNetwork)(
            make_trunk=L(alexnet_maker)(input_size=225, width_factor=1.0, norm="", dropout=0.5)
        ),
        normalization=L(PixelNormalization)(**pixels, **TORCHVISION_PIXELS),
        sampler=L(CropSampler)(num_crops=32),
        grid=L(SearchGrid)(
            mean_dimensions=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            aspect_ratios=(0.2, 0.31, 0.44, 0.6, 0.8, 1.05, 1.4, 2.06, 3.15, 7.3),
            stride=5.0,
            ring=1.2,
            ring_weight=1.0,
            key="MODEL.DETECTORNET",
        ),
        refinement_grid=L(SearchGrid)(
            mean_dimensions=(
                *(0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
            ),
            aspect_ratios=(0.5, 0.57, 0.66, 0.76, 0.87, 1.0, 1.15, 1.32, 1.52, 1.74, 2.0),
            stride=5.0,
            ring=1.2,
            ring_weight=1.0,
            key="MODEL.DETECTORNET.REFINEMENT",
        ),
        **settings,
    )
