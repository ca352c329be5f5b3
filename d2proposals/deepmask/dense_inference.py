"""Full-scene inference: DeepMask's network at every window of an image, at several scales.

Source: DeepMask, Sec. 3.3. Around a scaled image there is a border of the mean colour, so that
windows are centred on every ``stride``-th pixel of it, from its first corner on.

Shape shorthand in this module:

    h, w: height and width of the image
    Hs, Ws: height and width of the scaled image
    K: number of chosen windows, of all scales
    s: side of a predicted mask, in cells
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import nn

from ..proposals.patches import crop_patches
from .network import DeepMaskNetwork

# Pixels that go through the trunk at a time. Its first layer alone takes 64 float32 numbers for
# each pixel, twice, at full width: 1 GiB in all.
TILE_PIXELS = 2**21

# Samples of an image that are averaged at a time when it is scaled: 32 MiB on the CPU.
_CHUNK_SAMPLES = 2**20


@dataclass
class WindowPredictions:
    """Windows of one image with the best scores, best first.

    Attributes:
        score_logits: (K,) float32, descending.
        mask_logits: (K, s, s) float32.
        frames: (K, 4) float32 XYXY of the windows, in [0, 1] of the image's width and height; they
            reach beyond the image.
    """

    score_logits: torch.Tensor
    mask_logits: torch.Tensor
    frames: torch.Tensor


@dataclass
class _Scale:
    """One scale of the pyramid: what is kept of it until windows are chosen.

    Attributes:
        embedded: (C, Hf, Wf) the mask branch's map.
        score_logits: (rows, columns) float32 of the windows.
        size: (Hs, Ws).
    """

    embedded: torch.Tensor
    score_logits: torch.Tensor
    size: tuple[int, int]


@torch.no_grad()
def predict_windows(
    network: DeepMaskNetwork,
    pixel_normalization: nn.Module,
    image: torch.Tensor,
    scales: Sequence[float],
    topk: int,
) -> WindowPredictions:
    """Score every window of a pyramid and predict the masks of the best ones.

    Args:
        network: in evaluation mode.
        pixel_normalization: from the image's pixels to the trunk's.
        image: (3, h, w) normalised for the model, without padding.
        scales: factors on the image's sides.
        topk: K at most.

    Returns:
        WindowPredictions: windows with equal scores are in the order of scales, rows, columns.
    """
    pyramid = [_scale(network, pixel_normalization, image, scale) for scale in scales]
    scores = torch.cat([level.score_logits.flatten() for level in pyramid])
    # Sorted whole: topk would not say which of equal scores it takes.
    scores, chosen = scores.sort(descending=True, stable=True)
    scores, chosen = scores[:topk], chosen[:topk]
    masks = scores.new_zeros(len(chosen), network.mask_head.mask_size, network.mask_head.mask_size)
    frames = scores.new_zeros(len(chosen), 4)
    begin = 0
    for level in pyramid:
        num_columns = level.score_logits.shape[1]
        end = begin + level.score_logits.numel()
        here = ((chosen >= begin) & (chosen < end)).nonzero()[:, 0]
        rows = torch.div(chosen[here] - begin, num_columns, rounding_mode="floor")
        columns = (chosen[here] - begin) % num_columns
        # Under autocast the network's outputs are of half precision.
        masks[here] = network.mask_head.at_windows(level.embedded, rows, columns).to(masks)
        frames[here] = _frames(network, rows, columns, level.size)
        begin = end
    return WindowPredictions(scores, masks, frames)


def _scale(
    network: DeepMaskNetwork, pixel_normalization: nn.Module, image: torch.Tensor, scale: float
) -> _Scale:
    """Both branches' maps of one scale."""
    scaled = scale_image(image, scale)
    canvas = pixel_normalization(make_canvas(scaled, network))
    maps = tiled_map(network.trunk, canvas)
    border = network.context // network.stride
    embedded = network.mask_head.embed(_crop(maps, border)[None])[0]
    if network.score_trunk is not None:
        maps = tiled_map(network.score_trunk, canvas)
    scores = network.score_head.at_every_window(_crop(maps, border)[None])[0]
    # Half precision cannot hold the coordinates that are made like the scores.
    return _Scale(embedded, scores.float(), tuple(scaled.shape[-2:]))


def scale_image(image: torch.Tensor, scale: float) -> torch.Tensor:
    """Resize an image with the filter by which training patches are cut out.

    A window of the scaled image holds the pixels of the training patch cut at that place and scale:
    averages over what a pixel covers where the image gets smaller, bilinear samples where it gets
    larger. (An anti-aliased resize blurs twice as wide.) A pixel's width of zeros around the image
    blends into its border, as it does in patches that reach beyond the image.

    Args:
        image: (C, h, w) without padding, normalised, so that zero is the mean colour.
        scale: factor on both sides; results are rounded to whole pixels and at least 1.

    Returns:
        Tensor: (C, Hs, Ws); the image itself if that is its size.
    """
    height, width = image.shape[-2:]
    rows, columns = max(round(height * scale), 1), max(round(width * scale), 1)
    if (rows, columns) == (height, width):
        return image
    # The patch's number of samples per pixel, whatever rounding does to the sides.
    ratio = math.ceil(1 / scale)
    # Bands of rows, the last of which may reach beyond the image: RoIAlign lists the samples of one
    # box at a time.
    band = min(max(_CHUNK_SAMPLES // (columns * ratio**2), 1), rows)
    top = torch.arange(0, rows, band, device=image.device, dtype=image.dtype)
    zeros = torch.zeros_like(top)
    step = height / rows
    boxes = torch.stack([zeros, top * step, zeros + width, (top + band) * step], dim=1)
    bands = crop_patches(
        ImageList(image[None], [(height, width)]),
        boxes,
        zeros.long(),
        (band, columns),
        sampling_ratio=ratio,
    )
    return bands.transpose(0, 1).flatten(1, 2)[:, :rows]


def make_canvas(scaled: torch.Tensor, network: DeepMaskNetwork) -> torch.Tensor:
    """An image with zeros around it, so that windows are centred on every ``stride``-th pixel.

    Unlike the paper, which says nothing of the image's border: zeros are the mean colour, and
    beyond the outermost windows there are as many of them as a training patch had context.

    Args:
        scaled: (3, Hs, Ws).
        network: gives the sizes.

    Returns:
        Tensor: (3, H, W), both multiples of the stride, with Hs // stride + 1 rows of windows
        and Ws // stride + 1 columns.
    """
    before = network.patch_size // 2 + network.context
    after_height, after_width = (before - size % network.stride for size in scaled.shape[-2:])
    return F.pad(scaled, (before, after_width, before, after_height))


def tiled_map(trunk: Backbone, canvas: torch.Tensor) -> torch.Tensor:
    """The trunk's map of an image whatever its size, at bounded memory.

    The image goes through the trunk in tiles that overlap by what a cell sees beyond its own
    pixels, so the map is that of the whole image.

    Args:
        trunk: as in :class:`DeepMaskNetwork`.
        canvas: (3, H, W), both multiples of the trunk's stride.

    Returns:
        Tensor: (C, H / stride, W / stride).
    """
    sides = [side // trunk.stride for side in canvas.shape[-2:]]
    tile_sides = _tile_sides(sides, TILE_PIXELS, trunk)
    if tile_sides == sides:
        (maps,) = trunk(canvas[None]).values()
        return maps[0]
    (shape,) = trunk.output_shape().values()
    maps = canvas.new_empty(shape.channels, *sides)
    halo = trunk.context // trunk.stride
    for top in range(0, sides[0], tile_sides[0]):
        for left in range(0, sides[1], tile_sides[1]):
            (y1, y2, row), (x1, x2, column) = (
                (begin, min(begin + tile, side), max(begin - halo, 0))
                for begin, tile, side in zip((top, left), tile_sides, sides, strict=True)
            )
            tile = canvas[
                :,
                row * trunk.stride : (y2 + halo) * trunk.stride,
                column * trunk.stride : (x2 + halo) * trunk.stride,
            ]
            (tile_map,) = trunk(tile[None]).values()
            maps[:, y1:y2, x1:x2] = tile_map[0, :, y1 - row : y2 - row, x1 - column : x2 - column]
    return maps


def _tile_sides(sides: list[int], num_pixels: int, trunk: Backbone) -> list[int]:
    """Sides of tiles without their overlap, in cells, both sides at most those of the map.

    A tile is as wide as the map's shorter side if it can be, because overlaps cost work.
    """
    halo = trunk.context // trunk.stride
    num_cells = num_pixels // trunk.stride**2
    if sides[0] * sides[1] <= num_cells:
        return sides
    short = min(min(sides), max(int(num_cells**0.5) - 2 * halo, 1))
    overlap = 0 if short == min(sides) else 2 * halo
    long = min(max(num_cells // (short + overlap) - 2 * halo, 1), max(sides))
    return [short, long] if sides[0] <= sides[1] else [long, short]


def _crop(maps: torch.Tensor, border: int) -> torch.Tensor:
    """(C, Hf, Wf) without ``border`` cells on each side."""
    height, width = maps.shape[-2:]
    return maps[:, border : height - border, border : width - border]


def _frames(
    network: DeepMaskNetwork, rows: torch.Tensor, columns: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Windows in [0, 1] of the image, (P, 4) XYXY; window (0, 0) is centred on its corner."""
    center = torch.stack([columns, rows], dim=1) * float(network.stride)
    half = network.patch_size / 2
    frames = torch.cat([center - half, center + half], dim=1)
    height, width = size
    return frames / frames.new_tensor([width, height, width, height])
