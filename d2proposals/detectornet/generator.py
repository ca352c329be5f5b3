"""DetectorNet: boxes from five regressed masks, coarse to fine.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013.

Shape shorthand in this module:

    N: number of images in the batch
    P: number of crops
    K: number of classes; 1 for class-agnostic masks
    S: side of a crop at the network's input, in pixels
    d: cells per side of a mask
    R: number of proposals of one image

Naming convention:

    crop: a box of an image, mapped affinely to the network's input.
    window: a crop of the first stage, one of a fixed set that covers the image.
    score: S of Eq. 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..proposals.candidates import clip_candidates, make_empty_proposals, make_proposals
from ..proposals.evaluation_mode import in_evaluation
from ..proposals.patches import crop_patches
from .box_masks import box_mask_loss, box_mask_targets, unknown_cells
from .box_search import box_shapes
from .crop_sampling import CropSampler, enlarge_boxes, sample_mask_crops
from .detection import Detections, SearchGrid, best_boxes, detect_boxes
from .network import BoxMaskNetwork
from .settings import make_normalization, search_grid, trunk_maker
from .suppression import NMS_TYPES
from .windows import make_windows, merge_masks


class MaskSamples(NamedTuple):
    """What the network is trained on.

    Attributes:
        crops: (P, 4) XYXY, pixels of the network input.
        image_index: (P,) int64 image of each crop.
        gt_masks: (P, K, 5, d, d) in [0, 1].
        is_unknown: (P, K, 1, d, d) bool, cells that say nothing, in crowd regions.
    """

    crops: torch.Tensor
    image_index: torch.Tensor
    gt_masks: torch.Tensor
    is_unknown: torch.Tensor


@PROPOSAL_GENERATOR_REGISTRY.register()
class DetectorNet(nn.Module):
    """DetectorNet on the images themselves; feature maps of a backbone are not used."""

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        normalization: nn.Module,
        sampler: CropSampler,
        positive_coverage: float = 0.8,
        object_fraction: float = 0.0,
        zero_weight: float = 0.1,
        loss_weight: float = 1.0,
        num_scales: int = 3,
        window_overlap: float = 0.2,
        grid: SearchGrid,
        min_coverage: float = 0.5,
        pre_nms_topk: int = 1000,
        nms_thresh: float = 0.5,
        nms_type: str = "own_area",
        topk_per_scale: int = 5,
        refinement_grid: SearchGrid | None,
        enlargement: float = 1.2,
        final_nms_thresh: float = 1.0,
        min_box_size: float = 0.0,
        crops_at_once: int = 64,
        predicts_classes: bool = False,
        proposals_in_training: bool = True,
    ):
        """
        Args:
            network: a :class:`BoxMaskNetwork`, or a module with its ``forward``, ``num_classes``,
                ``mask_size`` and ``input_size``.
            normalization: from pixels of the network input to those of ``network``.
            sampler: of crops that train the network.
            positive_coverage: part of an object that a positive crop covers at least.
            object_fraction: of positive crops, the part drawn around objects as in the refinement.
            zero_weight: lambda of the loss.
            loss_weight: of the loss.
            num_scales: of windows.
            window_overlap: part of a window that its neighbour overlaps at least.
            grid: boxes that are searched in the masks of a scale, in pixels of the network input.
            min_coverage: detections are covered more than this by the full mask (Eq. 2).
            pre_nms_topk: boxes of each shape that enter non-maximum suppression.
            nms_thresh: threshold of the non-maximum suppression of each scale.
            nms_type: what it is compared with: "own_area", the part of a box that lies in a better
                one; "iou", intersection over union.
            topk_per_scale: detections of each scale and class.
            refinement_grid: boxes that are searched in the masks of a detection's crop, in pixels
                of the crop at the network's input; None to leave detections as they are.
            enlargement: sides of that crop, relative to the detection's.
            final_nms_thresh: IoU threshold of non-maximum suppression over the proposals of a
                class; 1 for none.
            min_box_size: smaller proposals are dropped, in pixels of the network input.
            crops_at_once: that the network is run on, in evaluation.
            predicts_classes: whether proposals have a class in evaluation.
            proposals_in_training: whether to decode proposals in training.

        Raises:
            ValueError: settings that make no sense.
        """
        super().__init__()
        self.network = network
        self.normalization = normalization
        self.sampler = sampler
        self.positive_coverage = positive_coverage
        self.object_fraction = object_fraction
        self.zero_weight = zero_weight
        self.loss_weight = loss_weight
        self.num_scales = num_scales
        self.window_overlap = window_overlap
        self.grid = grid
        self.min_coverage = min_coverage
        self.pre_nms_topk = pre_nms_topk
        self.nms_thresh = nms_thresh
        self.nms_type = nms_type
        self.topk_per_scale = topk_per_scale
        self.refinement_grid = refinement_grid
        self.enlargement = enlargement
        self.final_nms_thresh = final_nms_thresh
        self.min_box_size = min_box_size
        self.crops_at_once = crops_at_once
        self.predicts_classes = predicts_classes
        self.proposals_in_training = proposals_in_training
        self._check_settings()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec] | None = None) -> dict:
        node = cfg.MODEL.DETECTORNET
        # The paper's heads train on crops of their own (roi_heads.py).
        heads_need_proposals = cfg.MODEL.ROI_HEADS.NAME != "DetectorNetHeads"
        proposals_in_training = cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING
        return {
            "network": BoxMaskNetwork(
                make_trunk=trunk_maker(cfg),
                num_classes=1 if node.CLASS_AGNOSTIC else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
                mask_size=node.MASK_SIZE,
                networks=node.NETWORKS,
            ),
            "normalization": make_normalization(cfg),
            "sampler": CropSampler(
                num_crops=node.NUM_CROPS,
                positive_fraction=node.POSITIVE_FRACTION,
                min_scale=node.MIN_SCALE,
                num_tries=node.NUM_TRIES,
            ),
            "positive_coverage": node.POSITIVE_COVERAGE,
            "object_fraction": node.OBJECT_FRACTION,
            "zero_weight": node.ZERO_WEIGHT,
            "loss_weight": node.LOSS_WEIGHT,
            "num_scales": node.NUM_SCALES,
            "window_overlap": node.WINDOW_OVERLAP,
            "grid": search_grid(node, node, "MODEL.DETECTORNET"),
            "min_coverage": node.SCORE_THRESH,
            "pre_nms_topk": node.PRE_NMS_TOPK,
            "nms_thresh": node.NMS_THRESH,
            "nms_type": node.NMS_TYPE,
            "topk_per_scale": node.TOPK_PER_SCALE,
            "refinement_grid": (
                search_grid(node, node.REFINEMENT, "MODEL.DETECTORNET.REFINEMENT")
                if node.REFINEMENT.ENABLED
                else None
            ),
            "enlargement": node.REFINEMENT.ENLARGEMENT,
            "final_nms_thresh": node.FINAL_NMS_THRESH,
            "min_box_size": node.MIN_BOX_SIZE,
            "crops_at_once": node.CROPS_AT_ONCE,
            "predicts_classes": not node.CLASS_AGNOSTIC,
            "proposals_in_training": proposals_in_training and heads_need_proposals,
        }

    def _check_settings(self) -> None:
        """Raise ValueError for settings that make no sense."""
        if self.nms_type not in NMS_TYPES:
            raise ValueError(
                f"unknown MODEL.DETECTORNET.NMS_TYPE '{self.nms_type}', choose one of {NMS_TYPES}"
            )
        grid = self.refinement_grid
        if grid is not None:
            side = self.network.input_size
            shapes = grid.mean_dimensions, grid.aspect_ratios
            if not box_shapes((side, side), *shapes, cut_to_frame=False):
                raise ValueError(
                    f"MODEL.DETECTORNET.REFINEMENT.MEAN_DIMENSIONS {shapes[0]} with ASPECT_RATIOS "
                    f"{shapes[1]} gives no box that fits into a crop: one of them must be smaller."
                )
        for name, value, is_right in (
            ("POSITIVE_COVERAGE", self.positive_coverage, 0 < self.positive_coverage <= 1),
            ("OBJECT_FRACTION", self.object_fraction, 0 <= self.object_fraction <= 1),
            ("ZERO_WEIGHT", self.zero_weight, self.zero_weight > 0),
            ("NUM_SCALES", self.num_scales, self.num_scales >= 1),
            ("WINDOW_OVERLAP", self.window_overlap, 0 <= self.window_overlap < 1),
            ("PRE_NMS_TOPK", self.pre_nms_topk, self.pre_nms_topk >= 1),
            ("SCORE_THRESH", self.min_coverage, not math.isnan(self.min_coverage)),
            ("NMS_THRESH", self.nms_thresh, 0 <= self.nms_thresh <= 1),
            ("FINAL_NMS_THRESH", self.final_nms_thresh, 0 <= self.final_nms_thresh <= 1),
            ("TOPK_PER_SCALE", self.topk_per_scale, self.topk_per_scale >= 1),
            ("REFINEMENT.ENLARGEMENT", self.enlargement, self.enlargement > 0),
            ("MIN_BOX_SIZE", self.min_box_size, self.min_box_size >= 0),
            ("CROPS_AT_ONCE", self.crops_at_once, self.crops_at_once >= 1),
        ):
            if not is_right:
                raise ValueError(f"MODEL.DETECTORNET.{name} makes no sense: {value}.")

    @torch.no_grad()
    def label_and_sample_crops(
        self, image_sizes: list[tuple[int, int]], gt_instances: list[Instances]
    ) -> MaskSamples:
        """Draw crops of each image and make their masks (Sec. 6, Eq. 1).

        Args:
            image_sizes: (H, W) of each image, in pixels of the network input.
            gt_instances: of each image.
        """
        crops, gt_masks, is_unknown, num_positives = [], [], [], 0
        for size, gt_i in zip(image_sizes, gt_instances, strict=True):
            boxes_i, crowd_i = gt_i.gt_boxes.tensor, crowd_boxes(gt_i)
            crops_i, is_positive = sample_mask_crops(
                self.sampler,
                boxes_i,
                crowd_i,
                size,
                self.positive_coverage,
                self.object_fraction,
                self.enlargement,
            )
            classes_i = gt_i.gt_classes
            if not self.predicts_classes:
                classes_i = torch.zeros_like(classes_i)
            masks_i = box_mask_targets(
                boxes_i, classes_i, crops_i, self.network.num_classes, self.network.mask_size
            )
            crops.append(crops_i)
            gt_masks.append(masks_i)
            is_unknown.append(unknown_cells(masks_i, crowd_i, crops_i))
            num_positives += is_positive.sum()
        samples = MaskSamples(
            torch.cat(crops), image_index(crops), torch.cat(gt_masks), torch.cat(is_unknown)
        )
        storage = get_event_storage()
        storage.put_scalar("detectornet/num_pos_crops", num_positives)
        storage.put_scalar("detectornet/num_neg_crops", len(samples.crops) - num_positives)
        return samples

    def losses(
        self,
        pred_masks: torch.Tensor,
        gt_masks: torch.Tensor,
        is_unknown: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The weighted L2 loss of Sec. 4.

        Unlike the paper, which sums over outputs and crops, their mean: AdaGrad does not see the
        difference, and losses of a detector beside it need comparable sizes. And unlike it, which
        knows no crowd regions, cells there count only where an object is.

        Args:
            pred_masks: (P, K, 5, d, d), outputs of the network.
            gt_masks: (P, K, 5, d, d) in [0, 1].
            is_unknown: (P, K, 1, d, d) bool, cells that do not count; none by default.

        Returns:
            dict[str, Tensor]: "loss_detectornet_mask".
        """
        loss = box_mask_loss(pred_masks, gt_masks, self.zero_weight, is_unknown)
        if is_unknown is None:
            num_outputs = max(gt_masks.numel(), 1)
        else:
            num_outputs = ((~is_unknown).sum() * gt_masks.shape[2]).clamp(min=1)
        return {"loss_detectornet_mask": loss / num_outputs * self.loss_weight}

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: N images, normalised and padded.
            features: not used.
            gt_instances: of each image, with ``gt_boxes`` in pixels of the network input and
                ``gt_classes``; needed in training. Where there are ``crowd_regions``, no negative
                crops are drawn, and cells without an object do not count.

        Returns:
            list[Instances]: of each image, ``proposal_boxes`` (XYXY, pixels of the network input,
            clipped, not empty) and ``objectness_logits`` (the score S in [-5, 5], descending); in
            evaluation with masks of each class, ``proposal_classes`` (R,) int64. Empty in
            training without ``proposals_in_training``.
            dict[str, Tensor]: see :meth:`losses`; empty in evaluation.
        """
        losses = {}
        if self.training:
            assert gt_instances is not None, "DetectorNet needs gt_instances in training"
            samples = self.label_and_sample_crops(images.image_sizes, gt_instances)
            pred_masks = self._regress(images, samples.crops, samples.image_index)
            losses = self.losses(pred_masks, samples.gt_masks, samples.is_unknown)
            if not self.proposals_in_training:
                return make_empty_proposals(images.image_sizes, images.tensor.device), losses
        return self.predict_proposals(images), losses

    @torch.no_grad()
    def predict_proposals(self, images: ImageList) -> list[Instances]:
        """Algorithm 1, with all classes at a time.

        Args:
            images: N images, normalised and padded.

        Returns:
            list[Instances]: see :meth:`forward`.
        """
        # Images one by one: their windows differ in size, and each gets the proposals it gets
        # alone, to the last bit.
        return [self._predict_image(images, i) for i in range(len(images.image_sizes))]

    def _predict_image(self, images: ImageList, image: int) -> Instances:
        """Proposals of one image of the batch."""
        size = tuple(images.image_sizes[image])
        detections = self.detect(images, image)
        if self.refinement_grid is not None:
            detections = self.refine(images, image, detections)
        # Without their sign, which would mean to drop a box; NaN does.
        boxes, index = clip_candidates(
            detections.boxes, detections.scores.abs(), size, self.min_box_size
        )
        detections = detections.select(index)._replace(boxes=boxes)
        detections = detections.select(detections.scores.argsort(descending=True, stable=True))
        if self.final_nms_thresh < 1:
            detections = detections.select(batched_nms(*detections, self.final_nms_thresh))
        proposals = make_proposals(size, detections.boxes, detections.scores)
        if not self.training and self.predicts_classes:
            proposals.proposal_classes = detections.classes
        return proposals

    def detect(self, images: ImageList, image: int) -> Detections:
        """First stage of Algorithm 1: detections of each scale of windows.

        Args:
            images: N images, normalised and padded.
            image: index of one of them.
        """
        size = tuple(images.image_sizes[image])
        detections = []
        for windows in make_windows(size, self.num_scales, self.window_overlap):
            boxes = windows.boxes().to(images.tensor.device)
            masks = merge_masks(self.predict_masks(images, image, boxes), windows)
            detections.append(
                detect_boxes(
                    masks,
                    size,
                    self.grid,
                    min_coverage=self.min_coverage,
                    topk_per_shape=self.pre_nms_topk,
                    nms_thresh=self.nms_thresh,
                    topk=self.topk_per_scale,
                    nms_type=self.nms_type,
                )
            )
        return Detections.cat(detections)

    def refine(self, images: ImageList, image: int, detections: Detections) -> Detections:
        """Second stage of Algorithm 1: the best box in an enlarged crop of each detection.

        Args:
            images: N images, normalised and padded.
            image: index of one of them.
            detections: of the first stage.
        """
        if len(detections.boxes) == 0:
            return detections
        crops = enlarge_boxes(detections.boxes, self.enlargement)
        masks = self.predict_masks(images, image, crops, detections.classes)
        boxes, scores = best_boxes(
            masks[:, 0], crops, self.network.input_size, self.refinement_grid
        )
        return Detections(boxes, scores, detections.classes)

    def predict_masks(
        self,
        images: ImageList,
        image: int,
        crops: torch.Tensor,
        classes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Masks of crops of one image, clamped to [0, 1], the range of Eq. 1.

        In training as well, the network is run as in evaluation: without dropout, and batch
        statistics stay.

        Args:
            images: N images, normalised and padded.
            image: index of one of them.
            crops: (P, 4) XYXY, pixels of the network input.
            classes: (P,) int64, the one class of each crop whose masks are wanted; None for all.

        Returns:
            Tensor: (P, K, 5, d, d); (P, 1, 5, d, d) with ``classes``.
        """
        # The other images would be copied for each group of crops.
        single = ImageList(images.tensor[image : image + 1], [images.image_sizes[image]])
        # Crops of a class side by side: its networks are run once for all of them.
        order = torch.arange(len(crops), device=crops.device)
        if classes is not None:
            order = classes.argsort(stable=True)
        masks = []
        with in_evaluation(self.network):
            for group in order.split(self.crops_at_once):
                classes_of_group = None if classes is None else classes[group]
                masks.append(
                    self._regress(
                        single, crops[group], torch.zeros_like(group), classes_of_group
                    ).clamp(0, 1)
                )
        return torch.cat(masks)[order.argsort()]

    def _regress(
        self,
        images: ImageList,
        crops: torch.Tensor,
        index: torch.Tensor,
        classes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Outputs (P, K, 5, d, d) of the network for crops (P, 4) of images (P,).

        With one class of each crop (P,): (P, 1, 5, d, d).
        """
        patches = crop_patches(images, crops, index, (self.network.input_size,) * 2)
        return self.network(self.normalization(patches), classes)


def crowd_boxes(gt_instances: Instances) -> torch.Tensor:
    """(G, 4) XYXY crowd regions of one image; none where the mapper does not tell."""
    if gt_instances.has("crowd_regions"):
        return gt_instances.crowd_regions.boxes.tensor.to(gt_instances.gt_boxes.tensor)
    return Boxes(gt_instances.gt_boxes.tensor[:0]).tensor


def image_index(crops: list[torch.Tensor]) -> torch.Tensor:
    """(P,) int64 image of each crop, given the crops of each image."""
    return torch.cat(
        [torch.full_like(crops_i[:, 0], i, dtype=torch.int64) for i, crops_i in enumerate(crops)]
    )
