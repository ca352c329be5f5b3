"""The Max-IoU assigner, the classification samples and the statistics about them."""

import pytest
import torch

from d2proposals.sc_rpn.locations import Assignment, GroundTruth
from d2proposals.sc_rpn.max_iou_sampling import assign_max_iou, build_max_iou_matcher
from d2proposals.sc_rpn.stage_sampling import Samples, StageSampler, sample_statistics
from tests.sc_rpn.builders import build_locations


def test_max_iou_labels_by_hand():
    # IoU with the object: 1, .5, .1, 0; the fifth is in the padding.
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 1], [50, 50, 60, 60], [0, 0, 10, 10]]
    )[None]
    is_valid = torch.tensor([[True, True, True, True, False]])
    truth = GroundTruth(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]))
    assignment = assign_max_iou(build_max_iou_matcher((0.3, 0.7)), boxes, is_valid, truth)
    assert assignment.labels.tolist() == [[1, -1, 0, 0, -1]]
    assert assignment.matched.tolist() == [[0, -1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("min_best_iou", "label"), [(0.0, 1), (0.25, 1), (0.26, 0)], ids=["any", "equal", "below"]
)
def test_best_box_of_an_object_is_positive_from_a_bound_on(min_best_iou, label):
    # IoU with the first object: .25, .125 and 0. Nothing overlaps the second one.
    boxes = torch.tensor([[0.0, 0, 8, 2], [0, 0, 8, 1], [20, 20, 30, 30]])[None]
    truth = GroundTruth(torch.tensor([[0.0, 0, 8, 8], [70, 70, 80, 80]]), torch.tensor([0, 0]))
    is_valid = torch.ones(1, 3, dtype=torch.bool)
    matcher = build_max_iou_matcher((0.7, 0.7))
    assignment = assign_max_iou(matcher, boxes, is_valid, truth, min_best_iou)
    assert assignment.labels.tolist() == [[label, 0, 0]]
    assert assignment.matched.tolist() == [[label - 1, -1, -1]]


def test_objects_out_of_reach_leave_the_others_theirs():
    # The first object is reached by nothing, the second by the third box.
    boxes = torch.tensor([[0.0, 0, 8, 1], [50, 50, 60, 60], [20, 20, 30, 30]])[None]
    truth = GroundTruth(torch.tensor([[0.0, 0, 8, 8], [20, 20, 30, 34]]), torch.tensor([0, 0]))
    is_valid = torch.ones(1, 3, dtype=torch.bool)
    assignment = assign_max_iou(build_max_iou_matcher((0.3, 0.7)), boxes, is_valid, truth)
    assert assignment.labels.tolist() == [[0, 0, 1]]
    assert assignment.matched.tolist() == [[-1, -1, 1]]


def call_sampler(sampler, boxes, init_boxes=None, num_stages=2, image_size=(64, 64)):
    """Labels of one image for anchors of 8 strides, and by default the same initial proposals."""
    locations = build_locations(image_size)
    side = locations.stride_of_location[:, None] * 4
    anchors = torch.cat([locations.centers - side, locations.centers + side], dim=1)
    truth = GroundTruth(torch.tensor(boxes), torch.zeros(len(boxes), dtype=torch.long))
    init_boxes = anchors[None] if init_boxes is None else init_boxes(anchors)
    return sampler(locations, truth, anchors, init_boxes, num_stages)


@pytest.mark.parametrize(("min_best_iou", "num_positive"), [(0.3, 0), (0.0, 49)])
@pytest.mark.parametrize("stage", ["init", "refined"])
def test_best_samples_of_a_tiny_object(stage, min_best_iou, num_positive):
    # 7 x 7 anchors of 32 pixels, 4 apart, hold an object of 4 pixels: all of one IoU, 16 / 1024.
    sampler = StageSampler(
        init_assigner="max_iou", refined_assigner="max_iou", min_best_iou=min_best_iou
    )
    samples = call_sampler(sampler, [[32.0, 32, 36, 36]])
    assert (getattr(samples, stage).labels == 1).sum() == num_positive


def test_max_iou_reads_anchors_first_and_initial_proposals_second():
    # The anchor at (34, 30) is the object. The initial proposals are one cell further left.
    sampler = StageSampler(init_assigner="max_iou", refined_assigner="max_iou")
    samples = call_sampler(
        sampler, [[18.0, 14, 50, 46]], lambda x: (x - x.new_tensor([4, 0, 4, 0]))[None]
    )
    # Location 16 * 7 + 8 on the first map; IoU .78 and more one cell away too.
    first, second = (
        a.matched[0, 16 * 7 + 5 : 16 * 7 + 13] for a in (samples.init, samples.refined)
    )
    assert first.tolist() == [-1, -1, 0, 0, 0, -1, -1, -1]
    assert second.tolist() == [-1, -1, -1, 0, 0, 0, -1, -1]


def test_one_stage_shares_its_labels():
    samples = call_sampler(StageSampler(), [[18.0, 14, 50, 46]], num_stages=1)
    assert samples.refined is samples.init
    assert call_sampler(StageSampler(), [[18.0, 14, 50, 46]]).refined is not samples.init


def test_matched_objects_are_counted_over_the_batch():
    boxes = torch.tensor([[[0.0, 0, 10, 10]], [[5, 5, 9, 9]], [[0, 0, 1, 1]]])
    truth = GroundTruth(torch.tensor([[0.0, 0, 10, 10], [5, 5, 9, 9]]), torch.tensor([0, 1]))
    is_valid = torch.ones(3, 1, dtype=torch.bool)
    assignment = assign_max_iou(build_max_iou_matcher((0.3, 0.7)), boxes, is_valid, truth)
    assert assignment.matched.tolist() == [[0], [1], [-1]]


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "expected"),
    [(0, 1000, 256), (10, 1000, 246), (200, 1000, 200), (10, 30, 30), (5, 0, 0), (0, 0, 0)],
)
def test_number_of_random_negatives(num_positive, num_negative, expected):
    torch.manual_seed(0)
    labels = torch.full((2, 1500), -1, dtype=torch.int8)
    labels[0, :num_positive] = 1
    labels[0, num_positive : num_positive + num_negative] = 0
    labels[1, :700] = 0  # another image does not matter
    is_sampled = StageSampler(batch_size_per_image=256).draw_classification_samples(labels)
    assert is_sampled[0, :num_positive].all()
    assert (is_sampled & (labels == 0)).sum(1).tolist() == [expected, 256]
    assert not (is_sampled & (labels == -1)).any()


def test_negatives_are_random():
    labels = torch.zeros(1, 5000, dtype=torch.int8)
    sampler = StageSampler(batch_size_per_image=100)
    draws = [sampler.draw_classification_samples(labels).nonzero()[:, 1] for _ in range(2)]
    assert not torch.equal(*draws)
    assert draws[0].float().mean() == pytest.approx(2500, abs=700)


def test_statistics_by_hand():
    # Object 0 has three positives, object 1 has one, object 2 none.
    matched = torch.tensor([[0, 0, 0, 1, -1, -1]])
    labels = (matched >= 0).to(torch.int8)
    assignment = Assignment(labels, matched)
    samples = Samples(assignment, assignment, torch.tensor([[True] * 5 + [False]]))
    truth = GroundTruth(
        torch.tensor([[0.0, 0, 10, 10]]).repeat(3, 1), torch.zeros(3, dtype=torch.long)
    )
    init_boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5]] * 3])
    values = sample_statistics(samples, truth, init_boxes)
    assert values == pytest.approx(
        {
            "num_pos": 4,
            "num_neg": 1,
            "num_pos_init_per_object": 4 / 3,
            "num_pos_init_std": (14 / 9) ** 0.5,
            "num_pos_refined_per_object": 4 / 3,
            "num_pos_refined_std": (14 / 9) ** 0.5,
            "init_iou_of_pos": 0.75,
        }
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_assigner": "nearest"}, "unknown MODEL.SCRPN.INIT_ASSIGNER 'nearest'"),
        ({"refined_assigner": "atss"}, "unknown MODEL.SCRPN.REFINED_ASSIGNER 'atss'"),
        ({"sigma": 1.5}, r"SIGMA in \[0, 1\]"),
        ({"topk": 0}, "TOPK and NUM_LEVELS of at least 1"),
        ({"init_iou_thresholds": (0.7, 0.3)}, "0 <= negative <= positive <= 1"),
        ({"min_best_iou": 0.4}, r"MIN_BEST_IOU must lie between 0 and .* got 0.4, \(0.3, 0.7\)"),
        ({"min_best_iou": -0.1}, "MIN_BEST_IOU must lie between 0 and"),
        (
            {"init_iou_thresholds": (0.5, 0.7), "refined_iou_thresholds": (0.2, 0.7)},
            "MIN_BEST_IOU must lie between 0 and",
        ),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        StageSampler(**arguments)
