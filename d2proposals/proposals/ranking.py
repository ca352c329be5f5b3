"""Scores and order of proposals: logits, ranking ties, multi-threshold non-maximum suppression.

Shape shorthand in this module:

    R: number of boxes of one image
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torchvision.ops import nms

from ..files.strict_order import lower_equal_scores

# Of the boxes that another NMS has left already, multi-threshold NMS begins with this many for each
# that is wanted: nearly all are kept.
_FIRST_SHARE = 1.2


def probability_to_logit(probability: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Logit of probabilities, which are clamped to [eps, 1 - eps] first.

    Args:
        probability: any shape, values in [0, 1] (values outside are clamped as well).
        eps: distance kept from 0 and 1.

    Returns:
        Tensor: float32 logits of the same shape, in +-13.8 for the default ``eps``.
    """
    return torch.logit(probability.double(), eps=eps).float()


def strictly_decreasing(logits: torch.Tensor) -> torch.Tensor:
    """Lower logits by the smallest amounts that make them strictly decreasing.

    Everything downstream orders proposals by their score alone. A ranking that is not the order
    of the scores (multi-threshold NMS), or that breaks ties, is written into the scores by this.

    Args:
        logits: (R,) finite, in the order of the ranking, best first.

    Returns:
        Tensor: (R,) float32, each the largest number that is not above its input and is below
        its predecessor; in a trace, not above its predecessor.
    """
    if torch.jit.is_tracing():
        return _decreasing(logits.float())
    return lower_equal_scores(logits)


def _decreasing(logits: torch.Tensor) -> torch.Tensor:
    """The least of each number and those before it, by operators that every exported form has.

    The bits of a float are out of a trace's reach, and ONNX has no cumulative minimum. In an
    exported network the order is that of its outputs, whether or not scores are equal.
    """
    position = torch.arange(logits.shape[0], device=logits.device)
    is_later = position[None, :] > position[:, None]  # (R, R)
    before = logits[None, :].masked_fill(is_later, float("inf"))
    return F.pad(before, (0, 1), value=float("inf")).amin(dim=1)  # of no numbers as well


def multi_threshold_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    thresholds: Sequence[float],
    topks: Sequence[int],
    limit: int | None = None,
) -> torch.Tensor:
    """Non-maximum suppression whose IoU threshold grows with the number of proposals wanted.

    Source: S. Gidaris and N. Komodakis, "Attend Refine Repeat: Active Box Proposal Generation via
    In-Out Localization", BMVC 2016, Sec. 3; used by ZIP, Sec. 3.4. The loosest threshold gives the
    set S_1 of all proposals. Each stricter threshold t_i is applied to S_1 by itself and gives
    S_i. The ranking begins with the best of the strictest set and goes on with the best boxes of
    each looser set that it does not hold yet, until it holds as many as that set may fill.

    Args:
        boxes: (R, 4) XYXY.
        scores: (R,) higher is better; equal scores keep the order of the input.
        thresholds: IoU thresholds in [0, 1], loosest (highest) first, strictly decreasing.
        topks: as many numbers, decreasing: how many boxes the ranking holds once threshold i has
            contributed.
        limit: how many boxes are wanted; all by default.

    Returns:
        Tensor: (K,) int64 indices of the kept boxes in the order of the ranking, best first.

    Raises:
        ValueError: thresholds and numbers do not match or are not decreasing.
    """
    check_multi_threshold_settings(thresholds, topks)
    limit = topks[0] if limit is None else min(limit, topks[0])
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    if torch.jit.is_tracing():
        return order[_rank_all_by_thresholds(boxes, thresholds, topks, limit)]
    # The beginning of the list decides the beginning of each S_i, and few of them are needed far.
    length = math.ceil(_FIRST_SHARE * limit)
    while True:
        begin = first_of_nms(boxes[:length], thresholds[0], topks[0], _FIRST_SHARE)  # of S_1
        is_whole = length >= len(boxes) or len(begin) >= topks[0]
        ranked = _rank_by_thresholds(boxes[begin], thresholds, topks, limit, is_whole)
        if ranked is not None:
            return order[begin[ranked]]
        length *= 2


def _rank_by_thresholds(
    candidates: torch.Tensor,
    thresholds: Sequence[float],
    topks: Sequence[int],
    limit: int,
    is_whole: bool,
) -> torch.Tensor | None:
    """The ranking of :func:`multi_threshold_nms` from S_1 or from its beginning.

    Args:
        candidates: (R1, 4) the boxes of S_1, best first.
        thresholds: as of ``multi_threshold_nms``.
        topks: likewise.
        limit: how many boxes are wanted.
        is_whole: whether that is all of S_1.

    Returns:
        Tensor: at most ``limit`` int64 indices into ``candidates``; None if more of S_1 is needed.
    """
    ranked = torch.arange(0, device=candidates.device)
    is_ranked = torch.zeros(len(candidates), dtype=torch.bool, device=candidates.device)
    for threshold, topk in zip(reversed(thresholds), reversed(topks), strict=True):
        if len(ranked) >= limit:
            break
        if threshold == thresholds[0]:
            kept = torch.arange(len(candidates), device=candidates.device)
        else:
            kept = first_of_nms(candidates, threshold, topk, _FIRST_SHARE)
        num_missing = max(min(topk, limit) - len(ranked), 0)
        added = kept[~is_ranked[kept]][:num_missing]
        # S_i may hold further boxes among its first ``topk`` if S_1 goes on.
        if len(added) < num_missing and len(kept) < topk and not is_whole:
            return None
        is_ranked[added] = True
        ranked = torch.cat([ranked, added])
    return ranked


def _rank_all_by_thresholds(
    boxes: torch.Tensor, thresholds: Sequence[float], topks: Sequence[int], limit: int
) -> torch.Tensor:
    """The ranking of :func:`multi_threshold_nms` for a trace: no step depends on how many boxes
    another one found.

    Args:
        boxes: (R, 4) XYXY, best first.
        thresholds: as of ``multi_threshold_nms``.
        topks: likewise.
        limit: how many boxes are wanted.

    Returns:
        Tensor: at most ``limit`` int64 indices into ``boxes``.
    """
    loosest = first_of_nms(boxes, thresholds[0], topks[0])
    candidates = boxes[loosest]
    # The set that puts a box into the ranking; len(thresholds) for none.
    added_by = torch.full_like(loosest, len(thresholds))
    for step, (threshold, topk) in enumerate(
        zip(reversed(thresholds), reversed(topks), strict=True)
    ):
        is_kept = torch.ones_like(loosest, dtype=torch.bool)
        if threshold != thresholds[0]:
            is_kept = ~is_kept
            is_kept[first_of_nms(candidates, threshold, topk)] = True
        is_ranked = added_by < len(thresholds)
        is_new = is_kept & ~is_ranked
        has_room = is_ranked.sum() + is_new.long().cumsum(dim=0) <= min(topk, limit)
        added_by = added_by.masked_fill(is_new & has_room, step)
    order = added_by.argsort(stable=True)
    return loosest[order[added_by[order] < len(thresholds)]]


def first_of_nms(
    boxes: torch.Tensor, threshold: float, number: int, first_share: float = 2.0
) -> torch.Tensor:
    """The first ``number`` boxes that NMS keeps, of boxes that are sorted already.

    Whether NMS keeps a box depends on the boxes before it alone, so it is run on the beginning of
    the list, which is doubled until it yields enough.

    Args:
        boxes: (R, 4) XYXY, best first.
        threshold: IoU above which the later box goes.
        number: how many are wanted.
        first_share: length of the first beginning, relative to ``number``, at least 1. It changes
            the time alone, which grows with the square of the length.

    Returns:
        Tensor: at most ``number`` int64 indices, increasing.
    """
    # Positions instead of scores: NMS then cannot reorder equal scores.
    scores = -torch.arange(boxes.shape[0], device=boxes.device, dtype=torch.float32)
    if torch.jit.is_tracing():  # which has no loop
        return nms(boxes, scores, threshold)[:number]
    length = math.ceil(first_share * number)
    while True:
        kept = nms(boxes[:length], scores[:length], threshold)
        if len(kept) >= number or length >= len(boxes):
            return kept[:number]
        length *= 2


def check_multi_threshold_settings(
    thresholds: Sequence[float], topks: Sequence[int], keys: str = "multi-threshold NMS"
) -> None:
    """Raise ValueError, which names ``keys``, unless both are decreasing and of one length."""
    decreasing = all(
        a > b for values in (thresholds, topks) for a, b in zip(values, values[1:], strict=False)
    )
    if not thresholds or len(thresholds) != len(topks) or not decreasing:
        raise ValueError(
            f"{keys}: as many thresholds as numbers of boxes are needed, both decreasing, "
            f"got thresholds {tuple(thresholds)} and numbers {tuple(topks)}"
        )
