"""Full-scene inference: DeepMask's network at every window of an image, at several scales.

Source: DeepMask, Sec. 3.3.

Shape shorthand in this module:

    h, w: height and width of the image
    K: number of chosen windows, of all scales
    C: channels of the mask branch's map
    m: side of a window, in cells
    s: side of a predicted mask, in cells
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..proposals.pixel_normalization import PixelNormalization
from .image_canvas import ImageCanvas
from .network import DeepMaskNetwork
from .trunk_maps import TrunkMaps

# Windows that are scored at a time: 48 MiB of hidden units at full width.
_SCORED_WINDOWS = 2**13

# Numbers of the mask branch's maps that wait for the choice of windows: 128 MiB as float32, more
# than the pyramid of an image of 1333 x 800 pixels has.
_WAITING_NUMBERS = 2**25


@dataclass
class WindowPredictions:
    """Windows of one image with the best scores, best first.

    Attributes:
        score_logits: (K,) float32, descending.
        mask_logits: (K, s, s) float32.
        frames: (K, 4) float32 XYXY of the masks: the windows, or a little more where the outermost
            logits are at a window's corners. In [0, 1] of the image's width and height; they reach
            beyond the image.
    """

    score_logits: torch.Tensor
    mask_logits: torch.Tensor
    frames: torch.Tensor


@dataclass
class _Band:
    """Rows of windows of one scale: what is kept of them until windows are chosen.

    Attributes:
        embedded: (C, rows + m - 1, columns + m - 1) the mask branch's map.
        score_logits: (rows, columns) float32 of the windows.
        first_row: how many rows of windows are above.
        image_size: height and width of the scaled image, in pixels.
    """

    embedded: torch.Tensor
    score_logits: torch.Tensor
    first_row: int
    image_size: tuple[int, int]


def network_canvas(
    network: DeepMaskNetwork,
    pixel_normalization: PixelNormalization | nn.Identity,
    image: torch.Tensor,
    scale: float,
    shown: bool = False,
) -> ImageCanvas:
    """The canvas of an image that a network looks at.

    Args:
        network, pixel_normalization, image: as in :func:`predict_windows`.
        scale: factor on the image's sides.
        shown: for pictures: without context, its pixels normalised for the model.
    """
    color = network.canvas_style.border_color
    return ImageCanvas(
        image,
        scale,
        patch_size=network.patch_size,
        context=0 if shown else network.context,
        stride=network.stride,
        style=network.canvas_style,
        border_pixel=pixel_normalization.to_model(color) if color else None,
        normalize=nn.Identity() if shown else pixel_normalization,
    )


@torch.no_grad()
def predict_windows(
    network: DeepMaskNetwork,
    pixel_normalization: PixelNormalization | nn.Identity,
    image: torch.Tensor,
    scales: Sequence[float],
    topk: int,
) -> WindowPredictions:
    """Score every window of a pyramid and predict the masks of the best ones.

    Windows are chosen once, at the end; of a very large image, whenever the maps that wait for it
    take too much memory, which has the same result.

    Args:
        network: in evaluation mode.
        pixel_normalization: from the image's pixels to the trunk's.
        image: (3, h, w) normalised for the model, without padding.
        scales: factors on the image's sides.
        topk: K at most.

    Returns:
        WindowPredictions: windows with equal scores are in the order of scales, rows, columns.
    """
    side = network.mask_head.mask_size
    nothing = torch.zeros(0, device=image.device)
    best = WindowPredictions(nothing, nothing.view(0, side, side), nothing.view(0, 4))
    trunks = _trunks(network)
    waiting: list[_Band] = []
    for scale in scales:
        canvas = network_canvas(network, pixel_normalization, image, scale)
        for band in _bands(network, trunks, canvas):
            waiting.append(band)
            if sum(x.embedded.numel() for x in waiting) > _WAITING_NUMBERS:
                best, waiting = _choose(network, best, waiting, topk), []
    return _choose(network, best, waiting, topk)


@torch.no_grad()
def predict_row_of_windows(
    network: DeepMaskNetwork,
    pixel_normalization: PixelNormalization | nn.Identity,
    image: torch.Tensor,
    scale: float,
    row: int,
) -> WindowPredictions:
    """Scores and masks of all windows of one row, for pictures.

    Args:
        network, pixel_normalization, image: as in :func:`predict_windows`.
        scale: factor on the image's sides.
        row: of windows; they are centred on row ``row * stride`` of the scaled image.

    Returns:
        WindowPredictions: from left to right.
    """
    canvas = network_canvas(network, pixel_normalization, image, scale)
    for band in _bands(network, _trunks(network), canvas):
        if row - band.first_row < len(band.score_logits):
            scores = band.score_logits[row - band.first_row]
            columns = torch.arange(len(scores), device=scores.device)
            rows = torch.full_like(columns, row)
            masks = network.mask_head.at_windows(band.embedded, rows - band.first_row, columns)
            frames = _frames(network, rows, columns, canvas.image_size)
            return WindowPredictions(scores, masks.to(scores), frames)
    raise IndexError(f"the image has no row {row} of windows at scale {scale}")


def _trunks(network: DeepMaskNetwork) -> list[TrunkMaps]:
    """The mask branch's trunk and, if it has one of its own, the scoring branch's."""
    return [TrunkMaps(x) for x in (network.trunk, network.score_trunk) if x is not None]


def _bands(
    network: DeepMaskNetwork, trunks: Sequence[TrunkMaps], canvas: ImageCanvas
) -> Iterator[_Band]:
    """All windows of a scale, in as few bands as the trunk gives its map in."""
    border, size = canvas.map_border, network.map_size
    num_rows = canvas.map_size[0] - 2 * border
    # Rows of each trunk's map that windows of the next band look at as well.
    rests: list[torch.Tensor | None] = [None] * len(trunks)
    first_row, begin = 0, -border
    for maps_of_trunks in zip(*(trunk.bands(canvas) for trunk in trunks), strict=True):
        end = begin + maps_of_trunks[0].shape[1]
        rows = slice(max(-begin, 0), max(min(end, num_rows) - begin, 0))
        for number, maps_i in enumerate(maps_of_trunks):
            cropped = maps_i[:, rows, border : maps_i.shape[2] - border]
            rest = rests[number]
            rests[number] = cropped if rest is None else torch.cat([rest, cropped], dim=1)
        begin = end
        num_windows = rests[0].shape[1] - size + 1
        if num_windows < 1:
            continue
        maps = [network.window_maps(rest) for rest in rests]
        scores = _score(network, maps[-1])
        # Half precision cannot hold the coordinates that are made like the scores.
        embedded = network.mask_head.embed(maps[0][None])[0]
        yield _Band(embedded, scores.float(), first_row, canvas.image_size)
        first_row += num_windows
        rests = [rest[:, num_windows:] for rest in rests]


def _score(network: DeepMaskNetwork, maps: torch.Tensor) -> torch.Tensor:
    """(rows, columns) logits of the windows of a map or of codes, a few rows at a time."""
    size = network.score_head.map_size
    num_rows, num_columns = (side - size + 1 for side in maps.shape[1:])
    step = max(_SCORED_WINDOWS // num_columns, 1)
    pieces = [
        network.score_head.at_every_window(maps[None, :, row : row + step + size - 1])[0]
        for row in range(0, num_rows, step)
    ]
    return torch.cat(pieces)


def _choose(
    network: DeepMaskNetwork, best: WindowPredictions, bands: Sequence[_Band], topk: int
) -> WindowPredictions:
    """The best windows of those found before and of more bands, whose masks are predicted."""
    scores = torch.cat([best.score_logits, *(band.score_logits.flatten() for band in bands)])
    # Sorted whole: topk would not say which of equal scores it takes.
    scores, chosen = scores.sort(descending=True, stable=True)
    scores, chosen = scores[:topk], chosen[:topk]
    masks = scores.new_zeros(len(chosen), *best.mask_logits.shape[1:])
    frames = scores.new_zeros(len(chosen), 4)
    begin = len(best.score_logits)
    known = (chosen < begin).nonzero()[:, 0]
    masks[known], frames[known] = (x[chosen[known]] for x in (best.mask_logits, best.frames))
    for band in bands:
        num_columns = band.score_logits.shape[1]
        end = begin + band.score_logits.numel()
        here = ((chosen >= begin) & (chosen < end)).nonzero()[:, 0]
        rows = torch.div(chosen[here] - begin, num_columns, rounding_mode="floor")
        columns = (chosen[here] - begin) % num_columns
        # Under autocast the network's outputs are of half precision.
        masks[here] = network.mask_head.at_windows(band.embedded, rows, columns).to(masks)
        frames[here] = _frames(network, rows + band.first_row, columns, band.image_size)
        begin = end
    return WindowPredictions(scores, masks, frames)


def _frames(
    network: DeepMaskNetwork, rows: torch.Tensor, columns: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """What masks cover in [0, 1] of the image, (P, 4) XYXY; window (0, 0) is centred on its
    corner."""
    center = torch.stack([columns, rows], dim=1) * float(network.stride)
    half = network.patch_size / 2 * network.mask_head.frame_scale
    frames = torch.cat([center - half, center + half], dim=1)
    height, width = size
    return frames / frames.new_tensor([width, height, width, height])
