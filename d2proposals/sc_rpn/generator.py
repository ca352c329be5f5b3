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
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..proposals.candidates import select_input_shapes
from ..proposals.image_extent import stack_image_sizes, valid_cells
from ..proposals.proposal_generator import ProposalGenerator
from .duplicates import best_of_each_map, filter_duplicates
from .head import SCRPNHead
from .late_regression import can_regress_late, late_candidates
from .locations import GroundTruth, PyramidLocations
from .losses import iou_mask_logits
from .pixel_boxes import boxes_in_pixels, reference_boxes, valid_samples
from .predictions import HeadPredictions, InitialPredictions, SampledPredictions
from .stage_losses import StageLosses
from .stage_sampling import Samples, StageSampler, sample_statistics

IOU_MASK_SCORES = ("mean", "mask")


@PROPOSAL_GENERATOR_REGISTRY.register()
class SCRPN(ProposalGenerator):
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
        iou_mask_score: str = "mean",
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
            head: a :class:`SCRPNHead`, or a module with its ``predict_*`` methods,
                ``representation``, ``num_stages`` and ``iou_mask_feature``.
            sampler: assigns objects to the samples of both stages.
            iou_mask_samples: what trains the IoU mask (Table VI): "classification",
                "regression" or "regression_and_negatives" samples.
            num_sigmoid: sigmoids of the IoU mask, 2 or 1.
            use_iou_mask_at_test: whether scores are IoU-aware.
            iou_mask_score: which IoU-aware score: "mean" of classification and mask, or "mask".
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
        self.stage_losses = StageLosses(
            representation=head.representation,
            iou_mask_samples=iou_mask_samples,
            num_sigmoid=num_sigmoid,
            box_reg_loss_type=box_reg_loss_type,
            smooth_l1_beta=smooth_l1_beta,
            init_normalizer=init_normalizer,
            refined_normalizer=refined_normalizer,
            loss_weight=loss_weight or {},
        )
        self.num_sigmoid = num_sigmoid
        self.use_iou_mask_at_test = use_iou_mask_at_test
        if iou_mask_score not in IOU_MASK_SCORES:
            raise ValueError(
                f"unknown MODEL.SCRPN.IOU_MASK.SCORE {iou_mask_score!r}, choose one of "
                f"{IOU_MASK_SCORES}"
            )
        if iou_mask_score == "mask" and head.iou_mask_feature is None:
            raise ValueError("MODEL.SCRPN.IOU_MASK.SCORE 'mask' needs IOU_MASK.ENABLED True")
        self.iou_mask_score = iou_mask_score
        # Map from self.training state to train/test settings
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.level_nms_thresh = level_nms_thresh
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size
        self.proposals_in_training = proposals_in_training
        sampler.check_pyramid(self.strides, head.representation.num_anchors, head.num_stages)

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
                positive_region=node.POSITIVE_REGION,
                topk=node.TOPK,
                num_levels=node.NUM_LEVELS,
                keep_best=node.KEEP_BEST,
                init_iou_thresholds=tuple(node.INIT_IOU_THRESHOLDS),
                refined_iou_thresholds=tuple(node.REFINED_IOU_THRESHOLDS),
                min_best_iou=node.MIN_BEST_IOU,
                batch_size_per_image=node.BATCH_SIZE_PER_IMAGE,
            ),
            "iou_mask_samples": node.IOU_MASK.SAMPLES,
            "num_sigmoid": node.IOU_MASK.NUM_SIGMOID,
            "use_iou_mask_at_test": node.IOU_MASK.USE_AT_TEST,
            "iou_mask_score": node.IOU_MASK.SCORE,
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

    def head_parts(self) -> list[nn.Module]:
        """The first stage; the second one is computed at places that differ from image to image."""
        return [*self.head.tower, self.head.init_conv, self.head.init_offset]

    @torch.no_grad()
    def label_and_sample_locations(
        self,
        predictions: InitialPredictions,
        locations: PyramidLocations,
        ground_truth: GroundTruth,
    ) -> Samples:
        """Choose what each stage is trained on, given the current initial proposals.

        Args:
            predictions: of the head's first stage.
            locations: all locations of the batch.
            ground_truth: M objects.
        """
        representation = self.head.representation
        init_boxes = boxes_in_pixels(representation, predictions.init_shape, locations)
        samples = self.sampler(
            locations,
            ground_truth,
            reference_boxes(representation, locations),
            init_boxes,
            self.head.num_stages,
        )
        storage = get_event_storage()
        for name, number in sample_statistics(samples, ground_truth, init_boxes).items():
            storage.put_scalar(f"scrpn/{name}", number)
        return samples

    def losses(
        self,
        predictions: SampledPredictions,
        locations: PyramidLocations,
        ground_truth: GroundTruth,
        samples: Samples,
    ) -> dict[str, torch.Tensor]:
        """Eq. 3-7; sums over the batch, divided by the number of samples in the batch.

        Args:
            predictions: of the head, at the samples.
            locations: all locations of the batch.
            ground_truth: M objects.
            samples: of both stages.

        Returns:
            dict[str, Tensor]: weighted losses: "loss_scrpn_cls" (Eq. 4), "loss_scrpn_iou_mask"
            (Eq. 5, with an IoU mask), "loss_scrpn_init" (Eq. 6) and "loss_scrpn_refined" (Eq. 7,
            with two stages).
        """
        return self.stage_losses(predictions, locations, ground_truth, samples)

    def predict(
        self, images: ImageList, features: dict[str, torch.Tensor]
    ) -> tuple[InitialPredictions, PyramidLocations, list[tuple[int, int]]]:
        """The first stage everywhere, where that is, and the images' sizes."""
        maps = [features[name] for name in self.in_features]
        image_sizes = stack_image_sizes(images.image_sizes, maps[0].device)
        valid = [
            valid_cells(image_sizes, x.shape[-2:], stride, x.dtype)
            if _has_padding(images, x, stride)
            else None
            for x, stride in zip(maps, self.strides, strict=True)
        ]
        locations = PyramidLocations.build(
            [tuple(x.shape[-2:]) for x in maps], self.strides, image_sizes, maps[0].device
        )
        initial = self.head.predict_initial(
            maps, valid, not self._learns_at_samples(maps[0].device)
        )
        return initial, locations, images.image_sizes

    def _learns_at_samples(self, device: torch.device) -> bool:
        """Whether the first stage has a gradient only at what its losses read; on a CPU, where
        that spares most of the backward pass."""
        reads_few = self.stage_losses.iou_mask_samples != "regression_and_negatives"
        return self.training and device.type == "cpu" and self.head.num_stages == 2 and reads_few

    def training_losses(
        self,
        predictions: tuple[InitialPredictions, PyramidLocations, list[tuple[int, int]]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:
        """See :meth:`losses`. Crowd regions are background, as in Detectron2's RPN."""
        initial, locations, _ = predictions
        ground_truth = GroundTruth.from_instances(gt_instances)
        samples = self.label_and_sample_locations(initial, locations, ground_truth)
        if self._learns_at_samples(locations.centers.device):
            # Of the second stage's samples, points move with what their features say.
            is_learned = samples.is_sampled | (samples.init.labels == 1)
            initial = self.head.learn_initial_at(initial, is_learned)
        sampled = self._predict_samples(initial, samples)
        return self.losses(sampled, locations, ground_truth, samples)

    def _predict_samples(self, initial: InitialPredictions, samples: Samples) -> SampledPredictions:
        """The last stage where a loss reads it."""
        has_iou_mask = self.head.iou_mask_feature is not None
        is_needed = self.stage_losses.needed_samples(samples, has_iou_mask)
        # Of all negatives (Table VI), whole maps are cheaper than one position after the other.
        if self.head.num_stages == 2 and is_needed is samples.is_sampled:
            return self.head.predict_refined_at(initial, is_needed)
        return self.head.predict_refined(initial).at(is_needed)

    @torch.no_grad()
    def propose(
        self, predictions: tuple[InitialPredictions, PyramidLocations, list[tuple[int, int]]]
    ) -> list[Instances]:
        """:meth:`predict_proposals`, with no more of the second stage than that needs."""
        initial, locations, image_sizes = predictions
        if not can_regress_late(self.head, self.use_iou_mask_at_test):
            refined = self.head.predict_refined(initial)
            return self.predict_proposals(refined, locations, image_sizes)
        scores = self.scores(self.head.predict_classes(initial))
        usable = self._check_finite(scores) & valid_samples(self.head.representation, locations)
        boxes, scores, levels = late_candidates(
            self.head,
            initial,
            scores.masked_fill(~usable, -1),
            locations,
            self.pre_nms_topk[self.training],
        )
        self._check_finite(boxes)
        return self._filter_each_image(boxes, scores, levels, image_sizes)

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
        representation = self.head.representation
        scores = self.scores(predictions)
        boxes = boxes_in_pixels(representation, self._final_shape(predictions), locations)
        is_finite = self._check_finite(boxes).all(dim=2) & self._check_finite(scores)
        # Locations in the padding of the batch are never trained: no proposals from there.
        usable = is_finite & valid_samples(representation, locations)
        boxes, scores, levels = best_of_each_map(
            boxes,
            scores.masked_fill(~usable, -1),
            [
                locations.level_slice(level, representation.num_anchors)
                for level in range(len(self.strides))
            ],
            self.pre_nms_topk[self.training],
        )
        return self._filter_each_image(boxes, scores, levels, image_sizes)

    def _check_finite(self, x: torch.Tensor) -> torch.Tensor:
        """Where predictions are finite; FloatingPointError in training if one is not."""
        is_finite = x.isfinite()
        if self.training and not is_finite.all():
            raise FloatingPointError("SCRPN predicts Inf or NaN: training has diverged.")
        return is_finite

    def _filter_each_image(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        levels: torch.Tensor,
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """The proposals among the candidates (N, S, 4) of each image."""
        return [
            self._filter_duplicates(boxes_i, scores_i, levels, size_i)
            for boxes_i, scores_i, size_i in zip(
                boxes.unbind(), scores.unbind(), image_sizes, strict=True
            )
        ]

    def scores(self, predictions: HeadPredictions) -> torch.Tensor:
        """Scores in [0, 1], (N, R): the mean of classification score and IoU mask (Sec. III-A), or
        one of them alone."""
        scores = predictions.class_logits.sigmoid()
        if predictions.iou_mask is not None and self.use_iou_mask_at_test:
            iou_mask = iou_mask_logits(predictions.iou_mask, self.num_sigmoid).sigmoid()
            scores = iou_mask if self.iou_mask_score == "mask" else (scores + iou_mask) / 2
        return scores

    def _final_shape(self, predictions: HeadPredictions) -> torch.Tensor:
        """(N, R, D) shapes of the last stage."""
        if predictions.secondary is None:
            return predictions.init_shape
        return self.head.representation.decode_refined(
            predictions.init_shape, predictions.secondary
        )

    def _filter_duplicates(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        levels: torch.Tensor,
        image_size: tuple[int, int],
    ) -> Instances:
        """The proposals among one image's candidates, see :func:`filter_duplicates`."""
        return filter_duplicates(
            boxes,
            scores,
            levels,
            image_size,
            level_nms_thresh=self.level_nms_thresh,
            nms_thresh=self.nms_thresh,
            topk=self.post_nms_topk[self.training],
            min_box_size=self.min_box_size,
        )


def _has_padding(images: ImageList, feature_map: torch.Tensor, stride: int) -> bool:
    """Whether a feature map has cells that begin outside an image. A trace has to expect them."""
    return torch.jit.is_tracing() or any(
        -(-size // stride) < cells
        for image_size in images.image_sizes
        for size, cells in zip(image_size, feature_map.shape[-2:], strict=True)
    )
