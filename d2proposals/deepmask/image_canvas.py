"""A scaled image amid a border of the mean colour, made a few rows at a time.

Source: DeepMask, Sec. 3.3 and 3.4: the network is applied to an image at several scales.

Shape shorthand in this module:

    h, w: height and width of the image
    Hs, Ws: height and width of the scaled image
    H, W: height and width of the canvas, both multiples of the stride
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList

from ..proposals.image_pyramid import scaled_size
from ..proposals.patches import crop_patches

# Samples of an image that are averaged at a time when it is scaled: 32 MiB on the CPU.
_CHUNK_SAMPLES = 2**20

# Rows of the image beside those that samples lie in: bilinear weights reach one of them.
_MARGIN = 2


class ImageCanvas:
    """An image, scaled, with zeros around it, of which only asked-for rows are ever made.

    Unlike the paper, which says nothing of the image's border: zeros are the mean colour, and there
    are enough of them that windows are centred on every ``stride``-th pixel of the image, from its
    first corner on, and see as many pixels around them as a training patch had context.

    Attributes:
        size: (H, W), of (Hs // stride + 1) x (Ws // stride + 1) windows.
        image_size: (Hs, Ws).
        before: rows of zeros above the image, columns of them on its left.
    """

    def __init__(
        self,
        image: torch.Tensor,
        scale: float,
        *,
        patch_size: int,
        context: int,
        stride: int,
        normalize: Callable[[torch.Tensor], torch.Tensor] = lambda pixels: pixels,
    ) -> None:
        """
        Args:
            image: (3, h, w) without padding, normalised for the model.
            scale: factor on both of its sides.
            patch_size, context, stride: of the network, in pixels.
            normalize: from these pixels to the trunk's.
        """
        self._image, self._scale, self._normalize = image, scale, normalize
        self.image_size = scaled_size(tuple(image.shape[-2:]), scale)
        self.before = patch_size // 2 + context
        self.size = tuple(side - side % stride + 2 * self.before for side in self.image_size)

    def image_pixels(self) -> torch.Tensor:
        """(3, Hs, Ws), the scaled image without its border, normalised for the trunk."""
        return self._normalize(scale_image(self._image, self._scale))

    def border_pixel(self) -> torch.Tensor:
        """(3,), what the border consists of, normalised for the trunk."""
        return self._normalize(self._image.new_zeros(3, 1, 1))[:, 0, 0]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows ``first`` to ``last`` (not included) of the canvas.

        Returns:
            Tensor: (3, last - first, W), normalised for the trunk.
        """
        height, width = self.image_size
        top, bottom = (min(max(y - self.before, 0), height) for y in (first, last))
        pixels = scale_image(self._image, self._scale, (top, bottom))
        # Rows above the image that are asked for, and those below.
        above = min(max(self.before - first, 0), last - first)
        right = self.size[1] - width - self.before
        padding = (self.before, right, above, last - first - above - (bottom - top))
        return self._normalize(F.pad(pixels, padding))


def scale_image(
    image: torch.Tensor, scale: float, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """Resize an image, or rows of it, with the filter by which training patches are cut out.

    A window of the scaled image holds the pixels of the training patch cut at that place and scale:
    averages over what a pixel covers where the image gets smaller, bilinear samples where it gets
    larger. (An anti-aliased resize blurs twice as wide.) A pixel's width of zeros around the image
    blends into its border, as it does in patches that reach beyond the image.

    Args:
        image: (C, h, w) without padding, normalised, so that zero is the mean colour.
        scale: factor on both sides.
        rows: first row of the result and the one after its last; all of them by default.

    Returns:
        Tensor: (C, Hs, Ws) or the rows of it; the image's own if that is its size.
    """
    height, width = image.shape[-2:]
    num_rows, num_columns = scaled_size((height, width), scale)
    first, last = (0, num_rows) if rows is None else rows
    if (num_rows, num_columns) == (height, width):
        return image if rows is None else image[:, first:last]
    if first == last:
        return image.new_zeros(len(image), 0, num_columns)
    # The patch's number of samples per pixel, whatever rounding does to the sides.
    ratio = math.ceil(1 / scale)
    step = height / num_rows
    # The rows of the image that these look at: the rest is not copied.
    begin = max(math.floor(first * step) - _MARGIN, 0)
    source = image[:, begin : math.ceil(last * step) + _MARGIN]
    # Bands of rows, the last of which may reach beyond them: RoIAlign lists the samples of one box
    # at a time.
    band = min(max(_CHUNK_SAMPLES // (num_columns * ratio**2), 1), last - first)
    # Half precision cannot hold the coordinates of a large image.
    dtype = torch.promote_types(image.dtype, torch.float32)
    top = torch.arange(first, last, band, device=image.device, dtype=dtype)
    zeros = torch.zeros_like(top)
    boxes = torch.stack(
        [zeros, top * step - begin, zeros + width, (top + band) * step - begin], dim=1
    )
    bands = crop_patches(
        ImageList(source[None], [tuple(source.shape[-2:])]),
        boxes,
        zeros.long(),
        (band, num_columns),
        sampling_ratio=ratio,
    )
    return bands.transpose(0, 1).flatten(1, 2)[:, : last - first]
