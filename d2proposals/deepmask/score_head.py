"""DeepMask's scoring branch, for patches and for every window of a whole map.

Source: DeepMask, Sec. 3.1, 3.3 and 3.4; :class:`CodeScoreHead` as in the authors' later code
(DeepMask.lua of facebookresearch/deepmask).

Shape shorthand in this module:

    P: number of patches
    C: channels of the trunk's map
    m: side of a patch's map, in cells (14)
    Hf, Wf: height and width of a map, in cells
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class ScoreHead(nn.Module):
    """Scoring branch: 2x2 max pooling, then three fully connected layers (Sec. 3.1, 3.4)."""

    def __init__(
        self,
        *,
        in_channels: int,
        map_size: int,
        hidden_dims: Sequence[int] = (512, 1024),
        dropout: float = 0.5,
    ) -> None:
        """
        Args:
            in_channels: C.
            map_size: m, in cells; even.
            hidden_dims: units of the two hidden layers.
            dropout: rate after each of them.

        Raises:
            ValueError: not two hidden layers, or an odd map.
        """
        super().__init__()
        if len(hidden_dims) != 2:
            raise ValueError(f"MODEL.DEEPMASK.SCORE_DIMS needs two numbers, got {hidden_dims}.")
        if map_size % 2:
            raise ValueError(
                "MODEL.DEEPMASK.PATCH_SIZE must be an even multiple of the trunk's stride, got a "
                f"map of {map_size} x {map_size} cells."
            )
        self.map_size = map_size
        self.fc1 = nn.Linear(in_channels * (map_size // 2) ** 2, hidden_dims[0])
        self.fc2 = nn.Linear(hidden_dims[0], hidden_dims[1])
        self.fc3 = nn.Linear(hidden_dims[1], 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Logits of scores.

        Args:
            maps: (P, C, m, m) of the trunk.

        Returns:
            Tensor: (P,).
        """
        x = F.max_pool2d(maps, 2).flatten(1)
        x = self.dropout(F.relu(self.fc1(x)))
        x = self.dropout(F.relu(self.fc2(x)))
        return self.fc3(x)[:, 0]

    def at_every_window(self, maps: torch.Tensor) -> torch.Tensor:
        """Logits of scores at every window of a whole map (Sec. 3.3).

        A window's pooling starts at its own first cell. The interleaving trick computes that on
        shifted copies of the map; pooling with stride 1 and reading every second cell is the same.

        Args:
            maps: (N, C, Hf, Wf) of the trunk, both sides at least m.

        Returns:
            Tensor: (N, Hf - m + 1, Wf - m + 1).
        """
        side = self.map_size // 2
        x = F.max_pool2d(maps, 2, stride=1)
        weight = self.fc1.weight.view(len(self.fc1.weight), maps.shape[1], side, side)
        x = self.dropout(F.relu(F.conv2d(x, weight, self.fc1.bias, dilation=2)))
        x = x.flatten(2).transpose(1, 2)  # (N, windows, hidden)
        x = self.dropout(F.relu(self.fc2(x)))
        windows = [side - self.map_size + 1 for side in maps.shape[-2:]]
        return self.fc3(x).view(-1, *windows)


class CodeScoreHead(nn.Module):
    """Scoring branch on the code of :class:`SharedCode`: one hidden layer, dropout before both.

    Attributes:
        map_size: 1, a window's code being a map of one cell.
    """

    map_size = 1

    def __init__(self, *, code_dim: int, hidden_dims: Sequence[int], dropout: float = 0.5) -> None:
        """
        Args:
            code_dim: D, numbers of a window's code.
            hidden_dims: units of the hidden layer.
            dropout: rate before each of the two layers.

        Raises:
            ValueError: not one hidden layer.
        """
        super().__init__()
        if len(hidden_dims) != 1:
            raise ValueError(
                "MODEL.DEEPMASK.SCORE_DIMS needs one number with SHARED_CODE True, got "
                f"{tuple(hidden_dims)}."
            )
        self.fc1 = nn.Linear(code_dim, hidden_dims[0])
        self.fc2 = nn.Linear(hidden_dims[0], 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Logits of scores, (P, D, 1, 1) -> (P,)."""
        return self.at_every_window(codes)[:, 0, 0]

    def at_every_window(self, codes: torch.Tensor) -> torch.Tensor:
        """Logits of scores at every window, (N, D, rows, columns) -> (N, rows, columns)."""
        x = codes.permute(0, 2, 3, 1)  # (N, rows, columns, D)
        x = F.relu(self.fc1(self.dropout(x)))
        return self.fc2(self.dropout(x))[..., 0]
