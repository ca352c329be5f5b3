"""Convolutions that pad a map with its own mirror image instead of zeros.

The border cell itself is repeated (cba|abc|cba), unlike in torch's "reflect" (cb|abc) and, beyond
one cell, its "replicate" (aa|abc). The released DeepMask pads so (SpatialSymmetricPadding.lua of
facebookresearch/deepmask).

Shape shorthand in this module:

    N: number of images in the batch
    C: channels
    H, W: height and width of a map, in cells
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def pad_symmetrically(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Mirror a map at its borders, as often as it takes.

    Args:
        x: (N, C, H, W).
        rows: above and below.
        columns: left and right.

    Returns:
        Tensor: (N, C, H + 2 rows, W + 2 columns).
    """
    if max(rows, columns) <= 1:  # the same, several times as fast
        return F.pad(x, (columns, columns, rows, rows), mode="replicate")
    for dim, width in ((-2, rows), (-1, columns)):
        side = x.shape[dim]
        index = torch.arange(-width, side + width, device=x.device) % (2 * side)
        x = x.index_select(dim, torch.minimum(index, 2 * side - 1 - index))
    return x


class SymmetricConv2d(nn.Conv2d):
    """A convolution whose ``padding`` is symmetric."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pad_symmetrically(x, *self.padding)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Take the place of every convolution that pads, and its parameters.

        Args:
            module: changed in place, unless it is such a convolution itself.

        Returns:
            The module, or what stands in its place.
        """
        if isinstance(module, nn.Conv2d) and max(module.padding) > 0:
            with torch.device("meta"):
                converted = cls(
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size,
                    stride=module.stride,
                    padding=module.padding,
                    dilation=module.dilation,
                    groups=module.groups,
                    bias=module.bias is not None,
                )
            converted.weight, converted.bias = module.weight, module.bias
            return converted
        for key, child in module.named_children():
            module._modules[key] = cls.convert(child)
        return module
