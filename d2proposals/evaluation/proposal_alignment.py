"""Proposals of a file brought into the order of a dataset, and what that shows to be wrong.

Shape shorthand: R proposals of an image, S of all images.
"""

import numpy as np

from ..files.proposal_set import Fault, ProposalSet, name_some
from .box_checks import SHARE_AGAINST, SHARE_FOR, are_corners
from .ground_truth import GroundTruth
from .proposal_checks import ImageProposals

# Boxes of many proposals reach nearly to the image's ends; less tells of another scale.
_LEAST_EXTENT = 0.8
_LEAST_PROPOSALS = 100
_LEAST_IMAGES = 3
_OUTSIDE_PIXELS = 1


def align_to_dataset(
    proposals: ProposalSet, ground_truth: GroundTruth
) -> tuple[list[ImageProposals], list[Fault]]:
    """Bring proposals into the dataset's order of images and each image's into that of the scores.

    Equal scores keep the file's order; scores that are not numbers go last. Ids are compared as
    text, as Detectron2 does. An image that is listed several times has all of its proposals.

    Args:
        proposals: of a file.
        ground_truth: of the dataset.

    Returns:
        The proposals of every image of the dataset, none for an image that the file does not list,
        and the faults: those of the file and "unknown-images", "missing-images",
        "duplicate-images", "empty-images", "duplicate-proposals", "unsorted-scores",
        "xywh-boxes", "xyxy-boxes", "yxyx-boxes", "small-extent".
    """
    faults = list(proposals.faults)
    by_id: dict[str, list[int]] = {}
    for index, image_id in enumerate(proposals.image_ids):
        by_id.setdefault(str(image_id), []).append(index)
    faults += _check_ids(proposals, by_id, ground_truth)
    faults += _check_order(proposals)
    logits = proposals.logits()
    aligned = []
    for image_id in ground_truth.image_ids:
        indices = by_id.get(str(image_id), [])
        boxes = _concatenate([proposals.boxes[index] for index in indices], (0, 4))
        scores = _concatenate([logits[index] for index in indices], (0,))
        order = np.argsort(-scores, kind="stable")
        masks = None
        if proposals.masks is not None:
            masks = [mask for index in indices for mask in proposals.masks[index]]
            masks = [masks[rank] for rank in order]
        aligned.append(ImageProposals(boxes[order], scores[order].astype(np.float32), None, masks))
    faults += _check_duplicates(aligned, ground_truth)
    faults += _check_convention(proposals.format, aligned, ground_truth)
    faults += _check_extent(aligned, ground_truth)
    return aligned, faults


def _concatenate(arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(shape, np.float32)


def _check_ids(
    proposals: ProposalSet, by_id: dict[str, list[int]], ground_truth: GroundTruth
) -> list[Fault]:
    """Images that one side does not know, that come twice, or that have no proposals."""
    known = set(map(str, ground_truth.image_ids))
    unknown = [image_id for image_id in by_id if image_id not in known]
    missing = [image_id for image_id in ground_truth.image_ids if str(image_id) not in by_id]
    twice = [image_id for image_id, indices in by_id.items() if len(indices) > 1]
    empty = [
        image_id
        for image_id, indices in by_id.items()
        if image_id in known and not any(len(proposals.boxes[index]) for index in indices)
    ]
    total = len(ground_truth.image_ids)
    faults = []
    if unknown:
        faults.append(
            Fault(
                "unknown-images",
                f"{len(unknown)} of {len(by_id)} images do not belong to the dataset and are left "
                f"out; is it the right dataset and split? Images: {name_some(unknown)}",
            )
        )
    if missing:
        # A writer that forgets to count gives all proposals the same id.
        one = len(by_id) == 1 and not unknown
        hint = f" All proposals are of image {next(iter(by_id))}: is that meant?" if one else ""
        faults.append(
            Fault(
                "missing-images",
                f"{len(missing)} of {total} images of the dataset are not in the file and count as "
                f"images without proposals.{hint} Images: {name_some(missing)}",
            )
        )
    if twice:
        faults.append(
            Fault(
                "duplicate-images",
                f"{len(twice)} images are listed more than once; all of their proposals count. "
                f"Images: {name_some(twice)}",
            )
        )
    if empty:
        faults.append(
            Fault(
                "empty-images",
                f"{len(empty)} of {total} images have no proposals; their objects count as missed. "
                f"Images: {name_some(empty)}",
            )
        )
    return faults


def _check_order(proposals: ProposalSet) -> list[Fault]:
    """Scores that do not descend within an image."""
    unsorted = [
        image_id
        for image_id, scores_i in zip(proposals.image_ids, proposals.scores, strict=True)
        if (np.diff(scores_i) > 0).any()
    ]
    if not unsorted:
        return []
    return [
        Fault(
            "unsorted-scores",
            f"the proposals of {len(unsorted)} images are not in descending order of their scores; "
            f"they are sorted for the measurement. Images: {name_some(unsorted)}",
        )
    ]


def _check_duplicates(aligned: list[ImageProposals], ground_truth: GroundTruth) -> list[Fault]:
    """Proposals that occur several times in an image and use up its budget."""
    images, number = [], 0
    for image_id, proposals_i in zip(ground_truth.image_ids, aligned, strict=True):
        words = np.ascontiguousarray(proposals_i.boxes, np.float32).view(np.uint64)  # (R, 2)
        # Multiplication by a large odd number spreads the bits; a chance collision of 64 is none.
        keys = words[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ words[:, 1]
        if proposals_i.masks is not None:
            counts = [hash(mask["counts"]) for mask in proposals_i.masks]
            keys = keys ^ np.array(counts, np.int64).view(np.uint64)
        repeated = len(keys) - len(np.unique(keys))
        if repeated:
            images.append(image_id)
            number += repeated
    if not images:
        return []
    return [
        Fault(
            "duplicate-proposals",
            f"{number} proposals, in {len(images)} images, repeat another one of their image and "
            f"use up its budget. Images: {name_some(images)}",
        )
    ]


def _check_convention(
    format_name: str, aligned: list[ImageProposals], ground_truth: GroundTruth
) -> list[Fault]:
    """XYWH boxes where the format has XYXY, and the reverse."""
    boxes, sizes = _all_boxes(aligned, ground_truth)
    if not len(boxes):
        return []
    if format_name == "coco":
        # XYWH, which has become x, y, x + w, y + h on reading.
        against, is_other = are_corners(boxes, sizes)
        fault = Fault(
            "xyxy-boxes",
            f"{against.sum()} of {len(boxes)} boxes end outside of their image, and as XYXY nearly "
            "all fit; COCO's results have XYWH (x, y, width, height): convert them (--box-mode "
            "xyxy)",
        )
        return [fault] if is_other else []
    x1, y1, x2, y2 = boxes.T
    height, width = sizes.T + _OUTSIDE_PIXELS
    outside = (x2 > width) | (y2 > height)
    fits = (x1 >= 0) & (y1 >= 0) & (y2 <= width) & (x2 <= height)
    if outside.mean() > SHARE_AGAINST and fits.mean() >= SHARE_FOR:
        return [
            Fault(
                "yxyx-boxes",
                f"{outside.sum()} of {len(boxes)} boxes end outside of their image, and with rows "
                "before columns (y1, x1, y2, x2), as MATLAB's tools write, nearly all fit: convert "
                "them (--box-mode yxyx)",
            )
        ]
    against = (x2 < x1) | (y2 < y1)
    agrees = (x2 >= 0) & (y2 >= 0) & (x1 + x2 <= width) & (y1 + y2 <= height)
    if against.mean() <= SHARE_AGAINST or agrees.mean() < SHARE_FOR:
        return []
    return [
        Fault(
            "xywh-boxes",
            f"{against.sum()} of {len(boxes)} boxes end before they begin, and as XYWH nearly all "
            "fit; this format has XYXY (two corners): convert them (--box-mode xywh)",
        )
    ]


def _check_extent(aligned: list[ImageProposals], ground_truth: GroundTruth) -> list[Fault]:
    """Proposals that all keep away from the image's right and lower end: a smaller scale."""
    extents = [
        (proposals_i.boxes[:, [2, 3]].max(axis=0) / (size[1], size[0])).max()
        for proposals_i, size in zip(aligned, ground_truth.image_sizes, strict=True)
        if size and len(proposals_i.boxes) >= _LEAST_PROPOSALS
    ]
    # Relative boxes have a fault of their own.
    extent = max(extents, default=1)
    if len(extents) < _LEAST_IMAGES or not 0.02 < extent < _LEAST_EXTENT:
        return []
    return [
        Fault(
            "small-extent",
            f"in all {len(extents)} images with at least {_LEAST_PROPOSALS} proposals, these end "
            f"at {100 * extent:.0f} % of the image's width and height; are they in its original "
            "pixels, not those of a smaller copy?",
        )
    ]


def _all_boxes(
    aligned: list[ImageProposals], ground_truth: GroundTruth
) -> tuple[np.ndarray, np.ndarray]:
    """(S, 4) finite boxes of images of known size, and (S, 2) these sizes."""
    pairs = [
        (proposals_i.boxes, np.broadcast_to(np.float32(size), (len(proposals_i.boxes), 2)))
        for proposals_i, size in zip(aligned, ground_truth.image_sizes, strict=True)
        if size and len(proposals_i.boxes)
    ]
    if not pairs:
        return np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32)
    boxes, sizes = map(np.concatenate, zip(*pairs, strict=True))
    finite = np.isfinite(boxes).all(axis=1)
    return boxes[finite], sizes[finite]
