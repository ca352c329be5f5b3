"""Steps that generators share between their predictions and their proposals.

Shape shorthand in this module:

    R: number of boxes of one image
"""

from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances


def select_input_shapes(
    key: str, names: Sequence[str], input_shape: dict[str, ShapeSpec], backbone: str
) -> list[ShapeSpec]:
    """Shapes of the feature maps that a generator reads.

    Args:
        key: configuration key that names them, for the message.
        names: of the feature maps.
        input_shape: what the backbone returns.
        backbone: its name, for the message.

    Raises:
        ValueError: the backbone does not return one of them.
    """
    missing = [name for name in names if name not in input_shape]
    if missing:
        raise ValueError(
            f"{key} has {missing}, which the backbone {backbone} does not return; it returns "
            f"{sorted(input_shape)}"
        )
    return [input_shape[name] for name in names]


def at_most(number: int | torch.Tensor, limit: int) -> int | torch.Tensor:
    """``min(number, limit)`` for a size, which in a trace is a tensor that ``min`` would freeze."""
    return number.clamp(max=limit) if torch.is_tensor(number) else min(number, limit)


def clip_candidates(
    boxes: torch.Tensor, scores: torch.Tensor, image_size: tuple[int, int], min_box_size: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip boxes to their image and find those that are of use.

    Args:
        boxes: (R, 4) XYXY, pixels of the network input; may hold Inf and NaN.
        scores: (R,) negative for boxes to drop, such as those of the padding.
        image_size: (height, width).
        min_box_size: boxes with a side of at most this are dropped, in pixels.

    Returns:
        Tensor: (K, 4) clipped, finite, non-empty boxes, in the order of the input.
        Tensor: (K,) int64, their indices in the input.
    """
    # Before they are clipped: Detectron2 refuses to clip boxes that are not finite.
    index = (boxes.isfinite().all(dim=1) & (scores >= 0)).nonzero()[:, 0]
    clipped = Boxes(boxes[index])
    clipped.clip(image_size)
    keep = clipped.nonempty(threshold=min_box_size)
    return clipped.tensor[keep], index[keep]


def make_proposals(
    image_size: tuple[int, int], boxes: torch.Tensor, objectness_logits: torch.Tensor
) -> Instances:
    """The proposals of one image: (R, 4) boxes and (R,) logits, best first."""
    proposals = Instances(image_size)
    proposals.proposal_boxes = Boxes(boxes)
    proposals.objectness_logits = objectness_logits
    return proposals


def make_empty_proposals(
    image_sizes: Sequence[tuple[int, int]], device: torch.device
) -> list[Instances]:
    """What a generator returns in training where nobody wants its proposals."""
    boxes = torch.zeros(0, 4, device=device)
    return [make_proposals(size, boxes, boxes[:, 0]) for size in image_sizes]


def with_two_fields(proposals: Instances) -> Instances:
    """The same proposals without what R-CNN heads do not take in training."""
    return Instances(
        proposals.image_size,
        proposal_boxes=proposals.proposal_boxes,
        objectness_logits=proposals.objectness_logits,
    )
