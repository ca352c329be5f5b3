"""What files of proposals in JSON have in common: numbers, ids, masks, and complaints about them.

Shape shorthand: R proposals of an image.
"""

from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from .proposal_set import ProposalSet


class ContentError(ValueError):
    """A file is whole, but its content is not what it must be."""


def is_number(value: Any) -> bool:
    # Integers beyond a float's range would raise later.
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def plain_id(image_id: Any) -> int | str:
    """An image id: text, or a whole number, also one that is written with a point.

    Raises:
        ContentError: for anything else.
    """
    if type(image_id) is float and image_id.is_integer():
        image_id = int(image_id)
    if type(image_id) is int and abs(image_id) >= 2**63:
        raise ContentError(
            f"the image_id {str(image_id)[:40]} has more than 64 bits; number the images anew"
        )
    is_id = isinstance(image_id, str) or type(image_id) is int
    if not is_id:
        found = image_id if type(image_id) is float else type(image_id).__name__
        raise ContentError(f"an image_id is an integer or text, not {found}")
    return image_id


def boxes_of_masks(masks: list[dict[str, Any]]) -> np.ndarray:
    """(R, 4) float64 XYXY boxes around masks; an empty mask has an empty box."""
    boxes = np.asarray(mask_util.toBbox(masks), np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def plain_mask(mask: dict[str, Any]) -> dict[str, Any]:
    """A run-length encoding of pycocotools as JSON has it: its counts are text, not bytes."""
    return {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}


def check_finite(proposals: ProposalSet) -> None:
    """Raise ValueError for numbers that standard JSON cannot say."""
    for image_id, boxes_i, scores_i in zip(
        proposals.image_ids, proposals.boxes, proposals.scores, strict=True
    ):
        if not (np.isfinite(boxes_i).all() and np.isfinite(scores_i).all()):
            raise ValueError(
                f"image {image_id} has a box or a score that is not finite, which JSON cannot say; "
                "drop it (--drop-unusable)"
            )
