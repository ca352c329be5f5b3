"""ZIP: a proposal generator with anchors of each size on a level of their own.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.2-3.4.

Shape shorthand in this module:

    N: number of images in the batch
    Ri: anchors of level i, of all cells; R: of all levels
    K: number of classes, 2 or (with the gray class) 3
    T: number of candidate boxes of an image

Naming convention:

    valid: (N, 1, Hi, Wi) of 0 and 1, the cells of a map that begin inside the image. Anchors on
        other cells are neither sampled nor proposed.
    candidates: the boxes of an image after the NMS of each level, with their (biased) scores.
"""

import itertools
import logging
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from ..proposals.candidates import (
    make_proposals,
    select_input_shapes,
)
from ..proposals.image_extent import stack_image_sizes, valid_cells
from ..proposals.proposal_generator import ProposalGenerator
from ..proposals.ranking import (
    check_multi_threshold_settings,
    multi_threshold_nms,
    probability_to_logit,
    strictly_decreasing,
)
from ..proposals.sampled_convolution import is_watched
from .gray_class_sampling import IGNORED, EquilibriumSampler, GrayClassLabeler
from .head import ZIPLevelHeads
from .level_candidates import LevelCandidates, LevelSuppression, best_of_levels
from .losses import ZoomLoss, log_sample_counts
from .zoom_network import IMAGE_SIZES

logger = logging.getLogger(__name__)


@PROPOSAL_GENERATOR_REGISTRY.register()
class ZIP(ProposalGenerator):
    """Zoom out-and-in network for object proposals; runs on the zoom network or on any FPN."""

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        strides: Sequence[int],
        heads: nn.Module,
        anchor_generator: nn.Module,
        labeler: GrayClassLabeler,
        sampler: EquilibriumSampler,
        box2box_transform: Box2BoxTransform,
        box_reg_loss_type: str = "squared_l2",
        smooth_l1_beta: float = 1.0,
        loss_weight: dict[str, float] | None = None,
        pre_nms_topk: tuple[int, int] = (6000, 6000),
        level_nms_thresh: float = 0.5,
        level_nms_topk: int = 2000,
        level_bias: Sequence[float] = (),
        multi_nms_thresholds: Sequence[float] = (),
        multi_nms_topks: Sequence[int] = (),
        post_nms_topk: tuple[int, int] = (2000, 1000),
        min_box_size: float = 0.0,
        proposals_in_training: bool = True,
        gray_in_score: bool = True,
    ):
        """
        Args:
            in_features: names of the feature maps, one level each, high to low resolution.
            strides: of these maps, in pixels.
            heads: class logits and offsets of each level, e.g. :class:`ZIPLevelHeads`.
            anchor_generator: Detectron2's, for these maps.
            labeler: labels anchors by IoU.
            sampler: draws the anchors that take part in the loss.
            box2box_transform: encoding of boxes relative to anchors.
            box_reg_loss_type: "squared_l2" (Eq. 6) or "smooth_l1".
            smooth_l1_beta: of "smooth_l1".
            loss_weight: "loss_zip_cls", "loss_zip_loc" -> weight, 1 where absent.
            pre_nms_topk: (training, test) best boxes of a level that enter its NMS.
            level_nms_thresh: IoU threshold of that NMS.
            level_nms_topk: boxes that it keeps.
            level_bias: added to the probabilities of each level; empty for none.
            multi_nms_thresholds: of the second NMS; empty for none.
            multi_nms_topks: of the second NMS.
            post_nms_topk: (training, test) proposals per image.
            min_box_size: smaller boxes are dropped, in pixels of the network input.
            proposals_in_training: whether to decode proposals while training.
            gray_in_score: see :func:`best_of_levels`.

        Raises:
            ValueError: settings contradict each other.
        """
        super().__init__()
        if level_bias and len(level_bias) != len(in_features):
            raise ValueError(
                f"MODEL.ZIP.LEVEL_BIAS has {len(level_bias)} numbers for {len(in_features)} levels "
                f"({list(in_features)})"
            )
        if multi_nms_thresholds or multi_nms_topks:
            check_multi_threshold_settings(
                multi_nms_thresholds,
                multi_nms_topks,
                "MODEL.ZIP.MULTI_NMS_THRESHOLDS and MULTI_NMS_TOPKS",
            )
        self.in_features = list(in_features)
        self.strides = list(strides)
        self.heads = heads
        self.anchor_generator = anchor_generator
        self.labeler = labeler
        self.sampler = sampler
        self.box2box_transform = box2box_transform
        self.loss = ZoomLoss(box2box_transform, box_reg_loss_type, smooth_l1_beta)
        self.loss_weight = dict(loss_weight or {})
        # By self.training.
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.level_suppression = LevelSuppression(
            len(in_features), level_nms_thresh, level_nms_topk, min_box_size
        )
        self.level_bias = list(level_bias) or [0.0] * len(in_features)
        self.multi_nms_thresholds = list(multi_nms_thresholds)
        self.multi_nms_topks = list(multi_nms_topks)
        self.proposals_in_training = proposals_in_training
        self.gray_in_score = gray_in_score
        self._warned_of_extent = False

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        node = cfg.MODEL.ZIP
        shapes = _input_shapes(cfg, input_shape)
        anchor_generator = build_anchor_generator(cfg, shapes)
        return {
            "in_features": node.IN_FEATURES,
            "strides": [shape.stride for shape in shapes],
            "heads": ZIPLevelHeads(
                in_channels=[shape.channels for shape in shapes],
                channels=node.HEAD_CHANNELS,
                num_anchors=anchor_generator.num_anchors,
                num_classes=3 if node.GRAY_CLASS.ENABLED else 2,
                shared=node.SHARED_HEAD,
            ),
            "anchor_generator": anchor_generator,
            "labeler": GrayClassLabeler(
                positive_iou=node.POSITIVE_IOU,
                negative_iou=node.NEGATIVE_IOU,
                negative_iou_min=node.NEGATIVE_IOU_MIN,
                gray_iou=tuple(node.GRAY_CLASS.IOU) if node.GRAY_CLASS.ENABLED else None,
                low_quality_match=node.LOW_QUALITY_MATCH,
            ),
            "sampler": EquilibriumSampler(
                batch_size=node.BATCH_SIZE_PER_IMAGE,
                batch_size_per_class=node.BATCH_SIZE_PER_CLASS,
                equilibrium=node.EQUILIBRIUM.ENABLED,
                negative_ratio=node.EQUILIBRIUM.NEGATIVE_RATIO,
                share_without_positives=node.EQUILIBRIUM.SHARE_WITHOUT_POSITIVES,
                gray_ratio=node.GRAY_CLASS.RATIO if node.GRAY_CLASS.ENABLED else 0.0,
            ),
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": node.SMOOTH_L1_BETA,
            "loss_weight": {
                "loss_zip_cls": node.LOSS_WEIGHT,
                "loss_zip_loc": node.LOSS_WEIGHT * node.BBOX_REG_LOSS_WEIGHT,
            },
            "pre_nms_topk": (node.PRE_NMS_TOPK_TRAIN, node.PRE_NMS_TOPK_TEST),
            "level_nms_thresh": node.LEVEL_NMS_THRESH,
            "level_nms_topk": node.LEVEL_NMS_TOPK,
            "level_bias": node.LEVEL_BIAS,
            "multi_nms_thresholds": node.MULTI_NMS_THRESHOLDS,
            "multi_nms_topks": node.MULTI_NMS_TOPKS,
            "post_nms_topk": (node.POST_NMS_TOPK_TRAIN, node.POST_NMS_TOPK_TEST),
            "min_box_size": node.MIN_BOX_SIZE,
            "proposals_in_training": cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING,
            "gray_in_score": node.GRAY_CLASS.IN_SCORE,
        }

    def head_parts(self) -> list[nn.Module]:
        """The heads of all levels."""
        return [self.heads]

    @torch.no_grad()
    def label_and_sample_anchors(
        self,
        anchors: Sequence[Boxes],
        valid: Sequence[torch.Tensor],
        gt_instances: Sequence[Instances],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Labels of the sampled anchors, and the ground-truth box of each anchor.

        Args:
            anchors: of each level, Ri boxes.
            valid: of each level.
            gt_instances: of each image, with ``gt_boxes``.

        Returns:
            Per level: (N, Ri) labels, IGNORED where not sampled; and (N, Ri, 4) the box of each
            anchor's best ground truth (zeros for images without objects).
        """
        all_anchors = Boxes.cat(list(anchors))
        is_valid = torch.cat(self._on_anchors(valid), dim=1)
        labels, gt_boxes = [], []
        for instances, is_valid_i in zip(gt_instances, is_valid, strict=True):
            labels_i, index_i = self.labeler(all_anchors, instances.gt_boxes, is_valid_i)
            boxes_i = instances.gt_boxes.tensor
            labels.append(labels_i)
            gt_boxes.append(
                boxes_i[index_i] if len(boxes_i) else torch.zeros_like(all_anchors.tensor)
            )
        sizes = [len(a) for a in anchors]
        sampled = [self.sampler(labels_i) for labels_i in torch.stack(labels).split(sizes, dim=1)]
        return sampled, list(torch.stack(gt_boxes).split(sizes, dim=1))

    def losses(
        self,
        anchors: Sequence[Boxes],
        pred_class_logits: Sequence[torch.Tensor],
        pred_anchor_deltas: Sequence[torch.Tensor],
        gt_labels: Sequence[torch.Tensor],
        gt_boxes: Sequence[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Eq. 6, summed over levels, see :class:`ZoomLoss`.

        Args:
            anchors: of each level, Ri boxes.
            pred_class_logits: of each level, (N, Ri, K).
            pred_anchor_deltas: of each level, (N, Ri, 4).
            gt_labels: of each level, (N, Ri), see :meth:`label_and_sample_anchors`.
            gt_boxes: of each level, (N, Ri, 4).

        Returns:
            dict: "loss_zip_cls" and "loss_zip_loc", weighted scalars.
        """
        class_loss, box_loss = self.loss(
            anchors, pred_class_logits, pred_anchor_deltas, gt_labels, gt_boxes
        )
        log_sample_counts(gt_labels, self.in_features)
        losses = {"loss_zip_cls": class_loss, "loss_zip_loc": box_loss}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def training_losses(
        self, predictions, gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """See :meth:`losses`."""
        anchors, valid, logits, deltas, _ = predictions
        labels, gt_boxes = self.label_and_sample_anchors(anchors, valid, gt_instances)
        return self.losses(anchors, logits, deltas, labels, gt_boxes)

    def losses_alone(
        self, images: ImageList, features: dict[str, torch.Tensor], gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """See :meth:`losses`. On a CPU the heads look at the cells of the sampled anchors alone: a
        few hundred of each image, chosen by the ground truth."""
        # Others may compute something else.
        is_simple = type(self.heads) is ZIPLevelHeads and self.heads.are_simple()
        if images.tensor.device.type != "cpu" or not is_simple or is_watched(self.heads):
            return super().losses_alone(images, features, gt_instances)
        maps, valid = self._maps(images, features)
        anchors = self.anchor_generator(maps)
        labels, gt_boxes = self.label_and_sample_anchors(anchors, valid, gt_instances)
        outputs = self.heads.at_anchors(maps, [labels_i != IGNORED for labels_i in labels])
        return self.losses(anchors, *outputs, labels, gt_boxes)

    def propose(self, predictions) -> list[Instances]:
        """See :meth:`predict_proposals`."""
        return self.predict_proposals(*predictions)

    def predict(self, images: ImageList, features: dict[str, torch.Tensor]):
        """Anchors, valid cells, class logits and offsets of each level, and the images' sizes."""
        maps, valid = self._maps(images, features)
        return self.anchor_generator(maps), valid, *self.heads(maps), images.image_sizes

    def _maps(
        self, images: ImageList, features: dict[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The map of each level, zero outside of the images, and its valid cells."""
        image_sizes = stack_image_sizes(images.image_sizes, images.tensor.device)
        self._check_extent(image_sizes, features)
        maps = [features[name] for name in self.in_features]
        valid = [
            valid_cells(image_sizes, x.shape[-2:], stride, x.dtype)
            for x, stride in zip(maps, self.strides, strict=True)
        ]
        return [x * v for x, v in zip(maps, valid, strict=True)], valid

    def _check_extent(self, image_sizes: torch.Tensor, features: dict[str, torch.Tensor]) -> None:
        """Warn once if the zoom network took the border of an image for padding."""
        if self._warned_of_extent or IMAGE_SIZES not in features or torch.jit.is_tracing():
            return
        if not torch.equal(features[IMAGE_SIZES], image_sizes):
            self._warned_of_extent = True
            logger.warning(
                "The zoom network took image borders for padding (sizes %s instead of %s): their "
                "pixels equal MODEL.PIXEL_MEAN exactly. Attention there ignores these borders.",
                features[IMAGE_SIZES].tolist(),
                image_sizes.tolist(),
            )

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: Sequence[Boxes],
        valid: Sequence[torch.Tensor],
        pred_class_logits: Sequence[torch.Tensor],
        pred_anchor_deltas: Sequence[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Proposals of each image (Sec. 3.4). Arguments as in :meth:`losses`.

        They are fixed for the R-CNN heads: no gradient flows through their coordinates.
        """
        candidates = self._level_candidates(
            anchors, valid, pred_class_logits, pred_anchor_deltas, image_sizes
        )
        return [
            self.select(candidates_n.boxes, candidates_n.biased_scores(self.level_bias), size)
            for candidates_n, size in zip(candidates, image_sizes, strict=True)
        ]

    @torch.no_grad()
    def candidates(
        self, images: ImageList, features: dict[str, torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What enters the second NMS, for tests at several scales that run it once over all.

        Returns:
            Per image: (T, 4) boxes in pixels of the network input and (T,) scores.
        """
        return [
            (candidates_n.boxes, candidates_n.biased_scores(self.level_bias))
            for candidates_n in self.level_candidates(images, features)
        ]

    @torch.no_grad()
    def level_candidates(
        self, images: ImageList, features: dict[str, torch.Tensor]
    ) -> list[LevelCandidates]:
        """What :meth:`candidates` returns, by level and without the biases: of each image."""
        anchors, valid, logits, deltas, _ = self.predict(images, features)
        return self._level_candidates(anchors, valid, logits, deltas, images.image_sizes)

    @torch.no_grad()
    def select(
        self, boxes: torch.Tensor, scores: torch.Tensor, image_size: tuple[int, int]
    ) -> Instances:
        """The second NMS and the final ranking.

        Args:
            boxes: (T, 4) XYXY.
            scores: (T,) probabilities with the level's bias.
            image_size: (height, width) of the frame of ``boxes``.

        Returns:
            Instances: ``proposal_boxes`` and ``objectness_logits``, best first.
        """
        topk = self.post_nms_topk[self.training]
        if self.multi_nms_thresholds:
            keep = multi_threshold_nms(
                boxes, scores, self.multi_nms_thresholds, self.multi_nms_topks, limit=topk
            )
        else:
            keep = scores.argsort(descending=True, stable=True)[:topk]
        logits = strictly_decreasing(probability_to_logit(scores[keep]))
        return make_proposals(image_size, boxes[keep], logits)

    def _level_candidates(
        self,
        anchors: Sequence[Boxes],
        valid: Sequence[torch.Tensor],
        pred_class_logits: Sequence[torch.Tensor],
        pred_anchor_deltas: Sequence[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[LevelCandidates]:
        """The best boxes of each level after its own NMS; see :meth:`level_candidates`."""
        candidates = best_of_levels(
            anchors,
            self._on_anchors(valid),
            pred_class_logits,
            pred_anchor_deltas,
            self.box2box_transform,
            self.pre_nms_topk[self.training],
            self.gray_in_score,
        )
        if self.training and not all(
            c.boxes.isfinite().all() and c.scores.isfinite().all() for c in candidates
        ):
            raise FloatingPointError("ZIP predicts Inf or NaN: training has diverged.")
        return [
            self.level_suppression(candidates_n, size)
            for candidates_n, size in zip(candidates, image_sizes, strict=True)
        ]

    def _on_anchors(self, valid: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of each level, (N, 1, Hi, Wi) valid cells -> (N, Ri) bool, by anchor."""
        return [
            v.flatten(1).bool().repeat_interleave(per_cell, dim=1)
            for v, per_cell in zip(valid, self.anchor_generator.num_anchors, strict=True)
        ]


def _input_shapes(cfg, input_shape: dict[str, ShapeSpec]) -> list[ShapeSpec]:
    """Shapes of ZIP's feature maps; ValueError where config and backbone do not fit."""
    names = cfg.MODEL.ZIP.IN_FEATURES
    shapes = select_input_shapes(
        "MODEL.ZIP.IN_FEATURES", names, input_shape, cfg.MODEL.BACKBONE.NAME
    )
    for key in ("SIZES", "ASPECT_RATIOS"):
        groups = len(cfg.MODEL.ANCHOR_GENERATOR[key])
        if groups not in (1, len(names)):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{key} has {groups} groups for the {len(names)} levels of "
                f"MODEL.ZIP.IN_FEATURES ({list(names)}): give one group per level, or one for all"
            )
    _warn_of_small_anchors_of_deep_maps(names, shapes, cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    return shapes


def _warn_of_small_anchors_of_deep_maps(
    names: Sequence[str], shapes: Sequence[ShapeSpec], sizes: Sequence[Sequence[float]]
) -> None:
    """Warn where a map of a larger stride has smaller anchors than another one."""
    if len(sizes) != len(names) or not all(isinstance(x, list | tuple) and x for x in sizes):
        return
    levels = sorted(zip(shapes, map(max, sizes), names, strict=True), key=lambda x: x[0].stride)
    for (shape, size, name), (deeper, other_size, other_name) in itertools.pairwise(levels):
        if deeper.stride > shape.stride and other_size < size:
            logger.warning(
                f"MODEL.ANCHOR_GENERATOR.SIZES: {other_name}, of stride {deeper.stride}, has "
                f"anchors up to {other_size:g} pixels, and {name}, of stride {shape.stride}, up "
                f"to {size:g}: the groups go in the order of MODEL.ZIP.IN_FEATURES ({list(names)})."
            )
