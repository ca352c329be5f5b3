"""Running a convolutional network on an image of any size within a bound on memory.

Shape shorthand in this module:

    H, W: height and width of the image, in pixels
    Hm, Wm: height and width of the output maps, in cells: ceil(H / stride), ceil(W / stride)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch


def run_in_tiles(
    network: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    image: torch.Tensor,
    *,
    stride: int,
    receptive_field: int,
    tile_size: int,
) -> list[torch.Tensor]:
    """Run a network on overlapping tiles and join its maps, or on the whole of a small image.

    Tiles overlap by the receptive field and begin on multiples of the stride, so the maps are those
    of the whole image. (Normalisation by a map's own statistics, as in group normalisation, sees a
    tile instead.)

    Args:
        network: maps (1, C, h, w) to maps of at least ceil(h / stride) x ceil(w / stride) cells, of
            which cell (i, j) is centred on pixel (stride * i, stride * j).
        image: (C, H, W).
        stride: pixels per cell.
        receptive_field: side of the square of pixels that a cell depends on.
        tile_size: side of the part that a tile yields the cells of, in pixels, a multiple of
            ``stride``. With the overlap on both sides, a tile is a receptive field larger; sides of
            images up to that are not cut.

    Returns:
        list[Tensor]: (D, Hm, Wm) maps: the cells centred inside the image.
    """
    size = tuple(image.shape[-2:])
    margin = -(-(receptive_field // 2) // stride) * stride
    parts = [_parts(side, stride, margin, tile_size) for side in size]
    rows, columns = (part[-1][1] for part in parts)
    if all(len(part) == 1 for part in parts):
        return [x[0, :, :rows, :columns] for x in network(image[None])]
    maps: list[torch.Tensor] = []
    for (top, bottom), (left, right) in product(*parts):
        start_y, start_x = (max(x * stride - margin, 0) for x in (top, left))
        end_y, end_x = (x * stride + margin for x in (bottom, right))
        outputs = network(image[None, :, start_y:end_y, start_x:end_x])
        if not maps:
            maps = [x.new_empty(x.shape[1], rows, columns) for x in outputs]
        y, x = start_y // stride, start_x // stride
        for whole, part in zip(maps, outputs, strict=True):
            whole[:, top:bottom, left:right] = part[
                0, :, top - y : bottom - y, left - x : right - x
            ]
    return maps


def _parts(side: int, stride: int, margin: int, tile_size: int) -> list[tuple[int, int]]:
    """Ranges of cells along a side, one of each tile; one range if a tile holds the whole side."""
    cells = -(-side // stride)
    step = cells if side <= tile_size + 2 * margin else tile_size // stride
    return [(start, min(start + step, cells)) for start in range(0, cells, step)]
