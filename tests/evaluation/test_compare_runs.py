"""Tests of d2proposals.evaluation.agreement."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2proposals.evaluation.agreement import compare_runs


def make_run(boxes, logits):
    return Instances(
        (100, 200),
        proposal_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        objectness_logits=torch.tensor(logits, dtype=torch.float32),
    )


def test_boxes_are_found_whatever_their_order():
    first = make_run([[0, 0, 100, 100], [50, 0, 150, 50], [10, 10, 20, 20]], [3.0, 2.0, 1.0])
    # The second box moved by half a pixel of 100 (IoU 0.990), the third by one of 10.
    second = make_run([[50.5, 0, 150.5, 50], [0, 0, 100, 100], [11, 10, 21, 20]], [2.5, 3.0, 1.0])
    result = compare_runs(first, second)
    assert (result.num_first, result.num_second) == (3, 3)
    assert result.found == pytest.approx(2 / 3) and result.score_difference == pytest.approx(0.5)


def test_of_equal_boxes_the_nearest_score_counts():
    box = [0, 0, 100, 100]
    assert compare_runs(make_run([box, box], [2, 1]), make_run([box, box], [2, 1])) == (2, 2, 1, 0)


@pytest.mark.parametrize(("numbers", "found"), [((0, 0), 1), ((0, 1), 0), ((1, 0), 0)])
def test_without_proposals(numbers, found):
    runs = [make_run([[0, 0, 5, 5]] * number, [1.0] * number) for number in numbers]
    assert compare_runs(*runs) == (*numbers, found, 0)


def test_none_in_common():
    assert compare_runs(make_run([[0, 0, 5, 5]], [1]), make_run([[9, 9, 99, 99]], [1])).found == 0
