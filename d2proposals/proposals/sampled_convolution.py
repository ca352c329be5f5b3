"""A 3x3 convolution at some cells of a map.

Losses read a few hundred of the tens of thousands of cells that a head predicts at. What the head
computes there alone costs next to nothing, in particular of the backward pass.

Shape shorthand in this module:

    N: number of images in the batch
    C, D: input and output channels
    P: number of output cells
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn


def conv3x3_at(conv: nn.Conv2d, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A 3x3 convolution of stride 1 and padding 1, without norm or activation, at some cells.

    Args:
        conv: whose weight (D, C, 3, 3) and bias are used.
        x: (N, C, H, W).
        positions: (P,) int64 in [0, N * H * W), the cells of one image after the other.

    Returns:
        Tensor: (P, D), equal in values and gradients to the convolution there but for rounding.
    """
    height, width = x.shape[-2:]
    table = x.permute(0, 2, 3, 1).flatten(0, 2)  # (N * H * W, C), a view where channels are last
    step = torch.arange(-1, 2, device=x.device)
    cell = positions % (height * width)
    row = (cell // width)[:, None] + step  # (P, 3)
    column = (cell % width)[:, None] + step
    is_inside = _within(row, height)[:, :, None] & _within(column, width)[:, None, :]
    taps = positions[:, None, None] + step[:, None] * width + step  # (P, 3, 3)
    # What lies outside is read anywhere, and counts as zero.
    taps = torch.where(is_inside, taps, positions[:, None, None])
    values = F.embedding(taps.flatten(1), table) * is_inside.flatten(1)[..., None]  # (P, 9, C)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 9 * C)
    return F.linear(values.flatten(1), weight, conv.bias)


def pointwise_at(conv: nn.Conv2d, rows: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution of rows (P, C): (P, D)."""
    return F.linear(rows, conv.weight.flatten(1), conv.bias)


def predict_at(
    hidden: Conv2d, predictors: Sequence[nn.Conv2d], x: torch.Tensor, is_wanted: torch.Tensor
) -> list[torch.Tensor]:
    """What 1x1 convolutions make of a 3x3 convolution and its activation, at some cells.

    Args:
        hidden: Detectron2's, without norm, as of :func:`conv3x3_at`.
        predictors: 1x1 convolutions of its output.
        x: (N, C, H, W).
        is_wanted: (N, H * W) bool.

    Returns:
        list[Tensor]: of each predictor (N, H * W, its channels), zero at the other cells.
    """
    positions = is_wanted.flatten().nonzero()[:, 0]
    rows = hidden.activation(conv3x3_at(hidden, x, positions))
    outputs = []
    for conv in predictors:
        values = pointwise_at(conv, rows)
        dense = values.new_zeros(is_wanted.numel(), values.shape[1])
        outputs.append(dense.index_put((positions,), values).unflatten(0, is_wanted.shape))
    return outputs


def is_watched(module: nn.Module) -> bool:
    """Whether a part of a module has to be called itself: because it has hooks, as those of the
    warning of a collapse, of pruning and of weight norms, or because it is compiled."""
    return any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or part._compiled_call_impl is not None
        for part in module.modules()
    )


def _within(index: torch.Tensor, size: int) -> torch.Tensor:
    return (index >= 0) & (index < size)
