"""DetectorNet as a detector: detections of each class, pruned by a classifier.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 5.2 and 6.

Shape shorthand in this module:

    P: number of crops
    K: number of classes
    R: number of proposals of one image
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..proposals.patches import crop_patches
from .crop_sampling import CropSampler, sample_classifier_crops
from .generator import crowd_boxes, image_index
from .network import CropClassifier
from .settings import make_normalization, trunk_maker

# |S| of Eq. 3 is at most this: a difference of two means for each of five masks.
_MAX_SCORE = 5


@ROI_HEADS_REGISTRY.register()
class DetectorNetHeads(nn.Module):
    """Detections from the proposals of DetectorNet.

    Unlike the paper, whose classifier prunes boxes between the filter by Eq. 2 and non-maximum
    suppression (Sec. 5.2), before the best five of a scale are taken and refined: here it sees the
    refined proposals alone. The filter leaves thousands of boxes, each a run of the classifier, and
    proposals for other detectors have to come about without one.

    With masks of each class, a proposal has a class, and stays a detection where the classifier
    agrees with it. Class-agnostic proposals get their class from the classifier.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        class_agnostic: bool,
        classifier: nn.Module | None,
        normalization: nn.Module,
        sampler: CropSampler,
        iou_thresholds: tuple[float, float] = (0.2, 0.6),
        loss_weight: float = 1.0,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        max_detections: int = 100,
        crops_at_once: int = 64,
    ):
        """
        Args:
            num_classes: K.
            class_agnostic: whether proposals have no class.
            classifier: a :class:`CropClassifier`; None to keep all proposals, which then need a
                class.
            normalization: from pixels of the network input to those of ``classifier``.
            sampler: of crops that train the classifier.
            iou_thresholds: of negative and positive crops (Sec. 6).
            loss_weight: of the loss.
            score_thresh: detections of at most this score are dropped.
            nms_thresh: IoU threshold of the non-maximum suppression of each class.
            max_detections: per image.
            crops_at_once: that the classifier is run on, in evaluation.

        Raises:
            ValueError: nothing tells the class of a detection, or settings that make no sense.
        """
        super().__init__()
        if class_agnostic and classifier is None:
            raise ValueError(
                "DetectorNetHeads needs MODEL.DETECTORNET.CLASSIFIER.ENABLED True or "
                "MODEL.DETECTORNET.CLASS_AGNOSTIC False: nothing else tells an object's class."
            )
        if len(iou_thresholds) != 2 or not 0 <= iou_thresholds[0] <= iou_thresholds[1] <= 1:
            raise ValueError(
                "MODEL.DETECTORNET.CLASSIFIER.IOU_THRESHOLDS needs two numbers in [0, 1], the "
                f"negatives' first and not above the positives', got {tuple(iou_thresholds)}."
            )
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic
        self.classifier = classifier
        self.normalization = normalization
        self.sampler = sampler
        self.iou_thresholds = tuple(iou_thresholds)
        self.loss_weight = loss_weight
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections
        self.crops_at_once = crops_at_once

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec] | None = None) -> dict:
        node = cfg.MODEL.DETECTORNET
        num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        classifier = None
        if node.CLASSIFIER.ENABLED:
            classifier = CropClassifier(trunk_maker(cfg)(), num_classes)
        return {
            "num_classes": num_classes,
            "class_agnostic": node.CLASS_AGNOSTIC,
            "classifier": classifier,
            "normalization": make_normalization(cfg),
            "sampler": CropSampler(
                num_crops=node.CLASSIFIER.NUM_CROPS,
                positive_fraction=node.CLASSIFIER.POSITIVE_FRACTION,
                min_scale=node.CLASSIFIER.MIN_SCALE,
                num_tries=node.CLASSIFIER.NUM_TRIES,
                key="MODEL.DETECTORNET.CLASSIFIER",
            ),
            "iou_thresholds": tuple(node.CLASSIFIER.IOU_THRESHOLDS),
            "loss_weight": node.CLASSIFIER.LOSS_WEIGHT,
            "score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "crops_at_once": node.CROPS_AT_ONCE,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: N images, normalised and padded.
            features: not used.
            proposals: of each image, from :class:`DetectorNet`; used in evaluation, and with masks
                of each class they have ``proposal_classes`` then.
            targets: of each image, with ``gt_boxes`` and ``gt_classes``; needed in training.

        Returns:
            list[Instances]: in evaluation, of each image ``pred_boxes`` (XYXY, pixels of the
            network input), ``scores`` in [0, 1], descending, and ``pred_classes``. In training,
            the proposals as they are.
            dict[str, Tensor]: in training, "loss_detectornet_classifier", unless there is none.

        Raises:
            ValueError: in evaluation, proposals without classes where they need some.
        """
        if not self.training:
            detections = [
                self._detect_image(images, i, proposals_i)
                for i, proposals_i in enumerate(proposals)
            ]
            return detections, {}
        assert targets is not None, "DetectorNetHeads needs targets in training"
        return proposals, {} if self.classifier is None else self.losses(images, targets)

    def losses(self, images: ImageList, targets: list[Instances]) -> dict[str, torch.Tensor]:
        """Cross-entropy over random crops (Sec. 6), their mean.

        Args:
            images: N images, normalised and padded.
            targets: of each image, with ``gt_boxes`` and ``gt_classes``.
        """
        crops, classes = [], []
        for size, targets_i in zip(images.image_sizes, targets, strict=True):
            crops_i, classes_i = sample_classifier_crops(
                self.sampler,
                targets_i.gt_boxes.tensor,
                targets_i.gt_classes,
                crowd_boxes(targets_i),
                size,
                self.num_classes,
                self.iou_thresholds,
            )
            crops.append(crops_i)
            classes.append(classes_i)
        gt_classes = torch.cat(classes)
        logits = self._classify(images, torch.cat(crops), image_index(crops))
        loss = F.cross_entropy(logits, gt_classes, reduction="sum") / max(len(gt_classes), 1)
        num_positives = (gt_classes < self.num_classes).sum()
        storage = get_event_storage()
        storage.put_scalar("detectornet/num_pos_classifier_crops", num_positives)
        storage.put_scalar("detectornet/num_neg_classifier_crops", len(gt_classes) - num_positives)
        return {"loss_detectornet_classifier": loss * self.loss_weight}

    @torch.no_grad()
    def _detect_image(self, images: ImageList, image: int, proposals: Instances) -> Instances:
        """Detections of one image: pruned, filtered by score and by duplicates of their class."""
        boxes = proposals.proposal_boxes.tensor
        # S / 5: in [0, 1] for boxes that the masks speak for rather than against.
        scores = (proposals.objectness_logits / _MAX_SCORE).clamp(0, 1)
        if not self.class_agnostic and not proposals.has("proposal_classes"):
            raise ValueError(
                "DetectorNetHeads got proposals without classes: with "
                "MODEL.DETECTORNET.CLASS_AGNOSTIC False, MODEL.PROPOSAL_GENERATOR.NAME must be "
                "DetectorNet."
            )
        classes = None if self.class_agnostic else proposals.proposal_classes
        if self.classifier is not None:
            single = ImageList(images.tensor[image : image + 1], [images.image_sizes[image]])
            probability, predicted = self._class_probabilities(single, boxes).max(dim=1)
            keep = predicted < self.num_classes if classes is None else predicted == classes
            scores = probability if classes is None else scores
            boxes, scores, classes = boxes[keep], scores[keep], predicted[keep]
        keep = scores > self.score_thresh
        boxes, scores, classes = boxes[keep], scores[keep], classes[keep]
        keep = batched_nms(boxes, scores, classes, self.nms_thresh)[: self.max_detections]
        detections = Instances(proposals.image_size)
        detections.pred_boxes = Boxes(boxes[keep])
        detections.scores = scores[keep]
        detections.pred_classes = classes[keep]
        return detections

    def _class_probabilities(self, image: ImageList, crops: torch.Tensor) -> torch.Tensor:
        """(P, K + 1) probabilities of crops of a single image."""
        probabilities = [
            self._classify(image, group, torch.zeros_like(group[:, 0], dtype=torch.int64)).softmax(
                1
            )
            for group in crops.split(self.crops_at_once)
        ]
        return torch.cat(probabilities)

    def _classify(
        self, images: ImageList, crops: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """Logits (P, K + 1) of crops (P, 4) of images (P,)."""
        patches = crop_patches(images, crops, index, (self.classifier.input_size,) * 2)
        return self.classifier(self.normalization(patches))
