"""Refinement of proposals by the borders of superpixels.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Sec. III-D and Fig. 7, after
X. Chen, H. Ma, X. Wang and Z. Zhao, "Improving Object Proposals with Multi-Thresholding Straddling
Expansion", CVPR 2015. Superpixels: R. Achanta et al., "SLIC Superpixels Compared to
State-of-the-art Superpixel Methods", TPAMI 2012.

A window is a box in whole pixels: those whose centres lie in the box.

Shape shorthand in this module:

    H, W: height and width of the image, in pixels
    R: number of proposals
    S: number of superpixels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch

STRADDLING_TESTS = ("pixels", "boxes")
# Pairs of proposals and superpixels compared at once; 4 bytes each, a few times.
_PAIRS_PER_BLOCK = 2**21


class RefinedBoxes(NamedTuple):
    """Two versions of each proposal.

    Attributes:
        shrunk: (R, 4) XYXY, minimum bounding rectangle of the superpixels entirely inside.
        has_shrunk: (R,) bool, False where no superpixel is inside (``shrunk`` is then all 0).
        expanded: (R, 4) XYXY, the same of those inside or straddling: with pixels inside.
    """

    shrunk: torch.Tensor
    has_shrunk: torch.Tensor
    expanded: torch.Tensor


class SuperpixelRefinement:
    """Shrinks and expands proposals to the borders of SLIC superpixels."""

    def __init__(
        self,
        *,
        num_superpixels: int = 200,
        compactness: float = 10.0,
        sigma: float = 0.0,
        straddling: str = "pixels",
    ):
        """
        Args:
            num_superpixels: of an image, approximately. The paper gives no number; this one is as
                fine as the segmentation of the method that it follows.
            compactness: of SLIC: weight of distance against colour. Not in the paper either.
            sigma: of the Gaussian that SLIC smooths the image with first, in pixels; 0 for none.
                Not in the paper either. On a noisy image SLIC's superpixels fall apart, and what is
                too small is merged: all of it, at worst.
            straddling: "pixels": a superpixel touches a proposal with its pixels; "boxes": with its
                bounding box (which may have no pixel there), as in the released code of Chen et al.

        Raises:
            ValueError: a value is not allowed.
        """
        if straddling not in STRADDLING_TESTS:
            raise ValueError(
                f"Unknown MODEL.SPOP.REFINEMENT.STRADDLING {straddling!r}; "
                f"use one of {STRADDLING_TESTS}."
            )
        if num_superpixels < 1:
            raise ValueError(
                f"MODEL.SPOP.REFINEMENT.NUM_SUPERPIXELS must be at least 1, got {num_superpixels}."
            )
        if not compactness > 0:
            raise ValueError(
                f"MODEL.SPOP.REFINEMENT.COMPACTNESS must be positive, got {compactness}."
            )
        if not 0 <= sigma < math.inf:
            raise ValueError(
                f"MODEL.SPOP.REFINEMENT.SIGMA must be a number of pixels, 0 or more, got {sigma}."
            )
        self.num_superpixels = num_superpixels
        self.compactness = compactness
        self.sigma = sigma
        self.straddling = straddling

    def segment(self, image: torch.Tensor) -> torch.Tensor:
        """Superpixels of an image, computed on the CPU.

        Args:
            image: (3, H, W) uint8 RGB, on the CPU.

        Returns:
            Tensor: (H, W) int64 labels 0 ... S - 1, on the CPU. Pixels of one label are connected
            through their sides.
        """
        # Here, since it takes long to load and SPOP without refinement has no use for it.
        from skimage.segmentation import slic

        labels = slic(
            image.permute(1, 2, 0).numpy(),
            n_segments=self.num_superpixels,
            compactness=self.compactness,
            sigma=self.sigma,
            start_label=0,
            channel_axis=-1,
        )
        return torch.from_numpy(labels)

    @contextmanager
    def segmented_beside(
        self, images: Sequence[torch.Tensor]
    ) -> Iterator[list[Callable[[], torch.Tensor]]]:
        """Compute superpixels of images in threads, while the caller computes something else.

        Args:
            images: as for :meth:`segment`.

        Yields:
            list[Callable]: for each image, a function that waits for its superpixels and returns
            them.
        """
        with ThreadPoolExecutor(max(min(len(images), torch.get_num_threads()), 1)) as threads:
            futures = [threads.submit(self.segment, image) for image in images]
            try:
                yield [future.result for future in futures]
            finally:
                # After an exception, those that have not begun.
                for future in futures:
                    future.cancel()

    def __call__(self, boxes: torch.Tensor, labels: torch.Tensor) -> RefinedBoxes:
        """Refine proposals.

        Args:
            boxes: (R, 4) XYXY in pixels of the image.
            labels: (H, W) int64 superpixels, see :meth:`segment`.
        """
        windows = to_windows(boxes, tuple(labels.shape))
        superpixel_boxes = bounding_boxes(labels)
        shrunk, has_shrunk = shrink(windows, superpixel_boxes)
        if self.straddling == "pixels":
            expanded = expand(windows, superpixel_boxes, labels)
        else:
            expanded = expand_by_boxes(windows, superpixel_boxes)
        return RefinedBoxes(shrunk.to(boxes), has_shrunk, expanded.to(boxes))


def to_windows(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Whole pixels of boxes, at least one pixel in the image each.

    Args:
        boxes: (R, 4) XYXY, finite.
        image_size: (H, W).

    Returns:
        Tensor: (R, 4) int64 half-open XYXY: pixels x1 ... x2 - 1, those whose centres are in the
        box.
    """
    height, width = image_size
    size = torch.tensor([width, height], device=boxes.device)
    edges = (boxes - 0.5).ceil().long()
    start = edges[:, :2].clamp(min=0).minimum(size - 1)
    end = edges[:, 2:].minimum(size).maximum(start + 1)
    return torch.cat([start, end], dim=1)


def bounding_boxes(labels: torch.Tensor) -> torch.Tensor:
    """Half-open bounding boxes of superpixels.

    Args:
        labels: (H, W) int64, 0 ... S - 1, each present.

    Returns:
        Tensor: (S, 4) int64 XYXY.
    """
    height, width = labels.shape
    flat = labels.flatten()
    y = torch.arange(height, device=labels.device)[:, None].expand(height, width).flatten()
    x = torch.arange(width, device=labels.device).repeat(height)
    num_superpixels = int(labels.max()) + 1
    sides = []
    for position, reduce in ((x, "amin"), (y, "amin"), (x + 1, "amax"), (y + 1, "amax")):
        side = position.new_zeros(num_superpixels)
        sides.append(side.scatter_reduce(0, flat, position, reduce, include_self=False))
    return torch.stack(sides, dim=1)


def shrink(
    windows: torch.Tensor, superpixel_boxes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounding rectangles of the superpixels entirely inside windows.

    A superpixel is inside a window exactly if its bounding box is.

    Args:
        windows: (R, 4) int64.
        superpixel_boxes: (S, 4) int64.

    Returns:
        Tensor: (R, 4) int64, 0 where no superpixel is inside.
        Tensor: (R,) bool, whether one is.
    """
    return _bound_selected(windows, superpixel_boxes, _is_inside)


def expand_by_boxes(windows: torch.Tensor, superpixel_boxes: torch.Tensor) -> torch.Tensor:
    """Bounding rectangles (R, 4) of the superpixels whose bounding boxes overlap windows."""
    return _bound_selected(windows, superpixel_boxes, _overlaps)[0]


def expand(
    windows: torch.Tensor, superpixel_boxes: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Bounding rectangles of the superpixels that have a pixel inside windows.

    A connected superpixel that is inside and outside has a pixel in the window's outermost ring,
    and those of the ring together surround the others. So four ranges of pixels per window have to
    be looked at, the sides of the ring, and the least and greatest bounds in a range are two
    look-ups in a table of the ranges of the next smaller power of two.

    Args:
        windows: (R, 4) int64.
        superpixel_boxes: (S, 4) int64.
        labels: (H, W) int64; pixels of one label are connected through their sides.

    Returns:
        Tensor: (R, 4) int64 XYXY.
    """
    # (4, S): x1, y1, -x2, -y2, of which the minimum is looked for. 32 bits: half the memory.
    bounds = torch.cat([superpixel_boxes[:, :2], -superpixel_boxes[:, 2:]], dim=1).t().int()
    x1, y1, x2, y2 = windows.unbind(dim=1)
    rows = _range_minima(bounds[:, labels], x1, x2, torch.stack([y1, y2 - 1]))
    columns = _range_minima(bounds[:, labels.t()], y1, y2, torch.stack([x1, x2 - 1]))
    least = torch.minimum(rows, columns)  # (4, R)
    return torch.cat([least[:2], -least[2:]]).t().long()


def _range_minima(
    table: torch.Tensor, start: torch.Tensor, end: torch.Tensor, lines: torch.Tensor
) -> torch.Tensor:
    """Minima of ranges of a table's last dimension, on two lines of its second.

    Args:
        table: (4, L, P); overwritten.
        start, end: (R,) int64, half-open ranges in P.
        lines: (2, R) int64, in L.

    Returns:
        Tensor: (4, R), minima over both lines.
    """
    result = table.new_empty(4, len(start))
    # Index of the highest bit: exact for all lengths that a float32 holds.
    level = torch.frexp((end - start).float()).exponent - 1
    length = 1
    # After step i, an entry is the minimum of 2^i entries of the original table from its place on.
    for i in range(int(level.max()) + 1 if len(start) else 0):
        if i > 0:
            half = length // 2
            table[..., :-half] = torch.minimum(table[..., :-half], table[..., half:])
        index = (level == i).nonzero()[:, 0]
        first, last = start[index], end[index] - length
        candidates = [
            table[:, line, place] for line in lines[:, index] for place in (first, last)
        ]  # 4 of (4, K)
        result[:, index] = torch.stack(candidates).amin(dim=0)
        length *= 2
    return result


def _is_inside(window: torch.Tensor, superpixel: torch.Tensor) -> torch.Tensor:
    """(R, 1, 4) and (S, 4) -> (R, S) bool."""
    starts = (superpixel[:, :2] >= window[..., :2]).all(dim=-1)
    return starts & (superpixel[:, 2:] <= window[..., 2:]).all(dim=-1)


def _overlaps(window: torch.Tensor, superpixel: torch.Tensor) -> torch.Tensor:
    """(R, 1, 4) and (S, 4) -> (R, S) bool."""
    starts = (superpixel[:, :2] < window[..., 2:]).all(dim=-1)
    return starts & (superpixel[:, 2:] > window[..., :2]).all(dim=-1)


def _bound_selected(windows: torch.Tensor, superpixel_boxes: torch.Tensor, select) -> tuple:
    """Bounding rectangles (R, 4) of the superpixels that ``select`` picks, and (R,) if any.

    In blocks of windows, so that memory does not grow with R * S.
    """
    bounds = torch.cat([superpixel_boxes[:, :2], -superpixel_boxes[:, 2:]], dim=1).int()  # (S, 4)
    none = torch.iinfo(torch.int32).max
    block_size = max(_PAIRS_PER_BLOCK // len(superpixel_boxes), 1)
    blocks = []
    for block in windows.split(block_size):
        selected = select(block[:, None], superpixel_boxes)  # (B, S)
        least = [torch.where(selected, bound, none).amin(dim=1) for bound in bounds.unbind(dim=1)]
        blocks.append(torch.stack(least, dim=1))
    least = torch.cat(blocks).long() if blocks else windows.new_zeros(0, 4)
    has_any = least[:, 0] < none
    return torch.cat([least[:, :2], -least[:, 2:]], dim=1) * has_any[:, None], has_any
