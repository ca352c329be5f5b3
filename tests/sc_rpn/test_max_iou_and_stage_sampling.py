"""The Max-IoU assigner, the classification samples and the statistics about them."""

import pytest
import torch

from d2proposals.sc_rpn.locations import Assignment, GroundTruth
from d2proposals.sc_rpn.max_iou_sampling import assign_max_iou, build_max_iou_matcher
from d2proposals.sc_rpn.stage_sampling import Samples, StageSampler, sample_statistics


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


def test_best_box_of_an_object_is_positive_but_not_without_overlap():
    boxes = torch.tensor([[0.0, 0, 10, 2], [0, 0, 10, 1], [20, 20, 30, 30]])[None]
    truth = GroundTruth(torch.tensor([[0.0, 0, 10, 10], [70, 70, 80, 80]]), torch.tensor([0, 0]))
    is_valid = torch.ones(1, 3, dtype=torch.bool)
    assignment = assign_max_iou(build_max_iou_matcher((0.7, 0.7)), boxes, is_valid, truth)
    assert assignment.labels.tolist() == [[1, 0, 0]]


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
    ],
)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        StageSampler(**arguments)
