"""Proposals of a file brought into the order of a dataset, and what that shows to be wrong.

Shape shorthand: R proposals of an image.
"""

from collections.abc import Sequence

import numpy as np

from ..files.proposal_set import Fault, ProposalSet, logits_of, name_some
from .box_checks import OUTSIDE_PIXELS, SHARE_AGAINST, SHARE_FOR, CornerVotes
from .ground_truth import GroundTruth
from .proposal_checks import ImageProposals

# Boxes of many proposals reach nearly to the image's ends; less tells of another scale.
_LEAST_EXTENT = 0.8
_LEAST_PROPOSALS = 100
_LEAST_IMAGES = 3


class AlignedProposals(Sequence):
    """The proposals of a file in the dataset's order of images and each image's in that of the
    scores; an image's are put in order when they are asked for.

    Equal scores keep the file's order; scores that are not numbers go last. Ids are compared as
    text, as Detectron2 does. An image that is listed several times has all of its proposals, one
    that the file does not list has none.
    """

    def __init__(self, proposals: ProposalSet, image_ids: Sequence[int | str]) -> None:
        """
        Args:
            proposals: of a file.
            image_ids: of the dataset.
        """
        self._set = proposals
        self._image_ids = image_ids
        self._has_probabilities = proposals.has_probabilities()
        # Places in the file by the text of the image's id, in the file's order.
        self.places: dict[str, list[int]] = {}
        for index, image_id in enumerate(proposals.image_ids):
            self.places.setdefault(str(image_id), []).append(index)

    def __getitem__(self, index: int) -> ImageProposals:
        places = self.places.get(str(self._image_ids[index]), [])
        boxes = _concatenate([self._set.boxes[place] for place in places], (0, 4))
        scores = _concatenate([self._set.scores[place] for place in places], (0,))
        # Before they become logits, which are equal for all the smallest probabilities.
        order = np.argsort(-scores, kind="stable")
        scores = scores[order]
        if self._has_probabilities:
            scores = logits_of(scores)
        masks = None
        if self._set.masks is not None:
            masks = [mask for place in places for mask in self._set.masks[place]]
            masks = [masks[rank] for rank in order]
        return ImageProposals(boxes[order], scores.astype(np.float32), None, masks)

    def __len__(self) -> int:
        return len(self._image_ids)


def align_to_dataset(
    proposals: ProposalSet, ground_truth: GroundTruth
) -> tuple[AlignedProposals, list[Fault]]:
    """Bring proposals into the dataset's order, and tell what is wrong with them.

    Args:
        proposals: of a file.
        ground_truth: of the dataset.

    Returns:
        The proposals of every image of the dataset and the faults: those of the file and
        "unknown-images", "missing-images", "duplicate-images", "empty-images",
        "duplicate-proposals", "unsorted-scores", "xywh-boxes", "xyxy-boxes", "yxyx-boxes",
        "small-extent".
    """
    aligned = AlignedProposals(proposals, ground_truth.image_ids)
    faults = list(proposals.faults)
    faults += _check_ids(proposals, aligned.places, ground_truth)
    faults += _check_order(proposals)
    duplicates, extent = _Duplicates(), _Extent()
    convention = _CornersForSides() if proposals.format == "coco" else _OtherCorners()
    for image_id, size, proposals_i in zip(
        ground_truth.image_ids, ground_truth.image_sizes, aligned, strict=True
    ):
        duplicates.add(image_id, proposals_i)
        if size and len(proposals_i.boxes):
            extent.add(proposals_i.boxes, size)
            finite = proposals_i.boxes[np.isfinite(proposals_i.boxes).all(axis=1)]
            convention.add(finite, np.broadcast_to(np.float32(size), (len(finite), 2)))
    return aligned, faults + duplicates.faults() + convention.faults() + extent.faults()


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


class _Duplicates:
    """Proposals that occur several times in an image and use up its budget."""

    def __init__(self) -> None:
        self._images: list[int | str] = []
        self._number = 0

    def add(self, image_id: int | str, proposals_i: ImageProposals) -> None:
        words = np.ascontiguousarray(proposals_i.boxes, np.float32).view(np.uint64)  # (R, 2)
        # Multiplication by a large odd number spreads the bits; a chance collision of 64 is none.
        keys = words[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ words[:, 1]
        if proposals_i.masks is not None:
            counts = [hash(mask["counts"]) for mask in proposals_i.masks]
            keys = keys ^ np.array(counts, np.int64).view(np.uint64)
        repeated = len(keys) - len(np.unique(keys))
        if repeated:
            self._images.append(image_id)
            self._number += repeated

    def faults(self) -> list[Fault]:
        if not self._images:
            return []
        return [
            Fault(
                "duplicate-proposals",
                f"{self._number} proposals, in {len(self._images)} images, repeat another one of "
                f"their image and use up its budget. Images: {name_some(self._images)}",
            )
        ]


class _CornersForSides:
    """XYXY boxes in a format that has XYWH, which has become x, y, x + w, y + h on reading."""

    def __init__(self) -> None:
        self._votes = CornerVotes()

    def add(self, boxes: np.ndarray, sizes: np.ndarray) -> None:
        """Add finite boxes, (R, 4), of images of (R, 2) height and width."""
        self._votes.add(boxes, sizes)

    def faults(self) -> list[Fault]:
        votes = self._votes
        if not votes.are_corners:
            return []
        return [
            Fault(
                "xyxy-boxes",
                f"{votes.num_against} of {votes.number} boxes end outside of their image, and as "
                "XYXY nearly all fit; COCO's results have XYWH (x, y, width, height): convert them "
                "(--box-mode xyxy)",
            )
        ]


class _OtherCorners:
    """XYWH boxes, or rows before columns, in a format that has XYXY."""

    def __init__(self) -> None:
        self._number = 0
        self._counts = np.zeros(4, np.int64)

    def add(self, boxes: np.ndarray, sizes: np.ndarray) -> None:
        """Add finite boxes, (R, 4), of images of (R, 2) height and width."""
        x1, y1, x2, y2 = boxes.T
        height, width = sizes.T + OUTSIDE_PIXELS
        self._number += len(boxes)
        self._counts += [
            np.count_nonzero(of_boxes)
            for of_boxes in (
                # What speaks against columns first, and for rows first.
                (x2 > width) | (y2 > height),
                (x1 >= 0) & (y1 >= 0) & (y2 <= width) & (x2 <= height),
                # What speaks against two corners, and for sides.
                (x2 < x1) | (y2 < y1),
                (x2 >= 0) & (y2 >= 0) & (x1 + x2 <= width) & (y1 + y2 <= height),
            )
        ]

    def faults(self) -> list[Fault]:
        if not self._number:
            return []
        outside, fits, against, agrees = self._counts / self._number
        if outside > SHARE_AGAINST and fits >= SHARE_FOR:
            return [
                Fault(
                    "yxyx-boxes",
                    f"{self._counts[0]} of {self._number} boxes end outside of their image, and "
                    "with rows before columns (y1, x1, y2, x2), as MATLAB's tools write, nearly "
                    "all fit: convert them (--box-mode yxyx)",
                )
            ]
        if against <= SHARE_AGAINST or agrees < SHARE_FOR:
            return []
        return [
            Fault(
                "xywh-boxes",
                f"{self._counts[2]} of {self._number} boxes end before they begin, and as XYWH "
                "nearly all fit; this format has XYXY (two corners): convert them (--box-mode "
                "xywh)",
            )
        ]


class _Extent:
    """Proposals that all keep away from the image's right and lower end: a smaller scale."""

    def __init__(self) -> None:
        self._extents: list[float] = []

    def add(self, boxes: np.ndarray, size: tuple[int, int]) -> None:
        """Add the boxes, (R, 4), of an image of a height and width."""
        if len(boxes) >= _LEAST_PROPOSALS:
            ends = boxes[:, [2, 3]].max(axis=0) / (size[1], size[0])
            self._extents.append(ends.max())

    def faults(self) -> list[Fault]:
        # Relative boxes have a fault of their own.
        extent = max(self._extents, default=1)
        if len(self._extents) < _LEAST_IMAGES or not 0.02 < extent < _LEAST_EXTENT:
            return []
        return [
            Fault(
                "small-extent",
                f"in all {len(self._extents)} images with at least {_LEAST_PROPOSALS} proposals, "
                f"these end at {100 * extent:.0f} % of the image's width and height; are they in "
                "its original pixels, not those of a smaller copy?",
            )
        ]
