"""Windows that cover an image at several scales, and the masks of a scale merged into one.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 5.3.

Shape shorthand in this module:

    K: number of classes
    d: cells per side of a window's mask
    A, B: number of windows of a scale along the height and along the width
    U, V: number of cells of the merged mask along the height and along the width
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class AxisWindows(NamedTuple):
    """The windows of a scale along one axis of the image.

    Attributes:
        starts: (A,) where each window begins, in pixels.
        length: of all windows, in pixels.
    """

    starts: torch.Tensor
    length: float


class WindowGrid(NamedTuple):
    """The windows of one scale: every window along the height with every one along the width."""

    vertical: AxisWindows
    horizontal: AxisWindows

    def boxes(self) -> torch.Tensor:
        """The windows, (A * B, 4) XYXY float32 in pixels, row by row."""
        (y1, height), (x1, width) = self.vertical, self.horizontal
        y1, x1 = torch.meshgrid(y1, x1, indexing="ij")
        return torch.stack([x1, y1, x1 + width, y1 + height], dim=2).view(-1, 4).float()


class MergedMasks(NamedTuple):
    """Masks at the resolution of all windows of a scale.

    Network outputs are constant over their cells, so that merged masks are constant between the
    edges of the windows' cells. Kept by these edges they are exact, and their size does not
    depend on the image's.

    Attributes:
        values: (K, 5, U, V) in [0, 1].
        y_edges: (U + 1,) float64, increasing, in pixels of the image.
        x_edges: (V + 1,) the same along the width.
    """

    values: torch.Tensor
    y_edges: torch.Tensor
    x_edges: torch.Tensor


def make_windows(
    image_size: tuple[int, int], num_scales: int = 3, overlap: float = 0.2
) -> list[WindowGrid]:
    """Windows of each scale: the image, windows of half its sides, of a quarter, and so on.

    As few windows as cover the image with the given overlap between neighbours, spread evenly
    from edge to edge: 1 + 9 + 25 = 35 windows for the defaults ("usually less than 40").

    Args:
        image_size: (H, W) in pixels.
        num_scales: at least 1.
        overlap: least part of a window's area that its neighbour in a row or column overlaps.

    Returns:
        list[WindowGrid]: of each scale, the whole image first; tensors are on the CPU.
    """

    def along_axis(side: int, scale: int) -> AxisWindows:
        number = math.ceil((2**scale - 1) / (1 - overlap) - 1e-9) + 1
        length = side / 2**scale
        starts = torch.linspace(0, side - length, number, dtype=torch.float64)
        return AxisWindows(starts, length)

    height, width = image_size
    return [
        WindowGrid(along_axis(height, scale), along_axis(width, scale))
        for scale in range(num_scales)
    ]


def merge_masks(masks: torch.Tensor, windows: WindowGrid) -> MergedMasks:
    """Element-wise maximum of the windows' masks (Sec. 5.3, Algorithm 1).

    Args:
        masks: (A * B, K, 5, d, d) in [0, 1], in the order of :meth:`WindowGrid.boxes`.
        windows: of the scale.
    """
    num_columns = len(windows.horizontal.starts)
    y_edges, y_window, y_cell = _cells_along_axis(windows.vertical, masks.shape[-2])
    x_edges, x_window, x_cell = _cells_along_axis(windows.horizontal, masks.shape[-1])
    device = masks.device
    y_window, y_cell = (x.to(device)[:, :, None] for x in (y_window, y_cell))
    x_window, x_cell = (x.to(device)[:, None, :] for x in (x_window, x_cell))
    values = None
    # At most two windows lie over a point along each axis, unless they overlap by half and more.
    for rows, row_cells in zip(y_window, y_cell, strict=True):
        for columns, column_cells in zip(x_window, x_cell, strict=True):
            covering = masks[rows * num_columns + columns, :, :, row_cells, column_cells]
            values = covering if values is None else torch.maximum(values, covering)
    return MergedMasks(values.permute(2, 3, 0, 1), y_edges.to(device), x_edges.to(device))


def _cells_along_axis(
    windows: AxisWindows, mask_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cells of the merged mask along one axis.

    Returns:
        Tensor: (U + 1,) edges in pixels.
        Tensor: (L, U) windows that cover each cell. L is the greatest number of windows that
            cover one; where fewer do, one of them is repeated.
        Tensor: (L, U) the cell of that window's mask.
    """
    starts, length = windows
    cell = length / mask_size
    edges = (starts[:, None] + torch.arange(mask_size + 1, dtype=torch.float64) * cell).flatten()
    edges = edges.sort().values
    # Edges of different windows that rounding alone tells apart are one edge.
    distinct = torch.ones_like(edges, dtype=torch.bool)
    distinct[1:] = edges.diff() > 1e-6 * cell
    edges = edges[distinct]
    middle = (edges[1:] + edges[:-1]) / 2
    position = (middle - starts[:, None]) / cell  # (A, U) in cells of each window
    inside = (position > 0) & (position < mask_size)
    num_covering = int(inside.sum(dim=0).max())
    # Covering windows first; beyond their number, the first again.
    order = inside.to(torch.int8).sort(dim=0, descending=True, stable=True).indices[:num_covering]
    order = torch.where(inside.gather(0, order), order, order[:1])
    cells = position.gather(0, order).long().clamp(0, mask_size - 1)
    return edges, order, cells
