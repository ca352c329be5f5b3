"""Whether two networks find the same boxes in an image, and in the same order.

Shape shorthand in this module:

    R: number of boxes of the one network, S: of the other
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

# Two hosts round differently; a box counts as the same within these.
BOX_TOLERANCE = 1e-2  # pixels
SCORE_TOLERANCE = 1e-3
# Scores that are closer may stand in either order.
TIE = 1e-4


@dataclass(frozen=True)
class Differences:
    """Of the outputs of one image.

    Attributes:
        num_boxes: R and S.
        num_unmatched: boxes of either that the other does not have, with their score and class.
        num_cut: those of them that tie with the last box of lists of one length: which of equal
            boxes is cut off is nobody's promise.
        box: the largest difference of a matched coordinate, in pixels; 0 without boxes.
        score: the largest difference of a matched score.
        num_misplaced: boxes that stand before one of a better score, other than a tie.
    """

    num_boxes: tuple[int, int]
    num_unmatched: int
    num_cut: int
    box: float
    score: float
    num_misplaced: int

    @property
    def is_equal(self) -> bool:
        """Whether both found the same boxes in the same order, but for ties."""
        return self.num_unmatched == self.num_cut and self.num_misplaced == 0


def compare_outputs(
    expected: tuple[torch.Tensor, ...],
    found: tuple[torch.Tensor, ...],
) -> Differences:
    """Match the boxes of two outputs one to one.

    Args:
        expected: (R, 4) boxes, (R,) scores, and further tensors of R rows, which must agree to
            ``SCORE_TOLERANCE``; e.g. classes.
        found: the same of S boxes.
    """
    expected, found = (
        [x.double().cpu().flatten(1) for x in _columns(y)] for y in (expected, found)
    )
    box_distance = _largest_difference(expected[0], found[0])
    score_distance = _largest_difference(expected[1], found[1])
    is_same = box_distance <= BOX_TOLERANCE
    for one, other in zip(expected[1:], found[1:], strict=True):
        is_same &= _largest_difference(one, other) <= SCORE_TOLERANCE
    row, column = (
        torch.from_numpy(x) for x in linear_sum_assignment((~is_same).numpy().astype(float))
    )
    matched = is_same[row, column]
    row, column = row[matched], column[matched]
    num_boxes = (len(expected[0]), len(found[0]))
    unmatched = [_others(expected[1], row), _others(found[1], column)]
    return Differences(
        num_boxes=num_boxes,
        num_unmatched=sum(len(scores) for scores in unmatched),
        num_cut=_num_cut(unmatched, [expected[1], found[1]]),
        box=_largest(box_distance[row, column]),
        score=_largest(score_distance[row, column]),
        num_misplaced=_num_misplaced(expected[1][row[column.argsort()], 0]),
    )


def _columns(outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Each output with at least two dimensions."""
    return [x[:, None] if x.dim() == 1 else x for x in outputs]


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(R, D), (S, D) -> (R, S), the largest difference of the numbers of two rows."""
    return torch.cdist(one, other, p=float("inf"))


def _largest(x: torch.Tensor) -> float:
    return float(x.max()) if len(x) else 0.0


def _others(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows that are not at the indices."""
    is_other = torch.ones(len(x), dtype=torch.bool)
    is_other[index] = False
    return x[is_other]


def _num_cut(unmatched: list[torch.Tensor], scores: list[torch.Tensor]) -> int:
    """How many unmatched boxes tie with the last one of lists of one length, see Differences.

    Args:
        unmatched: scores of the unmatched boxes, of both lists.
        scores: of all boxes, of both, best first.
    """
    if len(scores[0]) != len(scores[1]):
        return 0
    return sum(
        int((some - all_scores[-1] <= TIE).sum())
        for some, all_scores in zip(unmatched, scores, strict=True)
        if len(some)
    )


def _num_misplaced(scores: torch.Tensor) -> int:
    """How many boxes stand before one of a better score, other than a tie.

    Args:
        scores: (K,) of the one list, in the other's order.
    """
    if len(scores) == 0:
        return 0
    best_from_here = scores.flip(0).cummax(dim=0).values.flip(0)
    return int((best_from_here > scores + TIE).sum())
