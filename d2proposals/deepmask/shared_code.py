"""Layers that both branches of the authors' later DeepMask share, behind the trunk.

Source: DeepMask.lua of facebookresearch/deepmask, the network that P. O. Pinheiro, T.-Y. Lin, R.
Collobert and P. Dollar, "Learning to Refine Object Segments", ECCV 2016 (arXiv:1603.08695) builds
on: a 1x1 convolution with ReLU and a linear layer, whose numbers are all that either branch sees.

Shape shorthand in this module:

    P: number of patches
    C: channels of the trunk's map
    m: side of a patch's map, in cells (10)
    D: numbers of a window's code (512)
    Hf, Wf: height and width of a map, in cells
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SharedCode(nn.Module):
    """From the trunk's map of a window to the window's code."""

    def __init__(self, *, in_channels: int, map_size: int, channels: int, code_dim: int) -> None:
        """
        Args:
            in_channels: C.
            map_size: m, in cells.
            channels: of the 1x1 convolution.
            code_dim: D.

        Raises:
            ValueError: a size that makes no sense.
        """
        super().__init__()
        for key, size in (("MASK_CHANNELS", channels), ("CODE_DIM", code_dim)):
            if size < 1:
                raise ValueError(
                    f"MODEL.DEEPMASK.{key} must be at least 1 with SHARED_CODE True, got {size}."
                )
        self.map_size = map_size
        self.conv = nn.Conv2d(in_channels, channels, 1)
        self.encode = nn.Linear(channels * map_size**2, code_dim)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Codes of patches.

        Args:
            maps: (P, C, m, m) of the trunk.

        Returns:
            Tensor: (P, D, 1, 1), a map of one cell for each.
        """
        return self.encode(F.relu(self.conv(maps)).flatten(1))[..., None, None]

    def at_every_window(self, maps: torch.Tensor) -> torch.Tensor:
        """Codes of every window of a whole map: the linear layer as a convolution.

        Args:
            maps: (N, C, Hf, Wf) of the trunk, both sides at least m.

        Returns:
            Tensor: (N, D, Hf - m + 1, Wf - m + 1).
        """
        weight = self.encode.weight
        weight = weight.view(len(weight), self.conv.out_channels, self.map_size, self.map_size)
        return F.conv2d(F.relu(self.conv(maps)), weight, self.encode.bias)
