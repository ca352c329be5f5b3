"""Labels and samples of SC-RPN's two stages, and statistics about them.

Source: W. Zou, Z. Zhang, Y. Peng, C. Xiang, S. Tian and L. Zhang, "SC-RPN: A Strong Correlation
Learning Framework for Region Proposal", IEEE Transactions on Image Processing 30, 2021,
Fig. 2, Sec. III-B and Table IV (combinations of assigners).

Shape shorthand in this module:

    N: number of images in the batch
    A: number of anchors per location
    R: number of samples of one image, A per location
    M: number of ground-truth objects in the batch
"""

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou

from .locations import Assignment, GroundTruth, PyramidLocations
from .max_iou_sampling import assign_max_iou, build_max_iou_matcher
from .size_aware_sampling import (
    assign_positive_region,
    assign_size_aware_threshold,
    check_strides,
)

INIT_ASSIGNERS = ("positive_region", "max_iou")
REFINED_ASSIGNERS = ("size_aware_threshold", "max_iou")
POSITIVE_REGIONS = ("touched", "inside")


@dataclass
class Samples:
    """What the two stages are trained on.

    Attributes:
        init: objects of the first stage's positives, its regression samples.
        refined: objects of the second stage's positives, its regression samples, and which other
            samples are negatives. With one stage the same as ``init``.
        is_sampled: (N, R) bool, the classification samples: all positives of ``refined`` and
            randomly chosen negatives.
    """

    init: Assignment
    refined: Assignment
    is_sampled: torch.Tensor


class StageSampler:
    """Assigns objects to the samples of each stage and draws the classification samples."""

    def __init__(
        self,
        *,
        init_assigner: str = "positive_region",
        refined_assigner: str = "size_aware_threshold",
        sigma: float = 0.2,
        positive_region: str = "touched",
        topk: int = 9,
        num_levels: int = 2,
        keep_best: bool = False,
        init_iou_thresholds: tuple[float, float] = (0.3, 0.7),
        refined_iou_thresholds: tuple[float, float] = (0.7, 0.7),
        min_best_iou: float = 0.3,
        batch_size_per_image: int = 256,
    ):
        """
        Args:
            init_assigner: first stage. "positive_region": Algorithm 1; "max_iou": by the IoU of
                anchors (of the square that points begin on).
            refined_assigner: second stage. "size_aware_threshold": Algorithm 2; "max_iou": by the
                IoU of initial proposals.
            sigma: center ratio of the positive region (Algorithm 1).
            positive_region: which cells count, "touched" by it or centred "inside" (Algorithm 1).
            topk: k, candidates per object and feature map (Algorithm 2).
            num_levels: N, feature maps per object (Algorithm 2).
            keep_best: whether Algorithm 2 leaves each object its best candidate.
            init_iou_thresholds: (negative, positive) of the first stage's "max_iou".
            refined_iou_thresholds: (negative, positive) of the second stage's "max_iou".
            min_best_iou: "max_iou": an object's best samples are positive from this IoU on, even
                below the positive threshold; not above the negative thresholds.
            batch_size_per_image: classification samples per image, exceeded where an image has
                more positives than half of it.

        Raises:
            ValueError: unknown names or impossible numbers.
        """
        for key, value, known in (
            ("INIT_ASSIGNER", init_assigner, INIT_ASSIGNERS),
            ("REFINED_ASSIGNER", refined_assigner, REFINED_ASSIGNERS),
            ("POSITIVE_REGION", positive_region, POSITIVE_REGIONS),
        ):
            if value not in known:
                raise ValueError(f"unknown MODEL.SCRPN.{key} {value!r}, choose one of {known}")
        if not 0 <= sigma <= 1 or topk < 1 or num_levels < 1:
            raise ValueError(
                "MODEL.SCRPN needs SIGMA in [0, 1], TOPK and NUM_LEVELS of at least 1, got "
                f"{sigma}, {topk} and {num_levels}"
            )
        if not 0 <= min_best_iou <= min(init_iou_thresholds[0], refined_iou_thresholds[0]):
            raise ValueError(
                "MODEL.SCRPN.MIN_BEST_IOU must lie between 0 and the negative thresholds of "
                f"INIT_IOU_THRESHOLDS and REFINED_IOU_THRESHOLDS, got {min_best_iou}, "
                f"{tuple(init_iou_thresholds)} and {tuple(refined_iou_thresholds)}"
            )
        self.init_assigner = init_assigner
        self.refined_assigner = refined_assigner
        self.sigma = sigma
        self.positive_region = positive_region
        self.topk = topk
        self.num_levels = num_levels
        self.keep_best = keep_best
        self.init_matcher = build_max_iou_matcher(init_iou_thresholds)
        self.refined_matcher = build_max_iou_matcher(refined_iou_thresholds)
        self.min_best_iou = min_best_iou
        self.batch_size_per_image = batch_size_per_image

    def check_pyramid(self, strides: list[int], num_anchors: int, num_stages: int) -> None:
        """Raise ValueError if the assigners do not fit the feature maps and the head."""
        is_size_aware = self.init_assigner == "positive_region" or (
            num_stages == 2 and self.refined_assigner == "size_aware_threshold"
        )
        if not is_size_aware:
            return
        check_strides(strides)
        if num_anchors != 1:
            raise ValueError(
                "size-aware sampling needs one anchor per location: set "
                "MODEL.SCRPN.INIT_ASSIGNER and REFINED_ASSIGNER to 'max_iou', or use one of "
                "ANCHOR_ASPECT_RATIOS"
            )

    @torch.no_grad()
    def __call__(
        self,
        locations: PyramidLocations,
        ground_truth: GroundTruth,
        reference_boxes: torch.Tensor,
        init_boxes: torch.Tensor,
        num_stages: int,
    ) -> Samples:
        """
        Args:
            locations: all locations of the batch.
            ground_truth: M objects.
            reference_boxes: (R, 4) XYXY, pixels of the network input; anchors.
            init_boxes: (N, R, 4) XYXY, pixels of the network input; initial proposals.
            num_stages: with 1, the first stage's labels serve classification too.
        """
        num_anchors = len(reference_boxes) // locations.num_locations
        is_valid = locations.is_valid.repeat_interleave(num_anchors, dim=1)
        if self.init_assigner == "positive_region":
            init = assign_positive_region(locations, ground_truth, self.sigma, self.positive_region)
        else:
            references = reference_boxes.expand_as(init_boxes)
            init = assign_max_iou(
                self.init_matcher, references, is_valid, ground_truth, self.min_best_iou
            )
        if num_stages == 1:
            refined = init
        elif self.refined_assigner == "size_aware_threshold":
            refined = assign_size_aware_threshold(
                locations, ground_truth, init_boxes, self.topk, self.num_levels, self.keep_best
            )
        else:
            refined = assign_max_iou(
                self.refined_matcher, init_boxes, is_valid, ground_truth, self.min_best_iou
            )
        return Samples(init, refined, self.draw_classification_samples(refined.labels))

    def draw_classification_samples(self, labels: torch.Tensor) -> torch.Tensor:
        """All positives and random negatives (Fig. 2).

        The paper does not say how many negatives. They fill each image's samples up to
        ``batch_size_per_image``, as in the paper's code base, but are never fewer than the
        positives.

        Args:
            labels: (N, R) int8, 1: positive, 0: negative.

        Returns:
            Tensor: (N, R) bool.
        """
        is_positive, is_negative = labels == 1, labels == 0
        num_positive = is_positive.sum(dim=1, keepdim=True)
        wanted = torch.maximum(self.batch_size_per_image - num_positive, num_positive)
        wanted = torch.minimum(wanted, is_negative.sum(dim=1, keepdim=True))
        chance = torch.rand(labels.shape, device=labels.device).masked_fill_(~is_negative, -1)
        drawn = chance.topk(int(wanted.max()), dim=1).indices  # (N, most wanted of an image)
        is_drawn = torch.arange(drawn.shape[1], device=drawn.device) < wanted
        return is_positive.scatter(1, drawn, is_drawn | is_positive.gather(1, drawn))


@torch.no_grad()
def sample_statistics(
    samples: Samples, ground_truth: GroundTruth, init_boxes: torch.Tensor
) -> dict[str, float]:
    """Numbers of samples, and whether they stay stable while proposals improve (Sec. III-B).

    Args:
        samples: of both stages.
        ground_truth: M objects.
        init_boxes: (N, R, 4) XYXY, pixels of the network input; initial proposals.

    Returns:
        dict[str, float]: per image "num_pos" and "num_neg", the second stage's classification
        samples. If there are objects, also per object "num_pos_init_per_object" and
        "num_pos_refined_per_object" (means), "num_pos_init_std" and "num_pos_refined_std"
        (standard deviations), and "init_iou_of_pos", the mean IoU of the second stage's
        positives before refinement.
    """
    num_images, num_objects = len(samples.is_sampled), len(ground_truth.boxes)
    matched = samples.refined.matched
    is_positive = matched >= 0
    values = {
        "num_pos": is_positive.sum() / num_images,
        "num_neg": (samples.is_sampled & ~is_positive).sum() / num_images,
    }
    if num_objects:
        for stage, objects in (("init", samples.init.matched), ("refined", matched)):
            counts = torch.bincount(objects[objects >= 0], minlength=num_objects).float()
            values[f"num_pos_{stage}_per_object"] = counts.mean()
            values[f"num_pos_{stage}_std"] = counts.std(correction=0)
        iou = matched_pairwise_iou(
            Boxes(init_boxes[is_positive]), Boxes(ground_truth.boxes[matched[is_positive]])
        )
        values["init_iou_of_pos"] = iou.sum() / max(len(iou), 1)
    # One transfer from the device for all of them.
    numbers = torch.stack([value.float() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))
