"""Images at several scales, for generators that read the images themselves.

Shape shorthand in this module:

    H, W: height and width of one image, in pixels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times a factor, in whole pixels, at least 1."""
    height, width = (max(round(side * scale), 1) for side in size)
    return height, width


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize one image, bilinearly, averaging over what a pixel covers where it gets smaller.

    Args:
        image: (C, H, W), cropped to its extent, so that no padding blends in.
        size: (height, width) of the result. Of a factor that :func:`scaled_size` rounded, take the
            factors of both sides from the sizes.

    Returns:
        Tensor: (C, *size), the image itself if that is its size.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(
        image[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
