"""Losses of SC-RPN by hand, and the range of the IoU mask."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import pairwise_iou
from torch.nn import functional as F

from d2proposals.sc_rpn import losses
from d2proposals.sc_rpn.locations import GroundTruth
from d2proposals.sc_rpn.losses import (
    delta_loss,
    iou_loss,
    iou_mask_logits,
    iou_mask_loss,
    iou_mask_targets,
)


def test_iou_loss_by_hand():
    # The same box; half of it; an overlap of 5 x 10 in a union of 150; no overlap: an enclosing
    # area of 900, of which the boxes fill 200.
    pred = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    gt = torch.tensor([[0.0, 0, 10, 10]]).expand(4, 4)
    expected = torch.tensor([0, math.log(2), math.log(3), -math.log(1e-6) + 1 + 7 / 9])
    torch.testing.assert_close(iou_loss(pred, gt), expected)


def test_iou_loss_gradient_by_hand():
    # IoU x / 10 for a box of width x in one of width 10: d(-ln IoU)/dx = -1/x.
    pred = torch.tensor([[0.0, 0, 5, 10]], requires_grad=True)
    iou_loss(pred, torch.tensor([[0.0, 0, 10, 10]])).sum().backward()
    assert pred.grad[0, 2].item() == pytest.approx(-1 / 5)
    # A box that does not touch its object is drawn towards it: its near sides move there.
    pred = torch.tensor([[20.0, 20, 25, 30]], requires_grad=True)
    iou_loss(pred, torch.tensor([[0.0, 0, 10, 10]])).sum().backward()
    assert (pred.grad[0, :2] > 0).all()


def test_delta_loss_compares_deltas():
    torch.manual_seed(0)
    source = torch.tensor([[0.0, 0, 8, 8], [4, 4, 20, 12]])
    gt = torch.tensor([[1.0, 2, 9, 12], [0, 4, 16, 20]])
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    deltas = torch.randn(2, 4) * 0.2
    pred = transform.apply_deltas(deltas, source)
    expected = F.smooth_l1_loss(
        deltas, transform.get_deltas(source, gt), beta=0.1, reduction="none"
    )
    torch.testing.assert_close(delta_loss(pred, gt, source, 0.1), expected.sum(1))


def test_delta_loss_does_not_move_what_deltas_are_measured_from():
    source = torch.tensor([[0.0, 0, 8, 8]], requires_grad=True)
    pred = torch.tensor([[1.0, 1, 8, 8]], requires_grad=True)
    delta_loss(pred, torch.tensor([[2.0, 2, 9, 9]]), source, 0.1).sum().backward()
    assert source.grad is None and pred.grad.abs().sum() > 0


def test_delta_loss_of_a_box_without_width_is_finite():
    # At x 1200 the next float32 is 1.2e-4 away: a box 1e-5 wide has no width left.
    pred = torch.tensor([[1200.0, 0, 1200 + 1e-5, 32]], requires_grad=True)
    source = torch.tensor([[1184.0, 0, 1216, 32]])
    assert pred[0, 0] == pred[0, 2]
    loss = delta_loss(pred, source, source, 0.1)
    # It counts as .01 pixels wide; Smooth L1 of ln(.01 / 32) alone, the centre is that of the box.
    assert loss.item() == pytest.approx(math.log(32 / 0.01) - 0.05, abs=0.02)
    loss.sum().backward()
    assert pred.grad.isfinite().all()


def test_double_sigmoid_range():
    x = torch.tensor([-1e4, 0.0, 1e4])
    mask = iou_mask_logits(x, 2).sigmoid()
    # sigmoid(0), sigmoid(1/2) and sigmoid(1)
    torch.testing.assert_close(
        mask, torch.tensor([0.5, 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1))])
    )
    assert iou_mask_logits(x, 1).sigmoid().tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("num_sigmoid", [1, 2])
def test_iou_mask_loss_is_cross_entropy_of_the_mask(num_sigmoid):
    x, iou = torch.linspace(-3, 3, 7), torch.linspace(0, 1, 7)
    mask = x.sigmoid() if num_sigmoid == 1 else x.sigmoid().sigmoid()
    expected = F.binary_cross_entropy(mask, iou, reduction="none")
    torch.testing.assert_close(iou_mask_loss(x, iou, num_sigmoid), expected)


def test_iou_mask_targets_by_hand(monkeypatch):
    # Objects 0 and 1 are in image 0, object 2 in image 1; image 2 has none.
    gt = GroundTruth(
        torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10]]), torch.tensor([0, 0, 1])
    )
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1)
    image = torch.tensor([0, 0, 1, 2])
    matched = torch.tensor([1, -1, 2, -1])
    # A positive counts its own object, a negative the best one of its image.
    expected = torch.tensor([0.5, 1.0, 1.0, 0.0])
    torch.testing.assert_close(iou_mask_targets(boxes, image, matched, gt), expected)
    monkeypatch.setattr(losses, "_MAX_IOUS", 1)
    torch.testing.assert_close(iou_mask_targets(boxes, image, matched, gt), expected)
    nothing = GroundTruth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert iou_mask_targets(boxes, image, matched * 0 - 1, nothing).tolist() == [0] * 4


def test_iou_mask_targets_compare_with_the_objects_of_their_image(monkeypatch):
    """Negatives alone, of all images at once; an object of another image is not theirs."""
    compared = []

    def count(boxes, gt_boxes):
        compared.append((len(boxes), len(gt_boxes)))
        return pairwise_iou(boxes, gt_boxes)

    monkeypatch.setattr(losses, "pairwise_iou", count)
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    truth = GroundTruth(boxes[:4], torch.tensor([0, 0, 0, 2]))
    image, matched = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([-1, 1, -1, -1, -1])
    assert iou_mask_targets(boxes, image, matched, truth).tolist() == [1, 1, 1, 0, 1]
    assert compared == [(4, 4)]
