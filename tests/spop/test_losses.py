"""Equations 1 to 4, by hand."""

import math

import pytest
import torch

from d2proposals.spop.losses import localization_loss, two_way_loss

PRED = [[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.3, 0.3], [9.0, 9.0, 9.0, 9.0]]
TRUE = [[0.1, 0.2, 0.2, 1.0], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]]


# First cell: differences 0, 0, .3, -.4: distance .5. Second: none. Third: background.
@pytest.mark.parametrize("loss_type, expected", [("squared_l2", 0.125 / 2), ("l2", 0.5 / 2)])
def test_distance_of_the_chosen_cells(loss_type, expected):
    pred = torch.tensor(PRED, requires_grad=True)
    loss = localization_loss(pred, torch.tensor(TRUE), torch.tensor([True, True, False]), loss_type)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert pred.grad.isfinite().all() and not pred.grad[2].any()
    scale = {"squared_l2": 1.0, "l2": 2.0}[loss_type]
    assert pred.grad[0].tolist() == pytest.approx([0, 0, 0.15 * scale, -0.2 * scale], abs=1e-6)


def test_no_cells_is_zero_and_connected():
    pred = torch.tensor(PRED, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    logits = torch.zeros(3, 2, requires_grad=True)
    for loss_type in ("squared_l2", "l2"):
        localization_loss(pred, torch.tensor(TRUE), none, loss_type).backward()
    two_way_loss(logits, none, none).backward()
    two_way_loss(logits, none, torch.zeros(0, dtype=torch.int64)).backward()
    assert pred.grad is not None and not pred.grad.any()
    assert logits.grad is not None and not logits.grad.any()


def test_cross_entropy_of_the_chosen_cells():
    # Probabilities of label 1: 3/4, 1/2, and one that is not chosen.
    logits = torch.tensor([[0.0, math.log(3)], [2.0, 2.0], [0.0, 50.0]])
    labels = torch.tensor([False, True, False])
    expected = (-math.log(1 / 4) - math.log(1 / 2)) / 2
    for chosen in (torch.tensor([True, True, False]), torch.tensor([1, 0])):
        assert two_way_loss(logits, labels, chosen).item() == pytest.approx(expected)


def test_gradients():
    pred, true = torch.rand(5, 4).double(), torch.rand(5, 4).double()
    chosen = torch.tensor([True, False, True, True, False])
    for loss_type in ("squared_l2", "l2"):
        assert torch.autograd.gradcheck(
            lambda x, t=loss_type: localization_loss(x, true, chosen, t), pred.requires_grad_()
        )
