"""Crops of the images of a batch that train DetectorNet's mask network and its classifier.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 6.

Shape shorthand in this module:

    N: number of images in the batch
    P: number of crops of all images
    M: number of objects of one image
    G: number of crowd regions of one image
    T: number of candidates of one image

Naming convention:

    candidate: a random crop, which is kept if it is positive or negative and one is still wanted.
    relative: of a box, in [0, 1] of its image's sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, pairwise_iou
from detectron2.structures.boxes import pairwise_intersection

from .sampling_quota import interleaved, share_out

# Displacements of crops from the object they are drawn around: of the centre, relative to the
# object's sides, and of the logarithm to base 2 of each side. About half of such crops have an IoU
# of 0.6 with the object.
_MAX_SHIFT = 0.2
_MAX_OCTAVES = 0.5


@dataclass(frozen=True)
class CropSampler:
    """How many crops an image gives, and how many candidates are drawn for them at most.

    Candidates are drawn at once: num_tries for each crop. What an image does not yield of one kind
    (a crowded image has no negatives) the others of the batch give instead, as far as they can.

    Attributes:
        num_crops: of each image, on average over the batch.
        positive_fraction: of ``num_crops``, the part that is positive.
        min_scale: least width of a crop, relative to the image's.
        num_tries: candidates per crop.
        key: where the configuration says these, for messages.
    """

    num_crops: int
    positive_fraction: float = 0.4
    min_scale: float = 0.1
    num_tries: int = 50
    key: str = field(default="MODEL.DETECTORNET", compare=False)

    def __post_init__(self) -> None:
        for name, value, is_right in (
            ("NUM_CROPS", self.num_crops, self.num_crops >= 1),
            ("POSITIVE_FRACTION", self.positive_fraction, 0 <= self.positive_fraction <= 1),
            ("MIN_SCALE", self.min_scale, 0 < self.min_scale <= 1),
            ("NUM_TRIES", self.num_tries, self.num_tries >= 1),
        ):
            if not is_right:
                raise ValueError(f"{self.key}.{name} makes no sense: {value}.")

    @property
    def num_positives(self) -> int:
        """Positive crops of an image, on average over the batch."""
        return round(self.num_crops * self.positive_fraction)

    @property
    def num_candidates(self) -> int:
        """Random candidates of an image."""
        return self.num_crops * self.num_tries


@dataclass(frozen=True)
class RefinementCrops:
    """The part of the mask network's crops that is drawn as those of the refinement are.

    These are boxes near an object, enlarged. Positives keep their place. Negatives have the shapes
    of such crops and lie anywhere, so that neither a crop's size nor its aspect ratio tells what is
    in it.

    Attributes:
        fraction: of the positives, and of the negatives.
        enlargement: of the boxes' sides.
    """

    fraction: float = 0.0
    enlargement: float = 1.2


class Crops(NamedTuple):
    """Crops of a batch, image by image, positives first.

    Attributes:
        boxes: (P, 4) XYXY, pixels of the network input.
        image_index: (P,) int64 image of each crop.
        labels: (P,) int64: of the classifier's crops the class, the background being the last; of
            the mask network's 1 for positives, 0 for negatives.
    """

    boxes: torch.Tensor
    image_index: torch.Tensor
    labels: torch.Tensor


class _Candidates(NamedTuple):
    """What an image can give, in the order in which it is taken.

    Attributes:
        positives: (A, 4) XYXY.
        labels: (A,) int64.
        negatives: (B, 4) XYXY.
    """

    positives: torch.Tensor
    labels: torch.Tensor
    negatives: torch.Tensor


@torch.no_grad()
def sample_mask_crops(
    sampler: CropSampler,
    gt_boxes: Sequence[torch.Tensor],
    crowd_boxes: Sequence[torch.Tensor],
    image_sizes: Sequence[tuple[int, int]],
    positive_coverage: float,
    refinement: RefinementCrops,
) -> Crops:
    """Crops that train the mask network.

    Positive is a crop that covers a large part of some object, negative one that intersects none;
    all others are discarded. Their width is uniform between the least scale and the image's width,
    but for those like the refinement's.

    Args:
        sampler: how many.
        gt_boxes: of each image (M, 4) XYXY, pixels of the image, on the device of the crops; parts
            outside the image do not count, empty boxes neither.
        crowd_boxes: of each image (G, 4) regions that hold objects not in ``gt_boxes``: no
            negatives there.
        image_sizes: (H, W) of each image in pixels.
        positive_coverage: part of an object's area that a positive crop covers at least.
        refinement: crops like those of the refinement, which may reach beyond the image.
    """
    gt_boxes = [_visible(x, size) for x, size in zip(gt_boxes, image_sizes, strict=True)]
    sides = [
        (x[:, 2:] - x[:, :2]) / x.new_tensor([size[1], size[0]])
        for x, size in zip(gt_boxes, image_sizes, strict=True)
    ]
    candidates = [
        _mask_candidates(
            sampler, gt_i, crowd_i, size, positive_coverage, refinement, torch.cat(sides)
        )
        for gt_i, crowd_i, size in zip(gt_boxes, crowd_boxes, image_sizes, strict=True)
    ]
    return _choose(sampler, candidates, negative_label=0)


@torch.no_grad()
def sample_classifier_crops(
    sampler: CropSampler,
    gt_boxes: Sequence[torch.Tensor],
    gt_classes: Sequence[torch.Tensor],
    crowd_boxes: Sequence[torch.Tensor],
    image_sizes: Sequence[tuple[int, int]],
    num_classes: int,
    iou_thresholds: tuple[float, float] = (0.2, 0.6),
    hard_negatives: Sequence[torch.Tensor] | None = None,
    hard_fraction: float = 0.0,
) -> Crops:
    """Crops that train the classifier which prunes detections.

    Args:
        sampler: how many.
        gt_boxes: of each image (M, 4) XYXY, pixels of the image, on the device of the crops.
        gt_classes: of each image (M,) int64 in [0, num_classes).
        crowd_boxes: of each image (G, 4) regions that hold objects not in ``gt_boxes``: no
            negatives there.
        image_sizes: (H, W) of each image in pixels.
        num_classes: K; the background is class K.
        iou_thresholds: a negative crop has less Jaccard similarity than the first with every
            object, a positive one at least the second with some object.
        hard_negatives: of each image (Q, 4) boxes; those that are negative crops by the rule are
            drawn before others.
        hard_fraction: of the negatives, the part that these make up, as far as there are so many.

    Returns:
        Crops: inside the image; positives have the class of the most similar object.
    """
    number = len(image_sizes)
    hard = [None] * number if hard_negatives is None else hard_negatives
    candidates = [
        _classifier_candidates(sampler, *of_image, iou_thresholds, hard_fraction)
        for of_image in zip(gt_boxes, gt_classes, crowd_boxes, image_sizes, hard, strict=True)
    ]
    return _choose(sampler, candidates, negative_label=num_classes)


def enlarge_boxes(boxes: torch.Tensor, factor: float) -> torch.Tensor:
    """Boxes (R, 4) with both sides multiplied by a factor around their centre."""
    center, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * factor
    return torch.cat([center - side / 2, center + side / 2], dim=1)


def _mask_candidates(
    sampler: CropSampler,
    gt_boxes: torch.Tensor,
    crowd_boxes: torch.Tensor,
    image_size: tuple[int, int],
    positive_coverage: float,
    refinement: RefinementCrops,
    object_sides: torch.Tensor,
) -> _Candidates:
    """Candidates of one image; ``object_sides`` (?, 2) are relative, of objects of the batch."""
    number = math.ceil(refinement.fraction * sampler.num_candidates)
    near = enlarge_boxes(_jittered_boxes(gt_boxes, number, image_size), refinement.enlargement)
    moved = _moved_boxes(object_sides, number, image_size)
    moved = enlarge_boxes(moved, refinement.enlargement)
    anywhere = _random_crops(sampler, image_size, gt_boxes)
    crowd_boxes = _visible(crowd_boxes, image_size)

    def is_positive(crops: torch.Tensor) -> torch.Tensor:
        covered = pairwise_intersection(Boxes(gt_boxes), Boxes(crops))  # (M, T)
        return (covered >= positive_coverage * Boxes(gt_boxes).area()[:, None]).any(dim=0)

    def is_negative(crops: torch.Tensor) -> torch.Tensor:
        touched = pairwise_intersection(Boxes(torch.cat([gt_boxes, crowd_boxes])), Boxes(crops))
        return (touched == 0).all(dim=0)

    positives, negatives = (
        interleaved(like_refinement[is_right(like_refinement)], anywhere[is_right(anywhere)],
                    refinement.fraction)
        for like_refinement, is_right in ((near, is_positive), (moved, is_negative))
    )  # fmt: skip
    return _Candidates(positives, torch.ones_like(positives[:, 0], dtype=torch.int64), negatives)


def _classifier_candidates(
    sampler: CropSampler,
    gt_boxes: torch.Tensor,
    gt_classes: torch.Tensor,
    crowd_boxes: torch.Tensor,
    image_size: tuple[int, int],
    hard_negatives: torch.Tensor | None,
    iou_thresholds: tuple[float, float],
    hard_fraction: float,
) -> _Candidates:
    """Candidates of one image."""
    is_visible = _is_visible(gt_boxes, image_size)
    gt_boxes, gt_classes = _visible(gt_boxes, image_size), gt_classes[is_visible]
    crowd_boxes = _visible(crowd_boxes, image_size)

    def best_match(crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(gt_boxes) == 0:
            return torch.zeros_like(crops[:, 0]), torch.zeros_like(crops[:, 0], dtype=torch.int64)
        return pairwise_iou(Boxes(gt_boxes), Boxes(crops)).max(dim=0)

    def negatives_of(crops: torch.Tensor) -> torch.Tensor:
        in_crowd = pairwise_intersection(Boxes(crowd_boxes), Boxes(crops)).any(dim=0)
        return crops[(best_match(crops)[0] < iou_thresholds[0]) & ~in_crowd]

    # Random boxes hardly ever have an IoU of 0.6, so those near objects are drawn beside them.
    candidates = torch.cat(
        [
            _jittered_boxes(gt_boxes, sampler.num_candidates, image_size),
            _random_boxes(sampler, image_size, gt_boxes),
        ]
    )
    # Candidates near objects come first: crops are to come from everywhere.
    candidates = candidates[torch.randperm(len(candidates), device=candidates.device)]
    best, matched = best_match(candidates)
    is_positive = best >= iou_thresholds[1]
    hard = candidates[:0]
    if hard_negatives is not None:
        hard = negatives_of(_visible(hard_negatives.to(candidates), image_size))
        hard = hard[torch.randperm(len(hard), device=hard.device)]
    negatives = interleaved(hard, negatives_of(candidates), hard_fraction)
    # An index of no match is that of no object, too.
    labels = gt_classes[matched[is_positive]] if len(gt_boxes) else gt_classes
    return _Candidates(candidates[is_positive], labels, negatives)


def _random_crops(
    sampler: CropSampler, image_size: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """(T, 4) crops anywhere in the image, of its aspect ratio, their width uniform."""
    height, width = image_size
    scale, x, y = torch.rand(3, sampler.num_candidates, device=like.device)
    # Unlike the paper, which says nothing of the height: in proportion to the width, so that
    # crops are like the windows of the test.
    scale = sampler.min_scale + (1 - sampler.min_scale) * scale
    x1, y1 = x * (1 - scale) * width, y * (1 - scale) * height
    return torch.stack([x1, y1, x1 + scale * width, y1 + scale * height], dim=1)


def _random_boxes(
    sampler: CropSampler, image_size: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """(T, 4) boxes anywhere in the image, their sides log-uniform and independent."""
    sides = torch.rand(sampler.num_candidates, 2, device=like.device)
    return _placed_boxes(torch.exp(sides * math.log(sampler.min_scale)), image_size)


def _moved_boxes(
    object_sides: torch.Tensor, number: int, image_size: tuple[int, int]
) -> torch.Tensor:
    """(T, 4) boxes anywhere in the image, of shapes as :func:`_jittered_boxes`; none without."""
    if len(object_sides) == 0:
        return object_sides.new_zeros(0, 4)
    sides = object_sides[torch.randint(len(object_sides), (number,), device=object_sides.device)]
    octaves = 2 * torch.rand(number, 2, device=sides.device) - 1
    return _placed_boxes((sides * torch.exp2(octaves * _MAX_OCTAVES)).clamp(max=1), image_size)


def _placed_boxes(sides: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """(T, 4) boxes of relative sides (T, 2) at uniform places inside the image."""
    corner = torch.rand(len(sides), 2, device=sides.device) * (1 - sides)
    scale = sides.new_tensor([image_size[1], image_size[0]] * 2)
    return torch.cat([corner, corner + sides], dim=1) * scale


def _jittered_boxes(boxes: torch.Tensor, number: int, image_size: tuple[int, int]) -> torch.Tensor:
    """(T, 4) displaced copies of boxes drawn at random, clipped; none without boxes."""
    if len(boxes) == 0:
        return boxes
    boxes = boxes[torch.randint(len(boxes), (number,), device=boxes.device)]
    shift, octaves = 2 * torch.rand(2, number, 2, device=boxes.device) - 1
    sides = boxes[:, 2:] - boxes[:, :2]
    center = (boxes[:, 2:] + boxes[:, :2]) / 2 + shift * _MAX_SHIFT * sides
    sides = sides * torch.exp2(octaves * _MAX_OCTAVES)
    jittered = Boxes(torch.cat([center - sides / 2, center + sides / 2], dim=1))
    jittered.clip(image_size)
    return jittered.tensor


def _is_visible(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """(M,) bool: boxes with an area inside the image."""
    clipped = Boxes(boxes.clone())
    clipped.clip(image_size)
    return clipped.nonempty()


def _visible(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """The boxes of :func:`_is_visible`, clipped to the image."""
    clipped = Boxes(boxes[_is_visible(boxes, image_size)])
    clipped.clip(image_size)
    return clipped.tensor


def _choose(sampler: CropSampler, candidates: Sequence[_Candidates], negative_label: int) -> Crops:
    """The first positives and negatives of each image, as many as are wanted in the batch."""
    num_negatives = sampler.num_crops - sampler.num_positives
    numbers = zip(
        share_out([len(x.positives) for x in candidates], sampler.num_positives),
        share_out([len(x.negatives) for x in candidates], num_negatives),
        strict=True,
    )
    boxes, index, labels = [], [], []
    for image, (candidates_i, (positives, negatives)) in enumerate(
        zip(candidates, numbers, strict=True)
    ):
        labels_i = candidates_i.labels[:positives]
        boxes += [candidates_i.positives[:positives], candidates_i.negatives[:negatives]]
        labels += [labels_i, labels_i.new_full((negatives,), negative_label)]
        index.append(labels_i.new_full((positives + negatives,), image))
    return Crops(torch.cat(boxes), torch.cat(index), torch.cat(labels))
