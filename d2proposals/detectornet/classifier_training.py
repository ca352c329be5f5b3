"""What DetectorNet's classifier is trained on, and its loss.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 6 and, of hard negatives, Sec. 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage

from .crop_sampling import CropSampler, sample_classifier_crops
from .mask_training import check_classes, crowd_of


@dataclass(frozen=True)
class ClassifierTraining:
    """How the classifier is trained.

    Attributes:
        num_classes: K.
        sampler: of its crops.
        iou_thresholds: of negative and positive crops (Sec. 6).
        hard_fraction: of the negatives, the part that hard ones make up where there are some.
        loss_weight: of the loss.

    Raises:
        ValueError: settings that make no sense.
    """

    num_classes: int
    sampler: CropSampler
    iou_thresholds: tuple[float, float] = (0.2, 0.6)
    hard_fraction: float = 0.0
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        thresholds = self.iou_thresholds
        if len(thresholds) != 2 or not 0 < thresholds[0] <= thresholds[1] <= 1:
            raise ValueError(
                "MODEL.DETECTORNET.CLASSIFIER.IOU_THRESHOLDS needs two numbers above 0, up to 1, "
                f"the negatives' first and not above the positives', got {tuple(thresholds)}."
            )
        if not 0 <= self.hard_fraction <= 1:
            raise ValueError(
                f"MODEL.DETECTORNET.CLASSIFIER.HARD_FRACTION makes no sense: {self.hard_fraction}."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ClassifierTraining:
        """As MODEL.DETECTORNET.CLASSIFIER says."""
        node = cfg.MODEL.DETECTORNET.CLASSIFIER
        return cls(
            num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            sampler=CropSampler(
                num_crops=node.NUM_CROPS,
                positive_fraction=node.POSITIVE_FRACTION,
                min_scale=node.MIN_SCALE,
                num_tries=node.NUM_TRIES,
                key="MODEL.DETECTORNET.CLASSIFIER",
            ),
            iou_thresholds=tuple(node.IOU_THRESHOLDS),
            hard_fraction=node.HARD_FRACTION,
            loss_weight=node.LOSS_WEIGHT,
        )

    def loss(
        self,
        classify: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[Instances],
        hard_negatives: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Cross-entropy over crops of the batch, their mean.

        Args:
            classify: takes crops (P, 4) and the image of each (P,), returns logits (P, K + 1).
            image_sizes: (H, W) of each image, in pixels of the network input.
            targets: of each image, with ``gt_boxes`` and ``gt_classes``.
            hard_negatives: of each image (Q, 4) boxes that a classifier took for objects.

        Raises:
            ValueError: an object of a class beyond K.
        """
        check_classes(targets, self.num_classes)
        crops = sample_classifier_crops(
            self.sampler,
            [x.gt_boxes.tensor for x in targets],
            [x.gt_classes for x in targets],
            [crowd_of(x)[0] for x in targets],
            image_sizes,
            self.num_classes,
            self.iou_thresholds,
            hard_negatives,
            self.hard_fraction,
        )
        logits = classify(crops.boxes, crops.image_index)
        loss = F.cross_entropy(logits, crops.labels, reduction="sum") / max(len(crops.labels), 1)
        num_positives = (crops.labels < self.num_classes).sum()
        storage = get_event_storage()
        storage.put_scalar("detectornet/num_pos_classifier_crops", num_positives)
        storage.put_scalar(
            "detectornet/num_neg_classifier_crops", len(crops.labels) - num_positives
        )
        return loss * self.loss_weight
