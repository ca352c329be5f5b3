"""Backbones, and the stock meta-architectures around a generator."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import ProposalNetwork
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    StandardROIHeads,
)

from d2proposals.backbones.bn_inception import BNInception
from d2proposals.backbones.image import ImageBackbone
from d2proposals.zip_rpn.zoom_network import ZoomNetwork

# Of Detectron2's ImageNet weights, of torchvision's, and of the public BN-Inception's.
BGR = {"model_format": "BGR", "model_mean": [103.53, 116.28, 123.675], "model_std": [1.0, 1.0, 1.0]}
RGB = {
    "model_format": "RGB",
    "model_mean": [123.675, 116.28, 103.53],
    "model_std": [58.395, 57.12, 57.375],
}
INCEPTION_BGR = {
    "model_format": "BGR",
    "model_mean": [104.0, 117.0, 128.0],
    "model_std": [57.375, 57.12, 58.395],
}


def resnet_fpn(in_features=("res2", "res3", "res4", "res5")):
    """ResNet-50-FPN with frozen stem, second stage and batch normalisation."""
    return L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
            out_features=list(in_features),
            freeze_at=2,
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        top_block=L(LastLevelMaxPool)(),
    )


def zoom_network():
    """ZIP's zoom out-and-in network over BN-Inception."""
    return L(ZoomNetwork)(
        bottom_up=L(BNInception)(norm="FrozenBN"),
        in_features=["inception_3b", "inception_4d", "inception_5b"],
        norm="FrozenBN",
    )


def image_backbone():
    """What generators with a trunk of their own stand on."""
    return L(ImageBackbone)()


def proposal_network(backbone, generator, pixels=BGR):
    """A generator alone, which decodes no proposals in training."""
    if "proposals_in_training" not in generator and "anchor_matcher" not in generator:
        generator.proposals_in_training = False
    return L(ProposalNetwork)(
        backbone=backbone,
        proposal_generator=generator,
        pixel_mean=pixels["model_mean"],
        pixel_std=pixels["model_std"],
    )


def faster_rcnn(generator, heads=None, backbone=None):
    """Faster R-CNN, or with other heads another R-CNN, on ResNet-50-FPN."""
    return L(GeneralizedRCNN)(
        backbone=backbone or resnet_fpn(),
        proposal_generator=generator,
        roi_heads=heads or box_heads(),
        pixel_mean=BGR["model_mean"],
        pixel_std=BGR["model_std"],
        input_format="BGR",
    )


def box_heads(iou=0.5, batch_size=512, weights=(10.0, 10.0, 5.0, 5.0)):
    """The heads of Faster R-CNN on the maps of an FPN of 256 channels."""
    return L(StandardROIHeads)(
        **_common_settings(batch_size),
        proposal_matcher=L(Matcher)(
            thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_head=_box_head(),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=list(weights)),
            num_classes="${..num_classes}",
        ),
    )


def cascade_heads():
    """The three stages of Cascade R-CNN."""
    return L(CascadeROIHeads)(
        **_common_settings(512),
        box_heads=[_box_head() for _ in range(3)],
        box_predictors=[
            L(FastRCNNOutputLayers)(
                input_shape=ShapeSpec(channels=1024),
                test_score_thresh=0.05,
                box2box_transform=L(Box2BoxTransform)(weights=[w1, w1, w2, w2]),
                cls_agnostic_bbox_reg=True,
                num_classes="${...num_classes}",
            )
            for w1, w2 in ((10.0, 5.0), (20.0, 10.0), (30.0, 15.0))
        ],
        proposal_matchers=[
            L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
            for iou in (0.5, 0.6, 0.7)
        ],
    )


def _common_settings(batch_size):
    return {
        "num_classes": 80,
        "batch_size_per_image": batch_size,
        "positive_fraction": 0.25,
        "box_in_features": ["p2", "p3", "p4", "p5"],
        "box_pooler": L(ROIPooler)(
            output_size=7,
            scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
    }


def _box_head():
    return L(FastRCNNConvFCHead)(
        input_shape=ShapeSpec(channels=256, height=7, width=7), conv_dims=[], fc_dims=[1024, 1024]
    )
