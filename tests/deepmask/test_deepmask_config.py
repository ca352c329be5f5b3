"""Every key of DeepMask reaches what it is for; the configuration is the paper's."""

import math

from detectron2.modeling import (
    BACKBONE_REGISTRY,
    build_proposal_generator,
)

from d2proposals.backbones import VGG
from d2proposals.deepmask.image_canvas import CanvasStyle
from tests.common import make_cfg, set_all

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
    "UPSAMPLING": "bilinear_corners",
    "TARGET_SIZE": 24,
    "BORDER": "half_patch",
    "BORDER_COLOR": (7.0, 8.0, 9.0),
    "RESAMPLING": "bilinear_corners",
    "SHARED_CODE": True,
    "SCORE_DIMS": (10, 11),
    "DROPOUT": 0.25,
    "OBJECT_SIZE": 40,
    "JITTER_SHIFT": 3.0,
    "JITTER_SCALE": 0.125,
    "FLIP": False,
    "NEGATIVE_SHIFT": 12.0,
    "NEGATIVE_SCALE": 0.75,
    "NEGATIVE_LOG2_SCALES": (-1.0, 1.5),
    "POSITIVES_IN_SCALE_RANGE": False,
    "MIN_OBJECT_AREA": 50.0,
    "MIN_OBJECT_SIDE": 3.0,
    "BATCH_SIZE_PER_IMAGE": 3,
    "CATEGORIES": (2, 4),
    "OTHER_CATEGORIES": "ignored",
    "BRANCHES": "joint",
    "MASK_LOSS_ON_NEGATIVES": True,
    "SCORE_LOSS_WEIGHT": 0.5,
    "LOSS_WEIGHT": 3.0,
    "LOG2_SCALES": (-1.0, 2.0),
    "NATIVE_SHORT_EDGE": 480,
    "NATIVE_LONG_EDGE": 700,
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
        "MODEL.DEEPMASK.SHARED_CODE", False,  # a code is of one trunk
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
        "mask_thresh": 0.1,
        "pre_nms_topk": {True: 51, False: 52},  # by whether it trains
        "nms_thresh": 0.75,
        "post_nms_topk": {True: 31, False: 32},
        "min_box_size": 7.0,
        "proposals_in_training": False,
    }
    assert {name: getattr(generator, name) for name in held} == held
    assert (generator.native_sizes.short_edge, generator.native_sizes.long_edge) == (480, 700)
    sampler = {
        "patch_size": 64,
        "object_size": 40,
        "jitter_shift": 3.0,
        "jitter_scale": 0.125,
        "flip": False,
        "negative_shift": 12.0,
        "negative_scale": 0.75,
        "negative_log2_scales": (-1.0, 1.5),
        "positives_in_scale_range": False,
        "min_object_area": 50.0,
        "min_object_side": 3.0,
        "categories": (2, 4),
        "other_categories": "ignored",
    }
    assert {name: getattr(generator.sampler, name) for name in sampler} == sampler
    network = generator.network
    assert (network.patch_size, network.context, network.stride) == (64, 8, 8)
    assert network.score_trunk is not None and network.score_trunk is not network.trunk
    mask_head, score_head = network.mask_head, network.score_head
    assert (mask_head.conv.out_channels, mask_head.encode.out_features) == (7, 9)
    assert (mask_head.mask_size, mask_head.upsampling) == (16, "bilinear_corners")
    assert mask_head.target_size == 24
    assert network.canvas_style == CanvasStyle("half_patch", (7.0, 8.0, 9.0), "bilinear_corners")
    assert (score_head.fc1.out_features, score_head.fc2.out_features) == (10, 11)
    assert score_head.dropout.p == 0.25
    # The trunk expects what the model has here: BGR, these means and deviations.
    assert generator.pixel_normalization.is_identity
    cfg.merge_from_list(
        ["MODEL.DEEPMASK.SHARED_TRUNK", True, "MODEL.DEEPMASK.SHARED_CODE", True,
         "MODEL.DEEPMASK.SCORE_DIMS", (10,)]
    )  # fmt: skip
    network = build_proposal_generator(cfg, {}).network
    code, mask_head, score_head = network.shared_code, network.mask_head, network.score_head
    assert (code.conv.out_channels, code.encode.in_features, code.encode.out_features) == (
        7, 7 * 8 * 8, 9
    )  # fmt: skip
    assert mask_head.conv is None and mask_head.classify.in_features == 9
    assert (score_head.fc1.in_features, score_head.fc1.out_features) == (9, 10)
    assert score_head.dropout.p == 0.25


def test_the_released_network_is_that_of_its_file():
    # train.lua, DataSampler.lua and evalPerImage.lua of facebookresearch/deepmask.
    cfg = make_cfg("deepmask_r50_rpn_only.yaml")
    node, solver = cfg.MODEL.DEEPMASK, cfg.SOLVER
    assert solver.IMS_PER_BATCH * node.BATCH_SIZE_PER_IMAGE == 32
    assert (solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY) == (1e-3, 0.9, 5e-4)
    assert (solver.MAX_ITER, solver.STEPS) == (300 * 4000, (50 * 4000, 120 * 4000))
    assert (node.PATCH_SIZE, node.MASK_SIZE, node.TARGET_SIZE) == (160, 56, 112)
    assert node.OBJECT_SIZE == math.ceil(160 * 128 / 224)
    assert node.CONTEXT == 32 / 2
    assert tuple(node.LOG2_SCALES) == tuple(-2.5 + 0.5 * k for k in range(7))
    assert (node.MASK_THRESH, node.NMS_THRESH, cfg.INPUT.MIN_SIZE_TEST) == (0.2, 1.0, 0)
    assert tuple(node.BORDER_COLOR) == (255 / 2,) * 3


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
