"""Signs that proposals are not what they should be, named in warnings before they are scored.

Shape shorthand: R proposals of an image, S of all images.
"""

import logging
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


def find_usable(proposals: list[ImageProposals], ground_truth: GroundTruth) -> list[np.ndarray]:
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
    proposals: list[ImageProposals], ground_truth: GroundTruth
) -> tuple[list[np.ndarray], list[Fault]]:
    """Tell which proposals can be scored, and name all that look wrong.

    The faults, each with counts and the first images: "not-finite", "negative-side" (XYWH taken for
    XYXY), "outside" of the image and "relative", within two pixels of its corner (another scale),
    "other-size" (of the image that the proposals are for), "mask-size"; and of a network that has
    collapsed, "equal-scores" everywhere and boxes of "one-shape" in every image.

    Args:
        proposals: of all images of the dataset, in its order.
        ground_truth: of the dataset.

    Returns:
        Per image (R,) bool: finite and without a negative side. The faults.
    """
    if not proposals:
        return [], []
    lengths = [len(proposals_i.boxes) for proposals_i in proposals]
    boxes = np.concatenate([proposals_i.boxes for proposals_i in proposals])  # (S, 4)
    logits = np.concatenate([proposals_i.objectness_logits for proposals_i in proposals])
    not_finite, negative = _find_unusable(boxes, logits)
    usable = ~(not_finite | negative)
    checks = {
        "not-finite": (not_finite, "are not finite (NaN or infinity) and match nothing"),
        "negative-side": (
            negative,
            "have a negative side and match nothing; are they XYWH instead of XYXY?",
        ),
        "outside": (
            usable & reach_outside(boxes, lengths, ground_truth.image_sizes),
            "reach outside of their image; are they in its original pixels?",
        ),
        "relative": (
            usable & _look_relative(boxes, lengths),
            "lie within 2 pixels of the corner; are they relative to the image's size?",
        ),
    }
    faults = []
    for name, (is_faulty, message) in checks.items():
        if is_faulty.any():
            images = np.unique(np.repeat(np.arange(len(lengths)), lengths)[is_faulty])
            named = name_some([ground_truth.image_ids[image] for image in images])
            text = f"{is_faulty.sum()} of {len(boxes)} proposals, in {len(images)} images, "
            faults.append(Fault(name, f"{text}{message} Images: {named}"))
    faults += _check_sizes(proposals, ground_truth)
    faults += _check_collapse(proposals, boxes, logits)
    return np.split(usable, np.cumsum(lengths))[:-1], faults


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


def _check_collapse(
    proposals: list[ImageProposals], boxes: np.ndarray, logits: np.ndarray
) -> list[Fault]:
    """Faults of proposals that do not depend on the image."""
    faults = []
    crowded = [p.boxes for p in proposals if len(p.boxes) >= _ENOUGH_BOXES]
    if not crowded:
        return []
    if np.ptp(np.nan_to_num(logits)) == 0:
        text = f"all {len(boxes)} proposals have the same score, so that their order is no ranking"
        faults.append(Fault("equal-scores", f"{text}; has the network collapsed?"))
    # Clipping cuts the ones at the border.
    if all(map(_have_one_shape, crowded)):
        text = f"in every image {_MOSTLY:.0%} of the proposals or more have one width and height"
        faults.append(Fault("one-shape", f"{text}; has the network collapsed?"))
    return faults


def _have_one_shape(boxes: np.ndarray) -> bool:
    """Whether most of the boxes of an image, (R, 4), are within a pixel of one width and height."""
    sides = boxes[:, 2:] - boxes[:, :2]
    is_like = (np.abs(sides - np.median(sides, axis=0)) <= 1).all(axis=1)
    return bool(is_like.mean() >= _MOSTLY)


def _check_sizes(proposals: list[ImageProposals], ground_truth: GroundTruth) -> list[Fault]:
    """Faults of proposals that say themselves that they are not in original pixels."""
    other, masks_differ = [], []
    for proposals_i, image_id, size in zip(
        proposals, ground_truth.image_ids, ground_truth.image_sizes, strict=True
    ):
        if proposals_i.image_size and size and tuple(proposals_i.image_size) != tuple(size):
            other.append(image_id)
        if size and any(tuple(mask["size"]) != tuple(size) for mask in proposals_i.masks or ()):
            masks_differ.append(image_id)
    faults = []
    if other:
        faults.append(
            Fault(
                "other-size",
                f"the proposals of {len(other)} images are for another size than the original "
                "image's; the model must rescale them (detector_postprocess). Images: "
                f"{name_some(other)}",
            )
        )
    if masks_differ:
        faults.append(
            Fault(
                "mask-size",
                f"masks of {len(masks_differ)} images have another size than the image and match "
                f"nothing; make them in its original pixels. Images: {name_some(masks_differ)}",
            )
        )
    return faults
