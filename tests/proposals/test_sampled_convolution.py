"""Tests of convolutions at some cells."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn
from torch.nn.utils import prune

from d2proposals.proposals.sampled_convolution import (
    conv3x3_at,
    is_watched,
    pointwise_at,
    predict_at,
)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(5, 7), (1, 4), (3, 1), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_convolution_s(layout, size, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)
    x.requires_grad_()
    inputs = [x, *conv.parameters()]
    # Each cell, one of them twice.
    positions = torch.randperm(2 * size[0] * size[1])
    positions = torch.cat([positions, positions[:1]])
    got = conv3x3_at(conv, x, positions)
    expected = conv(x).permute(0, 2, 3, 1).flatten(0, 2)[positions]
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, direction)
    for gradient, other in zip(torch.autograd.grad(got, inputs, direction), wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_no_cell_is_no_row():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    nothing = torch.zeros(0, dtype=torch.int64)
    got = conv3x3_at(conv, torch.zeros(1, 3, 5, 5), nothing)
    assert got.shape == (0, 4)
    got.sum().backward()
    assert conv.weight.grad.abs().max() == 0


def test_rows_by_a_pointwise_convolution():
    conv = nn.Conv2d(2, 1, 1)
    nn.init.constant_(conv.weight, 3)
    nn.init.constant_(conv.bias, 1)
    assert pointwise_at(conv, torch.tensor([[1.0, 2.0]])).tolist() == [[10.0]]


def test_predictions_at_wanted_cells_are_zero_elsewhere():
    torch.manual_seed(0)
    hidden = Conv2d(3, 5, 3, padding=1, activation=F.relu)
    predictors = (nn.Conv2d(5, 2, 1), nn.Conv2d(5, 4, 1))
    x = torch.randn(2, 3, 4, 6)
    is_wanted = torch.rand(2, 24) < 0.3
    outputs = predict_at(hidden, predictors, x, is_wanted)
    for conv, output in zip(predictors, outputs, strict=True):
        expected = conv(hidden(x)).flatten(2).mT * is_wanted[..., None]
        torch.testing.assert_close(output, expected)
    none, _ = predict_at(hidden, predictors, x, torch.zeros_like(is_wanted))
    assert none.shape == (2, 24, 2) and not none.any()


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_a_hook_of_any_part_watches_the_whole(kind):
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(nn.ReLU()))
    assert not is_watched(module)
    handle = getattr(module[1][0], f"register_{kind}")(lambda *_: None)
    assert is_watched(module)
    handle.remove()
    assert not is_watched(module)


def test_pruned_and_compiled_parts_are_called_themselves():
    pruned, compiled = nn.Conv2d(1, 1, 1), nn.Sequential(nn.Conv2d(1, 1, 1))
    prune.l1_unstructured(pruned, "weight", 0.5)
    compiled.compile(backend="eager")
    assert is_watched(pruned) and is_watched(compiled)
