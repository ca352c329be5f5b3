"""The trunk's map of a canvas, whatever its size: at bounded memory, and its border once.

A small image's canvas is mostly border, of one colour. What the trunk makes of that does not depend
on the image beyond what a cell sees, so it is computed on a small empty canvas and copied. A large
image goes through the trunk in tiles.

Shape shorthand in this module:

    C: channels of a map
    H, W: height and width of a canvas, in pixels
    T: side of the empty canvas, in pixels or in cells of a layer's map
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from torch import nn

from ..backbones.folded_norm import applied_weights
from ..backbones.vgg import VGG
from .image_canvas import ImageCanvas

# Pixels that go through the trunk at a time. Its first layer alone takes 64 float32 numbers for
# each pixel, twice, at full width: 1 GiB in all.
TILE_PIXELS = 2**21


class TrunkMaps:
    """A trunk that gives maps of canvases.

    Maps are those of the whole canvas in one pass, to rounding.
    """

    def __init__(self, trunk: Backbone) -> None:
        """
        Args:
            trunk: as in :class:`DeepMaskNetwork`, in evaluation mode; its weights and the pixels
                of borders must not change from here on.
        """
        self.trunk = trunk
        self._empty: list[torch.Tensor] = []

    def bands(self, canvas: ImageCanvas) -> Iterator[torch.Tensor]:
        """Consecutive rows of the map of a canvas.

        Yields:
            Tensor: (C, rows, W / stride), all rows at once if memory allows.
        """
        stride = self.trunk.stride
        sides = canvas.map_size
        # What the image has a say in is what counts.
        reach = 2 * self.trunk.context
        height, width = (side + reach for side in canvas.image_size)
        if height * width <= TILE_PIXELS and self._knows_border(canvas):
            yield self._map_around_image(canvas)
            return
        tile_sides = _tile_sides(sides, TILE_PIXELS, self.trunk)
        halo = self.trunk.context // stride
        for top in range(0, sides[0], tile_sides[0]):
            bottom = min(top + tile_sides[0], sides[0])
            row = max(top - halo, 0)
            pixels = canvas.rows(row * stride, min((bottom + halo) * stride, canvas.size[0]))
            maps = self._map_in_tiles(pixels, tile_sides[1])
            yield maps[:, top - row : bottom - row]

    def _map_in_tiles(self, pixels: torch.Tensor, tile_width: int) -> torch.Tensor:
        """Map of (3, H, W) pixels, in tiles beside each other.

        Tiles overlap by what a cell sees beyond its own pixels.
        """
        stride = self.trunk.stride
        width = -(-pixels.shape[-1] // stride)
        halo = self.trunk.context // stride
        pieces = []
        for left in range(0, width, tile_width):
            column = max(left - halo, 0)
            tile = pixels[:, :, column * stride : (left + tile_width + halo) * stride]
            piece = self._run(tile[None])[0]
            pieces.append(piece[:, :, left - column : left - column + tile_width])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def _run(self, pixels: torch.Tensor) -> torch.Tensor:
        (maps,) = self.trunk(pixels.contiguous(memory_format=torch.channels_last)).values()
        return maps

    def _knows_border(self, canvas: ImageCanvas) -> bool:
        """Whether the layers are known one by one, and an empty canvas fits into this one."""
        side = 2 * self.trunk.context + self.trunk.stride
        return (
            isinstance(self.trunk, VGG)
            and len(self.trunk.output_shape()) == 1
            and min(canvas.size) >= side
            and not any(length % self.trunk.stride for length in canvas.size)
        )

    def _map_around_image(self, canvas: ImageCanvas) -> torch.Tensor:
        """(C, H / stride, W / stride): layer by layer, only what depends on the image is computed.

        The rest of each layer's input is that of an empty canvas.
        """
        empty = self._empty_maps(canvas.border_pixel())
        x = canvas.image_pixels()[None].contiguous(memory_format=torch.channels_last)
        # The part of the layer's map that x is, and the map's size, each along y and along x.
        begin = [canvas.before, canvas.before]
        end = [b + side for b, side in zip(begin, canvas.image_size, strict=True)]
        size = list(canvas.size)
        context = self.trunk.context
        for layer, empty_map in zip(self.trunk.features, empty, strict=False):
            if isinstance(layer, nn.Conv2d):
                wide = (
                    [max(b - 1, 0) for b in begin],
                    [min(e + 1, s) for e, s in zip(end, size, strict=True)],
                )
                seen = [b - 1 for b in wide[0]], [e + 1 for e in wide[1]]
                x = _extend(x, (begin, end), seen, empty_map, size, context)
                x = F.conv2d(x, *applied_weights(layer))
                begin, end = wide
            elif isinstance(layer, nn.MaxPool2d):
                wide = [b // 2 * 2 for b in begin], [-(-e // 2) * 2 for e in end]
                x = layer(_extend(x, (begin, end), wide, empty_map, size, context))
                begin, end, size, context = (
                    [b // 2 for b in wide[0]],
                    [e // 2 for e in wide[1]],
                    [side // 2 for side in size],
                    context // 2,
                )
            else:  # activation or normalisation, pixel by pixel
                x = layer(x)
        return _extend(x, (begin, end), ([0, 0], size), empty[-1], size, context)[0]

    def _empty_maps(self, border_pixel: torch.Tensor) -> list[torch.Tensor]:
        """(1, C, T, T) input of each layer on an empty canvas, and the map at the end.

        Its rows, columns and corners up to what a cell sees are those at a canvas's edges, and the
        cells in the middle are alike.
        """
        if not self._empty:
            side = 2 * self.trunk.context + self.trunk.stride
            x = border_pixel.view(1, -1, 1, 1).repeat(1, 1, side, side)
            x = x.contiguous(memory_format=torch.channels_last)
            for layer in self.trunk.features:
                # Activations may be in place, but nothing is read of their input.
                self._empty.append(x)
                x = layer(x)
            self._empty.append(x)
        return self._empty


def _extend(
    x: torch.Tensor,
    have: tuple[list[int], list[int]],
    want: tuple[list[int], list[int]],
    empty_map: torch.Tensor,
    size: list[int],
    context: int,
) -> torch.Tensor:
    """Take what is around a part of a map from that of an empty canvas.

    Args:
        x: (1, C, h, w) the part.
        have: (top, left) and (bottom, right) of it in the map.
        want: the same of what is wanted, which contains it and may reach a cell beyond the map,
            where zeros are.
        empty_map: (1, C, T, T).
        size: (height, width) of the map.
        context: cells from an edge of the empty map that differ from its middle.

    Returns:
        Tensor: (1, C, h', w') of ``want``.
    """
    if want == have:
        return x
    # One cell of zeros around it, so that cell k of the empty map has index k + 1.
    source = F.pad(empty_map, (1, 1, 1, 1))
    side = empty_map.shape[-1]
    index = []
    for begin, end, length in zip(*want, size, strict=True):
        cell = torch.arange(begin, end, device=x.device)
        from_end = side - length + cell
        cell = torch.where(cell < context, cell, from_end.clamp(min=context))
        index.append(cell + 1)
    (top, left), (bottom, right) = have
    top, bottom = top - want[0][0], bottom - want[0][0]
    left, right = left - want[0][1], right - want[0][1]
    height, width = (len(i) for i in index)
    shape = (1, x.shape[1], height, width)
    result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    result[:, :, top:bottom, left:right] = x
    for rows, columns in (
        (slice(0, top), slice(0, width)),
        (slice(bottom, height), slice(0, width)),
        (slice(top, bottom), slice(0, left)),
        (slice(top, bottom), slice(right, width)),
    ):
        if rows.stop > rows.start and columns.stop > columns.start:
            taken = source[:, :, index[0][rows]][:, :, :, index[1][columns]]
            result[:, :, rows, columns] = taken
    return result


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
