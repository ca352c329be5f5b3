"""What SCRPN learns from: the samples of both stages, its losses and their gradients."""

import math

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image
from pycocotools import mask as mask_util

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.sc_rpn.locations import Assignment, GroundTruth, PyramidLocations
from d2proposals.sc_rpn.point_representation import build_representation
from d2proposals.sc_rpn.predictions import HeadPredictions
from d2proposals.sc_rpn.stage_sampling import Samples
from tests import common
from tests.sc_rpn import ablation_rows as rows
from tests.sc_rpn.builders import BOXES, build_generator, build_locations, make_batch, train_step


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


def hand_case():
    """A box of each stage half a width from its object, and four classification samples.

    The anchor is the square of 32 pixels around (2, 2); the initial and the refined box are
    (0, 0, 10, 10), the object is (5, 0, 15, 10).
    """
    locations = build_locations((64, 64))
    num = locations.num_locations
    # In cells around the location; the boxes of the others are not read.
    init = torch.tensor([-0.5, -0.5, 2, 2]).repeat(1, num, 1)
    predictions = HeadPredictions(init, torch.zeros(1, num), torch.zeros(1, num, 4), None)
    labels = torch.zeros(1, num, dtype=torch.int8)
    labels[0, 0] = 1
    assignment = Assignment(labels, labels.long() - 1)
    samples = Samples(assignment, assignment, torch.arange(num)[None] < 4)
    truth = GroundTruth(torch.tensor([[5.0, 0, 15, 10]]), torch.tensor([0]))
    return predictions.at(samples.is_sampled), locations, truth, samples


UNIT_WEIGHTS = "CLS_LOSS_WEIGHT 1.0; INIT_LOSS_WEIGHT 1.0; REFINED_LOSS_WEIGHT 1.0; "
BOX_STAGES = UNIT_WEIGHTS + rows.BOX + rows.WITHOUT_SADS + rows.WITHOUT_MASK + "ALIGNMENT box; "
# Deltas of the object minus those of the box: dx .5 from the initial box, and 5 / 32 in x from the
# anchor, both more than the default beta of 1/9; IoU 50 / 150.
INIT_L1, REFINED_L1, MINUS_LN_IOU = 5 / 32 - 1 / 18, 1 / 2 - 1 / 18, math.log(3)


@pytest.mark.parametrize(
    ("text", "init", "refined"),
    [
        ("BBOX_REG_LOSS_TYPE ('iou','iou')", MINUS_LN_IOU, MINUS_LN_IOU),
        ("BBOX_REG_LOSS_TYPE ('smooth_l1','smooth_l1')", INIT_L1, REFINED_L1),
        ("BBOX_REG_LOSS_TYPE ('iou','smooth_l1')", MINUS_LN_IOU, REFINED_L1),
        ("BBOX_REG_LOSS_TYPE ('smooth_l1','iou')", INIT_L1, MINUS_LN_IOU),
        (
            "BBOX_REG_LOSS_TYPE ('smooth_l1','smooth_l1'); SMOOTH_L1_BETA 1.0",
            (5 / 32) ** 2 / 2,
            1 / 8,
        ),
        ("INIT_NORMALIZER samples", MINUS_LN_IOU / 4, MINUS_LN_IOU),
        ("REFINED_NORMALIZER samples", MINUS_LN_IOU, MINUS_LN_IOU / 4),
    ],
)
def test_regression_losses_of_both_stages_by_hand(text, init, refined):
    losses = build_generator(rows.node(BOX_STAGES + text)).losses(*hand_case())
    assert losses["loss_scrpn_init"].item() == pytest.approx(init, rel=1e-5)
    assert losses["loss_scrpn_refined"].item() == pytest.approx(refined, rel=1e-5)


def test_each_stage_learns_of_the_object_that_it_is_matched_with():
    predictions, locations, truth, samples = hand_case()
    # A second object where the boxes are, which the second stage is matched with.
    truth = GroundTruth(
        torch.cat([truth.boxes, torch.tensor([[0.0, 0, 10, 10]])]), torch.tensor([0, 0])
    )
    other = samples.refined.matched.clone()
    other[0, 0] = 1
    samples.refined = Assignment(samples.refined.labels, other)
    losses = build_generator(rows.node(BOX_STAGES)).losses(predictions, locations, truth, samples)
    assert losses["loss_scrpn_init"].item() == pytest.approx(MINUS_LN_IOU, rel=1e-5)
    assert losses["loss_scrpn_refined"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("which", "expected"),
    [("classification", 3 / 2), ("regression", 1), ("regression_and_negatives", 10 / 4)],
)
def test_samples_of_the_iou_mask_by_hand(which, expected):
    """Samples whose cross entropies are 1, 2, 4 and 3 times ln 2, and an ignored one."""
    text = f"IOU_MASK.SAMPLES {which}; IOU_MASK.NUM_SIGMOID 1"
    labels = torch.tensor([[1, 0, 0, 0, -1]], dtype=torch.int8)
    samples = Samples(None, Assignment(labels, (labels == 1).long() - 1), None)
    samples.is_sampled = torch.tensor([[True, True, False, False, False]])
    # The positive's IoU is .5; the negatives' boxes are elsewhere.
    boxes = torch.tensor([[0.0, 0, 10, 5], *[[50, 50, 60, 60]] * 4])
    truth = GroundTruth(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]))
    mask = torch.tensor([1 / 2, 3 / 4, 15 / 16, 7 / 8, 0.99]).logit()
    losses = build_generator(rows.node(text)).stage_losses
    loss = losses.iou_mask_loss(mask, boxes, torch.arange(5), samples, truth)
    assert loss.item() == pytest.approx(expected * math.log(2))


def test_equations_4_to_7_by_hand():
    """One 64 x 64 image and one object; predictions such that each loss is known."""
    generator = build_generator(rows.node(UNIT_WEIGHTS)).train()
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
        is_positive = samples.refined.labels == 1
        predictions.class_logits = torch.where(is_positive, math.log(3), -math.log(15))
        sampled = predictions.at(samples.is_sampled)
        losses = generator.losses(sampled, locations, truth, samples)
    # Classification: positives have 3/4, negatives 1/16.
    num_samples = int(samples.is_sampled.sum())
    expected = -(9 * math.log(3 / 4) + (num_samples - 9) * math.log(15 / 16)) / num_samples
    assert losses["loss_scrpn_cls"].item() == pytest.approx(expected)
    # Positive region of 6.4 pixels around (32, 32): the four cells around it, centred 2 pixels
    # off. IoU: 30 * 30 / (2 * 1024 - 900).
    assert (samples.init.labels == 1).sum() == 4
    assert losses["loss_scrpn_init"].item() == pytest.approx(-math.log(900 / 1148), abs=1e-5)
    # Of the second stage, the first map's IoUs are 900/1148 (4 cells), and 30 * 26 / (2048 - 780)
    # (8 cells, of which 5 are candidates); the second map's boxes are 64 wide: 1024/4096 for all.
    # The mean is between: positives are the nine of the first map.
    assert is_positive.sum() == 9
    expected = -(4 * math.log(900 / 1148) + 5 * math.log(780 / 1268)) / 9
    assert losses["loss_scrpn_refined"].item() == pytest.approx(expected, abs=1e-5)
    # The mask is sigmoid(0) everywhere: ln 2 whatever the IoU.
    assert losses["loss_scrpn_iou_mask"].item() == pytest.approx(0.693147)


@pytest.mark.parametrize("text", ["ALIGNMENT_GRADIENT 0.0", rows.ROWS["III IoU loss"]])
def test_second_stage_does_not_train_the_first_through_the_box(text):
    generator = build_generator(rows.node(text)).train()
    with EventStorage():
        _, losses = generator(*make_batch())
    init_loss = losses.pop("loss_scrpn_init")
    assert losses["loss_scrpn_refined"] > 0
    for loss in losses.values():
        loss.backward(retain_graph=True)
    assert generator.head.init_offset.weight.grad is None
    assert generator.head.secondary_offset.weight.grad.any()
    init_loss.backward()
    assert generator.head.init_offset.weight.grad.any()


@pytest.mark.parametrize(
    ("row", "layer"),
    [
        ("III baseline", "init_offset"),  # has one stage
        *(
            (row, layer)
            for row in (
                "III IoU mask",
                "III point-based representation",
                "III IoU loss",
                "III alignment",
            )
            for layer in ("init_offset", "secondary_offset")
        ),
    ],
)
def test_training_stops_where_a_prediction_is_not_a_number(row, layer):
    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = build_generator(rows.node(rows.ROWS[row]))

        def forward(self, batch):
            return self.generator(*batch)[1]

    model = Losses()
    torch.nn.init.constant_(getattr(model.generator.head, layer).bias, float("nan"))
    trainer = SimpleTrainer(model, [make_batch()], torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(FloatingPointError, match="Loss became infinite or NaN"):
        trainer.train(0, 1)


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
    "row",
    [
        "III IoU mask",
        "III point-based representation",
        "III one anchor",
        "VI training samples regression",
    ],
)
def test_unusual_objects_give_finite_losses(boxes, row):
    generator = build_generator(rows.node(rows.ROWS[row]))
    _, losses, _ = train_step(generator, make_batch(boxes=boxes))
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_crowd_is_background(tmp_path):
    """An object at the left, a crowd region at the right."""
    height, width = 128, 160
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / "image.png")
    crowd = np.zeros((height, width), np.uint8, order="F")
    crowd[16:112, 80:152] = 1
    shared = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    annotations = [
        {**shared, "bbox": [8, 16, 56, 80], "segmentation": [[8, 16, 56, 16, 56, 80, 8, 80]]},
        {
            **shared,
            "bbox": [80, 16, 152, 112],
            "iscrowd": 1,
            "segmentation": mask_util.encode(crowd),
        },
    ]
    cfg = common.make_cfg(
        *("sc_rpn_only.yaml", "INPUT.MIN_SIZE_TRAIN", (height,), "INPUT.RANDOM_FLIP", "none")
    )
    record = {"file_name": str(tmp_path / "image.png"), "height": height, "width": width}
    instances = ProposalDatasetMapper(cfg, True)({**record, "annotations": annotations})[
        "instances"
    ]
    assert len(instances) == len(instances.crowd_regions.boxes) == 1
    truth = GroundTruth.from_instances([instances])
    locations = build_locations((height, width))
    x, y = locations.centers.unbind(1)
    in_crowd = (x > 80) & (x < 152) & (y > 16) & (y < 112)
    assert in_crowd.sum() > 400
    for text in ("BATCH_SIZE_PER_IMAGE 5000", "BATCH_SIZE_PER_IMAGE 5000; " + rows.WITHOUT_SADS):
        generator = build_generator(rows.node(text)).train()
        zero = torch.zeros(1, locations.num_locations, 18)
        predictions = HeadPredictions(
            generator.head.representation.decode_init(zero), zero[..., 0], zero, zero[..., 0]
        )
        with EventStorage():
            samples = generator.label_and_sample_locations(predictions, locations, truth)
        for assignment in (samples.init, samples.refined):
            assert (assignment.labels == 1).any()
            assert (assignment.labels[0, in_crowd] == 0).all()
        assert samples.is_sampled[0, in_crowd].all()
