import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    build_backbone,
    build_model,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.backbone import ResNet
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.backbones import VGG, BNInception
from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.detectornet.crop_sampling import CropSampler
from d2proposals.detectornet.detection import SearchGrid
from d2proposals.engine import Trainer, check_config
from d2proposals.evaluation import ProposalEvaluator
from d2proposals.zip_rpn import ZoomNetwork
from d2proposals.zip_rpn.gray_class_sampling import EquilibriumSampler, GrayClassLabeler
from d2proposals.zip_rpn.map_attention import ExcitationRecalibration
from tests.common import CONFIGS, add_rectangle_masks, make_cfg, make_instances

FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
LEAVES = [name for name in FILES if not Path(name).name.startswith("Base-")]
PACKAGE = CONFIGS.parent / "d2proposals"


@pytest.mark.parametrize("name", FILES)
def test_bases_are_files_below_configs(name):
    bases = yaml.safe_load((CONFIGS / name).read_text()).get("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        path = (CONFIGS / name).parent / base
        assert path.is_file(), f"{name}: _BASE_ {base} does not exist"
        assert path.resolve().is_relative_to(CONFIGS), f"{name}: _BASE_ {base} is not in configs/"
    assert bases or name not in LEAVES, f"{name}: only a Base- file stands by itself"
    if name not in LEAVES:
        assert not bases or bases.startswith("Base-"), f"{name}: a base of one other base"


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_its_version(name):
    # Without it, Detectron2 guesses the version from the keys.
    assert make_cfg(name).VERSION == 2
    content = yaml.safe_load((CONFIGS / name).read_text())
    if "_BASE_" not in content:
        assert content["VERSION"] == 2


@pytest.mark.parametrize("name", LEAVES)
def test_every_configuration_builds_and_runs(name):
    cfg = make_cfg(name)
    check_config(cfg)
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, 96, 128)).float()
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 96, "width": 128}])
    field = "proposals" if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" else "instances"
    assert output[field].image_size == (96, 128)


# Small stand-ins for the full-size networks.
TINY = ["MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN",
        "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.WEIGHTS", "",
        "MODEL.SPOP.TRUNK.WIDTH_FACTOR", 0.125, "MODEL.SPOP.HEAD_CHANNELS", 16,
        "MODEL.VGG.WIDTH_FACTOR", 0.0625, "MODEL.DEEPMASK.MASK_CHANNELS", 16,
        "MODEL.DEEPMASK.CODE_DIM", 16, "MODEL.DETECTORNET.WIDTH_FACTOR", 0.0625]  # fmt: skip


@pytest.mark.parametrize("name", LEAVES)
def test_a_training_step_of_every_configuration_reaches_every_trainable_parameter(name):
    # Training on several processes stops where a parameter gets no gradient.
    torch.manual_seed(0)
    model = build_model(make_cfg(name, *TINY)).train()
    image = torch.randint(0, 256, (3, 64, 96)).float()
    for boxes in ([[8, 8, 40, 56], [50, 10, 90, 40]], []):
        model.zero_grad(set_to_none=True)
        with EventStorage():
            instances = add_rectangle_masks(make_instances((64, 96), boxes))
            losses = model([{"image": image, "instances": instances}])
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert trainable and [n for n, p in trainable.items() if p.grad is None] == []


def leaf_keys(node, prefix=""):
    """Full name -> value of every key below a node."""
    keys = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            keys |= leaf_keys(value, f"{prefix}{key}.")
        else:
            keys[prefix + key] = value
    return keys


def new_keys():
    """Full names of the keys that Detectron2 does not have."""
    return set(leaf_keys(make_cfg())) - set(leaf_keys(get_cfg()))


class RecordingNode(CfgNode):
    """A configuration that adds the full name of every key that is asked for to a set."""

    def __init__(self, node, names, prefix=""):
        super().__init__()
        for key, value in node.items():
            is_node = isinstance(value, CfgNode)
            self[key] = RecordingNode(value, names, f"{prefix}{key}.") if is_node else value
        # Past yacs, which takes attributes for keys.
        self.__dict__.update(names=names, prefix=prefix)

    def __getitem__(self, key):
        self.__dict__["names"].add(self.__dict__["prefix"] + key)
        return super().__getitem__(key)


def test_every_new_key_is_read():
    read = set()
    for name in LEAVES:
        cfg = RecordingNode(make_cfg(name, "MODEL.DEVICE", "meta"), read)
        with torch.device("meta"):
            Trainer.build_optimizer(cfg, build_model(cfg))
        ProposalDatasetMapper.from_config(cfg, is_train=True)
        ProposalEvaluator.from_config(cfg, "d2p_shapes_val")
    assert new_keys() - read == set()


def words(text):
    return {word for word in re.split(r"[^a-z0-9]+", text.lower()) if len(word) > 2}


def unexplained_keys(source):
    """Keys without a comment directly above, and all keys.

    One comment may explain several keys in a row if the name of each shares a word with it, or
    with the name of a key before.
    """
    unexplained, keys, comment, known = [], [], "", ""
    for line in map(str.strip, source.splitlines()):
        match = re.match(r"cfg\.([A-Z0-9_.]+) = (CN\(\))?", line)
        if line.startswith("#"):
            comment, known = comment + line, ""
        elif match is None:
            comment, known = "", ""
        elif match[2] is None:
            keys.append(match[1])
            # "regression" in a comment explains "REG" in a name.
            shared = [word for word in words(match[1]) if word in known.lower()]
            if not comment and not shared:
                unexplained.append(match[1])
            comment, known = "", f"{known} {comment} {match[1].rsplit('.', 1)[1]}"
        else:
            comment, known = "", f"{known} {comment}"
    return unexplained, keys


def test_every_new_key_is_explained():
    unexplained, keys = unexplained_keys((PACKAGE / "config.py").read_text())
    assert unexplained == []
    assert set(keys) == new_keys() and len(keys) == len(set(keys))


@pytest.mark.parametrize(
    "lines, unexplained",
    [
        (["# What it does.", "cfg.MODEL.X.SIDE = 1"], []),
        (["# What it does.", "", "cfg.MODEL.X.SIDE = 1"], ["MODEL.X.SIDE"]),
        (["cfg.MODEL.X = CN()", "cfg.MODEL.X.SIDE = 1"], ["MODEL.X.SIDE"]),
        (["# Bounds on sides.", "cfg.MODEL.X.MIN_SIDE = 1", "cfg.MODEL.X.MAX_SIDE = 2"], []),
        (["# Bounds.", "cfg.MODEL.ZIP.MIN = 1", "cfg.MODEL.ZIP.DEPTH = 2"], ["MODEL.ZIP.DEPTH"]),
        (["# Bounds.", "cfg.MODEL.X.LOW = 1", "", "cfg.MODEL.X.LOW_2 = 2"], ["MODEL.X.LOW_2"]),
    ],
)
def test_what_counts_as_explained(lines, unexplained):
    assert unexplained_keys("\n".join(lines))[0] == unexplained


def set_all(node, values):
    """Overrides that give every key of MODEL.<node> a value unlike its default."""
    defaults = leaf_keys(make_cfg().MODEL[node])
    assert set(values) == set(defaults), "give each key a value here, and expect it below"
    same = [key for key, value in values.items() if value == defaults[key]]
    assert same == [], "these are the defaults, which a constructor may have anyway"
    return [x for key, value in values.items() for x in (f"MODEL.{node}.{key}", value)]


ZIP_SETTINGS = {
    "IN_FEATURES": ["zoom2", "zoom3"],
    "HEAD_CHANNELS": 24,
    "SHARED_HEAD": True,
    "POSITIVE_IOU": 0.75,
    "NEGATIVE_IOU": 0.125,
    "NEGATIVE_IOU_MIN": 0.0625,
    "LOW_QUALITY_MATCH": True,
    "GRAY_CLASS.ENABLED": False,
    "GRAY_CLASS.IOU": (0.25, 0.5),
    "GRAY_CLASS.RATIO": 0.375,
    "BATCH_SIZE_PER_IMAGE": 70,
    "BATCH_SIZE_PER_CLASS": 30,
    "EQUILIBRIUM.ENABLED": False,
    "EQUILIBRIUM.NEGATIVE_RATIO": 1.5,
    "EQUILIBRIUM.SHARE_WITHOUT_POSITIVES": 0.625,
    "BBOX_REG_LOSS_TYPE": "smooth_l1",
    "SMOOTH_L1_BETA": 0.5,
    "BBOX_REG_WEIGHTS": (10.0, 11.0, 5.0, 6.0),
    "BBOX_REG_LOSS_WEIGHT": 5.0,
    "LOSS_WEIGHT": 3.0,
    "PRE_NMS_TOPK_TRAIN": 51,
    "PRE_NMS_TOPK_TEST": 52,
    "LEVEL_NMS_THRESH": 0.625,
    "LEVEL_NMS_TOPK": 53,
    "LEVEL_BIAS": (0.25, -0.25),
    "MULTI_NMS_THRESHOLDS": (0.7, 0.3),
    "MULTI_NMS_TOPKS": (40, 20),
    "POST_NMS_TOPK_TRAIN": 31,
    "POST_NMS_TOPK_TEST": 32,
    "MIN_BOX_SIZE": 7.0,
}
ZIP_SHAPES = {f"zoom{i}": ShapeSpec(channels=12, stride=4 * 2**i) for i in (1, 2, 3)}


def build_zip(*overrides):
    cfg = make_cfg(
        None,
        *set_all("ZIP", ZIP_SETTINGS),
        "MODEL.PROPOSAL_GENERATOR.NAME", "ZIP",
        "MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", False,
        "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [64]], *overrides,
    )  # fmt: skip
    return build_proposal_generator(cfg, ZIP_SHAPES)


def test_every_key_of_zip_reaches_the_generator():
    generator = build_zip()
    held = {
        "in_features": ["zoom2", "zoom3"],
        "strides": [16, 32],
        "box_reg_loss_type": "smooth_l1",
        "smooth_l1_beta": 0.5,
        "loss_weight": {"loss_zip_cls": 3.0, "loss_zip_loc": 15.0},
        "pre_nms_topk": {True: 51, False: 52},  # by whether it trains
        "post_nms_topk": {True: 31, False: 32},
        "level_nms_thresh": 0.625,
        "level_nms_topk": 53,
        "level_bias": [0.25, -0.25],
        "multi_nms_thresholds": [0.7, 0.3],
        "multi_nms_topks": [40, 20],
        "min_box_size": 7.0,
        "proposals_in_training": False,
        "labeler": GrayClassLabeler(
            positive_iou=0.75,
            negative_iou=0.125,
            negative_iou_min=0.0625,
            gray_iou=None,
            low_quality_match=True,
        ),
        "sampler": EquilibriumSampler(
            batch_size=70,
            batch_size_per_class=30,
            equilibrium=False,
            negative_ratio=1.5,
            share_without_positives=0.625,
            gray_ratio=0.0,
        ),
    }
    assert {name: getattr(generator, name) for name in held} == held
    assert generator.box2box_transform.weights == (10.0, 11.0, 5.0, 6.0)
    (head,) = generator.heads.heads
    assert (head.conv.out_channels, head.num_classes) == (24, 2)


def test_keys_of_the_gray_class_reach_the_generator():
    generator = build_zip("MODEL.ZIP.GRAY_CLASS.ENABLED", True)
    assert generator.labeler.gray_iou == (0.25, 0.5)
    assert generator.sampler.gray_ratio == 0.375
    assert generator.heads.heads[0].num_classes == 3


ZOOM_NETWORK_SETTINGS = {
    "BOTTOM_UP": "build_resnet_backbone",
    "IN_FEATURES": ["res3", "res4", "res5"],
    "ZOOM_IN": False,
    "MIRROR_DEPTHS": (1, 3, 0),
    "NORM": "GN",
    "MAD.TYPE": "none",
    "MAD.LAMBDA": 4,
    "MAD.ACTIVATION": "relu",
    "MAD.REDUCTION": 8,
}


def test_every_key_of_the_zoom_network_reaches_its_constructor():
    overrides = ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]
    cfg = make_cfg(None, *set_all("ZOOM_NETWORK", ZOOM_NETWORK_SETTINGS), *overrides)
    with torch.device("meta"):
        arguments = ZoomNetwork.from_config(cfg, ShapeSpec(channels=3))
    assert type(arguments.pop("bottom_up")) is ResNet
    assert arguments == {
        "in_features": ["res3", "res4", "res5"],
        "zoom_in": False,
        "mirror_depths": (1, 3, 0),
        "norm": "GN",
        "attention_type": "none",
        "num_sources": 4,
        "attention_activation": "relu",
        "attention_reduction": 8,
    }


def test_keys_of_the_zoom_network_make_a_difference():
    def build(*overrides):
        names = {"NORM": "GN", "MIRROR_DEPTHS": (1, 3, 0), "MAD.TYPE": "excitation",
                 "MAD.LAMBDA": 4, "MAD.REDUCTION": 8}  # fmt: skip
        settings = [x for k, v in names.items() for x in (f"MODEL.ZOOM_NETWORK.{k}", v)]
        name = ["MODEL.BACKBONE.NAME", "build_zoom_network_backbone"]
        small = ["MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125]
        return build_backbone(make_cfg(None, *name, *small, *settings, *overrides))

    network = build()
    path = network.zoom_in_path
    assert [len(level) for level in (path.level3, path.level2, path.level1)] == [1, 3, 0]
    assert isinstance(path.upsample2.norm, nn.GroupNorm)
    assert network.num_sources == 4
    channels = network.output_shape()["zoom1"].channels
    assert [type(x) for x in network.attentions] == [ExcitationRecalibration] * 3
    assert network.attentions[0].squeeze.out_features == channels // 8
    relu = build("MODEL.ZOOM_NETWORK.MAD.TYPE", "channel", "MODEL.ZOOM_NETWORK.MAD.ACTIVATION",
                 "relu")  # fmt: skip
    assert [type(x.activation) for x in relu.attentions] == [nn.ReLU] * 2


BN_INCEPTION_SETTINGS = {
    "OUT_FEATURES": ["inception_3a", "inception_4b"],
    "WIDTH_FACTOR": 0.25,
    "NORM": "GN",
    "EXTRA_BLOCKS": (1, 0, 2),
}


def test_every_key_of_bn_inception_reaches_its_constructor():
    overrides = ["MODEL.BACKBONE.FREEZE_AT", 3]
    cfg = make_cfg(None, *set_all("BN_INCEPTION", BN_INCEPTION_SETTINGS), *overrides)
    assert BNInception.from_config(cfg, ShapeSpec(channels=4)) == {
        "in_channels": 4,
        "out_features": ["inception_3a", "inception_4b"],
        "width_factor": 0.25,
        "norm": "GN",
        "extra_blocks": (1, 0, 2),
        "freeze_at": 3,
    }
    cfg.MODEL.BACKBONE.NAME = "build_bn_inception_backbone"
    backbone = build_backbone(cfg, ShapeSpec(channels=4))
    # 3a has 256 channels at full width, 4b 576; conv1 64.
    assert {n: s.channels for n, s in backbone.output_shape().items()} == {
        "inception_3a": 64,
        "inception_4b": 144,
    }
    assert backbone.conv1_7x7_s2.weight.shape[:2] == (16, 4)
    assert isinstance(backbone.inception_4a.conv_1x1.norm, nn.GroupNorm)
    assert hasattr(backbone, "inception_3b_extra1")
    assert not any(p.requires_grad for p in backbone.inception_3b.parameters())
    assert all(p.requires_grad for p in backbone.inception_3c.parameters())


def test_the_paper_s_configuration_is_the_paper_s_network():
    cfg = make_cfg("zip_rpn_only.yaml")
    assert cfg.MODEL.BN_INCEPTION.WIDTH_FACTOR == 1.0
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[16, 32], [64, 128], [256, 512]]  # Sec. 3.3
    assert cfg.MODEL.ZIP.POSITIVE_IOU == 0.6 and cfg.MODEL.ZIP.NEGATIVE_IOU == 0.25
    assert tuple(cfg.MODEL.ZIP.GRAY_CLASS.IOU) == (0.35, 0.55)
    assert (cfg.MODEL.ZIP.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ZIP.BATCH_SIZE_PER_CLASS) == (300, 100)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA, cfg.SOLVER.WEIGHT_DECAY) == (1e-4, 0.5, 5e-4)
    assert cfg.SOLVER.STEPS[:2] == (7000, 14000)  # Sec. 5.1
    assert cfg.TEST.AUG.ENABLED and cfg.TEST.AUG.MIN_SIZES == (1000, 750, 500, 250)  # Sec. 3.4
    assert not cfg.TEST.AUG.FLIP and not cfg.MODEL.ZIP.LOW_QUALITY_MATCH
    assert (cfg.MODEL.ZIP.LEVEL_NMS_THRESH, cfg.MODEL.ZIP.LEVEL_NMS_TOPK) == (0.5, 2000)


DEEPMASK_SETTINGS = {
    "TRUNK": "build_vgg_backbone_of_a_test",
    "SHARED_TRUNK": False,
    "FORMAT": "BGR",
    "PIXEL_MEAN": [1.0, 2.0, 3.0],
    "PIXEL_STD": [4.0, 5.0, 6.0],
    "PATCH_SIZE": 64,
    "CONTEXT": 8,
    "MASK_CHANNELS": 7,
    "CODE_DIM": 9,
    "MASK_SIZE": 16,
    "UPSAMPLING": "trainable",
    "SCORE_DIMS": (10, 11),
    "DROPOUT": 0.25,
    "OBJECT_SIZE": 40,
    "JITTER_SHIFT": 3.0,
    "JITTER_SCALE": 0.125,
    "FLIP": False,
    "NEGATIVE_SHIFT": 12.0,
    "NEGATIVE_SCALE": 0.75,
    "NEGATIVE_LOG2_SCALES": (-1.0, 1.5),
    "BATCH_SIZE_PER_IMAGE": 3,
    "CATEGORIES": (2, 4),
    "OTHER_CATEGORIES": "ignored",
    "BRANCHES": "joint",
    "MASK_LOSS_ON_NEGATIVES": True,
    "SCORE_LOSS_WEIGHT": 0.5,
    "LOSS_WEIGHT": 3.0,
    "LOG2_SCALES": (-1.0, 2.0),
    "NATIVE_SHORT_EDGE": 480,
    "MASK_THRESH": 0.1,
    "PRE_NMS_TOPK_TRAIN": 51,
    "PRE_NMS_TOPK_TEST": 52,
    "NMS_THRESH": 0.75,
    "POST_NMS_TOPK_TRAIN": 31,
    "POST_NMS_TOPK_TEST": 32,
    "MIN_BOX_SIZE": 7.0,
}


def test_every_key_of_deepmask_reaches_the_generator(monkeypatch):
    def build_trunk(cfg, input_shape):
        return VGG(stages=((4,), (4,), (4,), (6,)), in_channels=input_shape.channels)

    trunks = BACKBONE_REGISTRY._obj_map | {"build_vgg_backbone_of_a_test": build_trunk}
    monkeypatch.setattr(BACKBONE_REGISTRY, "_obj_map", trunks)
    cfg = make_cfg(
        None, *set_all("DEEPMASK", DEEPMASK_SETTINGS), "MODEL.PROPOSAL_GENERATOR.NAME", "DeepMask",
        "MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", False,
        "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], "MODEL.PIXEL_STD", [4.0, 5.0, 6.0],
    )  # fmt: skip
    generator = build_proposal_generator(cfg, {})
    held = {
        "batch_size_per_image": 3,
        "branches": "joint",
        "mask_loss_on_negatives": True,
        "loss_weight": {"loss_deepmask_mask": 3.0, "loss_deepmask_score": 1.5},
        "scales": [0.5, 4.0],
        "native_short_edge": 480,
        "mask_thresh": 0.1,
        "pre_nms_topk": {True: 51, False: 52},  # by whether it trains
        "nms_thresh": 0.75,
        "post_nms_topk": {True: 31, False: 32},
        "min_box_size": 7.0,
        "proposals_in_training": False,
    }
    assert {name: getattr(generator, name) for name in held} == held
    sampler = {
        "patch_size": 64,
        "object_size": 40,
        "jitter_shift": 3.0,
        "jitter_scale": 0.125,
        "flip": False,
        "negative_shift": 12.0,
        "negative_scale": 0.75,
        "negative_log2_scales": (-1.0, 1.5),
        "categories": (2, 4),
        "other_categories": "ignored",
    }
    assert {name: getattr(generator.sampler, name) for name in sampler} == sampler
    network = generator.network
    assert (network.patch_size, network.context, network.stride) == (64, 8, 8)
    assert network.score_trunk is not None and network.score_trunk is not network.trunk
    mask_head, score_head = network.mask_head, network.score_head
    assert (mask_head.conv.out_channels, mask_head.encode.out_features) == (7, 9)
    assert (mask_head.mask_size, mask_head.upsampling) == (16, "trainable")
    assert (score_head.fc1.out_features, score_head.fc2.out_features) == (10, 11)
    assert score_head.dropout.p == 0.25
    # The trunk expects what the model has here: BGR, these means and deviations.
    assert generator.pixel_normalization.is_identity


def test_deepmask_s_configuration_is_the_paper_s():
    cfg = make_cfg("deepmask_rpn_only.yaml")
    node, solver = cfg.MODEL.DEEPMASK, cfg.SOLVER
    assert cfg.MODEL.VGG.WIDTH_FACTOR == 1.0 and cfg.MODEL.VGG.NORM == ""
    # Sec. 3.4: a batch of 32, learning rate .001, momentum .9, weight decay .00005.
    assert solver.IMS_PER_BATCH * node.BATCH_SIZE_PER_IMAGE == 32
    assert node.SCORE_LOSS_WEIGHT == 1 / 32  # Sec. 3.2
    assert (solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY) == (1e-3, 0.9, 5e-5)
    assert (node.PATCH_SIZE, node.OBJECT_SIZE, node.MASK_SIZE) == (224, 128, 56)
    assert (node.JITTER_SHIFT, node.JITTER_SCALE) == (16, 0.25)
    assert (node.NEGATIVE_SHIFT, node.NEGATIVE_SCALE) == (32, 1)
    assert (node.MASK_THRESH, node.NMS_THRESH, node.CONTEXT) == (0.2, 1.0, 0)
    assert cfg.INPUT.USE_INSTANCE_MASK and cfg.INPUT.MIN_SIZE_TEST == 0


DETECTORNET_SETTINGS = {
    "CLASS_AGNOSTIC": False,
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
    "OBJECT_FRACTION": 0.5,
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
    "SCORE_THRESH": 0.375,
    "PRE_NMS_TOPK": 51,
    "NMS_THRESH": 0.625,
    "TOPK_PER_SCALE": 31,
    "REFINEMENT.ENABLED": False,
    "REFINEMENT.ENLARGEMENT": 1.75,
    "REFINEMENT.MEAN_DIMENSIONS": (0.75,),
    "REFINEMENT.ASPECT_RATIOS": (1.25,),
    "REFINEMENT.STRIDE": 4.0,
    "FINAL_NMS_THRESH": 0.875,
    "MIN_BOX_SIZE": 7.0,
    "CROPS_AT_ONCE": 9,
    "CLASSIFIER.ENABLED": False,
    "CLASSIFIER.NUM_CROPS": 12,
    "CLASSIFIER.POSITIVE_FRACTION": 0.125,
    "CLASSIFIER.IOU_THRESHOLDS": (0.25, 0.75),
    "CLASSIFIER.MIN_SCALE": 0.5,
    "CLASSIFIER.NUM_TRIES": 8,
    "CLASSIFIER.LOSS_WEIGHT": 5.0,
}


def detectornet_cfg(*overrides):
    return make_cfg(
        None, *set_all("DETECTORNET", DETECTORNET_SETTINGS),
        "MODEL.PROPOSAL_GENERATOR.NAME", "DetectorNet", "MODEL.ROI_HEADS.NAME", "DetectorNetHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0],
        "MODEL.PIXEL_STD", [4.0, 5.0, 6.0], *overrides,
    )  # fmt: skip


def test_every_key_of_detectornet_reaches_the_generator():
    generator = build_proposal_generator(detectornet_cfg(), {})
    held = {
        "sampler": CropSampler(num_crops=11, positive_fraction=0.25, min_scale=0.125, num_tries=7),
        "positive_coverage": 0.75,
        "object_fraction": 0.5,
        "zero_weight": 0.5,
        "loss_weight": 3.0,
        "num_scales": 2,
        "window_overlap": 0.375,
        "grid": SearchGrid((0.25, 0.5), (0.5, 1.0), stride=3.0, ring=1.5, ring_weight=2.0),
        "min_coverage": 0.375,
        "pre_nms_topk": 51,
        "nms_thresh": 0.625,
        "topk_per_scale": 31,
        "refinement_grid": None,
        "enlargement": 1.75,
        "final_nms_thresh": 0.875,
        "min_box_size": 7.0,
        "crops_at_once": 9,
        "predicts_classes": True,
        "proposals_in_training": False,  # DetectorNetHeads do not need them
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
        (0.75,), (1.25,), stride=4.0, ring=1.5, ring_weight=2.0
    )


def test_keys_of_the_classifier_reach_detectornet_s_heads():
    heads = build_roi_heads(detectornet_cfg(), {})
    held = {
        "num_classes": 2,
        "class_agnostic": False,
        "classifier": None,
        "iou_thresholds": (0.25, 0.75),
        "loss_weight": 5.0,
        "crops_at_once": 9,
        "sampler": CropSampler(num_crops=12, positive_fraction=0.125, min_scale=0.5, num_tries=8),
    }
    assert {name: getattr(heads, name) for name in held} == held
    heads = build_roi_heads(detectornet_cfg("MODEL.DETECTORNET.CLASSIFIER.ENABLED", True), {})
    assert heads.classifier.network.output.out_features == 3


def test_detectornet_s_configuration_is_the_paper_s():
    cfg = make_cfg("detectornet_rpn_only.yaml")
    node = cfg.MODEL.DETECTORNET
    assert (node.INPUT_SIZE, node.MASK_SIZE, node.NETWORKS) == (225, 24, "per_mask")  # Sec. 4, 5.1
    assert (node.WIDTH_FACTOR, node.NORM, cfg.SOLVER.OPTIMIZER) == (1.0, "", "AdaGrad")
    assert (node.POSITIVE_FRACTION, node.POSITIVE_COVERAGE) == (0.4, 0.8)  # Sec. 6
    assert node.MEAN_DIMENSIONS == tuple(i / 10 for i in range(1, 10))  # Sec. 5.2
    assert len(node.ASPECT_RATIOS) == 10 and node.STRIDE == 5 and node.SCORE_THRESH == 0.5
    assert (node.NUM_SCALES, node.WINDOW_OVERLAP, node.TOPK_PER_SCALE) == (3, 0.2, 5)  # Sec. 5.3
    assert node.REFINEMENT.ENABLED and node.REFINEMENT.ENLARGEMENT == 1.2
    assert node.CLASSIFIER.IOU_THRESHOLDS == (0.2, 0.6) and node.RING_WEIGHT == 1.0
    assert cfg.INPUT.MIN_SIZE_TEST == 0 and tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (0,)
