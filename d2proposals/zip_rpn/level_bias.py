"""Tuning of the bias that makes ZIP's levels comparable, on a validation set.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.4: "we tune a bias term
for each level to add on the raw scores [...] cross validated on a smaller set different from the
one used for evaluation". Unlike the paper, which does not say how, coordinate search on AR.

The network runs once: its candidates before the second NMS are kept, a bias only ranks them anew.

Shape shorthand in this module:

    L: number of levels
    T: number of candidate boxes of an image, of all levels and scales
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import ImageList

from ..evaluation.ground_truth import GroundTruth
from ..evaluation.recall import Matcher, average_recall, box_overlaps
from .generator import ZIP
from .level_candidates import LevelCandidates


class RecordedImage(NamedTuple):
    """What the second NMS of one image gets.

    Attributes:
        candidates: T boxes of all levels and scales, scores without bias.
        image_size: (height, width) of the boxes' frame.
    """

    candidates: LevelCandidates
    image_size: tuple[int, int]


@contextmanager
def recorded_candidates(generator: ZIP) -> Iterator[list[RecordedImage]]:
    """While in this context, a test at one or several scales fills a list instead of proposing.

    The test is :class:`~d2proposals.engine.test_time_augmentation.ProposalNetworkWithTTA`'s, which
    hands the generator's ``candidates`` on to its ``select``; the levels travel beside the scores.
    """
    records: list[RecordedImage] = []

    def candidates(images: ImageList, features: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (c.boxes, torch.stack([c.scores, c.levels.to(c.scores)], dim=1))
            for c in generator.level_candidates(images, features)
        ]

    def select(boxes: torch.Tensor, scores: torch.Tensor, image_size: tuple[int, int]) -> None:
        # Of all images of the dataset: not on the model's device.
        boxes, scores = boxes.cpu(), scores.cpu()
        recorded = LevelCandidates(boxes, scores[:, 0], scores[:, 1].long())
        records.append(RecordedImage(recorded, image_size))

    generator.candidates, generator.select = candidates, select
    try:
        yield records
    finally:
        del generator.candidates, generator.select


def recall_with_bias(
    generator: ZIP,
    records: Sequence[RecordedImage],
    ground_truth: GroundTruth,
    level_bias: Sequence[float],
    limit: int,
) -> float:
    """AR of the best ``limit`` proposals that the generator selects with a bias.

    Args:
        generator: in evaluation mode.
        records: of each image, in the dataset's order.
        ground_truth: of the dataset, which has objects.
        level_bias: L numbers.
        limit: proposals per image, at most the generator's number.

    Returns:
        In [0, 1].
    """
    device = next(generator.parameters()).device
    boxes = (
        generator.select(c.boxes.to(device), c.biased_scores(level_bias).to(device), size)
        .proposal_boxes.tensor[:limit]
        .cpu()
        .numpy()
        for c, size in records
    )
    matcher = Matcher(ground_truth.areas, [limit])
    for overlaps_i in box_overlaps(ground_truth.boxes_by_image(), boxes):
        matcher.add(overlaps_i)
    return float(average_recall(matcher.finish())[0, 0])


def tune_level_bias(
    evaluate: Callable[[tuple[float, ...]], float],
    num_levels: int,
    first_step: float = 0.4,
    last_step: float = 0.0125,
) -> tuple[tuple[float, ...], float]:
    """Coordinate search: one level up or down by a step, which is halved when nothing improves.

    The first level keeps 0, since a constant added to all levels changes no ranking.

    Args:
        evaluate: takes L biases, returns what to maximise.
        num_levels: L.
        first_step: where the step begins.
        last_step: the search ends when the step falls below.

    Returns:
        The best biases and their value; zeros if nothing was better.
    """
    best_bias = (0.0,) * num_levels
    best = evaluate(best_bias)
    step = first_step
    while step >= last_step:
        is_better = False
        for level in range(1, num_levels):
            for change in (step, -step):
                trial = np.array(best_bias)
                trial[level] += change
                bias = tuple(trial.round(6).tolist())
                value = evaluate(bias)
                if value > best:
                    best_bias, best, is_better = bias, value, True
                    break
        if not is_better:
            step /= 2
    return best_bias, best
