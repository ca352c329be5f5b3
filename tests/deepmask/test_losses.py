"""Eq. 1 and its gradient by hand."""

import math

import pytest
import torch

from d2proposals.deepmask.losses import mask_loss, score_loss


def test_equation_1_by_hand():
    # Three patches of 1 x 2 pixels: y = 1, 1, -1; m = (1, -1), (1, 1), unused.
    f_segm = torch.tensor([[[2.0, 1.0]], [[-1.0, 0.0]], [[7.0, -7.0]]], requires_grad=True)
    m = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]]])
    f_score = torch.tensor([0.5, -2.0, 1.5], requires_grad=True)
    y = torch.tensor([1.0, 1.0, 0.0])
    segmentation = mask_loss(f_segm, m, y == 1)
    objectness = score_loss(f_score, y, torch.tensor([True, True, True]))

    def log(x):
        return math.log(1 + math.exp(x))

    first = (log(-2) + log(1)) / 2 + (log(1) + log(0)) / 2
    second = log(-0.5) + log(2) + log(1.5)
    assert segmentation.item() == pytest.approx(first, rel=1e-5)
    assert objectness.item() == pytest.approx(second, rel=1e-5)

    (segmentation + objectness / 32).backward()

    def slope(sign, f):  # of log(1 + exp(-sign f))
        return -sign / (1 + math.exp(sign * f))

    expected = [[slope(1, 2) / 2, slope(-1, 1) / 2], [slope(1, -1) / 2, slope(1, 0) / 2], [0, 0]]
    torch.testing.assert_close(f_segm.grad[:, 0], torch.tensor(expected))
    expected = [slope(1, 0.5) / 32, slope(1, -2) / 32, slope(-1, 1.5) / 32]
    torch.testing.assert_close(f_score.grad, torch.tensor(expected))


def test_patches_that_are_no_samples_count_for_nothing():
    f = torch.randn(2, 3, 3, requires_grad=True)
    loss = mask_loss(f, torch.ones(2, 3, 3), torch.tensor([False, False]))
    loss.backward()
    assert loss == 0 and f.grad.abs().sum() == 0
    assert score_loss(f[:, 0, 0], torch.ones(2), torch.tensor([False, False])) == 0


def test_gradients_numerically():
    torch.manual_seed(0)
    f = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(3, 2, 2).round().double()
    is_sample = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, targets, is_sample), f)
    assert torch.autograd.gradcheck(
        lambda x: score_loss(x[:, 0, 0], targets[:, 0, 0], is_sample), f
    )


def test_logits_of_half_precision_lose_no_more_of_it():
    torch.manual_seed(0)
    f = torch.randn(5, 8, 8).bfloat16()
    targets = torch.rand(5, 8, 8).round()
    is_sample = torch.ones(5, dtype=torch.bool)
    assert mask_loss(f, targets, is_sample) == mask_loss(f.float(), targets, is_sample)
    f, targets = f[:, 0, 0], targets[:, 0, 0]
    assert score_loss(f, targets, is_sample) == score_loss(f.float(), targets, is_sample)
