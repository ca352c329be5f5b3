"""A scaled image amid a border of one colour, made a few rows at a time.

Source: DeepMask, Sec. 3.3 and 3.4: the network is applied to an image at several scales. The paper
says nothing of borders and resampling; :class:`CanvasStyle` has this project's and those of the
authors' later code (InferDeepMask.lua of facebookresearch/deepmask).

Shape shorthand in this module:

    h, w: height and width of the image
    Hs, Ws: height and width of the scaled image
    H, W: height and width of the canvas
    Hf, Wf: height and width of the trunk's map of it, in cells
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList

from ..proposals.image_pyramid import scaled_size
from ..proposals.patches import crop_patches

# Samples of an image that are averaged at a time when it is scaled: 32 MiB on the CPU.
_CHUNK_SAMPLES = 2**20

# Rows of the image beside those that samples lie in: bilinear weights reach one of them.
_MARGIN = 2


BORDERS = ("context", "half_patch")
RESAMPLINGS = ("area", "bilinear_corners")


@dataclass(frozen=True)
class CanvasStyle:
    """How images are scaled, and what is around them.

    Attributes:
        border: "context": as many pixels that windows are centred on every ``stride``-th pixel of
            the image, from its first corner on, and see as many pixels around them as a training
            patch had context. "half_patch": half a patch on every side, so that windows at the
            image's corners see no context, and the last ones are centred up to a stride beyond it.
        border_color: of what is around the image, in [0, 255], in the trunk's channel order; () for
            the model's mean colour.
        resampling: "area": :func:`scale_image`. "bilinear_corners": :func:`resample_bilinear`, and
            sides of halves of pixels are rounded up.

    Raises:
        ValueError: an unknown name, or another number of channels.
    """

    border: str = "context"
    border_color: tuple[float, ...] = ()
    resampling: str = "area"

    def __post_init__(self) -> None:
        if self.border not in BORDERS:
            raise ValueError(
                f"MODEL.DEEPMASK.BORDER must be one of {BORDERS}, got '{self.border}'."
            )
        if len(self.border_color) not in (0, 3):
            raise ValueError(
                "MODEL.DEEPMASK.BORDER_COLOR needs three numbers, or () for the mean colour, got "
                f"{self.border_color}."
            )
        if self.resampling not in RESAMPLINGS:
            raise ValueError(
                f"MODEL.DEEPMASK.RESAMPLING must be one of {RESAMPLINGS}, got '{self.resampling}'."
            )


class ImageCanvas:
    """An image, scaled, with a border around it, of which only asked-for rows are ever made.

    Attributes:
        size: (H, W); multiples of the stride with the border "context".
        image_size: (Hs, Ws).
        before: rows of the border above the image, columns of it on its left.
        map_size: (Hf, Wf), rounded up.
        map_border: cells at each side of the map that are context alone, no part of a window.
    """

    def __init__(
        self,
        image: torch.Tensor,
        scale: float,
        *,
        patch_size: int,
        context: int,
        stride: int,
        style: CanvasStyle = CanvasStyle(),
        border_pixel: torch.Tensor | None = None,
        normalize: Callable[[torch.Tensor], torch.Tensor] = lambda pixels: pixels,
    ) -> None:
        """
        Args:
            image: (3, h, w) without padding, normalised for the model.
            scale: factor on both of its sides.
            patch_size, context, stride: of the network, in pixels.
            style: see there.
            border_pixel: (3, 1, 1) what the border consists of, normalised for the model; zeros,
                the mean colour, by default.
            normalize: from these pixels to the trunk's.
        """
        self._image, self._scale, self._normalize = image, scale, normalize
        self._border_pixel, self._style = border_pixel, style
        size = tuple(image.shape[-2:])
        self.before = patch_size // 2
        if style.border == "context":
            self.before += context
        if style.resampling == "area":
            self.image_size = scaled_size(size, scale)
        else:
            self.image_size = tuple(max(math.floor(side * scale + 0.5), 1) for side in size)
        self.size = tuple(side + 2 * self.before for side in self.image_size)
        if style.border == "context":
            self.size = tuple(
                length - side % stride
                for length, side in zip(self.size, self.image_size, strict=True)
            )
        self.map_size = [-(-length // stride) for length in self.size]
        self.map_border = (self.before - patch_size // 2) // stride

    def image_pixels(self) -> torch.Tensor:
        """(3, Hs, Ws), the scaled image without its border, normalised for the trunk."""
        return self._normalize(self._scaled(0, self.image_size[0]))

    def border_pixel(self) -> torch.Tensor:
        """(3,), what the border consists of, normalised for the trunk."""
        pixel = self._border_pixel
        pixel = self._image.new_zeros(3, 1, 1) if pixel is None else pixel.to(self._image)
        return self._normalize(pixel)[:, 0, 0]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows ``first`` to ``last`` (not included) of the canvas.

        Returns:
            Tensor: (3, last - first, W), normalised for the trunk.
        """
        height, width = self.image_size
        top, bottom = (min(max(y - self.before, 0), height) for y in (first, last))
        pixels = self._scaled(top, bottom)
        # Rows above the image that are asked for, and those below.
        above = min(max(self.before - first, 0), last - first)
        right = self.size[1] - width - self.before
        padding = (self.before, right, above, last - first - above - (bottom - top))
        if self._border_pixel is None:
            return self._normalize(F.pad(pixels, padding))
        border = self._border_pixel.to(pixels)
        return self._normalize(F.pad(pixels - border, padding) + border)

    def _scaled(self, first: int, last: int) -> torch.Tensor:
        """(3, last - first, Ws), rows of the scaled image, normalised for the model."""
        if self._style.resampling == "area":
            return scale_image(self._image, self._scale, (first, last))
        return resample_bilinear(self._image, self.image_size, (first, last))


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


def resample_bilinear(
    image: torch.Tensor, size: tuple[int, int], rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """Resize an image, or rows of it, by linear samples between pixels, whatever the scale.

    Corner pixels stay corner pixels, and nothing is averaged where an image gets smaller: the
    pyramid of the authors' later code (SpatialReSamplingEx of lua---nnx, "bilinear").

    Args:
        image: (C, h, w).
        size: (Hs, Ws).
        rows: first row of the result and the one after its last; all of them by default.

    Returns:
        Tensor: (C, Hs, Ws) or the rows of it.
    """
    ranges = ((0, size[0]) if rows is None else rows, (0, size[1]))
    for dim, number, (first, last) in zip((1, 2), size, ranges, strict=True):
        side = image.shape[dim]
        # In double precision: which pixels a sample lies between must not depend on rounding.
        position = torch.arange(first, last, device=image.device, dtype=torch.float64)
        position = position * ((side - 1) / max(number - 1, 1))
        before = position.floor().long().clamp(max=side - 1)
        share = (position - before).to(image).view(-1, *[1] * (2 - dim))
        after = (before + 1).clamp(max=side - 1)
        image = torch.lerp(image.index_select(dim, before), image.index_select(dim, after), share)
    return image
