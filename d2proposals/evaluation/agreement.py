"""Whether two runs of a model propose the same, up to rounding: on two devices, for instance.

Shape shorthand in this module:

    R, S: number of proposals of the one run and the other
"""

from typing import NamedTuple

import torch
from detectron2.structures import Instances, pairwise_iou

# Boxes that overlap more are one proposal: at 320 x 427 pixels, a shift of a pixel or less.
SAME_BOX_IOU = 0.99


class Agreement(NamedTuple):
    """How two runs agree on an image.

    Attributes:
        num_first, num_second: proposals of either run.
        found: share of the first run's proposals whose box is among the second's, in [0, 1]; 1 if
            there are none in either, 0 if in one alone.
        score_difference: greatest difference of the logits of a box that both have.
    """

    num_first: int
    num_second: int
    found: float
    score_difference: float


def compare_runs(first: Instances, second: Instances) -> Agreement:
    """Compare the proposals of an image in two runs, whatever devices they are on.

    Rounding may reverse two nearly equal scores, and suppression then keeps another of two boxes
    that overlap: a share, not all, is found again where scores are close.

    Args:
        first: R proposals, with ``proposal_boxes`` and ``objectness_logits``.
        second: S proposals, likewise.
    """
    first, second = first.to("cpu"), second.to("cpu")
    if len(first) == 0 or len(second) == 0:
        return Agreement(len(first), len(second), float(len(first) == len(second)), 0.0)
    is_same = pairwise_iou(first.proposal_boxes, second.proposal_boxes) >= SAME_BOX_IOU  # (R, S)
    logits, other_logits = first.objectness_logits.float(), second.objectness_logits.float()
    # Of equal boxes, the one whose score is nearest.
    differences = (logits[:, None] - other_logits).abs().masked_fill(~is_same, torch.inf)
    nearest = differences.min(dim=1).values
    nearest = nearest[nearest.isfinite()]
    return Agreement(
        len(first),
        len(second),
        found=len(nearest) / len(first),
        score_difference=nearest.max().item() if len(nearest) else 0.0,
    )
