"""SCRPN as a whole: its settings, its ablations and its hosts."""

from collections import Counter

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_proposal_generator
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2proposals.sc_rpn import SCRPN, SCRPNHead
from d2proposals.sc_rpn.point_representation import build_representation
from d2proposals.sc_rpn.stage_sampling import StageSampler
from tests import common
from tests.sc_rpn import ablation_rows as rows
from tests.sc_rpn.builders import (
    BOXES,
    CHANNELS,
    SHAPES,
    build_generator,
    make_batch,
    train_step,
)

# For networks of any size.
TINY = (
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.SCRPN.HEAD_CHANNELS", 8, "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8),
)


@pytest.mark.parametrize("row", rows.ROWS.values(), ids=rows.ROWS.keys())
def test_each_row_of_the_tables_builds_trains_and_proposes(row):
    generator = build_generator(rows.node(row))
    batch = make_batch()
    _, losses, _ = train_step(generator, batch)
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    proposals, losses = generator.eval()(*batch[:2])
    assert losses == {}
    assert all(len(p) for p in proposals)


def test_defaults():
    """The paper's (Sec. IV-A), and those that docs/sc_rpn.md lists where the paper has none."""
    node = {
        "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "HEAD_CHANNELS": 256,
        "NUM_CONVS": 0,
        "PRIOR_PROB": 0.5,
        "NUM_STAGES": 2,
        "REPRESENTATION": "points",
        "ANCHOR_SIDE": 8.0,
        "POINT_UNIT": 1.0,
        "ANCHOR_ASPECT_RATIOS": (1.0,),
        "ALIGNMENT": "point",
        "ALIGNMENT_GRADIENT": 0.1,
        "DEFORM_SAMPLER": "auto",
        "INIT_ASSIGNER": "positive_region",
        "REFINED_ASSIGNER": "size_aware_threshold",
        "SIGMA": 0.2,
        "POSITIVE_REGION": "touched",
        "TOPK": 9,
        "NUM_LEVELS": 2,
        "KEEP_BEST": False,
        "INIT_IOU_THRESHOLDS": (0.3, 0.7),
        "REFINED_IOU_THRESHOLDS": (0.7, 0.7),
        "MIN_BEST_IOU": 0.3,
        "BATCH_SIZE_PER_IMAGE": 256,
        "IOU_MASK": {
            "ENABLED": True,
            "FEATURE": "reg",
            "SAMPLES": "classification",
            "NUM_SIGMOID": 2,
            "USE_AT_TEST": True,
            "SCORE": "mean",
            "LOSS_WEIGHT": 1.0,
        },
        "BBOX_REG_LOSS_TYPE": ("iou", "iou"),
        "SMOOTH_L1_BETA": 1 / 9,
        "CLS_LOSS_WEIGHT": 2.0,
        "INIT_LOSS_WEIGHT": 0.5,
        "REFINED_LOSS_WEIGHT": 10.0,
        "INIT_NORMALIZER": "positives",
        "REFINED_NORMALIZER": "positives",
        "LOSS_WEIGHT": 1.0,
        "PRE_NMS_TOPK_TRAIN": 2000,
        "PRE_NMS_TOPK_TEST": 2000,
        "LEVEL_NMS_THRESH": 0.8,
        "NMS_THRESH": 0.8,
        "POST_NMS_TOPK_TRAIN": 2000,
        "POST_NMS_TOPK_TEST": 1000,
        "MIN_BOX_SIZE": 0.0,
    }
    assert common.make_cfg().MODEL.SCRPN == node
    assert common.make_cfg("sc_rpn_only.yaml").MODEL.SCRPN == node


def test_settings_reach_the_sampler():
    sampler = build_generator(
        rows.node(
            "SIGMA 0.4; TOPK 11; NUM_LEVELS 3; BATCH_SIZE_PER_IMAGE 77; MIN_BEST_IOU 0.1; "
            "INIT_IOU_THRESHOLDS (0.2,0.5); REFINED_IOU_THRESHOLDS (0.4,0.6); "
            "POSITIVE_REGION inside; KEEP_BEST True"
        )
    ).sampler
    assert (sampler.sigma, sampler.topk, sampler.num_levels) == (0.4, 11, 3)
    assert (sampler.positive_region, sampler.keep_best) == ("inside", True)
    assert (sampler.batch_size_per_image, sampler.min_best_iou) == (77, 0.1)
    assert sampler.init_matcher.thresholds[1:-1] == [0.2, 0.5]
    assert sampler.refined_matcher.thresholds[1:-1] == [0.4, 0.6]
    iou = torch.tensor([[0.15, 0.3, 0.45, 0.55, 0.9]])
    assert sampler.init_matcher(iou)[1].tolist() == [0, -1, -1, 1, 1]
    assert sampler.refined_matcher(iou)[1].tolist() == [0, 0, -1, -1, 1]


def test_the_page_has_every_row_of_the_tables():
    numbers = Counter(name.split()[0] for name in rows.ROWS)
    # With and without SADS: no mask, three samples or maps, and the mask not used in the test.
    with_sads = {"VI": 2 * (1 + 3 + 1), "VII": 2 * (1 + 3 + 1)}
    assert numbers == {"III": 8, "IV": 3, "V": 5 + 6 + 5, **with_sads, "VIII": 3}
    assert rows.node(rows.WITHOUT_SADS) == [
        *("MODEL.SCRPN.INIT_ASSIGNER", "max_iou", "MODEL.SCRPN.REFINED_ASSIGNER", "max_iou")
    ]
    assert rows.ROWS["III IoU mask"] == ""
    assert rows.ROWS["IV PosR / SAT"] == rows.ROWS["V N 2"].replace("NUM_LEVELS 2; ", "")
    assert rows.ROWS["VII feature map cls, without SADS"] == (
        rows.WITHOUT_SADS + "IOU_MASK.FEATURE cls; "
    )


@pytest.mark.parametrize("arguments", rows.COMMANDS, ids=" ".join)
def test_each_command_of_the_page_trains_a_step(arguments):
    cfg = common.make_cfg(arguments[0].removeprefix("configs/"), *arguments[1:], *TINY)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    instances = common.make_instances((96, 128), BOXES[:2])
    image = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(1))
    inputs = {"image": image, "instances": instances}
    if cfg.MODEL.LOAD_PROPOSALS:
        proposals = Instances((96, 128), proposal_boxes=Boxes(torch.tensor(BOXES[:2]).float()))
        proposals.objectness_logits = torch.zeros(2)
        inputs["proposals"] = proposals
    with EventStorage():
        losses = model([inputs])
    assert losses and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_default_losses_and_empty_proposals():
    proposals, losses, scalars = train_step(build_generator(), make_batch())
    names = ["cls", "init", "refined", "iou_mask"]
    assert sorted(losses) == sorted(f"loss_scrpn_{name}" for name in names)
    assert [p.image_size for p in proposals] == [(128, 160), (100, 90)]
    assert [len(p) for p in proposals] == [0, 0]
    assert [sorted(p.get_fields()) for p in proposals] == [
        ["objectness_logits", "proposal_boxes"]
    ] * 2
    assert scalars["scrpn/num_pos"] > 0
    assert scalars["scrpn/num_pos_refined_per_object"] * 4 == pytest.approx(
        scalars["scrpn/num_pos"] * 2
    )


def test_constructor_equals_from_config():
    configured = build_generator()
    torch.manual_seed(0)
    explicit = SCRPN(
        in_features=list(SHAPES),
        strides=[4, 8, 16, 32, 64],
        head=SCRPNHead(
            in_channels=CHANNELS,
            channels=CHANNELS,
            num_convs=0,
            representation=build_representation("points", 8.0, (1.0,)),
            num_stages=2,
            alignment="point",
            alignment_gradient=0.1,
            iou_mask_feature="reg",
        ),
        sampler=StageSampler(),
        loss_weight={
            "loss_scrpn_cls": 2.0,
            "loss_scrpn_iou_mask": 1.0,
            "loss_scrpn_init": 0.5,
            "loss_scrpn_refined": 10.0,
        },
        proposals_in_training=False,
    )
    results = []
    for generator in (configured, explicit):
        torch.manual_seed(5)
        results.append(train_step(generator, make_batch())[1])
    torch.testing.assert_close(*results)


def test_state_dict_round_trip():
    first, second = build_generator().eval(), build_generator().eval()
    torch.nn.init.normal_(second.head.classification.weight)
    second.load_state_dict(first.state_dict())
    images, features, _ = make_batch()
    a, b = (g(images, features)[0][0] for g in (first, second))
    assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
    assert torch.equal(a.objectness_logits, b.objectness_logits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("IN_FEATURES ['p2','p9']", r"IN_FEATURES has \['p9'\], which the backbone"),
        ("IN_FEATURES ['p2','p4']", "strides are powers of two and double"),
        ("NUM_STAGES 3", "NUM_STAGES must be 1 or 2, got 3"),
        ("NUM_STAGES 1", "NUM_STAGES 1 has nothing to align and no IoU mask"),
        ("ALIGNMENT deformable", "unknown MODEL.SCRPN.ALIGNMENT 'deformable'"),
        ("REPRESENTATION box", "ALIGNMENT 'point' needs REPRESENTATION 'points'"),
        (
            "REPRESENTATION box; ALIGNMENT box; ANCHOR_ASPECT_RATIOS (0.5,1.0)",
            "ALIGNMENT follows one proposal per location",
        ),
        (
            "REPRESENTATION box; ALIGNMENT none; ANCHOR_ASPECT_RATIOS (0.5,1.0)",
            "size-aware sampling needs one anchor per location",
        ),
        ("BBOX_REG_LOSS_TYPE ('smooth_l1','iou')", "'smooth_l1' compares deltas"),
        ("BBOX_REG_LOSS_TYPE ('iou','giou')", "unknown MODEL.SCRPN.BBOX_REG_LOSS_TYPE 'giou'"),
        ("BBOX_REG_LOSS_TYPE ('iou',)", "needs two names"),
        ("INIT_NORMALIZER all", "unknown MODEL.SCRPN.INIT_NORMALIZER 'all'"),
        ("REFINED_NORMALIZER all", "unknown MODEL.SCRPN.REFINED_NORMALIZER 'all'"),
        ("IOU_MASK.SAMPLES all", "unknown MODEL.SCRPN.IOU_MASK.SAMPLES 'all'"),
        ("POSITIVE_REGION all", "unknown MODEL.SCRPN.POSITIVE_REGION 'all'"),
        ("IOU_MASK.FEATURE p2", "unknown MODEL.SCRPN.IOU_MASK.FEATURE 'p2'"),
        ("IOU_MASK.NUM_SIGMOID 3", "unknown MODEL.SCRPN.IOU_MASK.NUM_SIGMOID 3"),
    ],
)
def test_messages_about_bad_settings(text, message):
    with pytest.raises(ValueError, match=message):
        build_generator(rows.node(text))


def test_feature_maps_with_other_channels_are_refused():
    cfg = common.make_cfg("sc_rpn_only.yaml")
    shapes = {**SHAPES, "p4": ShapeSpec(channels=8, stride=16)}
    with pytest.raises(ValueError, match="must have equal channels"):
        build_proposal_generator(cfg, shapes)


@pytest.mark.parametrize("architecture", ["ProposalNetwork", "GeneralizedRCNN"])
def test_hosts_train_and_evaluate(architecture):
    cfg = common.make_cfg(
        "shapes/sc_rpn_only.yaml",
        *("MODEL.META_ARCHITECTURE", architecture),
        *("MODEL.FPN.OUT_CHANNELS", CHANNELS, "MODEL.SCRPN.HEAD_CHANNELS", CHANNELS),
        *("MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", architecture == "GeneralizedRCNN"),
        *(
            "MODEL.ROI_HEADS.NAME",
            "StandardROIHeads",
            "MODEL.ROI_BOX_HEAD.NAME",
            "FastRCNNConvFCHead",
        ),
        *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
        *("MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
        *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    )
    torch.manual_seed(0)
    model = build_model(cfg)
    batch = []
    for (height, width), boxes in (((96, 128), BOXES[:2]), ((80, 64), [])):
        image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
        instances = common.make_instances((height, width), boxes)
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    for name, parameter in model.proposal_generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    outputs = model.eval()(batch)
    field = "proposals" if architecture == "ProposalNetwork" else "instances"
    assert len(outputs) == 2 and all(field in output for output in outputs)
