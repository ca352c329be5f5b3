"""Frozen batch normalisation as part of the convolution before it.

A frozen normalisation is y * scale + shift with constants for each channel. Multiplied into the
convolution's weights, which are few, it needs no pass over the maps, neither forward nor backward,
and no memory. Values and gradients are the same but for rounding; parameters keep their names, and
are still those of the convolution and of the normalisation apart. (``torch.nn.utils.fusion`` makes
new parameters instead, so that the old ones are neither trained nor saved.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn


class NormedConv2d(Conv2d):
    """Detectron2's convolution with its frozen ``norm`` folded into the weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, D, h, w), normalised and activated."""
        x = _normed_convolution(self, self.norm, x)
        return x if self.activation is None else self.activation(x)


class ConvBeforeNorm2d(nn.Conv2d):
    """A convolution with the frozen normalisation that follows it in a sequence folded in."""

    # In a tuple, so that it is no part of this module: it keeps its place and name.
    folded_norm: tuple[FrozenBatchNorm2d]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, D, h, w), normalised."""
        return _normed_convolution(self, self.folded_norm[0], x)


class FoldedNorm2d(FrozenBatchNorm2d):
    """A frozen normalisation that the convolution before it has done."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x``."""
        return x


def fold_frozen_norms(model: nn.Module) -> int:
    """Fold every frozen normalisation that directly follows a convolution into it.

    Found are Detectron2's convolutions with a ``norm``, and neighbours in an ``nn.Sequential``.
    Modules are changed in place and keep their parameters, hooks and names: only their class, and
    with it what ``forward`` does, becomes another.

    Args:
        model: with any modules; subclasses of the ones above are left alone.

    Returns:
        int: number of normalisations that are folded now and were not before.
    """
    folded = 0
    for module in model.modules():
        if type(module) is Conv2d and type(module.norm) is FrozenBatchNorm2d:
            module.__class__ = NormedConv2d
            folded += 1
        if not isinstance(module, nn.Sequential):
            continue
        layers = list(module)
        for conv, norm in zip(layers, layers[1:], strict=False):
            is_pair = type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d
            # What pads with other numbers than zeros does so in Conv2d.forward.
            if is_pair and conv.padding_mode == "zeros":
                conv.__class__, norm.__class__ = ConvBeforeNorm2d, FoldedNorm2d
                conv.folded_norm = (norm,)
                folded += 1
    return folded


def applied_weights(conv: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (D, C, h, w) and bias (D,) with which a convolution computes, its norm folded or not.

    For who computes a convolution without its module, at another padding for instance.
    """
    if isinstance(conv, ConvBeforeNorm2d):
        return _folded_weights(conv, conv.folded_norm[0])
    return conv.weight, conv.bias


def _normed_convolution(conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, D, h, w)."""
    weight, shift = _folded_weights(conv, norm)
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def _folded_weights(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution and the normalisation behind it as one."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (D,)
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv.weight * scale[:, None, None, None], shift
