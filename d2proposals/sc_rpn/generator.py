"""SC-RPN: a two-stage proposal generator whose modules are strongly correlated.

Source: W. Zou, Z. Zhang, Y. Peng, C. Xiang, S. Tian and L. Zhang, "SC-RPN: A Strong Correlation
Learning Framework for Region Proposal", IEEE Transactions on Image Processing 30, 2021
(10.1109/TIP.2021.3069547).

Shape shorthand in this module:

    N: number of images in the batch
    A: number of anchors per location (1 for points)
    D: numbers that a proposal's shape has (points: 18, box: 4)
    R: number of samples of one image, sum of Hi * Wi * A over the feature maps
    M: number of ground-truth objects in the batch
    S: number of selected samples in the batch

Naming convention:

    init: first stage. refined: second stage. With one stage, the initial proposals are final.
    score: the number in [0, 1] that orders proposals; the IoU-aware score with an IoU mask.
"""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms, nms
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..proposals.candidates import (
    clip_candidates,
    make_empty_proposals,
    make_proposals,
    select_input_shapes,
)
from ..proposals.image_extent import valid_cells
from ..proposals.ranking import probability_to_logit
from .head import HeadPredictions, SCRPNHead
from .locations import Assignment, GroundTruth, PyramidLocations
from .losses import (
    BOX_REG_LOSS_TYPES,
    delta_loss,
    iou_loss,
    iou_mask_logits,
    iou_mask_loss,
    iou_mask_targets,
)
from .stage_sampling import Samples, StageSampler, sample_statistics

NORMALIZERS = ("positives", "samples")
IOU_MASK_SAMPLES = ("classification", "regression", "regression_and_negatives")


@PROPOSAL_GENERATOR_REGISTRY.register()
class SCRPN(nn.Module):
    """SC-RPN on the feature maps of any FPN-like backbone."""

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        strides: list[int],
        head: nn.Module,
        sampler: StageSampler,
        iou_mask_samples: str = "classification",
        num_sigmoid: int = 2,
        use_iou_mask_at_test: bool = True,
        box_reg_loss_type: tuple[str, str] = ("iou", "iou"),
        smooth_l1_beta: float = 1.0 / 9,
        init_normalizer: str = "positives",
        refined_normalizer: str = "positives",
        loss_weight: dict[str, float] | None = None,
        pre_nms_topk: tuple[int, int] = (2000, 2000),
        level_nms_thresh: float = 0.8,
        nms_thresh: float = 0.8,
        post_nms_topk: tuple[int, int] = (2000, 1000),
        min_box_size: float = 0.0,
        proposals_in_training: bool = True,
    ):
        """
        Args:
            in_features: names of the feature maps, high to low resolution.
            strides: their strides, pixels per cell.
            head: a :class:`SCRPNHead`, or a module with its ``forward``, ``representation`` and
                ``num_stages``.
            sampler: assigns objects to the samples of both stages.
            iou_mask_samples: what trains the IoU mask (Table VI): "classification",
                "regression" or "regression_and_negatives" samples.
            num_sigmoid: sigmoids of the IoU mask, 2 or 1.
            use_iou_mask_at_test: whether scores are IoU-aware.
            box_reg_loss_type: "iou" or "smooth_l1", of the first and of the second stage.
            smooth_l1_beta: of "smooth_l1".
            init_normalizer: what the initial loss is divided by, "positives" (Eq. 6) or
                classification "samples".
            refined_normalizer: the same of the refined loss (Eq. 7).
            loss_weight: of the losses in :meth:`losses`, 1 for those that are absent.
            pre_nms_topk: (training, test) best proposals of each feature map before NMS.
            level_nms_thresh: IoU threshold of the NMS on each feature map.
            nms_thresh: IoU threshold of the NMS over all of them.
            post_nms_topk: (training, test) proposals per image.
            min_box_size: smaller proposals are dropped, in pixels of the network input.
            proposals_in_training: whether to decode proposals in training.

        Raises:
            ValueError: unknown names, or settings that exclude each other.
        """
        super().__init__()
        self.in_features = list(in_features)
        self.strides = list(strides)
        self.head = head
        self.sampler = sampler
        self.iou_mask_samples = iou_mask_samples
        self.num_sigmoid = num_sigmoid
        self.use_iou_mask_at_test = use_iou_mask_at_test
        self.box_reg_loss_type = tuple(box_reg_loss_type)
        self.smooth_l1_beta = smooth_l1_beta
        self.init_normalizer = init_normalizer
        self.refined_normalizer = refined_normalizer
        self.loss_weight = dict(loss_weight or {})
        # Map from self.training state to train/test settings
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.level_nms_thresh = level_nms_thresh
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size
        self.proposals_in_training = proposals_in_training
        self._check_settings()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        node = cfg.MODEL.SCRPN
        shapes = select_input_shapes(
            "MODEL.SCRPN.IN_FEATURES", node.IN_FEATURES, input_shape, cfg.MODEL.BACKBONE.NAME
        )
        weight = node.LOSS_WEIGHT
        return {
            "in_features": node.IN_FEATURES,
            "strides": [shape.stride for shape in shapes],
            "head": SCRPNHead(cfg, shapes),
            "sampler": StageSampler(
                init_assigner=node.INIT_ASSIGNER,
                refined_assigner=node.REFINED_ASSIGNER,
                sigma=node.SIGMA,
                topk=node.TOPK,
                num_levels=node.NUM_LEVELS,
                init_iou_thresholds=tuple(node.INIT_IOU_THRESHOLDS),
                refined_iou_thresholds=tuple(node.REFINED_IOU_THRESHOLDS),
                min_best_iou=node.MIN_BEST_IOU,
                batch_size_per_image=node.BATCH_SIZE_PER_IMAGE,
            ),
            "iou_mask_samples": node.IOU_MASK.SAMPLES,
            "num_sigmoid": node.IOU_MASK.NUM_SIGMOID,
            "use_iou_mask_at_test": node.IOU_MASK.USE_AT_TEST,
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": node.SMOOTH_L1_BETA,
            "init_normalizer": node.INIT_NORMALIZER,
            "refined_normalizer": node.REFINED_NORMALIZER,
            "loss_weight": {
                "loss_scrpn_cls": weight * node.CLS_LOSS_WEIGHT,
                "loss_scrpn_iou_mask": weight * node.IOU_MASK.LOSS_WEIGHT,
                "loss_scrpn_init": weight * node.INIT_LOSS_WEIGHT,
                "loss_scrpn_refined": weight * node.REFINED_LOSS_WEIGHT,
            },
            "pre_nms_topk": (node.PRE_NMS_TOPK_TRAIN, node.PRE_NMS_TOPK_TEST),
            "level_nms_thresh": node.LEVEL_NMS_THRESH,
            "nms_thresh": node.NMS_THRESH,
            "post_nms_topk": (node.POST_NMS_TOPK_TRAIN, node.POST_NMS_TOPK_TEST),
            "min_box_size": node.MIN_BOX_SIZE,
            "proposals_in_training": cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING,
        }

    def _check_settings(self) -> None:
        """Raise ValueError for names that do not exist and settings that exclude each other."""
        for key, value, known in (
            ("IOU_MASK.SAMPLES", self.iou_mask_samples, IOU_MASK_SAMPLES),
            ("INIT_NORMALIZER", self.init_normalizer, NORMALIZERS),
            ("REFINED_NORMALIZER", self.refined_normalizer, NORMALIZERS),
            ("IOU_MASK.NUM_SIGMOID", self.num_sigmoid, (1, 2)),
            *(("BBOX_REG_LOSS_TYPE", x, BOX_REG_LOSS_TYPES) for x in self.box_reg_loss_type),
        ):
            if value not in known:
                raise ValueError(f"unknown MODEL.SCRPN.{key} {value!r}, choose one of {known}")
        if len(self.box_reg_loss_type) != 2:
            raise ValueError(
                "MODEL.SCRPN.BBOX_REG_LOSS_TYPE needs two names, for the first and the second "
                f"stage, got {self.box_reg_loss_type}"
            )
        representation = self.head.representation
        if "smooth_l1" in self.box_reg_loss_type and representation.shape_dim != 4:
            raise ValueError(
                "MODEL.SCRPN.BBOX_REG_LOSS_TYPE 'smooth_l1' compares deltas from boxes: use "
                "'iou', or REPRESENTATION 'box'"
            )
        self.sampler.check_pyramid(self.strides, representation.num_anchors, self.head.num_stages)

    @torch.no_grad()
    def label_and_sample_locations(
        self,
        predictions: HeadPredictions,
        locations: PyramidLocations,
        ground_truth: GroundTruth,
    ) -> Samples:
        """Choose what each stage is trained on, given the current initial proposals.

        Args:
            predictions: of the head.
            locations: all locations of the batch.
            ground_truth: M objects.
        """
        init_boxes = self._to_pixels(predictions.init_shape, locations)
        samples = self.sampler(
            locations,
            ground_truth,
            self._reference_boxes(locations),
            init_boxes,
            self.head.num_stages,
        )
        storage = get_event_storage()
        for name, number in sample_statistics(samples, ground_truth, init_boxes).items():
            storage.put_scalar(f"scrpn/{name}", number)
        return samples

    def losses(
        self,
        predictions: HeadPredictions,
        locations: PyramidLocations,
        ground_truth: GroundTruth,
        samples: Samples,
    ) -> dict[str, torch.Tensor]:
        """Eq. 3-7; sums over the batch, divided by the number of samples in the batch.

        Args:
            predictions: of the head.
            locations: all locations of the batch.
            ground_truth: M objects.
            samples: of both stages.

        Returns:
            dict[str, Tensor]: weighted losses: "loss_scrpn_cls" (Eq. 4), "loss_scrpn_iou_mask"
            (Eq. 5, with an IoU mask), "loss_scrpn_init" (Eq. 6) and "loss_scrpn_refined" (Eq. 7,
            with two stages).
        """
        is_sampled = samples.is_sampled
        is_object = (samples.refined.labels[is_sampled] == 1).float()
        class_loss = F.binary_cross_entropy_with_logits(
            predictions.class_logits[is_sampled], is_object, reduction="sum"
        )
        num_sampled = is_sampled.sum().clamp(min=1)  # M_cls
        init_boxes = self._to_pixels(predictions.init_shape, locations)
        references = self._reference_boxes(locations).expand_as(init_boxes)
        init_loss = self._box_loss(0, init_boxes, references, samples.init, ground_truth)
        num_init = (samples.init.labels == 1).sum().clamp(min=1)  # N_reg
        if self.init_normalizer == "samples":
            num_init = num_sampled
        losses = {
            "loss_scrpn_cls": class_loss / num_sampled,
            "loss_scrpn_init": init_loss / num_init,
        }
        if predictions.secondary is not None:
            refined_boxes = self._refined_boxes(predictions, locations)
            refined_loss = self._box_loss(
                1, refined_boxes, init_boxes, samples.refined, ground_truth
            )
            num_refined = (samples.refined.labels == 1).sum().clamp(min=1)  # M_reg
            if self.refined_normalizer == "samples":
                num_refined = num_sampled
            losses["loss_scrpn_refined"] = refined_loss / num_refined
            if predictions.iou_mask is not None:
                losses["loss_scrpn_iou_mask"] = self._iou_mask_loss(
                    predictions.iou_mask, refined_boxes, samples, ground_truth
                )
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _box_loss(
        self,
        stage: int,
        boxes: torch.Tensor,
        source_boxes: torch.Tensor,
        assignment: Assignment,
        ground_truth: GroundTruth,
    ) -> torch.Tensor:
        """Regression loss of one stage (0 or 1), summed over its positives, Eq. 6 and 7."""
        is_positive = assignment.labels == 1
        gt_boxes = ground_truth.boxes[assignment.matched[is_positive]]
        if self.box_reg_loss_type[stage] == "iou":
            loss = iou_loss(boxes[is_positive], gt_boxes)
        else:
            loss = delta_loss(
                boxes[is_positive], gt_boxes, source_boxes[is_positive], self.smooth_l1_beta
            )
        return loss.sum()

    def _iou_mask_loss(
        self,
        iou_mask: torch.Tensor,
        refined_boxes: torch.Tensor,
        samples: Samples,
        ground_truth: GroundTruth,
    ) -> torch.Tensor:
        """Eq. 5: mean over the samples that train the IoU mask (Table VI)."""
        labels = samples.refined.labels
        is_sample = {
            "classification": samples.is_sampled,
            "regression": labels == 1,
            "regression_and_negatives": labels >= 0,
        }[self.iou_mask_samples]
        gt_iou = iou_mask_targets(
            refined_boxes.detach()[is_sample],
            is_sample.nonzero()[:, 0],
            samples.refined.matched[is_sample],
            ground_truth,
        )
        loss = iou_mask_loss(iou_mask[is_sample], gt_iou, self.num_sigmoid)
        return loss.sum() / max(len(gt_iou), 1)

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: N images, normalised and padded.
            features: feature maps by name, (N, C, Hi, Wi); those of ``in_features`` are used.
            gt_instances: of each image, with ``gt_boxes`` in pixels of the network input; needed
                in training. Crowd regions are not used, as in Detectron2's RPN: their locations
                are background.

        Returns:
            list[Instances]: of each image, ``proposal_boxes`` (XYXY, pixels of the network input,
            clipped, not empty) and ``objectness_logits`` (logit of the score, descending). Empty
            in training without ``proposals_in_training``.
            dict[str, Tensor]: see :meth:`losses`; empty in evaluation.
        """
        maps = [features[name] for name in self.in_features]
        image_sizes = torch.as_tensor(
            [tuple(size) for size in images.image_sizes], device=maps[0].device
        )
        valid = [
            valid_cells(image_sizes, x.shape[-2:], stride, x.dtype)
            for x, stride in zip(maps, self.strides, strict=True)
        ]
        predictions = self.head(maps, valid)
        locations = PyramidLocations.build(
            [tuple(x.shape[-2:]) for x in maps], self.strides, images.image_sizes, maps[0].device
        )
        losses = {}
        if self.training:
            assert gt_instances is not None, "SCRPN needs gt_instances in training"
            ground_truth = GroundTruth.from_instances(gt_instances)
            samples = self.label_and_sample_locations(predictions, locations, ground_truth)
            losses = self.losses(predictions, locations, ground_truth, samples)
            if not self.proposals_in_training:
                return make_empty_proposals(images.image_sizes, maps[0].device), losses
        return self.predict_proposals(predictions, locations, images.image_sizes), losses

    @torch.no_grad()
    def predict_proposals(
        self,
        predictions: HeadPredictions,
        locations: PyramidLocations,
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Score, decode, and filter duplicates on each feature map and then over all of them.

        Args:
            predictions: of the head.
            locations: all locations of the batch.
            image_sizes: (height, width) of each image, in pixels of the network input.

        Returns:
            list[Instances]: see :meth:`forward`.
        """
        scores = self.scores(predictions)
        boxes = self._final_boxes(predictions, locations)
        if self.training and not (boxes.isfinite().all() and scores.isfinite().all()):
            raise FloatingPointError("SCRPN predicts Inf or NaN: training has diverged.")
        # Locations in the padding of the batch are never trained: no proposals from there.
        usable = self._is_valid(locations) & boxes.isfinite().all(dim=2) & scores.isfinite()
        scores = scores.masked_fill(~usable, -1)
        topk_scores, topk_boxes, topk_levels = [], [], []
        for level in range(len(self.strides)):
            cells = locations.level_slice(level, self.head.representation.num_anchors)
            num_kept = min(self.pre_nms_topk[self.training], cells.stop - cells.start)
            best, index = scores[:, cells].topk(num_kept, dim=1)
            topk_scores.append(best)
            topk_boxes.append(boxes[:, cells].gather(1, index[..., None].expand(-1, -1, 4)))
            topk_levels.append(torch.full_like(index[0], level))
        levels = torch.cat(topk_levels)
        return [
            self._filter_duplicates(boxes_i, scores_i, levels, size_i)
            for boxes_i, scores_i, size_i in zip(
                torch.cat(topk_boxes, dim=1),
                torch.cat(topk_scores, dim=1),
                image_sizes,
                strict=True,
            )
        ]

    def scores(self, predictions: HeadPredictions) -> torch.Tensor:
        """Scores in [0, 1], (N, R): the mean of classification score and IoU mask (Sec. III-A)."""
        scores = predictions.class_logits.sigmoid()
        if predictions.iou_mask is not None and self.use_iou_mask_at_test:
            iou_mask = iou_mask_logits(predictions.iou_mask, self.num_sigmoid).sigmoid()
            scores = (scores + iou_mask) / 2
        return scores

    def _filter_duplicates(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        levels: torch.Tensor,
        image_size: tuple[int, int],
    ) -> Instances:
        """NMS on each feature map, then over all of them, of one image's candidates.

        Args:
            boxes: (S, 4) XYXY, pixels of the network input.
            scores: (S,) in [0, 1]; -1 for boxes to drop.
            levels: (S,) feature map of each box.
            image_size: (height, width).
        """
        boxes, index = clip_candidates(boxes, scores, image_size, self.min_box_size)
        scores, levels = scores[index], levels[index]
        keep = batched_nms(boxes, scores, levels, self.level_nms_thresh)
        boxes, scores = boxes[keep], scores[keep]
        keep = nms(boxes, scores, self.nms_thresh)[: self.post_nms_topk[self.training]]
        return make_proposals(image_size, boxes[keep], probability_to_logit(scores[keep]))

    def _is_valid(self, locations: PyramidLocations) -> torch.Tensor:
        """(N, R) bool: whether samples are centred inside their image."""
        return locations.is_valid.repeat_interleave(self.head.representation.num_anchors, dim=1)

    def _reference_boxes(self, locations: PyramidLocations) -> torch.Tensor:
        """(R, 4) anchors, or for points the square that they begin on; XYXY in pixels."""
        references = self.head.representation.reference_boxes(locations.centers.device)
        references = references * locations.stride_of_location[:, None, None]
        return (references + locations.centers.repeat(1, 2)[:, None]).flatten(0, 1)

    def _to_pixels(self, shape: torch.Tensor, locations: PyramidLocations) -> torch.Tensor:
        """Boxes of shapes, (N, R, D) in cells around the location -> (N, R, 4) in pixels."""
        boxes = self.head.representation.to_boxes(shape)
        per_location = self.head.representation.num_anchors
        stride = locations.stride_of_location.repeat_interleave(per_location)
        center = locations.centers.repeat_interleave(per_location, dim=0)
        return boxes * stride[:, None] + center.repeat(1, 2)

    def _refined_boxes(
        self, predictions: HeadPredictions, locations: PyramidLocations
    ) -> torch.Tensor:
        """(N, R, 4) XYXY, pixels of the network input."""
        shape = self.head.representation.decode_refined(
            predictions.init_shape, predictions.secondary
        )
        return self._to_pixels(shape, locations)

    def _final_boxes(
        self, predictions: HeadPredictions, locations: PyramidLocations
    ) -> torch.Tensor:
        """(N, R, 4) boxes of the last stage."""
        if predictions.secondary is None:
            return self._to_pixels(predictions.init_shape, locations)
        return self._refined_boxes(predictions, locations)
