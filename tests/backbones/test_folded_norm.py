"""Tests of frozen normalisation folded into convolutions."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from d2proposals.backbones.folded_norm import fold_frozen_norms


def frozen_norm(channels):
    norm = FrozenBatchNorm2d(channels)
    norm.weight.uniform_(0.5, 2)
    norm.bias.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 4)
    return norm


def small_network():
    """Both forms of a normed convolution: with a bias, strides, padding, groups and dilation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        frozen_norm(8),
        nn.ReLU(),
        Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, norm=frozen_norm(8), activation=nn.ReLU()),
        nn.Conv2d(8, 4, 1),
        frozen_norm(4),
    )


def test_a_folded_norm_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), FrozenBatchNorm2d(1, eps=0.0))
    nn.init.constant_(model[0].weight, 3)
    nn.init.constant_(model[0].bias, 5)
    for name, value in {"weight": 7, "bias": 1, "running_mean": 2, "running_var": 4}.items():
        getattr(model[1], name).fill_(value)
    assert fold_frozen_norms(model) == 1
    # (2 * 3 + 5 - 2) / sqrt(4) * 7 + 1
    assert model(torch.full((1, 1, 1, 1), 2.0)).item() == 32.5


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_values_and_gradients_stay(needs_gradient):
    model = small_network().requires_grad_(needs_gradient)
    folded = copy.deepcopy(model)
    assert fold_frozen_norms(folded) == 3
    assert fold_frozen_norms(folded) == 0  # once
    x = torch.randn(2, 3, 9, 11, requires_grad=needs_gradient)
    expected, got = model(x), folded(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if needs_gradient:
        direction = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, [x, *model.parameters()], direction)
        gradients = torch.autograd.grad(got, [x, *folded.parameters()], direction)
        for gradient, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)


def test_names_stay_and_weights_that_are_loaded_later_count():
    model, other = small_network(), small_network()
    other[1].bias += 1
    other[0].weight.data += 1
    fold_frozen_norms(model)
    assert list(model.state_dict()) == list(other.state_dict())
    model.load_state_dict(other.state_dict())
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-5)


def test_a_copy_has_its_own_norms():
    model = small_network()
    fold_frozen_norms(model)
    x = torch.randn(1, 3, 6, 6)
    before = model(x)
    copied = copy.deepcopy(model)
    copied[1].bias += 1
    assert torch.equal(model(x), before)
    assert not torch.allclose(copied(x), before)


def test_what_is_no_pair_stays():
    class OwnConv(nn.Conv2d):
        pass

    model = nn.Sequential(
        OwnConv(3, 4, 1),
        FrozenBatchNorm2d(4),
        nn.Conv2d(4, 4, 1, padding=1, padding_mode="reflect"),
        FrozenBatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        FrozenBatchNorm2d(4),
        Conv2d(4, 4, 1, norm=nn.BatchNorm2d(4)),
        Conv2d(4, 4, 1),
    )
    kinds = [type(module) for module in model.modules()]
    assert fold_frozen_norms(model) == 0
    assert [type(module) for module in model.modules()] == kinds
