import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    build_backbone,
    build_model,
    build_proposal_generator,
)
from detectron2.modeling.backbone import ResNet
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.backbones import BNInception
from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import (
    ProposalCheckpointer,
    Trainer,
    check_config,
    load_part_weights,
)
from d2proposals.evaluation import ProposalEvaluator
from d2proposals.zip_rpn import ZoomNetwork
from d2proposals.zip_rpn.gray_class_sampling import EquilibriumSampler, GrayClassLabeler
from d2proposals.zip_rpn.level_candidates import LevelSuppression
from d2proposals.zip_rpn.map_attention import ExcitationRecalibration
from tests.common import (
    CONFIGS,
    RANDOM,
    TINY,
    add_rectangle_masks,
    leaf_keys,
    make_cfg,
    make_instances,
    precomputed,
    set_all,
)

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
        names = [Path(base).name for base in ([bases] if isinstance(bases, str) else bases)]
        assert all(x.startswith("Base-") for x in names), f"{name}: a base of other bases"


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_its_version(name):
    # Without it, Detectron2 guesses the version from the keys.
    assert make_cfg(name).VERSION == 2
    content = yaml.safe_load((CONFIGS / name).read_text())
    if "_BASE_" not in content:
        assert content["VERSION"] == 2


@pytest.mark.parametrize("name", LEAVES)
def test_every_configuration_builds_and_runs(name):
    # Generators at full size; with a ResNet-50 and R-CNN heads, which are Detectron2's, small ones.
    narrow = any(x in name for x in ("_rcnn_", "sliding", "vgg16"))
    cfg = make_cfg(name, *(TINY if narrow else RANDOM))
    check_config(cfg)
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, 96, 128)).float()
    inputs = {"image": image, "height": 96, "width": 128, **precomputed(cfg, 96, 128)}
    with torch.no_grad():
        (output,) = model([inputs])
    field = "proposals" if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" else "instances"
    assert output[field].image_size == (96, 128)


@pytest.mark.parametrize("name", LEAVES)
def test_a_training_step_of_every_configuration_reaches_every_trainable_parameter(name):
    # Training on several processes stops where a parameter gets no gradient.
    torch.manual_seed(0)
    cfg = make_cfg(name, *TINY)
    model = build_model(cfg).train()
    image = torch.randint(0, 256, (3, 64, 96)).float()
    for boxes in ([[8, 8, 40, 56], [50, 10, 90, 40]], []):
        model.zero_grad(set_to_none=True)
        with EventStorage():
            instances = add_rectangle_masks(make_instances((64, 96), boxes))
            inputs = {"image": image, "instances": instances, **precomputed(cfg, 64, 96)}
            losses = model([inputs])
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert trainable and [n for n, p in trainable.items() if p.grad is None] == []


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
        cfg = RecordingNode(make_cfg(name, *RANDOM, "MODEL.DEVICE", "meta"), read)
        with torch.device("meta"):
            model = Trainer.build_model(cfg)
            Trainer.build_optimizer(cfg, model)
            load_part_weights(cfg, ProposalCheckpointer(model))
        ProposalDatasetMapper.from_config(cfg, is_train=True)
        ProposalEvaluator.from_config(cfg, "d2p_shapes_val")
        Trainer.evaluates_proposals_of_detector(cfg)
    # Of data alone: tests/data/test_coco_files.py, tests/data/test_category_choice.py,
    # tests/engine/test_checked_datasets.py; of parts that are compiled:
    # tests/engine/test_execution.py.
    elsewhere = {"DATASETS.COCO_FILES", "DATASETS.CATEGORIES", "DATASETS.STRICT"}
    elsewhere |= {"MODEL.EXECUTION.COMPILE_BACKEND"}
    assert new_keys() - read == elsewhere


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
    "GRAY_CLASS.IN_SCORE": False,
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
        "loss_weight": {"loss_zip_cls": 3.0, "loss_zip_loc": 15.0},
        "pre_nms_topk": {True: 51, False: 52},  # by whether it trains
        "post_nms_topk": {True: 31, False: 32},
        "level_suppression": LevelSuppression(
            num_levels=2, nms_thresh=0.625, topk=53, min_box_size=7.0
        ),
        "level_bias": [0.25, -0.25],
        "multi_nms_thresholds": [0.7, 0.3],
        "multi_nms_topks": [40, 20],
        "proposals_in_training": False,
        "gray_in_score": False,
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
    assert generator.loss.box2box_transform is generator.box2box_transform
    loss = generator.loss
    assert (loss.box_reg_loss_type, loss.smooth_l1_beta) == ("smooth_l1", 0.5)
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
    "OUT_CHANNELS": 48,
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
        "out_channels": 48,
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
    assert cfg.SOLVER.STEPS == tuple(range(7000, 236000, 7000))  # Sec. 5.1
    assert cfg.SOLVER.MOMENTUM == 0.9
    # 8 epochs of the 117,266 images of COCO 2017 train that have objects.
    assert abs(cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / 117_266 - 8) < 0.1
    assert cfg.TEST.AUG.ENABLED and cfg.TEST.AUG.MIN_SIZES == (1000, 750, 500, 250)  # Sec. 3.4
    assert not cfg.TEST.AUG.FLIP and not cfg.MODEL.ZIP.LOW_QUALITY_MATCH
    assert (cfg.MODEL.ZIP.LEVEL_NMS_THRESH, cfg.MODEL.ZIP.LEVEL_NMS_TOPK) == (0.5, 2000)
