"""The pairs of an object and a proposal from which recall can be counted, as few as there need be.

From all IoUs of an image two lists are kept. The pairs that one-to-one matching looks at, in its
order: whoever matches among the k best proposals walks through them and leaves out those of a rank
of k or more. (The matches of k proposals are not a part of those of k + 1, so they cannot be stored
themselves.) And for each object the proposals that were better than all before them: the last of
them below rank k is the best of k.

Shape shorthand:
    G, R: objects and proposals of an image
    E: pairs with an IoU of at least .5
    B: proposals that are better than all before them, of all objects
"""

from typing import NamedTuple

import numpy as np

from ..evaluation.recall import MIN_MATCHED_IOU


class Pairs(NamedTuple):
    """The pairs of an image.

    Attributes:
        gt, rank: (E,) int, object and proposal, in the order of greedy matching: by IoU, of equal
            ones the earlier object first, then the better rank.
        iou: (E,) float32, descending.
        best_gt, best_rank: (B,) int, by object and then by rank.
        best_iou: (B,) float32, above 0, ascending within an object.
    """

    gt: np.ndarray
    rank: np.ndarray
    iou: np.ndarray
    best_gt: np.ndarray
    best_rank: np.ndarray
    best_iou: np.ndarray


def find_pairs(overlaps: np.ndarray) -> Pairs:
    """The pairs of an image.

    Args:
        overlaps: (G, R) float32 IoU, of boxes or of masks, columns by descending score.
    """
    gt, rank = np.nonzero(overlaps >= MIN_MATCHED_IOU)
    iou = overlaps[gt, rank]
    order = np.lexsort((rank, gt, -iou))
    best = np.maximum.accumulate(overlaps, axis=1)
    before = np.pad(best[:, :-1], ((0, 0), (1, 0)))[:, : overlaps.shape[1]]
    best_gt, best_rank = np.nonzero(overlaps > before)
    return Pairs(
        gt[order], rank[order], iou[order], best_gt, best_rank, overlaps[best_gt, best_rank]
    )
