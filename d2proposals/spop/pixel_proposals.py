"""From SPOP's maps to boxes, one for each cell.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Sec. III-A, III-B, Eq. 5.

Shape shorthand in this module:

    N: number of images in the batch
    Hm, Wm: height and width of the maps, in cells
    T: number of cells of one image, Hm * Wm
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LOCALIZATIONS = ("fused", "large_size", "small_size")


class PixelProposals(NamedTuple):
    """One box of each of T cells.

    Attributes:
        boxes: (T, 4) XYXY; not clipped, not necessarily with x1 < x2.
        logits: (T,) log-odds of the cell being on an object.
    """

    boxes: torch.Tensor
    logits: torch.Tensor


def two_way_log_odds(logits: torch.Tensor) -> torch.Tensor:
    """The logit of the second class's probability under a two-way softmax.

    Args:
        logits: (N, 2, Hm, Wm).

    Returns:
        Tensor: (N, Hm, Wm). Unlike the probability, it still tells nearly certain cells apart.
    """
    return logits[:, 1] - logits[:, 0]


def fuse_coordinates(
    large: torch.Tensor, small: torch.Tensor, size_logits: torch.Tensor
) -> torch.Tensor:
    """Eq. 5: both networks' coordinates, weighted by the confidence z of a large object.

    Args:
        large: (N, 4, Hm, Wm) of the large-size network.
        small: (N, 4, Hm, Wm) of the small-size network.
        size_logits: (N, 2, Hm, Wm), small and large.

    Returns:
        Tensor: (N, 4, Hm, Wm), z * large + (1 - z) * small.
    """
    confidence = two_way_log_odds(size_logits).sigmoid()[:, None]
    return confidence * large + (1 - confidence) * small


def to_image_pixels(
    coordinates: torch.Tensor, normalizer: float, scale: tuple[float, float]
) -> torch.Tensor:
    """Boxes in an image from coordinates in a resized copy of it.

    Args:
        coordinates: (4, Hm, Wm) XYXY, in units of ``normalizer`` pixels of the copy.
        normalizer: pixels per unit.
        scale: (y, x) pixels of the copy per pixel of the image.

    Returns:
        Tensor: (T, 4) XYXY, pixels of the image, row by row.
    """
    y, x = scale
    factor = coordinates.new_tensor([x, y, x, y])
    return coordinates.flatten(1).t() * normalizer / factor
