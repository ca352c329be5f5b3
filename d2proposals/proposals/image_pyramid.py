"""Images at several scales, for generators that read the images themselves.

Shape shorthand in this module:

    H, W: height and width of one image, in pixels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def resize_image(image: torch.Tensor, scale: float) -> torch.Tensor:
    """Resize one image, bilinearly, averaging over what a pixel covers where it gets smaller.

    Args:
        image: (C, H, W), cropped to its extent, so that no padding blends in.
        scale: factor on both sides; results are rounded to whole pixels and at least 1.

    Returns:
        Tensor: (C, round(H * scale), round(W * scale)). Where that rounds, the two factors differ
        a little from ``scale``: take them from the shapes.
    """
    height, width = image.shape[-2:]
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    if size == (height, width):
        return image
    return F.interpolate(
        image[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]


def native_scale(image_size: tuple[int, int], native_short_edge: int) -> float:
    """Factor that takes an image back to the size that a generator's scales refer to.

    Scales of a pyramid refer to images as they were taken. A detector resizes its images first,
    and does not tell the generator.

    Args:
        image_size: (H, W) of the network input.
        native_short_edge: shorter side of images as they are taken, in pixels; 0 if the network
            input has that size.

    Returns:
        float: 1 for ``native_short_edge`` 0.
    """
    return native_short_edge / min(image_size) if native_short_edge > 0 else 1.0
