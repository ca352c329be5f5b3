"""Signs that ground truth is not what it should be, named before anything is measured with it.

The same questions that ``proposal_checks`` puts to proposals. What is wrong with single annotations
has been counted by their reader (``files.annotation_faults``).

Shape shorthand: M ground truths of all images.
"""

from collections.abc import Sequence

import numpy as np

from ..files.proposal_set import Fault, name_some
from .box_checks import CornerVotes, reach_outside

# Boxes relative to the image's size end at 1; of those in pixels hardly any does.
_LARGEST_RELATIVE = 1
_SHARE_RELATIVE = 0.5
_MESSAGES = {
    "gt-relative": "lie within the first pixel; are they relative to the image's size? Give them "
    "in pixels.",
    "gt-xyxy-boxes": "end outside of their image, and as XYXY nearly all fit; COCO's files have "
    "XYWH (x, y, width, height): convert the annotations.",
    "gt-outside": "reach outside of their image and are measured as they are; are they in its "
    "original pixels?",
    "gt-some-masks": "have no mask; masks are measured on the others alone.",
}


def find_ground_truth_faults(
    boxes: np.ndarray,
    has_mask: np.ndarray,
    num_per_image: np.ndarray,
    image_ids: Sequence[int | str],
    image_sizes: Sequence[tuple[int, int] | None],
) -> list[Fault]:
    """Name what looks wrong with a dataset's objects as a whole.

    The faults, each with counts and the first images: "gt-relative" to the image's size,
    "gt-xyxy-boxes" (XYXY taken for XYWH), "gt-outside" of the image, "gt-some-masks" (objects
    without mask among others with one).

    Args:
        boxes: (M, 4) XYXY, image by image.
        has_mask: (M,) bool.
        num_per_image: (number of images,) int.
        image_ids, image_sizes: of each image; a size is (height, width), None if unknown.
    """
    if not len(boxes):
        return []
    image_of = np.repeat(np.arange(len(num_per_image)), num_per_image)
    is_relative = (boxes[:, 2:] <= _LARGEST_RELATIVE).all(axis=1) & (boxes >= 0).all(axis=1)
    if is_relative.mean() <= _SHARE_RELATIVE:
        is_relative[:] = False
    checks = {
        "gt-relative": is_relative,
        "gt-xyxy-boxes": _corners_taken_for_sides(boxes, image_of, image_sizes),
        "gt-outside": reach_outside(boxes, num_per_image, image_sizes),
        "gt-some-masks": ~has_mask if has_mask.any() else np.zeros(len(boxes), bool),
    }
    faults = []
    for name, is_faulty in checks.items():
        if is_faulty.any():
            images = np.unique(image_of[is_faulty])
            named = name_some([image_ids[image] for image in images])
            text = f"{is_faulty.sum()} of {len(boxes)} objects {_MESSAGES[name]} Images: {named}"
            faults.append(Fault(name, text))
    return faults


def _corners_taken_for_sides(
    boxes: np.ndarray, image_of: np.ndarray, image_sizes: Sequence[tuple[int, int] | None]
) -> np.ndarray:
    """(M,) bool, which boxes end outside because they are XYXY; none unless nearly all are."""
    is_known = np.array([size is not None for size in image_sizes], bool)[image_of]
    sizes = np.array([size or (1, 1) for size in image_sizes], np.float32)[image_of]
    votes = CornerVotes()
    against = votes.add(boxes[is_known], sizes[is_known])
    found = np.zeros(len(boxes), bool)
    if votes.are_corners:
        found[is_known] = against
    return found
