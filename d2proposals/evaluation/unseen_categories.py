"""Recall of objects of categories that a generator was not trained on.

Source: D. Kim, T.-Y. Lin, A. Angelova, I. S. Kweon, W. Kuo, "Learning Open-World Object Proposals
without Learning to Classify", RA-L 2022, arXiv:2108.06753, Sec. IV-A: ground truth of the seen
categories is ignored, and proposals on it do not count into the budget k of AR@k. Which proposals
those are is decided as in COCO's evaluation at IoU .5: by descending score, each takes the unseen
object, not yet taken, of the highest IoU; a proposal that finds none takes the seen object, not yet
taken, of the highest IoU, and leaves the ranking. So a seen object removes one proposal, and a
second one on it counts.

Shape shorthand:
    B: images
    G, R: ground truths and proposals of an image
"""

from collections.abc import Sequence

import numpy as np

from ..files.annotation_cleaning import NO_CATEGORY
from ..files.annotation_file import find_categories
from .ground_truth import GroundTruth

_MIN_IOU = np.float32(0.5)


def choose_unseen(
    ground_truth: GroundTruth, unseen: Sequence[str] | None, seen: Sequence[str] | None
) -> set[int]:
    """The categories that were not trained on, by those that were not or those that were.

    Args:
        ground_truth: of the dataset.
        unseen: names or numbers, as of ``find_categories``; None if ``seen`` is given.
        seen: the same; None for both means no such split.

    Returns:
        the unseen categories; {} without a split.

    Raises:
        ValueError: for categories that the dataset does not have, if objects have none, and if all
            objects or none are of unseen categories.
    """
    known = ground_truth.category_names
    if unseen:
        chosen = find_categories(unseen, known)
    elif seen:
        everything = set(known) or set(np.unique(ground_truth.categories).tolist())
        chosen = everything - find_categories(seen, known)
    else:
        return set()
    num_unknown = int((ground_truth.categories == NO_CATEGORY).sum())
    if num_unknown:
        raise ValueError(
            f"{num_unknown} of the dataset's objects have no category that it lists: they are "
            "neither seen nor unseen; mend their 'category_id', or take them out"
        )
    is_unseen = np.isin(ground_truth.categories, list(chosen))
    if is_unseen.all() or not is_unseen.any():
        raise ValueError(
            f"{'all' if is_unseen.any() else 'none'} of the dataset's objects are of unseen "
            "categories; name some of its categories"
        )
    return chosen


def find_on_seen(overlaps: Sequence[np.ndarray], is_seen: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Which proposals are taken by seen objects and leave the budget.

    Args:
        overlaps: per image (G, R) IoU, columns by descending score.
        is_seen: per image (G,) bool, whether an object's category was seen.

    Returns:
        Per image (R,) bool.
    """
    # (ranks, B, G): the images side by side, rank by rank. Pairs below the threshold play no part.
    num_images = len(overlaps)
    num_gt = max((len(overlaps_i) for overlaps_i in overlaps), default=0)
    num_ranks = max((overlaps_i.shape[1] for overlaps_i in overlaps), default=0)
    iou = np.zeros((num_ranks, num_images, num_gt), np.float32)
    seen = np.zeros((num_images, num_gt), bool)
    for index, (overlaps_i, is_seen_i) in enumerate(zip(overlaps, is_seen, strict=True)):
        iou[: overlaps_i.shape[1], index, : len(overlaps_i)] = overlaps_i.T
        seen[index, : len(is_seen_i)] = is_seen_i
    reaches = iou >= _MIN_IOU
    # Unseen objects come first whatever their IoU, which is at most 1.
    preference = np.where(reaches, iou + np.float32(2) * ~seen, 0)
    is_free = np.ones((num_images, num_gt), bool)
    on_seen = np.zeros((num_ranks, num_images), bool)
    image = np.arange(num_images)
    for rank in np.flatnonzero(reaches.any(axis=(1, 2))):
        candidates = np.where(is_free, preference[rank], 0)
        best = candidates.argmax(axis=1)
        takes = candidates[image, best] > 0
        is_free[image[takes], best[takes]] = False
        on_seen[rank] = takes & seen[image, best]
    return [on_seen[: overlaps_i.shape[1], index] for index, overlaps_i in enumerate(overlaps)]
