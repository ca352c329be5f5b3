"""Every key of DetectorNet reaches what it is for; the configuration is the paper's."""

import pytest
import torch
from detectron2.modeling import build_proposal_generator, build_roi_heads
from torch import nn

from d2proposals.backbones.torchvision_backbone import TorchvisionBackbone
from d2proposals.backbones.vgg import VGG
from d2proposals.detectornet import roi_heads
from d2proposals.detectornet.classifier_training import ClassifierTraining
from d2proposals.detectornet.crop_sampling import CropSampler
from d2proposals.detectornet.detection import SearchGrid
from d2proposals.detectornet.sliding_windows import SlidingGrid
from tests.common import make_cfg, set_all

DETECTORNET_SETTINGS = {
    "CLASS_AGNOSTIC": False,
    "TRUNK": "build_vgg_backbone",
    "NETWORKS": "per_class_and_mask",
    "INPUT_SIZE": 97,
    "MASK_SIZE": 6,
    "WIDTH_FACTOR": 0.0625,
    "NORM": "GN",
    "DROPOUT": 0.25,
    "FORMAT": "BGR",
    "PIXEL_MEAN": [1.0, 2.0, 3.0],
    "PIXEL_STD": [4.0, 5.0, 6.0],
    "NUM_CROPS": 11,
    "POSITIVE_FRACTION": 0.25,
    "POSITIVE_COVERAGE": 0.75,
    "OBJECT_FRACTION": 0.25,
    "MIN_SCALE": 0.125,
    "NUM_TRIES": 7,
    "ZERO_WEIGHT": 0.5,
    "LOSS_WEIGHT": 3.0,
    "NUM_SCALES": 2,
    "WINDOW_OVERLAP": 0.375,
    "MEAN_DIMENSIONS": (0.25, 0.5),
    "ASPECT_RATIOS": (0.5, 1.0),
    "STRIDE": 3.0,
    "RING": 1.5,
    "RING_WEIGHT": 2.0,
    "HALVES_WEIGHT": 0.5,
    "SCORE_THRESH": 0.375,
    "PRE_NMS_TOPK": 51,
    "NMS_THRESH": 0.625,
    "NMS_TYPE": "iou",
    "TOPK_PER_SCALE": 31,
    "REFINEMENT.ENABLED": False,
    "REFINEMENT.ENLARGEMENT": 1.75,
    "REFINEMENT.TOPK": 17,
    "REFINEMENT.MEAN_DIMENSIONS": (0.75,),
    "REFINEMENT.ASPECT_RATIOS": (1.25,),
    "REFINEMENT.STRIDE": 4.0,
    "FINAL_NMS_THRESH": 0.875,
    "MIN_BOX_SIZE": 7.0,
    "CROPS_AT_ONCE": 9,
    "SLIDING_WINDOWS.MEAN_DIMENSIONS": (0.5, 1.0),
    "SLIDING_WINDOWS.ASPECT_RATIOS": (1.0, 2.0, 0.5),
    "SLIDING_WINDOWS.STRIDE": 8.0,
    "CLASSIFIER.ENABLED": False,
    "CLASSIFIER.NUM_CROPS": 12,
    "CLASSIFIER.POSITIVE_FRACTION": 0.125,
    "CLASSIFIER.IOU_THRESHOLDS": (0.25, 0.75),
    "CLASSIFIER.MIN_SCALE": 0.5,
    "CLASSIFIER.NUM_TRIES": 8,
    "CLASSIFIER.LOSS_WEIGHT": 5.0,
    "CLASSIFIER.PRUNING_BUDGET": 13,
    "CLASSIFIER.HARD_FRACTION": 0.375,
}


CLASSIFIER_TRAINING = ClassifierTraining(
    num_classes=2,
    sampler=CropSampler(num_crops=12, positive_fraction=0.125, min_scale=0.5, num_tries=8),
    iou_thresholds=(0.25, 0.75),
    hard_fraction=0.375,
    loss_weight=5.0,
)


# Of the heads' classifier, which these have not.
NO_HARD_NEGATIVES = ("MODEL.DETECTORNET.CLASSIFIER.HARD_FRACTION", 0.0)


def detectornet_cfg(*overrides):
    return make_cfg(
        None, *set_all("DETECTORNET", DETECTORNET_SETTINGS), "MODEL.DETECTORNET.TRUNK", "alexnet",
        "MODEL.PROPOSAL_GENERATOR.NAME", "DetectorNet", "MODEL.ROI_HEADS.NAME", "DetectorNetHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0],
        "MODEL.PIXEL_STD", [4.0, 5.0, 6.0], *overrides,
    )  # fmt: skip


def test_every_key_of_detectornet_reaches_the_generator():
    generator = build_proposal_generator(detectornet_cfg(), {})
    held = {
        "sampler": CropSampler(num_crops=11, positive_fraction=0.25, min_scale=0.125, num_tries=7),
        "positive_coverage": 0.75,
        "object_fraction": 0.25,
        "samples_each_class": True,
        "classifier": None,
        "classifier_training": None,
        "zero_weight": 0.5,
        "loss_weight": 3.0,
        "num_scales": 2,
        "window_overlap": 0.375,
        "grid": SearchGrid(
            (0.25, 0.5), (0.5, 1.0), 3.0, ring=1.5, ring_weight=2.0, halves_weight=0.5
        ),
        "min_coverage": 0.375,
        "pre_nms_topk": 51,
        "nms_thresh": 0.625,
        "nms_type": "iou",
        "topk_per_scale": 31,
        "refinement_grid": None,
        "refinement_topk": 17,
        "pruning_budget": 13,
        "enlargement": 1.75,
        "final_nms_thresh": 0.875,
        "min_box_size": 7.0,
        "crops_at_once": 9,
        "predicts_classes": True,
        "proposals_in_training": True,  # the heads' hard negatives
    }
    assert {name: getattr(generator, name) for name in held} == held
    network = generator.network
    assert (network.input_size, network.mask_size, network.num_classes) == (97, 6, 2)
    assert len(network.networks) == 2 * 5
    trunk = network.networks[0].trunk
    assert trunk.out_channels == 256 and trunk.classifier[0].p == 0.25
    assert isinstance(trunk.features[0].norm, nn.GroupNorm)
    # The trunk expects what the model has here: BGR, these means and deviations.
    assert generator.normalization.is_identity
    refining = detectornet_cfg("MODEL.DETECTORNET.REFINEMENT.ENABLED", True)
    assert build_proposal_generator(refining, {}).refinement_grid == SearchGrid(
        (0.75,), (1.25,), stride=4.0, ring=1.5, ring_weight=2.0, halves_weight=0.5
    )


def test_any_backbone_is_a_trunk():
    """Stride 16 of 97 pixels: 6x6 cells of VGG-A's 512 / 16 channels."""
    overrides = ["MODEL.DETECTORNET.TRUNK", "build_vgg_backbone", "MODEL.VGG.WIDTH_FACTOR", 0.0625]
    trunk = build_proposal_generator(detectornet_cfg(*overrides), {}).network.networks[0].trunk
    assert isinstance(trunk.backbone, VGG) and trunk.classifier[1].in_features == 6 * 6 * 32
    crops = torch.randn(2, 3, 97, 97)
    output = trunk(crops)
    assert output.shape == (2, 256) and output.min() == 0
    output.sum().backward()
    assert trunk.backbone.features[0].weight.grad.any()


def test_nothing_of_a_crop_is_padding_to_its_trunk():
    """Zeros beyond an image stand at any side of a crop; those at the right are no batch's."""
    overrides = ["MODEL.DETECTORNET.TRUNK", "build_torchvision_backbone",
                 "MODEL.TORCHVISION.NAME", "mobilenet_v3_small",
                 "MODEL.TORCHVISION.OUT_FEATURES", ["stride16"]]  # fmt: skip
    trunk = build_proposal_generator(detectornet_cfg(*overrides), {}).network.networks[0].trunk
    with_mask = TorchvisionBackbone(name="mobilenet_v3_small", out_features=["stride16"]).eval()
    with_mask.load_state_dict(trunk.backbone.state_dict())
    crops = torch.randn(1, 3, 97, 97)
    crops[..., 70:] = 0
    with torch.no_grad():
        of_trunk, masked = (x(crops)["stride16"] for x in (trunk.backbone.eval(), with_mask))
    plain = TorchvisionBackbone(
        name="mobilenet_v3_small", out_features=["stride16"], mask_padding=False
    ).eval()
    plain.load_state_dict(trunk.backbone.state_dict())
    with torch.no_grad():
        expected = plain(crops)["stride16"]
    torch.testing.assert_close(of_trunk, expected)
    assert not torch.allclose(masked, expected, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.DETECTORNET.TRUNK", "alexnet2"], "unknown MODEL.DETECTORNET.TRUNK 'alexnet2'"),
        (
            ["MODEL.DETECTORNET.TRUNK", "build_vgg_backbone", "MODEL.VGG.WIDTH_FACTOR", 0.0625,
             "MODEL.VGG.OUT_FEATURES", ["stage4", "stage5"]],
            "gives one map, VGG gives",
        ),
    ],
)  # fmt: skip
def test_what_is_no_trunk_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_proposal_generator(detectornet_cfg(*overrides), {})


def test_keys_of_the_classifier_reach_detectornet_s_heads():
    enabled = ("MODEL.DETECTORNET.CLASSIFIER.ENABLED", True)
    after = detectornet_cfg(*enabled, "MODEL.DETECTORNET.CLASSIFIER.PRUNING_BUDGET", 0)
    heads = build_roi_heads(after, {})
    held = {
        "num_classes": 2,
        "class_agnostic": False,
        "classifier_training": CLASSIFIER_TRAINING,
        "crops_at_once": 9,
    }
    assert {name: getattr(heads, name) for name in held} == held
    assert heads.classifier.network.output.out_features == 3
    assert build_proposal_generator(after, {}).classifier is None
    assert build_roi_heads(detectornet_cfg(*NO_HARD_NEGATIVES), {}).classifier is None


def test_the_classifier_is_the_generator_s_where_it_prunes_before_the_suppression():
    enabled = ("MODEL.DETECTORNET.CLASSIFIER.ENABLED", True)
    cfg = detectornet_cfg(*enabled)
    generator = build_proposal_generator(cfg, {})
    assert generator.classifier.network.output.out_features == 3
    assert generator.classifier_training == CLASSIFIER_TRAINING
    with pytest.raises(ValueError, match="HARD_FRACTION is of the classifier of DetectorNetHeads"):
        build_roi_heads(cfg, {})
    cfg = detectornet_cfg(*enabled, *NO_HARD_NEGATIVES)
    assert build_roi_heads(cfg, {}).classifier is None
    # Class-agnostic proposals still need a class.
    agnostic = detectornet_cfg(*enabled, "MODEL.DETECTORNET.CLASS_AGNOSTIC", True)
    assert build_roi_heads(agnostic, {}).classifier is not None


def test_keys_of_the_sliding_windows():
    cfg = detectornet_cfg("MODEL.PROPOSAL_GENERATOR.NAME", "SlidingWindows")
    grid = build_proposal_generator(cfg, {}).grid
    assert grid == SlidingGrid((0.5, 1.0), (1.0, 2.0, 0.5), stride=8.0)


def test_a_classifier_that_is_not_wanted_is_not_built(monkeypatch):
    built = []
    monkeypatch.setattr(roi_heads, "CropClassifier", lambda *args: built.append(args))
    build_roi_heads(detectornet_cfg(*NO_HARD_NEGATIVES), {})
    assert built == []
    enabled = ("MODEL.DETECTORNET.CLASSIFIER.ENABLED", True)
    build_roi_heads(detectornet_cfg(*enabled, "MODEL.DETECTORNET.CLASSIFIER.PRUNING_BUDGET", 0), {})
    assert len(built) == 1


def test_detectornet_s_configuration_is_the_paper_s():
    cfg = make_cfg("detectornet_rpn_only.yaml")
    node = cfg.MODEL.DETECTORNET
    assert (node.INPUT_SIZE, node.MASK_SIZE, node.NETWORKS) == (225, 24, "per_mask")  # Sec. 4, 5.1
    assert (node.WIDTH_FACTOR, node.NORM, cfg.SOLVER.OPTIMIZER) == (1.0, "", "AdaGrad")
    assert (node.POSITIVE_FRACTION, node.POSITIVE_COVERAGE) == (0.4, 0.8)  # Sec. 6
    assert node.MEAN_DIMENSIONS == tuple(i / 10 for i in range(1, 10))  # Sec. 5.2
    assert len(node.ASPECT_RATIOS) == 10 and node.STRIDE == 5 and node.SCORE_THRESH == 0.5
    assert (node.NMS_TYPE, node.NMS_THRESH) == ("own_area", 0.5)  # "as in [9]"
    assert (node.NUM_SCALES, node.WINDOW_OVERLAP, node.TOPK_PER_SCALE) == (3, 0.2, 5)  # Sec. 5.3
    assert node.REFINEMENT.ENABLED and node.REFINEMENT.ENLARGEMENT == 1.2
    assert node.CLASSIFIER.IOU_THRESHOLDS == (0.2, 0.6) and node.RING_WEIGHT == 1.0
    sliding = node.SLIDING_WINDOWS  # Sec. 7
    assert (len(sliding.MEAN_DIMENSIONS), len(sliding.ASPECT_RATIOS), sliding.STRIDE) == (10, 8, 5)
    assert (min(sliding.MEAN_DIMENSIONS), max(sliding.MEAN_DIMENSIONS)) == (0.1, 1)
    assert cfg.INPUT.MIN_SIZE_TEST == 0 and tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (0,)


def test_ten_million_crops_for_each_class():
    for name, num_classes in (
        ("detectornet_rpn_only.yaml", 1),
        ("detectornet_voc.yaml", 20),
        ("detectornet_sliding_windows_voc.yaml", 20),
    ):
        cfg = make_cfg(name)
        per_step = cfg.SOLVER.IMS_PER_BATCH * cfg.MODEL.DETECTORNET.NUM_CROPS
        assert cfg.MODEL.DETECTORNET.CLASSIFIER.NUM_CROPS == cfg.MODEL.DETECTORNET.NUM_CROPS
        assert 0 <= cfg.SOLVER.MAX_ITER * per_step - num_classes * 10**7 < per_step
