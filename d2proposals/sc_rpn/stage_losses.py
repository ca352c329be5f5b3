"""The losses of SC-RPN's two stages together.

Source: W. Zou, Z. Zhang, Y. Peng, C. Xiang, S. Tian and L. Zhang, "SC-RPN: A Strong Correlation
Learning Framework for Region Proposal", IEEE Transactions on Image Processing 30, 2021,
Sec. III-D (Eq. 3-7) and Table VI (what trains the IoU mask).

Shape shorthand in this module:

    N: number of images in the batch
    R: number of samples of one image
    M: number of ground-truth objects in the batch
    S: number of samples at which the second stage was computed
    K: number of positives
"""

import torch
import torch.nn.functional as F

from .locations import GroundTruth, PyramidLocations
from .losses import BOX_REG_LOSS_TYPES, delta_loss, iou_loss, iou_mask_loss, iou_mask_targets
from .pixel_boxes import Representation, boxes_in_pixels, reference_boxes
from .predictions import SampledPredictions
from .stage_sampling import Samples

NORMALIZERS = ("positives", "samples")
IOU_MASK_SAMPLES = ("classification", "regression", "regression_and_negatives")


class StageLosses:
    """Eq. 3-7; sums over the batch, divided by the number of samples in the batch."""

    def __init__(
        self,
        *,
        representation: Representation,
        iou_mask_samples: str,
        num_sigmoid: int,
        box_reg_loss_type: tuple[str, str],
        smooth_l1_beta: float,
        init_normalizer: str,
        refined_normalizer: str,
        loss_weight: dict[str, float],
    ):
        """
        Args:
            representation: of the proposals.
            iou_mask_samples: what trains the IoU mask (Table VI): "classification",
                "regression" or "regression_and_negatives" samples.
            num_sigmoid: sigmoids of the IoU mask, 2 or 1.
            box_reg_loss_type: "iou" or "smooth_l1", of the first and of the second stage.
            smooth_l1_beta: of "smooth_l1".
            init_normalizer: what the initial loss is divided by, "positives" (Eq. 6) or
                classification "samples".
            refined_normalizer: the same of the refined loss (Eq. 7).
            loss_weight: of each loss by its name, 1 for those that are absent.

        Raises:
            ValueError: unknown names, or settings that exclude each other.
        """
        self.representation = representation
        self.iou_mask_samples = iou_mask_samples
        self.num_sigmoid = num_sigmoid
        self.box_reg_loss_type = tuple(box_reg_loss_type)
        self.smooth_l1_beta = smooth_l1_beta
        self.init_normalizer = init_normalizer
        self.refined_normalizer = refined_normalizer
        self.loss_weight = dict(loss_weight)
        self._check_settings()

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
        if "smooth_l1" in self.box_reg_loss_type and self.representation.shape_dim != 4:
            raise ValueError(
                "MODEL.SCRPN.BBOX_REG_LOSS_TYPE 'smooth_l1' compares deltas from boxes: use "
                "'iou', or REPRESENTATION 'box'"
            )

    def needed_samples(self, samples: Samples, has_iou_mask: bool) -> torch.Tensor:
        """Samples whose second stage a loss reads, (N, R) bool.

        Args:
            samples: of both stages.
            has_iou_mask: whether the head predicts an IoU mask.
        """
        if has_iou_mask and self.iou_mask_samples == "regression_and_negatives":
            return samples.refined.labels >= 0
        return samples.is_sampled  # all positives, and negatives

    def __call__(
        self,
        predictions: SampledPredictions,
        locations: PyramidLocations,
        ground_truth: GroundTruth,
        samples: Samples,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            predictions: of the head, at :meth:`needed_samples` or more.
            locations: all locations of the batch.
            ground_truth: M objects.
            samples: of both stages.

        Returns:
            dict[str, Tensor]: weighted losses, see :meth:`SCRPN.losses`.
        """
        num_sampled = samples.is_sampled.sum().clamp(min=1)  # M_cls
        losses = {
            "loss_scrpn_cls": self._class_loss(predictions, samples) / num_sampled,
            "loss_scrpn_init": self._init_loss(
                predictions, locations, ground_truth, samples, num_sampled
            ),
        }
        if predictions.secondary is not None:
            refined_boxes = self._refined_boxes(predictions, locations)
            losses["loss_scrpn_refined"] = self._refined_loss(
                predictions, refined_boxes, locations, ground_truth, samples, num_sampled
            )
            if predictions.iou_mask is not None:
                losses["loss_scrpn_iou_mask"] = self.iou_mask_loss(
                    predictions.iou_mask, refined_boxes, predictions.index, samples, ground_truth
                )
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _class_loss(self, predictions: SampledPredictions, samples: Samples) -> torch.Tensor:
        """Eq. 4, summed over the classification samples."""
        is_sampled = samples.is_sampled.flatten()[predictions.index]
        labels = samples.refined.labels.flatten()[predictions.index]
        return F.binary_cross_entropy_with_logits(
            predictions.class_logits[is_sampled], (labels[is_sampled] == 1).float(), reduction="sum"
        )

    def _init_loss(
        self,
        predictions: SampledPredictions,
        locations: PyramidLocations,
        ground_truth: GroundTruth,
        samples: Samples,
        num_sampled: torch.Tensor,
    ) -> torch.Tensor:
        """Eq. 6."""
        positive = (samples.init.labels == 1).flatten().nonzero()[:, 0]  # (K,)
        boxes = self._init_boxes(predictions, locations, positive)
        references = reference_boxes(self.representation, locations)
        loss = self._box_loss(
            0,
            boxes,
            references[positive % len(references)],
            ground_truth.boxes[samples.init.matched.flatten()[positive]],
        )
        return loss / _normalizer(self.init_normalizer, positive, num_sampled)  # N_reg

    def _refined_loss(
        self,
        predictions: SampledPredictions,
        refined_boxes: torch.Tensor,
        locations: PyramidLocations,
        ground_truth: GroundTruth,
        samples: Samples,
        num_sampled: torch.Tensor,
    ) -> torch.Tensor:
        """Eq. 7, of the (S, 4) refined boxes."""
        labels = samples.refined.labels.flatten()[predictions.index]
        positive = (labels == 1).nonzero()[:, 0]  # (K,) of the S samples
        index = predictions.index[positive]
        loss = self._box_loss(
            1,
            refined_boxes[positive],
            self._init_boxes(predictions, locations, index),
            ground_truth.boxes[samples.refined.matched.flatten()[index]],
        )
        return loss / _normalizer(self.refined_normalizer, positive, num_sampled)  # M_reg

    def _box_loss(
        self, stage: int, boxes: torch.Tensor, source_boxes: torch.Tensor, gt_boxes: torch.Tensor
    ) -> torch.Tensor:
        """Regression loss of one stage (0 or 1), summed over its (K, 4) positives."""
        if self.box_reg_loss_type[stage] == "iou":
            return iou_loss(boxes, gt_boxes).sum()
        return delta_loss(boxes, gt_boxes, source_boxes, self.smooth_l1_beta).sum()

    def iou_mask_loss(
        self,
        iou_mask: torch.Tensor,
        refined_boxes: torch.Tensor,
        index: torch.Tensor,
        samples: Samples,
        ground_truth: GroundTruth,
    ) -> torch.Tensor:
        """Eq. 5: mean over the samples that train the IoU mask (Table VI).

        Args:
            iou_mask: (S,) output of the branch's convolution.
            refined_boxes: (S, 4) XYXY, pixels of the network input.
            index: (S,) the samples in the flattened (N, R).
            samples: of both stages.
            ground_truth: M objects.
        """
        labels = samples.refined.labels.flatten()[index]
        is_used = {
            "classification": samples.is_sampled.flatten()[index],
            "regression": labels == 1,
            "regression_and_negatives": labels >= 0,
        }[self.iou_mask_samples]
        index = index[is_used]
        gt_iou = iou_mask_targets(
            refined_boxes.detach()[is_used],
            torch.div(index, samples.refined.labels.shape[1], rounding_mode="floor"),
            samples.refined.matched.flatten()[index],
            ground_truth,
        )
        loss = iou_mask_loss(iou_mask[is_used], gt_iou, self.num_sigmoid)
        return loss.sum() / max(len(gt_iou), 1)

    def _init_boxes(
        self, predictions: SampledPredictions, locations: PyramidLocations, index: torch.Tensor
    ) -> torch.Tensor:
        """Initial boxes of the samples ``index`` (K,): (K, 4) in pixels."""
        shape = predictions.init_shape.flatten(0, 1)[index]
        return boxes_in_pixels(self.representation, shape, locations, index)

    def _refined_boxes(
        self, predictions: SampledPredictions, locations: PyramidLocations
    ) -> torch.Tensor:
        """(S, 4) in pixels."""
        init_shape = predictions.init_shape.flatten(0, 1)[predictions.index]
        shape = self.representation.decode_refined(init_shape, predictions.secondary)
        return boxes_in_pixels(self.representation, shape, locations, predictions.index)


def _normalizer(
    name: str, positives: torch.Tensor, num_sampled: torch.Tensor
) -> torch.Tensor | int:
    """What a regression loss is divided by: its positives (K,), or the classification samples."""
    return num_sampled if name == "samples" else max(len(positives), 1)
