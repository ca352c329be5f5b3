"""Signs that proposals are not what they should be, named in warnings before they are scored.

Shape shorthand: R proposals of an image, S of all images.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..files.proposal_set import Fault, name_some
from .box_checks import reach_outside
from .ground_truth import GroundTruth

logger = logging.getLogger(__name__)

# Boxes relative to the image's size end at 1.
_LARGEST_RELATIVE = 2
# Number of proposals of an image that tell of a collapse, and what part of them is most.
_ENOUGH_BOXES = 20
_MOSTLY = 0.9
# Images that are checked together: array operations are long, memory is small.
_IMAGES_AT_ONCE = 64
# What is said of the proposals that have a fault by themselves.
_MESSAGES = {
    "not-finite": "are not finite (NaN or infinity) and match nothing",
    "negative-side": "have a negative side and match nothing; are they XYWH instead of XYXY?",
    "outside": "reach outside of their image; are they in its original pixels?",
    "relative": "lie within 2 pixels of the corner; are they relative to the image's size?",
}


class ImageProposals(NamedTuple):
    """The proposals of an image.

    Attributes:
        boxes: (R, 4) float32, XYXY in pixels of the original image, best score first.
        objectness_logits: (R,) float32, descending.
        image_size: (height, width) in pixels that the boxes refer to; None if that is unknown.
        masks: R run-length encodings of pycocotools, None without masks.
    """

    boxes: np.ndarray
    objectness_logits: np.ndarray
    image_size: tuple[int, int] | None
    masks: list[dict[str, Any]] | None = None


def find_usable(proposals: Sequence[ImageProposals], ground_truth: GroundTruth) -> list[np.ndarray]:
    """Tell which proposals can be scored, and warn about all that look wrong.

    There is one warning for each fault of ``find_faults``.

    Args:
        proposals: of all images of the dataset, in its order.
        ground_truth: of the dataset.

    Returns:
        Per image (R,) bool: finite and without a negative side.
    """
    usable, faults = find_faults(proposals, ground_truth)
    for fault in faults:
        logger.warning(fault.message)
    return usable


def find_faults(
    proposals: Sequence[ImageProposals], ground_truth: GroundTruth
) -> tuple[list[np.ndarray], list[Fault]]:
    """Tell which proposals can be scored, and name all that look wrong.

    The faults, each with counts and the first images: "not-finite", "negative-side" (XYWH taken for
    XYXY), "outside" of the image and "relative", within two pixels of its corner (another scale),
    "other-size" (of the image that the proposals are for), "mask-size"; and of a network that has
    collapsed, "equal-scores" everywhere and boxes of "one-shape" in every image.

    Args:
        proposals: of all images of the dataset, in its order; read once, some images at a time.
        ground_truth: of the dataset.

    Returns:
        Per image (R,) bool: finite and without a negative side. The faults.
    """
    checks = _Checks()
    usable: list[np.ndarray] = []
    some: list[ImageProposals] = []
    for index, proposals_i in enumerate(proposals):
        some.append(proposals_i)
        if len(some) == _IMAGES_AT_ONCE or index + 1 == len(proposals):
            images = range(index + 1 - len(some), index + 1)
            usable += checks.add(
                some,
                [ground_truth.image_ids[image] for image in images],
                [ground_truth.image_sizes[image] for image in images],
            )
            some = []
    return usable, checks.faults()


class _Checks:
    """What :func:`find_faults` counts, for images that come some at a time."""

    def __init__(self) -> None:
        self._number = 0
        # Of each fault that proposals have by themselves: how many have it, and in which images.
        self._numbers = dict.fromkeys(_MESSAGES, 0)
        self._images: dict[str, list[int | str]] = {name: [] for name in _MESSAGES}
        self._other_size: list[int | str] = []
        self._other_mask_size: list[int | str] = []
        self._has_crowded = False
        self._has_one_shape = True
        self._least_logit, self._greatest_logit = np.inf, -np.inf
        self._all_usable: dict[int, np.ndarray] = {}

    def add(
        self,
        proposals: list[ImageProposals],
        image_ids: list[int | str],
        image_sizes: list[tuple[int, int] | None],
    ) -> list[np.ndarray]:
        """Check the proposals of some images: per image (R,) bool, which are usable."""
        lengths = [len(proposals_i.boxes) for proposals_i in proposals]
        boxes = np.concatenate([proposals_i.boxes for proposals_i in proposals])  # (S, 4)
        logits = np.concatenate([proposals_i.objectness_logits for proposals_i in proposals])
        self._number += len(boxes)
        not_finite, negative = _find_unusable(boxes, logits)
        usable = ~(not_finite | negative)
        for name, is_faulty in {
            "not-finite": not_finite,
            "negative-side": negative,
            "outside": usable & reach_outside(boxes, lengths, image_sizes),
            "relative": usable & _look_relative(boxes, lengths),
        }.items():
            if is_faulty.any():
                self._numbers[name] += int(is_faulty.sum())
                images = np.unique(np.repeat(np.arange(len(lengths)), lengths)[is_faulty])
                self._images[name] += [image_ids[image] for image in images]
        self._add_sizes(proposals, image_ids, image_sizes)
        if len(logits):
            scores = np.nan_to_num(logits)
            self._least_logit = min(self._least_logit, scores.min())
            self._greatest_logit = max(self._greatest_logit, scores.max())
        crowded = [p.boxes for p in proposals if len(p.boxes) >= _ENOUGH_BOXES]
        self._has_crowded |= bool(crowded)
        self._has_one_shape = self._has_one_shape and all(map(_have_one_shape, crowded))
        by_image = np.split(usable, np.cumsum(lengths))[:-1]
        # Nearly always all are, and one array for all of them is little memory.
        return [self._shared(usable_i) if usable_i.all() else usable_i for usable_i in by_image]

    def _shared(self, usable_i: np.ndarray) -> np.ndarray:
        """The one array of so many Trues."""
        return self._all_usable.setdefault(len(usable_i), np.ones(len(usable_i), bool))

    def _add_sizes(
        self,
        proposals: list[ImageProposals],
        image_ids: list[int | str],
        image_sizes: list[tuple[int, int] | None],
    ) -> None:
        """Proposals that say themselves that they are not in original pixels."""
        for proposals_i, image_id, size in zip(proposals, image_ids, image_sizes, strict=True):
            if proposals_i.image_size and size and tuple(proposals_i.image_size) != tuple(size):
                self._other_size.append(image_id)
            if size and any(tuple(mask["size"]) != tuple(size) for mask in proposals_i.masks or ()):
                self._other_mask_size.append(image_id)

    def faults(self) -> list[Fault]:
        """Those of all images."""
        faults = []
        for name, message in _MESSAGES.items():
            if self._numbers[name]:
                images = self._images[name]
                text = f"{self._numbers[name]} of {self._number} proposals, in {len(images)} images"
                faults.append(Fault(name, f"{text}, {message} Images: {name_some(images)}"))
        return faults + self._size_faults() + self._collapse()

    def _size_faults(self) -> list[Fault]:
        faults = []
        if self._other_size:
            faults.append(
                Fault(
                    "other-size",
                    f"the proposals of {len(self._other_size)} images are for another size than "
                    "the original image's; the model must rescale them (detector_postprocess). "
                    f"Images: {name_some(self._other_size)}",
                )
            )
        if self._other_mask_size:
            faults.append(
                Fault(
                    "mask-size",
                    f"masks of {len(self._other_mask_size)} images have another size than the "
                    "image and match nothing; make them in its original pixels. Images: "
                    f"{name_some(self._other_mask_size)}",
                )
            )
        return faults

    def _collapse(self) -> list[Fault]:
        """Faults of proposals that do not depend on the image."""
        if not self._has_crowded:
            return []
        faults = []
        if self._least_logit == self._greatest_logit:
            text = f"all {self._number} proposals have the same score, so that their order is no"
            text += " ranking; has the network collapsed?"
            faults.append(Fault("equal-scores", text))
        # Clipping cuts the ones at the border.
        if self._has_one_shape:
            text = f"in every image {_MOSTLY:.0%} of the proposals or more have one width and"
            faults.append(Fault("one-shape", f"{text} height; has the network collapsed?"))
        return faults


def usable_of(proposals: ImageProposals) -> np.ndarray:
    """(R,) bool, which proposals of an image can be scored: finite and without a negative side."""
    not_finite, negative = _find_unusable(proposals.boxes, proposals.objectness_logits)
    return ~(not_finite | negative)


def _find_unusable(boxes: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S,) bool each, which proposals are not finite, and which have a negative side."""
    not_finite = ~np.isfinite(boxes).all(axis=1) | np.isnan(logits)
    negative = (boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1])
    return not_finite, negative


def _look_relative(boxes: np.ndarray, lengths: list[int]) -> np.ndarray:
    """(S,) bool, which boxes are in images where no box reaches beyond the first two pixels."""
    reaches_far = (boxes[:, 2] > _LARGEST_RELATIVE) | (boxes[:, 3] > _LARGEST_RELATIVE)
    num_before = np.concatenate([[0], np.cumsum(reaches_far)])
    ends = np.cumsum(lengths)
    has_none = num_before[ends] == num_before[ends - lengths]
    return np.repeat(has_none, lengths)


def _have_one_shape(boxes: np.ndarray) -> bool:
    """Whether most of the boxes of an image, (R, 4), are within a pixel of one width and height."""
    sides = boxes[:, 2:] - boxes[:, :2]
    is_like = (np.abs(sides - np.median(sides, axis=0)) <= 1).all(axis=1)
    return bool(is_like.mean() >= _MOSTLY)
