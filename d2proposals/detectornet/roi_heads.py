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
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from ..proposals.patches import crop_patches
from .classifier_training import ClassifierTraining
from .crop_sampling import CropSampler
from .network import CropClassifier
from .settings import make_normalization, prunes_before_suppression, trunk_maker


@ROI_HEADS_REGISTRY.register()
class DetectorNetHeads(nn.Module):
    """Detections from the proposals of DetectorNet.

    Unlike the paper, whose classifier prunes boxes between the filter by Eq. 2 and non-maximum
    suppression (Sec. 5.2), before the best five of a scale are taken and refined: here it sees the
    refined proposals alone. The filter leaves thousands of boxes, each a run of the classifier, and
    proposals for other detectors have to come about without one. The paper's order is that of
    ``MODEL.DETECTORNET.CLASSIFIER.PRUNING_BUDGET``: the generator then has the classifier.

    With masks of each class, a proposal has a class, and stays a detection where the classifier
    agrees with it. Class-agnostic proposals get their class from the classifier: of sliding
    windows, that is the paper's baseline (Sec. 7).
    """

    stays_in_python = "a trace would freeze how many proposals an image has."

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
        hard_fraction: float = 0.0,
        loss_weight: float = 1.0,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        max_detections: int = 100,
        crops_at_once: int = 64,
        max_score: float = 5.0,
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
            hard_fraction: of the negative crops, the part that proposals in training make up, as
                far as they are negatives (Sec. 7).
            loss_weight: of the loss.
            score_thresh: detections of at most this score are dropped.
            nms_thresh: IoU threshold of the non-maximum suppression of each class.
            max_detections: per image.
            crops_at_once: that the classifier is run on, in evaluation.
            max_score: what |S| of Eq. 3 is at most: a difference of two means for each of five
                masks, the halves' by their weight.

        Raises:
            ValueError: nothing tells the class of a detection, or settings that make no sense.
        """
        super().__init__()
        if class_agnostic and classifier is None:
            raise ValueError(
                "DetectorNetHeads needs MODEL.DETECTORNET.CLASSIFIER.ENABLED True or "
                "MODEL.DETECTORNET.CLASS_AGNOSTIC False: nothing else tells an object's class."
            )
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic
        self.classifier = classifier
        self.normalization = normalization
        self.classifier_training = ClassifierTraining(
            num_classes, sampler, tuple(iou_thresholds), hard_fraction, loss_weight
        )
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections
        self.crops_at_once = crops_at_once
        self.max_score = max_score

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec] | None = None) -> dict:
        node = cfg.MODEL.DETECTORNET
        num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        classifier, training = None, ClassifierTraining.from_config(cfg)
        # What a classifier has pruned before needs none but to get a class.
        has_classes = not node.CLASS_AGNOSTIC and prunes_before_suppression(cfg)
        if node.CLASSIFIER.ENABLED and not has_classes:
            classifier = CropClassifier(trunk_maker(cfg)(), num_classes)
        elif training.hard_fraction > 0:
            raise ValueError(
                "MODEL.DETECTORNET.CLASSIFIER.HARD_FRACTION is of the classifier of "
                "DetectorNetHeads, which has none here: set it 0.0, CLASSIFIER.ENABLED True, or "
                "CLASSIFIER.PRUNING_BUDGET 0, with which the generator has none of its own."
            )
        return {
            "num_classes": num_classes,
            "class_agnostic": node.CLASS_AGNOSTIC,
            "classifier": classifier,
            "normalization": make_normalization(cfg),
            "sampler": training.sampler,
            "iou_thresholds": training.iou_thresholds,
            "hard_fraction": training.hard_fraction,
            "loss_weight": training.loss_weight,
            "score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "crops_at_once": node.CROPS_AT_ONCE,
            "max_score": 1 + 4 * node.HALVES_WEIGHT,
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
            proposals: of each image, from :class:`DetectorNet`; with masks of each class they have
                ``proposal_classes`` in evaluation. In training they may be hard negatives.
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
        if self.classifier is None:
            return proposals, {}
        hard_negatives = None
        if self.classifier_training.hard_fraction > 0:
            hard_negatives = [x.proposal_boxes.tensor for x in proposals]
        return proposals, self.losses(images, targets, hard_negatives)

    def losses(
        self,
        images: ImageList,
        targets: list[Instances],
        hard_negatives: list[torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy over crops (Sec. 6), see :class:`ClassifierTraining`.

        Args:
            images: N images, normalised and padded.
            targets: of each image, with ``gt_boxes`` and ``gt_classes``.
            hard_negatives: of each image (Q, 4) boxes that a classifier took for objects.
        """
        loss = self.classifier_training.loss(
            lambda crops, index: self._classify(images, crops, index),
            images.image_sizes,
            targets,
            hard_negatives,
        )
        return {"loss_detectornet_classifier": loss}

    @torch.no_grad()
    def _detect_image(self, images: ImageList, image: int, proposals: Instances) -> Instances:
        """Detections of one image: pruned, filtered by score and by duplicates of their class."""
        boxes = proposals.proposal_boxes.tensor
        # In [0, 1] for boxes that the masks speak for rather than against.
        scores = (proposals.objectness_logits / self.max_score).clamp(0, 1)
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
