"""Signs that proposals are not what they should be, named in warnings before they are scored.

Shape shorthand: R proposals of an image, S of all images.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .ground_truth import GroundTruth

logger = logging.getLogger(__name__)

# A warning names at most so many images.
_NUM_NAMED = 5
# Boxes may end so far outside of their image, in image sides and in pixels: less is rounding.
_OUTSIDE_SIDES = 0.05
_OUTSIDE_PIXELS = 1
# Boxes relative to the image's size end at 1.
_LARGEST_RELATIVE = 2


class ImageProposals(NamedTuple):
    """The proposals of an image.

    Attributes:
        boxes: (R, 4) float32, XYXY in pixels of the original image, best score first.
        objectness_logits: (R,) float32, descending.
        image_size: (height, width) in pixels that the boxes refer to; None if there are no boxes.
    """

    boxes: np.ndarray
    objectness_logits: np.ndarray
    image_size: tuple[int, int] | None


def find_usable(proposals: list[ImageProposals], ground_truth: GroundTruth) -> list[np.ndarray]:
    """Tell which proposals can be scored, and warn about all that look wrong.

    There is one warning for each kind of fault, with counts and the first images: not finite,
    negative sides (XYWH taken for XYXY), outside of the image or within two pixels of its corner
    (another scale).

    Args:
        proposals: of all images of the dataset, in its order.
        ground_truth: of the dataset.

    Returns:
        Per image (R,) bool: finite and without a negative side.
    """
    lengths = [len(proposals_i.boxes) for proposals_i in proposals]
    boxes = np.concatenate([proposals_i.boxes for proposals_i in proposals])  # (S, 4)
    logits = np.concatenate([proposals_i.objectness_logits for proposals_i in proposals])
    not_finite = ~np.isfinite(boxes).all(axis=1) | np.isnan(logits)
    negative = (boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1])
    usable = ~(not_finite | negative)
    faults = {
        "are not finite (NaN or infinity) and match nothing": not_finite,
        "have a negative side and match nothing; are they XYWH instead of XYXY?": negative,
        "reach outside of their image; are they in its original pixels?": usable
        & _reach_outside(boxes, lengths, ground_truth.image_sizes),
        "lie within 2 pixels of the corner; are they relative to the image's size?": usable
        & _look_relative(boxes, lengths),
    }
    for message, is_faulty in faults.items():
        if is_faulty.any():
            images = np.unique(np.repeat(np.arange(len(lengths)), lengths)[is_faulty])
            logger.warning(
                f"{is_faulty.sum()} of {len(boxes)} proposals, in {len(images)} images, {message} "
                f"Images: {name_some([ground_truth.image_ids[image] for image in images])}"
            )
    _check_sizes(proposals, ground_truth)
    return np.split(usable, np.cumsum(lengths))[:-1]


def _reach_outside(
    boxes: np.ndarray, lengths: list[int], image_sizes: list[tuple[int, int] | None]
) -> np.ndarray:
    """(S,) bool, which boxes leave their image; none if its size is unknown."""
    sizes = np.array([size or (np.inf, np.inf) for size in image_sizes], np.float32)
    margin = np.where(np.isfinite(sizes), _OUTSIDE_SIDES * sizes, 0) + _OUTSIDE_PIXELS
    height_end, width_end = (sizes + margin).T
    height_margin, width_margin = margin.T
    return (
        (boxes[:, 0] < np.repeat(-width_margin, lengths))
        | (boxes[:, 1] < np.repeat(-height_margin, lengths))
        | (boxes[:, 2] > np.repeat(width_end, lengths))
        | (boxes[:, 3] > np.repeat(height_end, lengths))
    )


def _look_relative(boxes: np.ndarray, lengths: list[int]) -> np.ndarray:
    """(S,) bool, which boxes are in images where no box reaches beyond the first two pixels."""
    reaches_far = (boxes[:, 2] > _LARGEST_RELATIVE) | (boxes[:, 3] > _LARGEST_RELATIVE)
    num_before = np.concatenate([[0], np.cumsum(reaches_far)])
    ends = np.cumsum(lengths)
    has_none = num_before[ends] == num_before[ends - lengths]
    return np.repeat(has_none, lengths)


def _check_sizes(proposals: list[ImageProposals], ground_truth: GroundTruth) -> None:
    """Warn about proposals that say themselves that they are not in original pixels."""
    wrong = [
        image_id
        for proposals_i, image_id, size in zip(
            proposals, ground_truth.image_ids, ground_truth.image_sizes, strict=True
        )
        if proposals_i.image_size and size and tuple(proposals_i.image_size) != tuple(size)
    ]
    if wrong:
        logger.warning(
            f"the proposals of {len(wrong)} images are for another size than the original image's; "
            f"the model must rescale them (detector_postprocess). Images: {name_some(wrong)}"
        )


def name_some(image_ids: Sequence[int | str]) -> str:
    """The first few ids as text."""
    rest = ", ..." if len(image_ids) > _NUM_NAMED else ""
    return ", ".join(str(image_id) for image_id in image_ids[:_NUM_NAMED]) + rest
