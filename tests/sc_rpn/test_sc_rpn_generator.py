"""SCRPN as a whole: its contract, its losses, its ablations and its hosts."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_proposal_generator
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage

from d2proposals.proposals.ranking import probability_to_logit
from d2proposals.sc_rpn import SCRPN, SCRPNHead
from d2proposals.sc_rpn.head import HeadPredictions
from d2proposals.sc_rpn.locations import GroundTruth, PyramidLocations
from d2proposals.sc_rpn.point_representation import build_representation
from d2proposals.sc_rpn.stage_sampling import StageSampler
from tests import common
from tests.sc_rpn import ablation_rows as rows

CHANNELS = 16
SHAPES = {f"p{i}": ShapeSpec(channels=CHANNELS, stride=2**i) for i in range(2, 7)}
BOXES = [[10, 10, 60, 80], [30, 40, 46, 52], [70, 5, 120, 120]]


def build_generator(overrides=()):
    cfg = common.make_cfg("sc_rpn_only.yaml", "MODEL.SCRPN.HEAD_CHANNELS", CHANNELS, *overrides)
    torch.manual_seed(0)
    return build_proposal_generator(cfg, SHAPES)


def make_batch(sizes=((128, 160), (100, 90)), boxes=(BOXES, BOXES[:1])):
    images = common.make_images(*sizes)
    generator = torch.Generator().manual_seed(1)
    height, width = images.tensor.shape[-2:]
    features = {
        name: torch.randn(
            len(sizes), CHANNELS, -(-height // s.stride), -(-width // s.stride), generator=generator
        )
        for name, s in SHAPES.items()
    }
    gt = [common.make_instances(size, b) for size, b in zip(sizes, boxes, strict=True)]
    return images, features, gt


def train_step(generator, batch):
    with EventStorage() as storage:
        proposals, losses = generator.train()(*batch)
        sum(losses.values()).backward()
        scalars = {name: history.latest() for name, history in storage.histories().items()}
    return proposals, losses, scalars


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


def test_loss_weights_are_those_of_equation_3():
    batch = make_batch()
    losses = []
    for overrides in (
        (),
        rows.node(
            "CLS_LOSS_WEIGHT 1.0; INIT_LOSS_WEIGHT 1.0; REFINED_LOSS_WEIGHT 1.0; LOSS_WEIGHT 0.5"
        ),
    ):
        generator = build_generator(overrides)
        torch.manual_seed(3)
        losses.append(train_step(generator, batch)[1])
    ratios = {name: (losses[0][name] / losses[1][name]).item() for name in losses[0]}
    expected = {"cls": 4.0, "iou_mask": 2.0, "init": 1.0, "refined": 20.0}
    assert ratios == pytest.approx({f"loss_scrpn_{k}": v for k, v in expected.items()})


def test_refined_loss_can_be_divided_by_the_samples():
    losses = []
    for normalizer in ("positives", "samples"):
        generator = build_generator(rows.node(f"REFINED_NORMALIZER {normalizer}"))
        _, values, scalars = train_step(generator, make_batch())
        losses.append(values["loss_scrpn_refined"].item())
    num_samples = scalars["scrpn/num_pos"] + scalars["scrpn/num_neg"]
    assert losses[0] / losses[1] == pytest.approx(num_samples / scalars["scrpn/num_pos"])


def test_equations_4_to_7_by_hand():
    """One 64 x 64 image and one object; predictions such that each loss is known."""
    generator = build_generator(
        rows.node("CLS_LOSS_WEIGHT 1.0; INIT_LOSS_WEIGHT 1.0; REFINED_LOSS_WEIGHT 1.0")
    ).train()
    sizes = [(16 >> i or 1, 16 >> i or 1) for i in range(5)]
    locations = PyramidLocations.build(sizes, generator.strides, [(64, 64)], torch.device("cpu"))
    truth = GroundTruth.from_instances([common.make_instances((64, 64), [[16, 16, 48, 48]])])
    num = locations.num_locations
    # Points on a square of 8 cells; those of the first map are 32 pixels wide.
    init = build_representation("points", 8.0, (1.0,)).decode_init(torch.zeros(1, num, 18))
    predictions = HeadPredictions(
        init, torch.zeros(1, num), torch.zeros(1, num, 18), torch.full((1, num), -1e4)
    )
    with EventStorage():
        samples = generator.label_and_sample_locations(predictions, locations, truth)
        losses = generator.losses(predictions, locations, truth, samples)
    # Classification: ln 2 for every sample.
    assert losses["loss_scrpn_cls"].item() == pytest.approx(0.693147)
    # Positive region of 6.4 pixels around (32, 32): the four cells around it, centred 2 pixels
    # off. IoU: 30 * 30 / (2 * 1024 - 900).
    assert (samples.init.labels == 1).sum() == 4
    assert losses["loss_scrpn_init"].item() == pytest.approx(-math.log(900 / 1148), abs=1e-5)
    # Of the second stage, the first map's IoUs are 900/1148 (4 cells), and 30 * 26 / (2048 - 780)
    # (8 cells, of which 5 are candidates); the second map's boxes are 64 wide: 1024/4096 for all.
    # The mean is between: positives are the nine of the first map.
    assert (samples.refined.labels == 1).sum() == 9
    expected = -(4 * math.log(900 / 1148) + 5 * math.log(780 / 1268)) / 9
    assert losses["loss_scrpn_refined"].item() == pytest.approx(expected, abs=1e-5)
    # The mask is sigmoid(0) everywhere: ln 2 whatever the IoU.
    assert losses["loss_scrpn_iou_mask"].item() == pytest.approx(0.693147)


def test_second_stage_does_not_train_the_first_through_the_box():
    generator = build_generator(rows.node("ALIGNMENT_GRADIENT 0.0")).train()
    with EventStorage():
        _, losses = generator(*make_batch())
    losses["loss_scrpn_refined"].backward(retain_graph=True)
    losses["loss_scrpn_iou_mask"].backward(retain_graph=True)
    assert generator.head.init_offset.weight.grad is None
    assert generator.head.secondary_offset.weight.grad.any()
    losses["loss_scrpn_init"].backward()
    assert generator.head.init_offset.weight.grad.any()


@pytest.mark.parametrize(
    "boxes",
    [
        ([], []),
        (BOXES, []),
        ([[50, 20, 51, 120]], [[3, 3, 4, 4]]),
        ([[-200, -200, 600, 600]], [[0, 0, 90, 100]]),
        ([[20, 20, 20, 60]], BOXES[:1]),
        ([[500, 500, 520, 520]], BOXES[:1]),
        ([[x % 150, x // 5, x % 150 + 9, x // 5 + 14] for x in range(500)], BOXES),
    ],
    ids=["none", "half", "pixel", "bigger", "no area", "outside", "500"],
)
@pytest.mark.parametrize(
    "row", ["III IoU mask", "III points", "III one anchor", "VI SADS, regression, test True"]
)
def test_unusual_objects_give_finite_losses(boxes, row):
    generator = build_generator(rows.node(rows.ROWS[row]))
    _, losses, _ = train_step(generator, make_batch(boxes=boxes))
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_crowd_is_background():
    batch = make_batch(boxes=([], []))
    for instances in batch[2]:
        instances.crowd_regions = []
    _, losses, scalars = train_step(build_generator(), batch)
    assert scalars["scrpn/num_pos"] == 0
    assert losses["loss_scrpn_init"] == 0 and losses["loss_scrpn_refined"] == 0


@pytest.mark.parametrize("row", ["III IoU mask", "III baseline", "III alignment"])
def test_proposals_keep_the_contract(row):
    generator = build_generator(rows.node(rows.ROWS[row])).eval()
    images, features, _ = make_batch()
    proposals, losses = generator(images, features)
    assert losses == {}
    for p, (height, width) in zip(proposals, images.image_sizes, strict=True):
        assert p.image_size == (height, width)
        assert sorted(p.get_fields()) == ["objectness_logits", "proposal_boxes"]
        boxes, logits = p.proposal_boxes.tensor, p.objectness_logits
        assert 0 < len(p) <= 1000
        assert (logits.diff() <= 0).all() and logits.isfinite().all()
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert p.proposal_boxes.nonempty().all()
        iou = pairwise_iou(p.proposal_boxes, p.proposal_boxes).fill_diagonal_(0)
        assert iou.max() <= 0.8
    again = generator(images, features)[0]
    assert torch.equal(again[0].proposal_boxes.tensor, proposals[0].proposal_boxes.tensor)


def test_scores_are_the_mean_of_classification_and_mask():
    predictions = HeadPredictions(
        torch.zeros(1, 2, 18),
        torch.tensor([[0.0, 2.0]]),
        torch.zeros(1, 2, 18),
        torch.tensor([[0.0, -1e4]]),
    )
    # sigmoid(0) = .5 and sigmoid(sigmoid(0)) = .622459; sigmoid(2) = .880797 and sigmoid(0) = .5.
    scores = build_generator().scores(predictions)
    torch.testing.assert_close(scores, torch.tensor([[0.5612297, 0.6903985]]))
    scores = build_generator(rows.node("IOU_MASK.USE_AT_TEST False")).scores(predictions)
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.8807971]]))
    scores = build_generator(rows.node("IOU_MASK.NUM_SIGMOID 1")).scores(predictions)
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.4403985]]))


def test_duplicates_are_filtered_on_each_map_and_then_over_all():
    generator = build_generator().eval()
    a, b, c = [0.0, 0, 100, 100], [0, 0, 100, 78], [0, 0, 100, 61]
    # IoU(a, b) = .78, IoU(b, c) = .782: all stay on one map at .8; equal boxes of two maps do not.
    boxes = torch.tensor([a, b, c, a, [500.0, 500, 600, 600], [0, 0, 0, 50]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.95, 0.94])
    levels = torch.tensor([0, 0, 0, 1, 1, 1])
    found = generator._filter_duplicates(boxes, scores, levels, (200, 200))
    assert found.proposal_boxes.tensor.tolist() == [a, b, c]
    torch.testing.assert_close(found.objectness_logits, probability_to_logit(scores[:3]))


def test_locations_in_the_padding_do_not_propose():
    generator = build_generator().eval()
    images, features, _ = make_batch()
    proposals = generator(images, features)[0][1]
    changed = {name: x.clone() for name, x in features.items()}
    # The 3x3 convolution and the points (4 cells away, and a little more) look beyond the image,
    # so nothing within it may see the change: far cells of the two largest maps only.
    changed["p2"][1, :, -2:, -8:] = 50.0
    assert torch.equal(
        generator(images, changed)[0][1].proposal_boxes.tensor, proposals.proposal_boxes.tensor
    )


def test_diverged_training_is_named():
    generator = build_generator(["MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True])
    torch.nn.init.constant_(generator.head.classification.bias, float("nan"))
    with EventStorage(), pytest.raises(FloatingPointError, match="training has diverged"):
        generator.train()(*make_batch())


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
        ("REFINED_NORMALIZER all", "unknown MODEL.SCRPN.REFINED_NORMALIZER 'all'"),
        ("IOU_MASK.SAMPLES all", "unknown MODEL.SCRPN.IOU_MASK.SAMPLES 'all'"),
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
