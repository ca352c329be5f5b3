"""Crops of an image that train DetectorNet's mask network and its classifier.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 6.

Shape shorthand in this module:

    P: number of crops of one image
    M: number of objects of one image
    G: number of crowd regions of one image
    T: number of candidates

Naming convention:

    candidate: a random crop, which is kept if it is positive or negative and one is still wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from detectron2.structures import Boxes, pairwise_iou
from detectron2.structures.boxes import pairwise_intersection

# Displacements of the classifier's positive candidates from their object: of the centre, relative
# to the object's sides, and of the logarithm to base 2 of each side. About half of such crops have
# an IoU of 0.6.
_MAX_SHIFT = 0.2
_MAX_OCTAVES = 0.5


@dataclass(frozen=True)
class CropSampler:
    """How many crops an image gives, and how many candidates are drawn for them at most.

    Candidates are drawn at once: num_tries for each crop. An image on which they do not yield
    enough of one kind (a crowded image has no negatives) gives fewer crops.

    Attributes:
        num_crops: of each image.
        positive_fraction: of ``num_crops``, the part that is positive.
        min_scale: least width of a crop, relative to the image's.
        num_tries: candidates per crop.
        key: where the configuration says these, for messages.
    """

    num_crops: int
    positive_fraction: float = 0.4
    min_scale: float = 0.25
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
        """Positive crops of an image at most."""
        return round(self.num_crops * self.positive_fraction)

    @property
    def num_candidates(self) -> int:
        """T."""
        return self.num_crops * self.num_tries


@torch.no_grad()
def sample_mask_crops(
    sampler: CropSampler,
    gt_boxes: torch.Tensor,
    crowd_boxes: torch.Tensor,
    image_size: tuple[int, int],
    positive_coverage: float = 0.8,
    object_fraction: float = 0.0,
    enlargement: float = 1.2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops that train the mask network.

    Positive is a crop that covers a large part of some object, negative one that intersects none;
    all others are discarded. Their width is uniform between the least scale and the image's width.

    Args:
        sampler: how many.
        gt_boxes: (M, 4) XYXY, pixels of the image, on the device of the crops; parts outside the
            image do not count, empty boxes neither.
        crowd_boxes: (G, 4) regions that hold objects not in ``gt_boxes``: no negatives there.
        image_size: (H, W) in pixels.
        positive_coverage: part of an object's area that a positive crop covers at least.
        object_fraction: of the positives, the part that is drawn around objects instead, as the
            crops of the refinement are: displaced objects, enlarged.
        enlargement: of these.

    Returns:
        Tensor: (P, 4) XYXY, positives first; inside the image but for those around objects.
        Tensor: (P,) bool, whether each is positive.
    """
    gt_boxes = _visible(gt_boxes, image_size)
    around_objects = _jittered_boxes(
        gt_boxes, round(sampler.num_positives * object_fraction), image_size
    )
    candidates = torch.cat(
        [
            enlarge_boxes(around_objects, enlargement),
            _random_crops(sampler, image_size, gt_boxes),
        ]
    )
    covered = pairwise_intersection(Boxes(gt_boxes), Boxes(candidates))  # (M, T)
    covered = covered / Boxes(gt_boxes).area()[:, None]
    is_positive = (covered >= positive_coverage).any(dim=0)
    crowd = pairwise_intersection(Boxes(_visible(crowd_boxes, image_size)), Boxes(candidates))
    is_negative = (covered == 0).all(dim=0) & (crowd == 0).all(dim=0)
    return _choose(sampler, candidates, is_positive, is_negative)


@torch.no_grad()
def sample_classifier_crops(
    sampler: CropSampler,
    gt_boxes: torch.Tensor,
    gt_classes: torch.Tensor,
    crowd_boxes: torch.Tensor,
    image_size: tuple[int, int],
    num_classes: int,
    iou_thresholds: tuple[float, float] = (0.2, 0.6),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops that train the classifier which prunes detections.

    Args:
        sampler: how many.
        gt_boxes: (M, 4) XYXY, pixels of the image, on the device of the crops.
        gt_classes: (M,) int64 in [0, num_classes).
        crowd_boxes: (G, 4) regions that hold objects not in ``gt_boxes``: no negatives there.
        image_size: (H, W) in pixels.
        num_classes: K; the background is class K.
        iou_thresholds: a negative crop has less Jaccard similarity than the first with every
            object, a positive one at least the second with some object.

    Returns:
        Tensor: (P, 4) XYXY inside the image, positives first.
        Tensor: (P,) int64 classes in [0, K]: that of the most similar object.
    """
    is_visible = _is_visible(gt_boxes, image_size)
    gt_boxes, gt_classes = _visible(gt_boxes, image_size), gt_classes[is_visible]
    # Random boxes hardly ever have an IoU of 0.6, so those near objects are drawn beside them.
    candidates = torch.cat(
        [
            _jittered_boxes(gt_boxes, sampler.num_candidates, image_size),
            _random_boxes(sampler, image_size, gt_boxes),
        ]
    )
    background = gt_boxes.new_zeros(1, len(candidates))
    iou = torch.cat([pairwise_iou(Boxes(gt_boxes), Boxes(candidates)), background])  # (M + 1, T)
    best, matched = iou.max(dim=0)
    crowd = pairwise_intersection(Boxes(_visible(crowd_boxes, image_size)), Boxes(candidates))
    is_positive = best >= iou_thresholds[1]
    is_negative = (best < iou_thresholds[0]) & (crowd == 0).all(dim=0)
    classes = torch.cat([gt_classes, gt_classes.new_tensor([num_classes])])[matched]
    classes = classes.where(is_positive, torch.full_like(classes, num_classes))
    # Candidates near objects come first: negatives are to come from everywhere.
    order = torch.randperm(len(candidates), device=candidates.device)
    index = torch.arange(len(candidates), device=candidates.device)[order]
    chosen, _ = _choose(sampler, index, is_positive[order], is_negative[order])
    return candidates[chosen], classes[chosen]


def enlarge_boxes(boxes: torch.Tensor, factor: float) -> torch.Tensor:
    """Boxes (R, 4) with both sides multiplied by a factor around their centre."""
    center, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * factor
    return torch.cat([center - side / 2, center + side / 2], dim=1)


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
    sides = torch.rand(2, sampler.num_candidates, device=like.device)
    sides = torch.exp(sides * math.log(sampler.min_scale)).flip(0)
    corner = torch.rand(2, sampler.num_candidates, device=like.device) * (1 - sides)
    scale = like.new_tensor([image_size[1], image_size[0]] * 2)
    return torch.cat([corner, corner + sides]).T * scale


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


def _choose(
    sampler: CropSampler,
    candidates: torch.Tensor,
    is_positive: torch.Tensor,
    is_negative: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first positives and negatives of candidates (T, ...), as many as are wanted of each."""
    positives = is_positive.nonzero()[: sampler.num_positives, 0]
    negatives = is_negative.nonzero()[: sampler.num_crops - sampler.num_positives, 0]
    index = torch.cat([positives, negatives])
    return candidates[index], is_positive[index]
