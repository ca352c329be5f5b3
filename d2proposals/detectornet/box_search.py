"""Exhaustive search for the boxes that agree best with five masks, by integral images.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 5.2 (Eq. 2 and 3).

Shape shorthand in this module:

    B: number of sets of five masks over the same frame (classes of an image, or crops)
    U, V: number of cells of a mask along the height and along the width
    Y, X: number of positions of a box shape along the height and along the width
    T: number of boxes kept

Naming convention:

    frame: the rectangle that the masks cover, an image or a crop; its corner is (0, 0).
    score: S of Eq. 3, in [-5, 5] with a ring of weight 1.
    coverage: S of Eq. 2 for the full mask, in [0, 1].
    ring: the region around a box whose mask counts against it (Eq. 3 for h = full).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .box_masks import MASK_TYPES

# Positions of a box shape that are scored at a time, over all sets of masks: what bounds the
# memory of large images (about 100 bytes each).
MAX_POSITIONS = 1 << 21


class FoundBoxes(NamedTuple):
    """The best boxes of each set of masks, in the order of their score, best first.

    Attributes:
        boxes: (B, T, 4) XYXY float32, pixels of the frame.
        scores: (B, T) float32, S of Eq. 3; -inf for places that are not filled.
    """

    boxes: torch.Tensor
    scores: torch.Tensor


def check_shapes(
    key: str, mean_dimensions: Sequence[float], aspect_ratios: Sequence[float], stride: float
) -> None:
    """Raise ValueError unless sizes, aspect ratios and stride of boxes are possible.

    Args:
        key: of the configuration that holds them, for the error.
        mean_dimensions, aspect_ratios: as for :func:`box_shapes`.
        stride: distance between positions, in pixels.
    """
    sizes, ratios = mean_dimensions, aspect_ratios
    for name, value, is_right, rule in (
        ("MEAN_DIMENSIONS", sizes, all(0 < x <= 1 for x in sizes), "numbers in (0, 1]"),
        ("ASPECT_RATIOS", ratios, all(0 < x < math.inf for x in ratios), "positive numbers"),
        ("STRIDE", stride, 0 < stride < math.inf, "a positive number"),
    ):
        if not value or not is_right:
            raise ValueError(f"{key}.{name} needs {rule}, got {value}.")


def box_shapes(
    frame_size: tuple[float, float],
    mean_dimensions: Sequence[float],
    aspect_ratios: Sequence[float],
    cut_to_frame: bool = True,
) -> list[tuple[float, float]]:
    """Shapes that are searched for: sizes times aspect ratios, each of which fits into the frame.

    Unlike the paper, which says nothing of shapes with a side longer than the frame's: in an image,
    that side becomes the frame's, the other one as long as keeps the mean dimension. So narrow
    images have shapes of each size, too, and objects from edge to edge a shape that fits them. In a
    crop, which goes on beyond its frame, such shapes are left out.

    Args:
        frame_size: (height, width) in pixels.
        mean_dimensions: (height + width) / 2 of the boxes, relative to the frame's, in (0, 1].
        aspect_ratios: width / height of the boxes.
        cut_to_frame: what becomes of shapes beyond the frame; False leaves them out.

    Returns:
        list[tuple[float, float]]: (height, width) in pixels, all different.
    """
    frame_height, frame_width = frame_size
    shapes = []
    for mean_dimension in mean_dimensions:
        both_sides = mean_dimension * (frame_height + frame_width)
        for ratio in aspect_ratios:
            height = both_sides / (1 + ratio)
            # The width may be the frame's, but for rounding.
            least_height = both_sides - frame_width * (1 + 1e-9)
            if not cut_to_frame and not least_height <= height <= frame_height * (1 + 1e-9):
                continue
            height = min(max(height, both_sides - frame_width), frame_height)
            shapes.append((height, min(both_sides - height, frame_width)))
    return list(dict.fromkeys(shapes))


def num_positions(frame_side: float, box_side: float, stride: float) -> int:
    """Positions along an axis at which a box lies inside the frame, ``stride`` pixels apart."""
    return int((frame_side - box_side) / stride + 1e-6) + 1


class AxisTerms(NamedTuple):
    """Weights of an integral image along one axis, for Y intervals of one length.

    Attributes:
        whole: (Y, U + 1) for the sum over the interval.
        halves: (Y, U + 1) for the sum over its first half minus that over its second.
        ring: (Y, U + 1) for the sum over the interval with its ring.
        ring_length: (Y,) length of the interval with its ring inside the frame.
    """

    whole: torch.Tensor
    halves: torch.Tensor
    ring: torch.Tensor
    ring_length: torch.Tensor


class MaskScores:
    """Scores boxes against sets of five masks (Eq. 2 and 3) by integral images.

    The integral of a mask that is constant over its cells is bilinear inside each cell, so that
    interpolation between the edges gives it exactly at any point, and the sum over a box is the
    same product of rows and columns for all boxes of a shape.

    Sums are float64: float32 loses as much as a half's share in differences over large images.
    """

    def __init__(self, masks: torch.Tensor, y_edges: torch.Tensor, x_edges: torch.Tensor):
        """
        Args:
            masks: (B, 5, U, V) in [0, 1], types in the order of :data:`MASK_TYPES`.
            y_edges: (U + 1,) edges of the rows of cells, increasing, in pixels of the frame.
            x_edges: (V + 1,) the same of the columns.
        """
        self.y_edges, self.x_edges = y_edges.double(), x_edges.double()
        cell_area = self.y_edges.diff()[:, None] * self.x_edges.diff()
        by_type = dict(zip(MASK_TYPES, (masks.double() * cell_area).unbind(dim=1), strict=True))
        # Eq. 3 takes the bottom half of the top mask from its top half, and the top half of the
        # bottom mask from its bottom half: one term of the difference of the two masks.
        sums = torch.stack(
            [
                by_type["full"],
                by_type["top"] - by_type["bottom"],
                by_type["left"] - by_type["right"],
            ]
        )  # (3, B, U, V)
        integrals = sums.cumsum(dim=2).cumsum(dim=3)
        self.full, self.top, self.left = torch.nn.functional.pad(integrals, (1, 0, 1, 0))

    @property
    def num_sets(self) -> int:
        """B."""
        return len(self.full)

    def __call__(
        self,
        shape: tuple[float, float],
        y1: torch.Tensor,
        x1: torch.Tensor,
        ring: float,
        ring_weight: float = 1.0,
        halves_weight: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the boxes of one shape at all pairs of the given positions.

        Args:
            shape: (height, width) in pixels.
            y1: (Y,) float64 upper edges, in pixels.
            x1: (X,) float64 left edges, in pixels.
            ring: sides of the box with its ring, relative to the box's. Of the ring, only what
                lies inside the frame counts; without any, nothing is subtracted.
            ring_weight: of the ring's term; 1 in Eq. 3.
            halves_weight: of the four halves' terms; 1 in Eq. 3.

        Returns:
            Tensor: (B, Y, X) float64 scores, Eq. 3.
            Tensor: (B, Y, X) float64 coverage of the box by the full mask, Eq. 2.
        """
        (rows,) = axis_terms(self.y_edges, [y1], [shape[0]], ring)
        (columns,) = axis_terms(self.x_edges, [x1], [shape[1]], ring)
        return self.score(shape, rows, columns, ring_weight, halves_weight)

    def score(
        self,
        shape: tuple[float, float],
        rows: AxisTerms,
        columns: AxisTerms,
        ring_weight: float = 1.0,
        halves_weight: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the boxes of one shape, given the weights of their Y rows and X columns; otherwise
        as :meth:`__call__`."""
        area = shape[0] * shape[1]
        column_sums, column_halves = columns.whole.T, columns.halves.T
        covered = rows.whole @ self.full @ column_sums  # (B, Y, X)
        ring_covered = rows.ring @ self.full @ columns.ring.T - covered
        ring_area = rows.ring_length[:, None] * columns.ring_length - area
        is_ring = ring_area > 1e-6 * area
        ring_mean = (ring_covered / ring_area.where(is_ring, torch.ones_like(ring_area))) * is_ring
        halves = rows.halves @ self.top @ column_sums + rows.whole @ self.left @ column_halves
        coverage = covered / area
        scores = coverage - ring_weight * ring_mean + halves_weight * halves / (area / 2)
        return scores, coverage


def axis_terms(
    edges: torch.Tensor, starts: Sequence[torch.Tensor], sides: Sequence[float], ring: float
) -> list[AxisTerms]:
    """Weights of an integral image along one axis, for intervals of several lengths at once.

    Args:
        edges: (U + 1,) edges of the cells.
        starts: of each length, (Y,) float64 where its intervals begin.
        sides: the lengths.
        ring: length of an interval with its ring, relative to the interval's.

    Returns:
        those of each length.
    """
    numbers = [len(start) for start in starts]
    start = torch.cat(list(starts))
    side = torch.repeat_interleave(
        start.new_tensor(sides), torch.tensor(numbers, device=start.device), output_size=len(start)
    )
    end, margin = start + side, (ring - 1) / 2 * side
    ring_start, ring_end = (start - margin).clamp(min=edges[0]), (end + margin).clamp(max=edges[-1])
    points = torch.cat([start, start + side / 2, end, ring_start, ring_end])
    at_start, at_middle, at_end, at_ring_start, at_ring_end = _interpolation(edges, points).view(
        5, len(start), len(edges)
    )
    terms = (
        at_end - at_start,
        2 * at_middle - at_start - at_end,
        at_ring_end - at_ring_start,
        ring_end - ring_start,
    )
    return [AxisTerms(*x) for x in zip(*(term.split(numbers) for term in terms), strict=True)]


def _interpolation(edges: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Weights (R, U + 1) that interpolate linearly between values at the edges.

    Args:
        edges: (U + 1,) increasing.
        points: (R,); beyond the last edges, the values there are taken.
    """
    right = torch.searchsorted(edges, points).clamp(1, len(edges) - 1)
    left_edge, right_edge = edges[right - 1], edges[right]
    share = ((points - left_edge) / (right_edge - left_edge)).clamp(0, 1)
    weights = edges.new_zeros(len(points), len(edges))
    weights.scatter_(1, right[:, None], share[:, None])
    weights.scatter_(1, right[:, None] - 1, 1 - share[:, None])
    return weights


def search_boxes(
    scorer: MaskScores,
    frame_size: tuple[float, float],
    shapes: Sequence[tuple[float, float]],
    *,
    stride: float,
    ring: float,
    ring_weight: float = 1.0,
    halves_weight: float = 1.0,
    topk_per_shape: int,
    min_coverage: float | None = None,
) -> FoundBoxes:
    """Slide boxes of given shapes over a frame and keep the best of each shape.

    Which of several boxes of a shape with equal scores are kept, and their order, is up to the
    device's ``topk``.

    Args:
        scorer: of B sets of masks over the frame.
        frame_size: (height, width) in pixels.
        shapes: (height, width) of the boxes in pixels, inside the frame.
        stride: distance between positions, in pixels.
        ring: sides of the box with its ring, relative to the box's.
        ring_weight: of the ring's term; 1 in Eq. 3.
        halves_weight: of the four halves' terms; 1 in Eq. 3.
        topk_per_shape: boxes of each shape that are kept, by score.
        min_coverage: boxes that the full mask does not cover more than this (Eq. 2) are dropped;
            None keeps all.

    Returns:
        FoundBoxes: T is at most ``topk_per_shape`` times the number of shapes.
    """
    device = scorer.full.device
    found = []
    for some_shapes in _shapes_at_once(scorer, frame_size, shapes, stride):
        starts = [
            [
                torch.arange(num_positions(frame_side, side, stride), device=device).double()
                * stride
                for side in sides
            ]
            for frame_side, sides in zip(frame_size, zip(*some_shapes, strict=True), strict=True)
        ]
        terms = [
            axis_terms(edges, of_axis, sides, ring)
            for edges, of_axis, sides in zip(
                (scorer.y_edges, scorer.x_edges),
                starts,
                zip(*some_shapes, strict=True),
                strict=True,
            )
        ]
        for shape, y1, x1, rows, columns in zip(some_shapes, *starts, *terms, strict=True):
            rows_at_once = max(MAX_POSITIONS // (scorer.num_sets * len(x1)), 1)
            parts = (x.split(rows_at_once) for x in (y1, *rows))
            best = [
                _best_positions(
                    shape,
                    y1_part,
                    x1,
                    scorer.score(shape, AxisTerms(*rows_part), columns, ring_weight, halves_weight),
                    topk_per_shape,
                    min_coverage,
                )
                for y1_part, *rows_part in zip(*parts, strict=True)
            ]
            found.append(best[0] if len(best) == 1 else _best(_join(best), topk_per_shape))
    if not found:
        empty = torch.zeros(scorer.num_sets, 0, device=device)
        return FoundBoxes(empty[..., None].expand(-1, -1, 4), empty)
    joined = _join(found)
    return _best(joined, joined.scores.shape[1])


def _shapes_at_once(
    scorer: MaskScores,
    frame_size: tuple[float, float],
    shapes: Sequence[tuple[float, float]],
    stride: float,
) -> Iterator[list[tuple[float, float]]]:
    """The shapes in groups, whose weights along an axis are at most ``MAX_POSITIONS`` numbers a
    term, unless those of a single shape are more."""
    num_edges = max(len(scorer.y_edges), len(scorer.x_edges))
    group, longest = [], 0
    for shape in shapes:
        own = max(num_positions(*x, stride) for x in zip(frame_size, shape, strict=True))
        if group and (len(group) + 1) * max(longest, own) * num_edges > MAX_POSITIONS:
            yield group
            group, longest = [], 0
        group.append(shape)
        longest = max(longest, own)
    if group:
        yield group


def _best_positions(
    shape: tuple[float, float],
    y1: torch.Tensor,
    x1: torch.Tensor,
    scored: tuple[torch.Tensor, torch.Tensor],
    topk: int,
    min_coverage: float | None,
) -> FoundBoxes:
    """The best boxes of a shape, given scores and coverage (B, Y, X) at all positions."""
    scores, coverage = (x.flatten(1) for x in scored)
    if min_coverage is not None:
        scores = scores.masked_fill(coverage <= min_coverage, -torch.inf)
    topk_scores, index = scores.topk(min(topk, scores.shape[1]), dim=1)
    top, left = y1[index // len(x1)], x1[index % len(x1)]
    boxes = torch.stack([left, top, left + shape[1], top + shape[0]], dim=2)
    return FoundBoxes(boxes.float(), topk_scores.float())


def _join(parts: Sequence[FoundBoxes]) -> FoundBoxes:
    """All boxes of several lists of each set of masks."""
    return FoundBoxes(*(torch.cat(x, dim=1) for x in zip(*parts, strict=True)))


def _best(found: FoundBoxes, number: int) -> FoundBoxes:
    """The ``number`` best boxes of each set of masks, best first, ties in the order of the list."""
    order = found.scores.argsort(dim=1, descending=True, stable=True)[:, :number]
    boxes = found.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return FoundBoxes(boxes, found.scores.gather(1, order))
