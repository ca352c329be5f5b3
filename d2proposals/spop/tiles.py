"""Running a convolutional network on an image of any size within a bound on memory.

Shape shorthand in this module:

    H, W: height and width of the image, in pixels
    Hm, Wm: height and width of the output maps, in cells: ceil(H / stride), ceil(W / stride)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        tile_size: longest side of an image that is run as a whole, and side of the part that a tile
            yields the cells of; in pixels, a multiple of ``stride``.

    Returns:
        list[Tensor]: (D, Hm, Wm) maps: the cells centred inside the image.
    """
    height, width = image.shape[-2:]
    rows, columns = -(-height // stride), -(-width // stride)
    if max(height, width) <= tile_size:
        return [x[0, :, :rows, :columns] for x in network(image[None])]
    margin = -(-(receptive_field // 2) // stride) * stride
    cells = max(tile_size // stride, 1)
    maps: list[torch.Tensor] = []
    for row in range(0, rows, cells):
        top, bottom = row * stride, min(row + cells, rows) * stride
        for column in range(0, columns, cells):
            left, right = column * stride, min(column + cells, columns) * stride
            start_y, start_x = max(top - margin, 0), max(left - margin, 0)
            tile = image[:, start_y : bottom + margin, start_x : right + margin]
            outputs = network(tile[None])
            if not maps:
                maps = [x.new_empty(x.shape[1], rows, columns) for x in outputs]
            inner_row, inner_column = row - start_y // stride, column - start_x // stride
            for whole, part in zip(maps, outputs, strict=True):
                target = whole[:, row : row + cells, column : column + cells]
                target.copy_(
                    part[
                        0,
                        :,
                        inner_row : inner_row + target.shape[1],
                        inner_column : inner_column + target.shape[2],
                    ]
                )
    return maps
