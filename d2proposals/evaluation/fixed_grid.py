"""The baseline that sees nothing: one fixed grid of square boxes, the same for every image.

A trained generator that is not well above it has learned no more than where objects usually are.

Shape shorthand: R boxes of an image, all sides together.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances

from ..data.dataset_reading import read_dataset
from .evaluator import ProposalEvaluator


def grid_boxes(
    image_size: tuple[int, int], sides: Sequence[float] = (32, 64, 128), num_boxes: int = 100
) -> Instances:
    """Square boxes of several sides, each spread evenly over an image.

    The numbers of boxes are those of :func:`split_boxes`. The boxes of a side stand in rows with
    equal distances; rows and boxes in a row are as many as make the distances alike in both
    directions. They spread over the positions at which the square lies inside the image, each in
    the middle of an equal share of them. A square larger than the image is cut to it, and then
    boxes may coincide.

    Larger boxes rank first, because fewer of them cover more; of one side, those nearest to the
    middle of the image, where most objects of photographs are.

    Args:
        image_size: (height, width) in pixels, both positive.
        sides: in pixels, all different and positive.
        num_boxes: R, at least one per side.

    Returns:
        ``proposal_boxes`` (R, 4) XYXY in pixels, inside the image, not empty, and
        ``objectness_logits`` (R,), strictly decreasing.

    Raises:
        ValueError: if one of the arguments is none of the above.
    """
    if min(image_size) <= 0:
        raise ValueError(f"image_size must be a positive (height, width), not {image_size}")
    numbers = split_boxes(sides, num_boxes)
    boxes = [
        _spread_squares(image_size, side, numbers[side]) for side in sorted(numbers, reverse=True)
    ]
    # The score of rank r of R is the probability 1 - r / (R + 1), neither 0 nor 1.
    ranks = torch.arange(1, num_boxes + 1, dtype=torch.float32)
    return Instances(
        image_size,
        proposal_boxes=Boxes(torch.cat(boxes)),
        objectness_logits=torch.logit(1 - ranks / (num_boxes + 1)),
    )


def split_boxes(sides: Sequence[float], num_boxes: int) -> dict[float, int]:
    """How many boxes of each side make ``num_boxes``.

    Equal numbers, what is left over to the smaller sides. It is the stronger baseline: in
    proportion to 1 / side, AR@100 on d2p_shapes_val is 4.6 instead of 5.8, in proportion to
    1 / area, which would cover the image alike at all sides, 3.0: a hundred boxes are too few to
    hit small objects, whatever their share.

    Args:
        sides: in pixels, all different and positive.
        num_boxes: at least one per side.

    Returns:
        Number of boxes by side.

    Raises:
        ValueError: if one of the arguments is none of the above.
    """
    if not sides or min(sides) <= 0 or len(set(sides)) < len(sides):
        raise ValueError(f"sides must be different positive numbers of pixels, not {tuple(sides)}")
    if num_boxes < len(sides):
        raise ValueError(f"num_boxes ({num_boxes}) must be at least one per side: {len(sides)}")
    each, left_over = divmod(num_boxes, len(sides))
    return {side: each + (rank < left_over) for rank, side in enumerate(sorted(sides))}


def evaluate_fixed_grid(
    dataset_name: str,
    *,
    sides: Sequence[float] = (32, 64, 128),
    num_boxes: int = 100,
    **evaluator_kwargs: Any,
) -> dict[str, dict[str, float]]:
    """Evaluate :func:`grid_boxes` on a registered dataset, without reading its images.

    Args:
        dataset_name: a registered dataset; its dictionaries must have "height" and "width".
        sides: in pixels of the original image.
        num_boxes: per image.
        evaluator_kwargs: of :class:`ProposalEvaluator`. ``distributed`` is False by default: each
            process sees the whole dataset.

    Returns:
        The results of :class:`ProposalEvaluator`.

    Raises:
        ValueError: for an unknown dataset or one without image sizes, and for wrong arguments.
    """
    evaluator = ProposalEvaluator(dataset_name, **{"distributed": False, **evaluator_kwargs})
    # By image size, because many images of a dataset share one.
    grids: dict[tuple[int, int], Instances] = {}
    for record in read_dataset(dataset_name).records:
        if not {"height", "width"} <= record.keys():
            raise ValueError(
                f"image {record['image_id']} of the dataset {dataset_name!r} has no 'height' or "
                "'width', which the fixed grid needs; add them to the dataset's dictionaries"
            )
        size = (record["height"], record["width"])
        if size not in grids:
            grids[size] = grid_boxes(size, sides, num_boxes)
        evaluator.process([record], [{"proposals": grids[size]}])
    return evaluator.evaluate()


def _spread_squares(image_size: tuple[int, int], side: float, number: int) -> torch.Tensor:
    """(number, 4) squares of a side, nearest to the middle of the image first."""
    height, width = image_size
    # The square's upper left corner may be anywhere in this rectangle.
    free_height, free_width = max(height - side, 0), max(width - side, 0)
    num_rows = _num_rows(number, free_height, free_width)
    # Row i has the boxes from i * number // num_rows on: whole numbers that differ by one at most.
    starts = torch.arange(num_rows + 1) * number // num_rows
    per_row = starts.diff()
    row = torch.repeat_interleave(torch.arange(num_rows), per_row)  # (number,)
    column = torch.arange(number) - starts[row]
    x1 = (column + 0.5) / per_row[row] * free_width
    y1 = (row + 0.5) / num_rows * free_height
    boxes = torch.stack([x1, y1, (x1 + side).clamp(max=width), (y1 + side).clamp(max=height)], 1)
    from_middle = (x1 - free_width / 2) ** 2 + (y1 - free_height / 2) ** 2
    return boxes[from_middle.argsort(stable=True)]


def _num_rows(number: int, free_height: float, free_width: float) -> int:
    """Rows that make the distance between rows about that between the boxes of a row."""
    if free_width == 0:
        return number if free_height else 1
    return min(max(round(math.sqrt(number * free_height / free_width)), 1), number)
