"""Where training patches are cut, and their labels.

Source: DeepMask, Sec. 3: a patch's label y says whether an object is centred in it.

Shape shorthand in this module:

    P: number of patches
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class PatchSamples:
    """Where patches are cut; positives first.

    Attributes:
        centers: (P, 2) x, y in pixels of the network input.
        object_sizes: (P,) of the patches.
        image_index: (P,) int64.
        object_index: (P,) int64 the centred object of a positive patch; -1 of a negative one.
        flipped: (P,) bool, mirrored left to right.
        is_valid: (P,) bool; the others are placeholders, where a batch has no objects or no room
            for a negative.
        num_positive: how many of the P are positive.
    """

    centers: torch.Tensor
    object_sizes: torch.Tensor
    image_index: torch.Tensor
    object_index: torch.Tensor
    flipped: torch.Tensor
    is_valid: torch.Tensor
    num_positive: int

    @property
    def labels(self) -> torch.Tensor:
        """(P,) float32, 1 for positives and 0 for negatives (the paper's y is 1 and -1)."""
        position = torch.arange(len(self.centers), device=self.centers.device)
        return (position < self.num_positive).float()
