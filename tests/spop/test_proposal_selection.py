"""Refinement, ranking and suppression of the proposals of one image."""

import pytest
import torch

from d2proposals.spop.pixel_proposals import PixelProposals
from d2proposals.spop.proposal_selection import best_proposals, select_proposals
from d2proposals.spop.superpixel_refinement import SuperpixelRefinement

# Four superpixels of 8 x 8.
QUARTERS = 2 * (torch.arange(16) // 8)[:, None] + torch.arange(16) // 8


def select(boxes, logits, size=(16, 16), superpixels=None, **settings):
    if superpixels is not None:
        settings |= {"refinement": SuperpixelRefinement(), "superpixels": superpixels}
    settings = {"nms_thresh": 1.0, "topk": 100} | settings
    initial = PixelProposals(torch.tensor(boxes), torch.tensor(logits))
    return select_proposals(initial, size, **settings)


def test_the_best_in_order_and_equal_ones_as_they_come():
    logits = torch.tensor([1.0, 3.0, torch.nan, 1.0, 2.0])
    boxes = torch.arange(5.0)[:, None].expand(5, 4)
    best = best_proposals(PixelProposals(boxes, logits), 4)
    assert best.boxes[:, 0].tolist() == [1, 4, 0, 3]
    assert best.logits.tolist() == [3, 2, 1, 1]


def test_versions_rank_stably_behind_their_initial_proposal():
    # Two proposals of equal score.
    boxes = [[0.0, 0, 10, 10], [6.0, 6, 16, 16], [3.0, 3, 5, 5]]
    proposals = select(boxes, [2.0, 2.0, 1.0], superpixels=QUARTERS)
    assert proposals.proposal_boxes.tensor.tolist() == [
        [0, 0, 10, 10], [0, 0, 8, 8], [0, 0, 16, 16],
        [6, 6, 16, 16], [8, 8, 16, 16], [0, 0, 16, 16],
        [3, 3, 5, 5], [0, 0, 8, 8],  # nothing inside: no shrunk version
    ]  # fmt: skip
    logits = proposals.objectness_logits
    assert (logits.diff() < 0).all()
    assert logits.tolist() == pytest.approx([2.0] * 6 + [1.0] * 2, abs=1e-5)


def test_superpixels_of_a_copy_of_another_size():
    # The image is twice as high and three times as wide as the copy.
    boxes = [[0.0, 0, 30, 20], [9.0, 6, 15, 10]]
    proposals = select(boxes, [2.0, 1.0], (32, 48), QUARTERS)
    assert proposals.image_size == (32, 48)
    assert proposals.proposal_boxes.tensor.tolist() == [
        [0, 0, 30, 20], [0, 0, 24, 16], [0, 0, 48, 32], [9, 6, 15, 10], [0, 0, 24, 16]
    ]  # fmt: skip


def test_small_versions_are_dropped_like_small_initial_proposals():
    # A side of exactly the limit is too short, too.
    boxes = [[0.0, 0, 10, 10], [0.0, 0, 9, 16]]
    proposals = select(boxes, [2.0, 1.0], superpixels=QUARTERS, min_box_size=8.0)
    assert proposals.proposal_boxes.tensor.tolist() == [
        [0, 0, 10, 10], [0, 0, 16, 16], [0, 0, 9, 16], [0, 0, 16, 16]
    ]  # fmt: skip
    assert proposals.objectness_logits.tolist() == pytest.approx([2, 2, 1, 1], abs=1e-5)


def test_nms_at_08():
    # IoU with the first: 79/100 (kept), 81/100 (gone).
    boxes = [[0.0, 0, 100, 10], [0.0, 0, 81, 10], [0.0, 0, 79, 10]]
    proposals = select(boxes, [3.0, 2.0, 1.0], (20, 200), nms_thresh=0.8)
    assert proposals.proposal_boxes.tensor[:, 2].tolist() == [100, 79]


def test_none_and_nothing_of_use():
    for boxes, logits in (
        (torch.zeros(0, 4), torch.zeros(0)),
        (torch.tensor([[5.0, 5, 5, 9], [-9, -9, -1, -1]]), torch.zeros(2)),
        (torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([torch.nan])),
    ):
        proposals = select_proposals(
            PixelProposals(boxes, logits), (16, 16), nms_thresh=0.8, topk=9,
            refinement=SuperpixelRefinement(), superpixels=QUARTERS,
        )  # fmt: skip
        assert len(proposals) == 0
