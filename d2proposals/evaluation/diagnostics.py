"""What recall alone does not say: how good the proposals are, and which objects they cover.

* Histogram of the IoU of the best-scored proposals with their ground truth: Zou et al., "SC-RPN",
  TIP 2021, Fig. 6 and 7.
* High-quality proposals, whose IoU is above a threshold, by the aspect ratio of their object: the
  same, Fig. 8. Beside them, how many objects have such a proposal.
* ABO, and objects detected, by the objects' size: Jie et al., "Scale-aware Pixel-wise Object
  Proposal Networks", TIP 2016, Fig. 13 and 9.

Shape shorthand: M ground truths of all images, K numbers of proposals, L limits of the histogram.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .recall import Matches

NUM_BINS = 20
# Numbers of best-scored proposals whose IoU is counted.
HISTOGRAM_LIMITS = (300, 1000)
# From which IoU an object is covered, and above which a proposal is of high quality.
COVERED_IOUS = (70, 80)  # percent
# An object is detected if a proposal overlaps it by this IoU.
DETECTED_IOU = 0.5
# Width / height, in octaves between 1/8 and 8 and all beyond.
ASPECT_EDGES = 2.0 ** np.arange(-3, 4)
# Square root of the area in pixels, in half octaves.
SIDE_EDGES = 2.0 ** np.arange(2, 10.5, 0.5)


class OverlapHistogram:
    """Counts of the proposals' best IoU with any ground truth, over bins of .05."""

    def __init__(self, limits: Sequence[int] = HISTOGRAM_LIMITS) -> None:
        self.limits = tuple(limits)
        self.counts = np.zeros((len(self.limits), NUM_BINS), np.int64)

    def add(self, best_i: np.ndarray) -> None:
        """Add an image by the best IoU of its (R,) proposals, 0 without ground truth."""
        bins = np.minimum((best_i * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        for row, limit in zip(self.counts, self.limits, strict=True):
            row += np.bincount(bins[:limit], minlength=NUM_BINS)


class HighQualityCounts:
    """Counts of the proposals above each of ``COVERED_IOUS``, by their object's aspect ratio.

    A proposal's object is the one that it overlaps most, and its IoU is the one with it.
    """

    def __init__(self, limits: Sequence[int] = HISTOGRAM_LIMITS) -> None:
        self.limits = tuple(limits)
        # (limits, IoUs, bins of the aspect ratio)
        self.counts = np.zeros(
            (len(self.limits), len(COVERED_IOUS), len(ASPECT_EDGES) + 1), np.int64
        )

    def add(self, overlaps_i: np.ndarray, best_i: np.ndarray, aspect_bins_i: np.ndarray) -> None:
        """Add an image.

        Args:
            overlaps_i: (G, R) IoU.
            best_i: (R,) its maxima, 0 without ground truth.
            aspect_bins_i: (G,) of :func:`aspect_bins`.
        """
        thresholds = [np.float32(percent) / np.float32(100) for percent in COVERED_IOUS]
        # Few proposals are good; to look for the object of each one takes most of the time.
        rank = np.flatnonzero(best_i > min(thresholds))
        if len(rank) == 0:
            return
        ratio_bin = aspect_bins_i[overlaps_i.take(rank, axis=1).argmax(axis=0)]
        best, num_bins = best_i[rank], self.counts.shape[2]
        for counts, limit in zip(self.counts, self.limits, strict=True):
            for row, threshold in zip(counts, thresholds, strict=True):
                is_good = (rank < limit) & (best > threshold)
                row += np.bincount(ratio_bin[is_good], minlength=num_bins)

    def content(self) -> dict[str, dict[str, list[int]]]:
        """Counts as JSON content: by limit as text, by IoU ("IoU70", ...), by bin."""
        return {
            str(limit): {
                f"IoU{percent}": row.tolist()
                for percent, row in zip(COVERED_IOUS, counts, strict=True)
            }
            for limit, counts in zip(self.limits, self.counts, strict=True)
        }


def diagnose(
    matches: Matches,
    histogram: OverlapHistogram,
    high_quality: HighQualityCounts,
    boxes: np.ndarray,
    areas: np.ndarray,
    limits: Sequence[int],
) -> dict[str, Any]:
    """Diagnostics as JSON content.

    Args:
        matches: of all ground truth.
        histogram: of all images.
        high_quality: of all images.
        boxes: (M, 4) XYXY of the ground truth, for its aspect ratios.
        areas: (M,) in square pixels.
        limits: numbers of proposals k.

    Returns:
        ``proposal_iou``: "edges" and counts by limit as text; ``aspect_ratio``: "edges" (width /
        height, ends open), "num_ground_truth", by limit and IoU the number covered, and by limit
        and IoU "high_quality_proposals";
        ``abo_by_side``: "edges" (square root of the area in pixels, ends open),
        "num_ground_truth", and by limit ABO in percent, None for a bin without objects;
        ``detected_by_side``: "edges" and "num_ground_truth" likewise, and by limit the number of
        objects that a proposal overlaps by an IoU of at least .5.
    """
    ratio_bin = aspect_bins(boxes)
    num_by_ratio = np.bincount(ratio_bin, minlength=len(ASPECT_EDGES) + 1)
    covered = {}
    for limit in limits:
        best = matches.best_iou[:, matches.column(limit)]
        covered[str(limit)] = {
            f"IoU{percent}": np.bincount(
                ratio_bin[best >= np.float32(percent) / np.float32(100)],
                minlength=len(num_by_ratio),
            ).tolist()
            for percent in COVERED_IOUS
        }
    return {
        "proposal_iou": {
            "edges": (np.arange(NUM_BINS + 1) / NUM_BINS).tolist(),
            **{
                str(limit): row.tolist()
                for limit, row in zip(histogram.limits, histogram.counts, strict=True)
            },
        },
        "aspect_ratio": {
            "edges": ASPECT_EDGES.tolist(),
            "num_ground_truth": num_by_ratio.tolist(),
            "covered": covered,
            "high_quality_proposals": high_quality.content(),
        },
        **_by_side(matches, areas, limits),
    }


def aspect_bins(boxes: np.ndarray) -> np.ndarray:
    """Bins of ``ASPECT_EDGES`` of (M, 4) XYXY boxes: (M,) in [0, edges]; the last for no height."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(height > 0, width / height, np.inf)
    return np.searchsorted(ASPECT_EDGES, ratio, side="right")


def _by_side(matches: Matches, areas: np.ndarray, limits: Sequence[int]) -> dict[str, Any]:
    """What :func:`diagnose` returns by the objects' size."""
    side_bin = np.searchsorted(SIDE_EDGES, np.sqrt(areas), side="right")
    num_bins = len(SIDE_EDGES) + 1
    num_by_side = np.bincount(side_bin, minlength=num_bins).tolist()
    abo, detected = {}, {}
    for limit in limits:
        best = matches.best_iou[:, matches.column(limit)]
        total = np.bincount(side_bin, best, minlength=num_bins)
        abo[str(limit)] = [
            100 * value / number if number else None
            for value, number in zip(total.tolist(), num_by_side, strict=True)
        ]
        is_detected = best >= DETECTED_IOU
        detected[str(limit)] = np.bincount(side_bin[is_detected], minlength=num_bins).tolist()
    shared = {"edges": SIDE_EDGES.tolist(), "num_ground_truth": num_by_side}
    return {"abo_by_side": {**shared, **abo}, "detected_by_side": {**shared, **detected}}
