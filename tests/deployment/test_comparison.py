"""What counts as the same boxes in the same order."""

import pytest
import torch

from d2proposals.deployment.comparison import compare_outputs

BOXES = torch.tensor([[0, 0, 10, 10], [5, 5, 20, 20], [1, 1, 4, 4], [2, 2, 9, 9]]).float()
SCORES = torch.tensor([0.9, 0.7, 0.5, 0.4])
CLASSES = torch.tensor([1, 0, 0, 1])


def compare(boxes=BOXES, scores=SCORES, classes=CLASSES):
    return compare_outputs((BOXES, SCORES, CLASSES), (boxes, scores, classes))


def test_roundings_are_the_same():
    found = compare(BOXES + 0.004, SCORES - 2e-5)
    assert found.is_equal and found.num_boxes == (4, 4) and found.num_unmatched == 0
    assert found.box == pytest.approx(0.004, abs=1e-6)
    assert found.score == pytest.approx(2e-5, rel=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        {"boxes": BOXES + torch.tensor([[0, 0, 0, 0.02]] + [[0.0] * 4] * 3)},
        {"scores": SCORES + torch.tensor([0.002, 0, 0, 0])},
        {"classes": torch.tensor([0, 0, 0, 1])},
    ],
)
def test_a_box_that_differs_is_missing_on_both_sides(change):
    found = compare(**change)
    assert (found.num_unmatched, found.num_cut, found.is_equal) == (2, 0, False)


def test_lists_of_unequal_length():
    found = compare(BOXES[:3], SCORES[:3], CLASSES[:3])
    assert (found.num_boxes, found.num_unmatched, found.num_cut) == ((4, 3), 1, 0)
    assert not found.is_equal
    found = compare(BOXES[:0], SCORES[:0], CLASSES[:0])
    assert (found.num_unmatched, found.box, found.is_equal) == (4, 0.0, False)


def test_equal_boxes_are_matched_one_to_one():
    twice = torch.stack([BOXES[0], BOXES[0]]), SCORES[[0, 0]]
    once = torch.stack([BOXES[0], BOXES[1]]), SCORES[[0, 0]]
    assert compare_outputs(twice, once).num_unmatched == 2


def test_another_order_counts_unless_scores_tie():
    order = torch.tensor([1, 0, 2, 3])
    found = compare(BOXES[order], SCORES[order], CLASSES[order])
    assert (found.num_unmatched, found.num_misplaced, found.is_equal) == (0, 1, False)
    tied = torch.tensor([0.9, 0.9 - 5e-5, 0.5, 0.4])
    found = compare_outputs((BOXES, tied), (BOXES[order], tied[order]))
    assert found.num_misplaced == 0 and found.is_equal


def test_which_of_equal_boxes_is_cut_off_does_not_count():
    scores = torch.tensor([0.9, 0.7, 0.5, 0.5])
    other = BOXES.clone()
    other[3] = torch.tensor([30, 30, 40, 40])
    found = compare_outputs((BOXES, scores), (other, scores))
    assert (found.num_unmatched, found.num_cut, found.is_equal) == (2, 2, True)
    # Not the last score: no cut explains it.
    other = BOXES.clone()
    other[1] = torch.tensor([30, 30, 40, 40])
    found = compare_outputs((BOXES, scores), (other, scores))
    assert (found.num_unmatched, found.num_cut, found.is_equal) == (2, 0, False)
