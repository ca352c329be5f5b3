"""Recall of object proposals: matching and measures, on plain arrays.

Measures:

* AR, average recall: recall at the IoU thresholds .50:.05:.95, averaged; the form that COCO made
  of Hosang, Benenson, Dollar, Schiele, "What makes for effective detection proposals?", TPAMI 2016.
* AR-cont: the same paper's continuous form, 2 * mean(max(IoU - .5, 0)). The two differ by some
  points on the same boxes and are never compared.
* ABO, average best overlap, and MABO, its mean over categories: Uijlings et al., "Selective search
  for object recognition", IJCV 2013. Several objects may share a proposal here.
* AUC: the area under AR over the logarithm of the number of proposals, from 1 to 1,000, divided by
  the length of that interval; the range with which Pinheiro, Collobert, Dollar, "Learning to
  segment object candidates", NIPS 2015, agrees with its own AR.

AR and AR-cont match one to one and greedily: the pair of the highest IoU first, then the best pair
of what is left, and so on, within an image, among its k best-scored proposals and the ground truth
of an area range alone. Of pairs with equal IoU the one of the earlier ground truth goes first, then
the one of the better-ranked proposal.

Shape shorthand:
    G, R: ground truths and proposals of an image
    M: ground truths of all images, in order
    A: area ranges
    K: numbers of proposals at which recall is measured
    E: edges, that is pairs of a ground truth and a proposal whose IoU is at least .5
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.integrate import trapezoid

# float32 as the IoU itself: 3 / 5 must reach the threshold .6.
IOU_THRESHOLDS = np.arange(50, 100, 5, dtype=np.float32) / np.float32(100)
# Closed ranges of the annotated area in square pixels, as in COCO: an area of exactly 32^2 is
# small and medium. By the suffix in the measures' names; "" is all ground truth.
AREA_RANGES = {
    "": (0.0, np.inf),
    "s": (0.0, 32.0**2),
    "m": (32.0**2, 96.0**2),
    "l": (96.0**2, np.inf),
}
# Where the curve of AR over the number of proposals, and so AUC, is sampled.
CURVE_NUM_PROPOSALS = (1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 200, 300, 500, 700, 1000)
CURVE_IOU_THRESHOLDS = np.arange(50, 101, dtype=np.float32) / np.float32(100)
# IoU thresholds whose recall is drawn over the number of proposals (SPOP, Fig. 8, 11 and 12; ZIP,
# Fig. 7).
CURVE_SINGLE_IOUS = (0.5, 0.7, 0.8)
# Single thresholds (in percent) whose recall is among the measures.
DETAIL_IOU_THRESHOLDS = (50, 70)
MAX_LIMIT = 2000

# Scalars of the boxes' own type; another one would have every step convert.
_ZERO = np.float32(0)
_TINY = np.finfo(np.float32).smallest_subnormal

# No measure of matched pairs looks at an IoU below .5, and greedy matching comes to those pairs
# last: leaving them out changes nothing and makes the matching small.
MIN_MATCHED_IOU = 0.5
# Images are matched in blocks: enough of them to keep array operations long, few enough to keep
# memory small.
_BLOCK_IMAGES = 256
_BLOCK_EDGES = 2**20
_LONG_STRETCH = 100


@dataclass(frozen=True)
class Matches:
    """What the proposals of a dataset reach, ground truth by ground truth.

    Attributes:
        num_proposals: the K numbers of best-scored proposals per image, ascending.
        in_range: (A, M) bool, whether a ground truth belongs to an area range, in the order of
            ``AREA_RANGES``.
        matched_iou: (A, M, K) float32, IoU with the proposal matched one to one; 0 where there is
            none with an IoU of at least .5, and outside the area range.
        best_iou: (M, K) float32, highest IoU with any proposal.
    """

    num_proposals: tuple[int, ...]
    in_range: np.ndarray
    matched_iou: np.ndarray
    best_iou: np.ndarray

    def column(self, num_proposals: int) -> int:
        """Index into K of one of ``num_proposals``."""
        return self.num_proposals.index(num_proposals)


def check_limits(limits: Sequence[int]) -> tuple[int, ...]:
    """Numbers of proposals, ascending.

    Raises:
        ValueError: if there are none, or one is not a whole number from 1 to 2,000.
    """
    valid = all(int(limit) == limit and 1 <= limit <= MAX_LIMIT for limit in limits)
    if not limits or not valid:
        raise ValueError(
            f"limits (TEST.PROPOSALS.LIMITS) must be whole numbers from 1 to {MAX_LIMIT}, "
            f"not {tuple(limits)}"
        )
    return tuple(sorted({int(limit) for limit in limits}))


def find_idle_limits(limits: Sequence[int], numbers: Iterable[int]) -> list[int]:
    """Limits that can only repeat the figures of a lower one, as that takes every proposal in.

    Args:
        limits: as of :func:`check_limits`.
        numbers: of proposals, image by image.
    """
    most = max(numbers, default=0)
    return [limit for limit in limits if any(most <= lower < limit for lower in limits)]


def describe_idle_limits(limits: Sequence[int], numbers: Sequence[int]) -> str:
    """A sentence that names them, "" where there are none; arguments as above."""
    idle = find_idle_limits(limits, numbers)
    if not idle:
        return ""
    if not max(numbers, default=0):
        return "no image has a proposal (boxes that are not finite or empty are none)"
    lower = max(set(limits) - set(idle))
    return (
        f"no image has more than {max(numbers, default=0)} proposals: the figures at "
        f"{', '.join(map(str, idle))} repeat those at {lower}"
    )


def box_overlaps(
    gt_boxes: Iterable[np.ndarray], proposal_boxes: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """IoU of boxes, image by image.

    Args:
        gt_boxes: per image (G, 4) float32, XYXY.
        proposal_boxes: per image (R, 4) float32, XYXY in the same pixels, best score first.

    Yields:
        Per image (G, R) float32.
    """
    for gt_boxes_i, proposal_boxes_i in zip(gt_boxes, proposal_boxes, strict=True):
        yield box_iou(gt_boxes_i, proposal_boxes_i)


def box_iou(gt_boxes: np.ndarray, proposal_boxes: np.ndarray) -> np.ndarray:
    """IoU of all pairs, to the bit as Detectron2's ``pairwise_iou``.

    The boxes of an image are too few for several threads: torch's spend more time on waiting for
    each other than on these operations, many times more on a busy machine. NumPy has one.

    Args:
        gt_boxes, proposal_boxes: (G, 4) and (R, 4) float32, XYXY.

    Returns:
        (G, R) float32; 0 where boxes do not meet.
    """
    x1, y1, x2, y2 = gt_boxes.T[:, :, None]  # (G, 1) each
    # Contiguous rows make the operations on (G, R) faster.
    other_x1, other_y1, other_x2, other_y2 = np.ascontiguousarray(proposal_boxes.T)  # (R,) each
    # Three arrays for all of the steps: fresh memory takes more time than they do.
    width, height, start = (
        np.empty((len(gt_boxes), len(proposal_boxes)), np.float32) for _ in range(3)
    )
    np.minimum(x2, other_x2, out=width)
    width -= np.maximum(x1, other_x1, out=start)
    np.minimum(y2, other_y2, out=height)
    height -= np.maximum(y1, other_y1, out=start)
    np.maximum(width, _ZERO, out=width)
    np.maximum(height, _ZERO, out=height)
    intersection = np.multiply(width, height, out=width)
    areas, other_areas = (x2 - x1) * (y2 - y1), (other_x2 - other_x1) * (other_y2 - other_y1)
    union = np.add(areas, other_areas, out=height)
    union -= intersection
    # Boxes that meet have a union above zero; those that do not get 0 for any divisor but 0.
    np.maximum(union, _TINY, out=union)
    return np.divide(intersection, union, out=intersection)


def match_proposals(
    overlaps: Iterable[np.ndarray], gt_areas: np.ndarray, num_proposals: Sequence[int]
) -> Matches:
    """Match proposals to ground truth for all numbers of proposals and area ranges at once.

    An image without proposals counts: its ground truth is missed. Unlike Detectron2's
    ``_evaluate_box_proposals``, which leaves it out; for all other images the results agree.

    Args:
        overlaps: per image (G, R) IoU of boxes or of masks, columns by descending score.
        gt_areas: (M,) annotated areas in square pixels, of the rows of all ``overlaps``.
        num_proposals: the K numbers of proposals.
    """
    matcher = Matcher(gt_areas, num_proposals)
    for overlaps_i in overlaps:
        matcher.add(overlaps_i)
    return matcher.finish()


class Matcher:
    """``match_proposals`` for images that come one by one."""

    def __init__(self, gt_areas: np.ndarray, num_proposals: Sequence[int]) -> None:
        self._num_proposals = tuple(sorted(num_proposals))
        gt_areas = np.asarray(gt_areas, np.float32)
        ranges = np.array(list(AREA_RANGES.values()), np.float32)  # (A, 2)
        self._in_range = (gt_areas >= ranges[:, :1]) & (gt_areas <= ranges[:, 1:])  # (A, M)
        self._matched_iou = np.zeros((*self._in_range.shape, len(self._num_proposals)), np.float32)
        self._best_iou = np.zeros(self._matched_iou.shape[1:], np.float32)
        self._block = _EdgeBlock(self._num_proposals, first_gt=0)

    def add(self, overlaps_i: np.ndarray) -> None:
        """Add the next image by its (G, R) IoU."""
        overlaps_i = overlaps_i[:, : self._num_proposals[-1]]
        rows = slice(self._block.end_gt, self._block.end_gt + len(overlaps_i))
        if rows.stop > self._in_range.shape[1]:
            raise ValueError(f"{self._in_range.shape[1]} areas given for {rows.stop} ground truths")
        self._best_iou[rows] = _best_of_first(overlaps_i, self._num_proposals)
        self._block.add(overlaps_i)
        if self._block.is_full():
            self._match_block()

    def finish(self) -> Matches:
        """The matches of all images.

        Raises:
            ValueError: if the images' ground truths are not as many as the areas.
        """
        self._match_block()
        if self._block.end_gt != self._in_range.shape[1]:
            raise ValueError(
                f"{self._in_range.shape[1]} areas given for {self._block.end_gt} ground truths"
            )
        return Matches(self._num_proposals, self._in_range, self._matched_iou, self._best_iou)

    def _match_block(self) -> None:
        rows = slice(self._block.first_gt, self._block.end_gt)
        self._matched_iou[:, rows] = self._block.match(self._in_range[:, rows])
        self._block = _EdgeBlock(self._num_proposals, first_gt=self._block.end_gt)


def _best_of_first(overlaps_i: np.ndarray, num_proposals: tuple[int, ...]) -> np.ndarray:
    """Highest of the first k IoUs of each row for each k: (G, R) -> (G, K)."""
    num_gt, num_columns = overlaps_i.shape
    if overlaps_i.size == 0:
        return np.zeros((num_gt, len(num_proposals)), np.float32)
    # Maxima of the stretches between one number and the next, then their running maximum. A
    # stretch that begins behind the last proposal is empty and repeats what came before.
    starts = [start for start in (0, *num_proposals[:-1]) if start < num_columns]
    ends = [*starts[1:], num_columns]
    # reduceat takes many short stretches at once, but long ones slowly.
    num_short = sum(end <= _LONG_STRETCH for end in ends)
    best = np.empty((num_gt, len(num_proposals)), np.float32)
    if num_short:
        first = overlaps_i[:, : ends[num_short - 1]]
        np.maximum.reduceat(first, starts[:num_short], axis=1, out=best[:, :num_short])
    for column in range(num_short, len(starts)):
        overlaps_i[:, starts[column] : ends[column]].max(axis=1, out=best[:, column])
    best[:, len(starts) :] = 0
    return np.maximum.accumulate(best, axis=1)


class _EdgeBlock:
    """The edges of consecutive images, to be matched together.

    Attributes:
        first_gt, end_gt: the ground truths of the block, as a range of M.
    """

    def __init__(self, num_proposals: tuple[int, ...], first_gt: int) -> None:
        self.num_proposals = num_proposals
        self.first_gt = self.end_gt = first_gt
        self._num_images = 0
        self._num_edges = 0
        self._gt, self._image, self._rank, self._iou = [], [], [], []

    def is_full(self) -> bool:
        return self._num_images >= _BLOCK_IMAGES or self._num_edges >= _BLOCK_EDGES

    def add(self, overlaps_i: np.ndarray) -> None:
        """Add an image by its (G, R) IoU."""
        edges = np.flatnonzero(overlaps_i >= MIN_MATCHED_IOU)
        gt, rank = np.divmod(edges, max(overlaps_i.shape[1], 1))
        self._gt.append(gt + (self.end_gt - self.first_gt))
        self._rank.append(rank)
        self._image.append(np.full(len(edges), self._num_images))
        self._iou.append(overlaps_i.reshape(-1)[edges])
        self._num_images += 1
        self._num_edges += len(edges)
        self.end_gt += len(overlaps_i)

    def match(self, in_range: np.ndarray) -> np.ndarray:
        """Match all images of the block.

        Args:
            in_range: (A, M) bool, M being the ground truths of the block.

        Returns:
            (A, M, K) float32 as ``Matches.matched_iou``.
        """
        num_ranges, num_gt = in_range.shape
        matched_iou = np.zeros((len(self.num_proposals), num_ranges, num_gt), np.float32)
        if self._num_edges == 0:
            return np.moveaxis(matched_iou, 0, -1)
        gt, rank, image, iou = map(np.concatenate, (self._gt, self._rank, self._image, self._iou))
        # Lowest IoU first; reversed before the stable sort, so that of equal ones the earlier
        # ground truth and then the better rank comes last and wins.
        order = np.argsort(iou[::-1], kind="stable")
        gt, rank, image, iou = (array[::-1][order] for array in (gt, rank, image, iou))
        # Area ranges do not compete: each has its own copies of ground truths and proposals.
        range_index, edge = np.nonzero(in_range[:, gt])
        max_rank = self.num_proposals[-1]
        proposal = (range_index * self._num_images + image[edge]) * max_rank + rank[edge]
        gt = range_index * num_gt + gt[edge]
        rank, iou = rank[edge], iou[edge]

        # Few of the copies have an edge; those alone are numbered, which keeps them in the cache.
        has_edge = np.zeros(num_ranges * self._num_images * max_rank, bool)
        has_edge[proposal] = True
        proposal = (np.cumsum(has_edge) - 1)[proposal]
        num_copies = np.count_nonzero(has_edge)
        # Fewer proposals have fewer edges: from the most to the least.
        for column in reversed(range(len(self.num_proposals))):
            kept = rank < self.num_proposals[column]
            gt, proposal, rank, iou = gt[kept], proposal[kept], rank[kept], iou[kept]
            matched = match_edges(gt, proposal, iou, num_ranges * num_gt, num_copies)
            matched_iou[column] = matched.reshape(num_ranges, num_gt)
        return np.moveaxis(matched_iou, 0, -1)


def match_edges(
    gt: np.ndarray, proposal: np.ndarray, iou: np.ndarray, num_gt: int, num_proposals: int
) -> np.ndarray:
    """Greedy one-to-one matching, best edge first, without a loop over edges or ground truths.

    An edge that is the best of its ground truth and the best of its proposal is taken by the
    greedy order whatever happens elsewhere, so each round takes all such edges at once and removes
    their neighbours. A round takes at least the best edge left; a few rounds empty real data.

    Args:
        gt, proposal: (E,) int, the ends of the edges, worst edge first.
        iou: (E,) float32.
        num_gt, num_proposals: one more than the largest possible ``gt`` and ``proposal``.

    Returns:
        (num_gt,) float32, IoU of each ground truth's edge, 0 without one.
    """
    matched_iou = np.zeros(num_gt, np.float32)
    best_of_gt = np.empty(num_gt, np.int64)
    best_of_proposal = np.empty(num_proposals, np.int64)
    is_matched = np.zeros(num_gt, bool)
    is_used = np.zeros(num_proposals, bool)
    while len(iou):
        position = np.arange(len(iou))
        # Of several values assigned to an element the last stays: that of the best edge.
        best_of_gt[gt] = position
        best_of_proposal[proposal] = position
        taken = np.flatnonzero(
            (best_of_gt[gt] == position) & (best_of_proposal[proposal] == position)
        )
        matched_iou[gt[taken]] = iou[taken]
        is_matched[gt[taken]] = True
        is_used[proposal[taken]] = True
        left = ~(is_matched[gt] | is_used[proposal])
        gt, proposal, iou = gt[left], proposal[left], iou[left]
    return matched_iou


def average_recall(matches: Matches) -> np.ndarray:
    """AR by area range and number of proposals.

    Returns:
        (A, K) in [0, 1]; NaN for an area range without ground truth.
    """
    recall = np.full((len(matches.in_range), len(matches.num_proposals)), np.nan)
    for row, in_range, matched_iou in zip(
        recall, matches.in_range, matches.matched_iou, strict=True
    ):
        if in_range.any():
            num_reached = np.searchsorted(IOU_THRESHOLDS, matched_iou[in_range], side="right")
            row[:] = num_reached.mean(axis=0) / len(IOU_THRESHOLDS)
    return recall


def recall_at_iou(matched_iou: np.ndarray, iou_thresholds: np.ndarray) -> np.ndarray:
    """Share of ground truths matched with at least an IoU.

    Args:
        matched_iou: (M,) float32, M > 0.
        iou_thresholds: (T,) float32, each at least .5.

    Returns:
        (T,) in [0, 1].
    """
    num_below = np.searchsorted(np.sort(matched_iou), iou_thresholds, side="left")
    return 1 - num_below / len(matched_iou)


def continuous_average_recall(matched_iou: np.ndarray) -> np.ndarray:
    """AR-cont: (M, K) IoU of M > 0 matched ground truths -> (K,) in [0, 1]."""
    return 2 * np.maximum(matched_iou - 0.5, 0).mean(axis=0, dtype=np.float64)


def mean_average_best_overlap(best_iou: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """MABO: (M, K) best IoU and (M,) categories, M > 0 -> (K,) in [0, 1]."""
    _, categories, counts = np.unique(categories, return_inverse=True, return_counts=True)
    weights = 1 / (counts[categories] * len(counts))
    return weights @ best_iou.astype(np.float64)


def area_under_curve(num_proposals: Sequence[int], recall: np.ndarray) -> np.ndarray:
    """Area under AR over the logarithm of the number of proposals, by the trapezoid rule.

    Args:
        num_proposals: (K,) ascending; the published range is from 1 to 1,000.
        recall: (..., K) AR.

    Returns:
        (...), in the unit of ``recall``: the area is divided by the length of the interval.
    """
    log_number = np.log(num_proposals)
    return trapezoid(recall, log_number, axis=-1) / (log_number[-1] - log_number[0])


def recall_metrics(
    matches: Matches, categories: np.ndarray, limits: Sequence[int]
) -> dict[str, float]:
    """All measures, in percent, under the names with which they are printed.

    Keys without "-" are the headline: ``AR@k``, ``ARs@k``, ``ARm@k``, ``ARl@k``, ``ABO@k``,
    ``MABO@k`` and ``AUC``, ``AUCs``, ``AUCm``, ``AUCl``; those with it are details, which
    Detectron2's ``print_csv_format`` leaves out: ``AR-cont@k``, ``ABO-s@k`` (``-m``, ``-l``) and
    ``Recall-IoU50@k`` (``70``). A measure of an area range without ground truth is left out.

    Args:
        matches: must have been made for ``limits`` and ``CURVE_NUM_PROPOSALS``.
        categories: (M,) int.
        limits: numbers of proposals k.
    """
    if len(categories) == 0:
        return {}
    columns = [matches.column(limit) for limit in limits]
    by_limit = {
        "MABO": mean_average_best_overlap(matches.best_iou[:, columns], categories),
        "AR-cont": continuous_average_recall(matches.matched_iou[0][:, columns]),
    }
    thresholds = np.array(DETAIL_IOU_THRESHOLDS, np.float32) / np.float32(100)
    recall = [recall_at_iou(matches.matched_iou[0, :, column], thresholds) for column in columns]
    for percent, values in zip(DETAIL_IOU_THRESHOLDS, np.transpose(recall), strict=True):
        by_limit[f"Recall-IoU{percent}"] = values

    ar = average_recall(matches)
    curve = ar[:, [matches.column(number) for number in CURVE_NUM_PROPOSALS]]
    auc = area_under_curve(CURVE_NUM_PROPOSALS, curve)
    metrics = {}
    for row, suffix in enumerate(AREA_RANGES):
        in_range = matches.in_range[row]
        if in_range.any():
            by_limit[f"AR{suffix}"] = ar[row, columns]
            abo = matches.best_iou[in_range][:, columns].mean(axis=0, dtype=np.float64)
            by_limit[f"ABO-{suffix}" if suffix else "ABO"] = abo
            metrics[f"AUC{suffix}"] = auc[row]
    for name, values in by_limit.items():
        for limit, value in zip(limits, values, strict=True):
            metrics[f"{name}@{limit}"] = value
    return {
        name: 100 * float(metrics[name]) for name in sorted(metrics, key=_printing_order(limits))
    }


def _printing_order(limits: Sequence[int]) -> Callable[[str], tuple[int, int]]:
    """Sorting key of measures: AR and its sizes by limit first, then the others."""
    names = [f"AR{suffix}" for suffix in AREA_RANGES]
    names += [f"AUC{suffix}" for suffix in AREA_RANGES] + ["ABO", "MABO", "AR-cont"]

    def key(metric: str) -> tuple[int, int]:
        name, _, limit = metric.partition("@")
        position = names.index(name) if name in names else len(names)
        group = 0 if position < len(AREA_RANGES) else position
        return group, list(limits).index(int(limit)) if limit else 0

    return key
