"""DetectorNet: boxes from five regressed masks, coarse to fine.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013.

Here is how it is built and trained; how it finds boxes is coarse_to_fine.py.

Shape shorthand in this module:

    N: number of images in the batch
    P: number of crops
    K: number of classes; 1 for class-agnostic masks
    d: cells per side of a mask

Naming convention:

    crop: a box of an image, mapped affinely to the network's input.
    score: S of Eq. 3.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage

from .classifier_training import ClassifierTraining
from .coarse_to_fine import CoarseToFine, check_settings
from .crop_sampling import CropSampler, RefinementCrops
from .mask_training import (
    MaskSamples,
    check_classes,
    mask_loss,
    sample_masks,
    sample_masks_of_each_class,
)
from .network import BoxMaskNetwork, CropClassifier
from .settings import make_normalization, prunes_before_suppression, search_grid, trunk_maker


@PROPOSAL_GENERATOR_REGISTRY.register()
class DetectorNet(CoarseToFine):
    """DetectorNet on the images themselves; feature maps of a backbone are not used."""

    stays_in_python = "its windows are laid out in Python for each image's size."

    @configurable
    def __init__(
        self,
        *,
        sampler: CropSampler,
        positive_coverage: float = 0.8,
        object_fraction: float = 0.5,
        samples_each_class: bool = False,
        zero_weight: float = 0.1,
        loss_weight: float = 1.0,
        classifier_training: ClassifierTraining | None = None,
        proposals_in_training: bool = True,
        **inference,
    ):
        """
        Args:
            sampler: of crops that train the network.
            positive_coverage: part of an object that a positive crop covers at least.
            object_fraction: of the crops, the part that is drawn as those of the refinement are.
            samples_each_class: whether each class has crops of its own.
            zero_weight: lambda of the loss.
            loss_weight: of the loss.
            classifier_training: of the classifier that prunes boxes, where there is one.
            proposals_in_training: whether to decode proposals in training.
            **inference: network, and how boxes are found: see :class:`CoarseToFine`.

        Raises:
            ValueError: settings that make no sense.
        """
        super().__init__(**inference)
        self.sampler = sampler
        self.positive_coverage = positive_coverage
        self.object_fraction = object_fraction
        self.samples_each_class = samples_each_class
        self.zero_weight = zero_weight
        self.loss_weight = loss_weight
        self.classifier_training = classifier_training
        self.proposals_in_training = proposals_in_training
        check_settings(
            ("POSITIVE_COVERAGE", positive_coverage, 0 < positive_coverage <= 1),
            ("OBJECT_FRACTION", object_fraction, 0 <= object_fraction <= 1),
            ("ZERO_WEIGHT", zero_weight, zero_weight > 0),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec] | None = None) -> dict:
        node = cfg.MODEL.DETECTORNET
        # The paper's heads train on crops of their own (roi_heads.py), unless they take proposals
        # for hard negatives.
        heads_need_proposals = (
            cfg.MODEL.ROI_HEADS.NAME != "DetectorNetHeads" or node.CLASSIFIER.HARD_FRACTION > 0
        )
        proposals_in_training = cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING
        prunes = prunes_before_suppression(cfg)
        make_trunk = trunk_maker(cfg)
        return {
            "network": BoxMaskNetwork(
                make_trunk=make_trunk,
                num_classes=1 if node.CLASS_AGNOSTIC else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
                mask_size=node.MASK_SIZE,
                networks=node.NETWORKS,
            ),
            "normalization": make_normalization(cfg),
            "classifier": (
                CropClassifier(make_trunk(), cfg.MODEL.ROI_HEADS.NUM_CLASSES) if prunes else None
            ),
            "classifier_training": ClassifierTraining.from_config(cfg) if prunes else None,
            "sampler": CropSampler(
                num_crops=node.NUM_CROPS,
                positive_fraction=node.POSITIVE_FRACTION,
                min_scale=node.MIN_SCALE,
                num_tries=node.NUM_TRIES,
            ),
            "positive_coverage": node.POSITIVE_COVERAGE,
            "object_fraction": node.OBJECT_FRACTION,
            "samples_each_class": (
                node.NETWORKS == "per_class_and_mask" and not node.CLASS_AGNOSTIC
            ),
            "zero_weight": node.ZERO_WEIGHT,
            "loss_weight": node.LOSS_WEIGHT,
            "num_scales": node.NUM_SCALES,
            "window_overlap": node.WINDOW_OVERLAP,
            "grid": search_grid(node, node, "MODEL.DETECTORNET"),
            "min_coverage": node.SCORE_THRESH,
            "pre_nms_topk": node.PRE_NMS_TOPK,
            "pruning_budget": node.CLASSIFIER.PRUNING_BUDGET,
            "nms_thresh": node.NMS_THRESH,
            "nms_type": node.NMS_TYPE,
            "topk_per_scale": node.TOPK_PER_SCALE,
            "refinement_grid": (
                search_grid(node, node.REFINEMENT, "MODEL.DETECTORNET.REFINEMENT")
                if node.REFINEMENT.ENABLED
                else None
            ),
            "refinement_topk": node.REFINEMENT.TOPK,
            "enlargement": node.REFINEMENT.ENLARGEMENT,
            "final_nms_thresh": node.FINAL_NMS_THRESH,
            "min_box_size": node.MIN_BOX_SIZE,
            "crops_at_once": node.CROPS_AT_ONCE,
            "predicts_classes": not node.CLASS_AGNOSTIC,
            "proposals_in_training": proposals_in_training and heads_need_proposals,
        }

    @torch.no_grad()
    def label_and_sample_crops(
        self, image_sizes: list[tuple[int, int]], gt_instances: list[Instances]
    ) -> MaskSamples:
        """Draw crops of the batch and make their masks (Sec. 6, Eq. 1).

        Args:
            image_sizes: (H, W) of each image, in pixels of the network input.
            gt_instances: of each image.

        Raises:
            ValueError: with masks of each class, an object of a class that has none.
        """
        if self.predicts_classes:
            check_classes(gt_instances, self.network.num_classes)
        settings = {
            "mask_size": self.network.mask_size,
            "positive_coverage": self.positive_coverage,
            "refinement": RefinementCrops(self.object_fraction, self.enlargement),
        }
        if self.samples_each_class:
            samples = sample_masks_of_each_class(
                self.sampler, image_sizes, gt_instances, **settings
            )
        else:
            samples = sample_masks(
                self.sampler,
                image_sizes,
                gt_instances,
                num_classes=self.network.num_classes,
                **settings,
            )
        storage = get_event_storage()
        storage.put_scalar("detectornet/num_pos_crops", samples.num_positives)
        storage.put_scalar("detectornet/num_neg_crops", len(samples.crops) - samples.num_positives)
        return samples

    def losses(
        self,
        pred_masks: torch.Tensor,
        gt_masks: torch.Tensor,
        is_unknown: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The weighted L2 loss of Sec. 4, see :func:`~.mask_training.mask_loss`.

        Args:
            pred_masks: (P, K, 5, d, d), outputs of the network.
            gt_masks: (P, K, 5, d, d) in [0, 1].
            is_unknown: (P, K, 1, d, d) bool, cells that do not count; none by default.

        Returns:
            dict[str, Tensor]: "loss_detectornet_mask".
        """
        loss = mask_loss(pred_masks, gt_masks, self.zero_weight, is_unknown)
        return {"loss_detectornet_mask": loss * self.loss_weight}

    def training_losses(
        self, predictions: ImageList, gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """See :meth:`losses`; "loss_detectornet_pruning" where a classifier prunes; of images.

        Where there are ``crowd_regions``, no negative crops are drawn, and cells without an object
        do not count.
        """
        images = predictions
        samples = self.label_and_sample_crops(images.image_sizes, gt_instances)
        pred_masks = self._regress(images, samples.crops, samples.image_index, samples.classes)
        losses = self.losses(pred_masks, samples.gt_masks, samples.is_unknown)
        if self.classifier is not None:
            losses["loss_detectornet_pruning"] = self.classifier_training.loss(
                lambda crops, index: self._classify(images, crops, index),
                images.image_sizes,
                gt_instances,
            )
        return losses
