"""All measures of a set of proposals from one pass over its images.

Shape shorthand: G ground truths and R proposals of an image.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .diagnostics import HighQualityCounts, OverlapHistogram, aspect_bins, diagnose
from .ground_truth import GroundTruth
from .mask_overlaps import mask_overlaps
from .proposal_checks import ImageProposals
from .recall import AREA_RANGES, CURVE_NUM_PROPOSALS, Matcher, box_overlaps, recall_metrics
from .report import AREA_NAMES, recall_curves
from .unseen_categories import find_on_seen

# Images are searched for proposals on seen objects side by side, within this many IoUs.
_UNSEEN_IMAGES = 64
_UNSEEN_OVERLAPS = 2**23


@dataclass(frozen=True)
class Measurement:
    """What has been measured, in percent.

    Attributes:
        metrics: of ``recall_metrics``, over all categories.
        by_categories: the same by subset of the ground truth: "seen" and "unseen" (plain: the
            other subset's objects do not exist) and "unseen_budget" (see ``unseen_categories``);
            {} unless unseen categories are given.
        curves: of ``recall_curves``.
        diagnostics: of ``diagnose``.
        num_ground_truth: by the area range's name.
    """

    metrics: dict[str, float]
    curves: dict[str, Any]
    diagnostics: dict[str, Any]
    num_ground_truth: dict[str, int]
    by_categories: dict[str, dict[str, float]] = field(default_factory=dict)


def box_overlaps_of(
    ground_truth: GroundTruth,
    proposals: Sequence[ImageProposals],
    usable: Sequence[np.ndarray],
    top: int | None = None,
) -> Iterator[np.ndarray]:
    """(G, R) IoU of boxes, image by image; that of an unusable proposal is 0.

    Args:
        ground_truth: of the dataset.
        proposals: of each image, in the dataset's order.
        usable: per image (R,) bool.
        top: how many best-scored proposals of an image take part; None for all.
    """
    boxes = (
        scorable_boxes(proposals_i, usable_i, top)
        for proposals_i, usable_i in zip(proposals, usable, strict=True)
    )
    return box_overlaps(ground_truth.boxes_by_image(), boxes)


def scorable_boxes(
    proposals_i: ImageProposals, usable_i: np.ndarray, top: int | None = None
) -> np.ndarray:
    """(R, 4) boxes of an image; an unusable one has become a point, which overlaps nothing."""
    return np.where(usable_i[:top, None], proposals_i.boxes[:top], np.float32(0))


def mask_overlaps_of(
    ground_truth: GroundTruth,
    proposals: Sequence[ImageProposals],
    usable: Sequence[np.ndarray],
    top: int | None = None,
) -> Iterator[np.ndarray]:
    """(G, R) IoU of masks, image by image; otherwise as :func:`box_overlaps_of`."""
    masks = ((proposals_i.masks or [])[:top] for proposals_i in proposals)
    for overlaps_i, usable_i in zip(
        mask_overlaps(ground_truth.masks_by_image(), masks), usable, strict=True
    ):
        # An image without proposals may come without masks.
        yield np.where(usable_i[: overlaps_i.shape[1]], overlaps_i, np.float32(0))


def num_needed(limits: Sequence[int], unseen: Collection[int] = ()) -> int | None:
    """How many best-scored proposals of an image play a part in its measures; None for all.

    With unseen categories, each proposal that leaves the budget lets another one in.
    """
    return None if len(unseen) else max(*limits, *CURVE_NUM_PROPOSALS)


def measure(
    overlaps: Iterable[np.ndarray],
    ground_truth: GroundTruth,
    limits: Sequence[int],
    unseen: Collection[int] = (),
) -> Measurement:
    """Measure proposals by their IoU with the ground truth.

    Args:
        overlaps: per image (G, R), of boxes or of masks, columns by descending score.
        ground_truth: of the dataset, its images in the order of ``overlaps``.
        limits: numbers of proposals k, as of ``check_limits``.
        unseen: categories that the generator was not trained on.
    """
    num_proposals = sorted({*limits, *CURVE_NUM_PROPOSALS})
    everything = Matcher(ground_truth.areas, num_proposals)
    histogram, high_quality = OverlapHistogram(), HighQualityCounts()
    subsets = _Subsets(ground_truth, num_proposals, unseen) if len(unseen) else None
    ends = np.cumsum(ground_truth.num_per_image)
    bins_by_image = np.split(aspect_bins(ground_truth.boxes), ends)[:-1]
    for overlaps_i, aspect_bins_i in zip(overlaps, bins_by_image, strict=True):
        everything.add(overlaps_i)
        best_i = overlaps_i.max(axis=0, initial=0)
        histogram.add(best_i)
        high_quality.add(overlaps_i, best_i, aspect_bins_i)
        if subsets:
            subsets.add(overlaps_i)
    matches = everything.finish()
    return Measurement(
        metrics=recall_metrics(matches, ground_truth.categories, limits),
        curves=recall_curves(matches, limits),
        diagnostics=diagnose(
            matches, histogram, high_quality, ground_truth.boxes, ground_truth.areas, limits
        ),
        num_ground_truth={
            AREA_NAMES[suffix]: int(in_range.sum())
            for suffix, in_range in zip(AREA_RANGES, matches.in_range, strict=True)
        },
        by_categories=subsets.metrics(limits) if subsets else {},
    )


class _Subsets:
    """Seen and unseen ground truth, matched on its own."""

    def __init__(
        self, ground_truth: GroundTruth, num_proposals: list[int], unseen: Collection[int]
    ) -> None:
        is_seen = ~np.isin(ground_truth.categories, list(unseen))
        self._is_seen = np.split(is_seen, np.cumsum(ground_truth.num_per_image))[:-1]
        self._categories = {"seen": ground_truth.categories[is_seen]}
        self._categories["unseen"] = ground_truth.categories[~is_seen]
        self._categories["unseen_budget"] = self._categories["unseen"]
        self._matchers = {
            "seen": Matcher(ground_truth.areas[is_seen], num_proposals),
            "unseen": Matcher(ground_truth.areas[~is_seen], num_proposals),
            "unseen_budget": Matcher(ground_truth.areas[~is_seen], num_proposals),
        }
        self._next = 0
        self._block: list[tuple[np.ndarray, np.ndarray]] = []
        self._largest = (0, 0)

    def add(self, overlaps_i: np.ndarray) -> None:
        is_seen_i = self._is_seen[self._next]
        self._next += 1
        self._matchers["seen"].add(overlaps_i[is_seen_i])
        self._matchers["unseen"].add(overlaps_i[~is_seen_i])
        # Each image of a block becomes as large as the most objects and the most proposals in it.
        num_gt, num_ranks = map(max, self._largest, overlaps_i.shape)
        size = (len(self._block) + 1) * num_gt * num_ranks
        if size > _UNSEEN_OVERLAPS or len(self._block) >= _UNSEEN_IMAGES:
            self._match_block()
            num_gt, num_ranks = overlaps_i.shape
        self._block.append((overlaps_i, is_seen_i))
        self._largest = (num_gt, num_ranks)

    def metrics(self, limits: Sequence[int]) -> dict[str, dict[str, float]]:
        self._match_block()
        return {
            name: recall_metrics(matcher.finish(), self._categories[name], limits)
            for name, matcher in self._matchers.items()
        }

    def _match_block(self) -> None:
        if not self._block:
            return
        on_seen = find_on_seen(*zip(*self._block, strict=True))
        for (overlaps_i, is_seen_i), on_seen_i in zip(self._block, on_seen, strict=True):
            self._matchers["unseen_budget"].add(overlaps_i[~is_seen_i][:, ~on_seen_i])
        self._block, self._largest = [], (0, 0)
