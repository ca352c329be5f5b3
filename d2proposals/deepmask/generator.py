"""DeepMask: class-agnostic masks with scores, predicted at every window of an image pyramid.

Source: P. O. Pinheiro, R. Collobert and P. Dollar, "Learning to Segment Object Candidates", NIPS
2015 (arXiv:1506.06204).

Shape shorthand in this module:

    N: number of images in the batch
    P: number of training patches in the batch
    R: number of proposals of one image
    S: side of a patch, in pixels (224)
    s: side of a predicted mask, in cells (56)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ..proposals.candidates import clip_candidates, make_proposals
from ..proposals.evaluation_mode import in_evaluation
from ..proposals.mask_proposals import ProposalMasks
from ..proposals.native_size import NativeSizes, scale_between
from ..proposals.patches import crop_patches
from ..proposals.pixel_normalization import PixelNormalization
from ..proposals.proposal_generator import ProposalGenerator
from ..proposals.ranking import first_of_nms
from .dense_inference import WindowPredictions, predict_windows
from .losses import idle_branch_loss, mask_loss, score_loss
from .mask_boxes import boxes_of_masks
from .network import DeepMaskNetwork, build_network
from .patch_masks import cut_masks
from .patch_samples import PatchSamples
from .patch_sampling import PatchSampler, check_categories

BRANCHES = ("alternating", "joint")

# Logit of 1 - 1e-6: scores are clamped to it.
_MAX_SCORE_LOGIT = math.log((1 - 1e-6) / 1e-6)


@dataclass
class TrainingPatches:
    """What one iteration learns from.

    Attributes:
        pixels: (P, 3, S + 2 context, S + 2 context), normalised for the trunk.
        samples: where they were cut.
        masks: (the patches that train the segmentation branch, the first ones; side, side) of 0
            and 1.
        trains_mask, trains_score: whether this iteration trains the branch.
    """

    pixels: torch.Tensor
    samples: PatchSamples
    masks: torch.Tensor
    trains_mask: bool
    trains_score: bool


@PROPOSAL_GENERATOR_REGISTRY.register()
class DeepMask(ProposalGenerator):
    """DeepMask with a trunk of its own; the features of a detector's backbone are not used."""

    stays_in_python = "the sizes of its pyramid are computed in Python for each image."

    @configurable
    def __init__(
        self,
        *,
        network: DeepMaskNetwork,
        pixel_normalization: nn.Module,
        sampler: PatchSampler,
        batch_size_per_image: int = 4,
        branches: str = "alternating",
        mask_loss_on_negatives: bool = False,
        loss_weight: dict[str, float] | None = None,
        log2_scales: Sequence[float] = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0),
        native_sizes: NativeSizes | None = None,
        mask_thresh: float = 0.2,
        pre_nms_topk: tuple[int, int] = (1000, 1000),
        nms_thresh: float = 1.0,
        post_nms_topk: tuple[int, int] = (1000, 1000),
        min_box_size: float = 0.0,
        proposals_in_training: bool = True,
    ):
        """
        Args:
            network: trunk and both branches.
            pixel_normalization: from the model's pixels to the trunk's.
            sampler: draws training patches.
            batch_size_per_image: patches per image of a batch, of an iteration.
            branches: "alternating" trains the segmentation branch and the scoring branch in turn,
                "joint" both at once.
            mask_loss_on_negatives: whether masks are also learnt from negatives, as empty.
            loss_weight: of the losses in :meth:`losses`, 1 for those that are absent; by default
                that of the score is the paper's lambda, 1/32.
            log2_scales: octaves by which images are enlarged for each scale of the pyramid.
            native_sizes: says which size of an image scales refer to; by default, that of the image
                as it was taken.
            mask_thresh: probability above which a pixel belongs to the mask.
            pre_nms_topk: (training, test) windows whose masks are predicted, best scores first.
            nms_thresh: IoU of boxes above which the later proposal goes; 1 for no NMS.
            post_nms_topk: (training, test) proposals per image.
            min_box_size: smaller proposals are dropped, in pixels of the network input.
            proposals_in_training: whether to decode proposals in training.

        Raises:
            ValueError: an unknown name, or numbers that make no sense.
        """
        super().__init__()
        if branches not in BRANCHES:
            raise ValueError(
                f"MODEL.DEEPMASK.BRANCHES must be one of {BRANCHES}, got '{branches}'."
            )
        if not 0 < mask_thresh < 1:
            raise ValueError(f"MODEL.DEEPMASK.MASK_THRESH must be in (0, 1), got {mask_thresh}.")
        if not 0 <= nms_thresh <= 1:
            raise ValueError(f"MODEL.DEEPMASK.NMS_THRESH must be in [0, 1], got {nms_thresh}.")
        for key, limits in (("PRE_NMS_TOPK", pre_nms_topk), ("POST_NMS_TOPK", post_nms_topk)):
            if min(limits) < 1:
                raise ValueError(
                    f"MODEL.DEEPMASK.{key}_TRAIN and {key}_TEST must be at least 1, got "
                    f"{limits[0]} and {limits[1]}."
                )
        if len(log2_scales) == 0:
            raise ValueError("MODEL.DEEPMASK.LOG2_SCALES needs at least one scale.")
        if batch_size_per_image < 1:
            raise ValueError(
                "MODEL.DEEPMASK.BATCH_SIZE_PER_IMAGE must be at least 1, got "
                f"{batch_size_per_image}."
            )
        self.network = network
        self.pixel_normalization = pixel_normalization
        self.sampler = sampler
        self.batch_size_per_image = batch_size_per_image
        self.branches = branches
        self.mask_loss_on_negatives = mask_loss_on_negatives
        default_weight = {"loss_deepmask_score": 1 / 32}  # lambda of Eq. 1
        self.loss_weight = dict(default_weight if loss_weight is None else loss_weight)
        self.scales = [2.0**octaves for octaves in log2_scales]
        self.native_sizes = native_sizes or NativeSizes("MODEL.DEEPMASK")
        self.mask_thresh = mask_thresh
        # Map from self.training state to train/test settings
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size
        self.proposals_in_training = proposals_in_training

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        node = cfg.MODEL.DEEPMASK
        check_categories(node.CATEGORIES, cfg.DATASETS.TRAIN)
        return {
            "network": build_network(cfg),
            "pixel_normalization": PixelNormalization.from_config(cfg, node),
            "sampler": PatchSampler(
                patch_size=node.PATCH_SIZE,
                object_size=node.OBJECT_SIZE,
                jitter_shift=node.JITTER_SHIFT,
                jitter_scale=node.JITTER_SCALE,
                flip=node.FLIP,
                negative_shift=node.NEGATIVE_SHIFT,
                negative_scale=node.NEGATIVE_SCALE,
                negative_log2_scales=tuple(node.NEGATIVE_LOG2_SCALES),
                positives_in_scale_range=node.POSITIVES_IN_SCALE_RANGE,
                min_object_area=node.MIN_OBJECT_AREA,
                min_object_side=node.MIN_OBJECT_SIDE,
                categories=tuple(node.CATEGORIES),
                other_categories=node.OTHER_CATEGORIES,
            ),
            "batch_size_per_image": node.BATCH_SIZE_PER_IMAGE,
            "branches": node.BRANCHES,
            "mask_loss_on_negatives": node.MASK_LOSS_ON_NEGATIVES,
            "loss_weight": {
                "loss_deepmask_mask": node.LOSS_WEIGHT,
                "loss_deepmask_score": node.LOSS_WEIGHT * node.SCORE_LOSS_WEIGHT,
            },
            "log2_scales": tuple(node.LOG2_SCALES),
            "native_sizes": NativeSizes(
                "MODEL.DEEPMASK", short_edge=node.NATIVE_SHORT_EDGE, long_edge=node.NATIVE_LONG_EDGE
            ),
            "mask_thresh": node.MASK_THRESH,
            "pre_nms_topk": (node.PRE_NMS_TOPK_TRAIN, node.PRE_NMS_TOPK_TEST),
            "nms_thresh": node.NMS_THRESH,
            "post_nms_topk": (node.POST_NMS_TOPK_TRAIN, node.POST_NMS_TOPK_TEST),
            "min_box_size": node.MIN_BOX_SIZE,
            "proposals_in_training": cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING,
        }

    @torch.no_grad()
    def label_and_sample_patches(
        self, images: ImageList, gt_instances: list[Instances]
    ) -> TrainingPatches:
        """Draw patches for the branch or branches of this iteration, and cut them out.

        Args:
            images: N images, normalised and padded.
            gt_instances: of each image, with ``gt_boxes`` and ``gt_masks``.

        Returns:
            TrainingPatches: P = N * ``batch_size_per_image``, one more if that is odd and half of
            them are negatives.
        """
        # Unlike the paper, which does not say per what the branches alternate: by the number of the
        # iteration, so that all processes train the same one.
        storage = get_event_storage()
        joint = self.branches == "joint"
        trains_mask = joint or storage.iter % 2 == 0
        trains_score = joint or storage.iter % 2 == 1
        number = self.batch_size_per_image * len(gt_instances)
        with_negatives = trains_score or self.mask_loss_on_negatives
        half = (number + 1) // 2
        ground_truth = self.sampler.read_ground_truth(
            gt_instances,
            self._native_scales(images.image_sizes),
        )
        samples = self.sampler.sample(
            ground_truth,
            half if with_negatives else number,
            half if with_negatives else 0,
        )
        pixels = self._cut_patches(images, samples)
        size = self.network.mask_head.target_size
        masks = pixels.new_zeros(0, size, size)
        if trains_mask:
            boxes = self.sampler.boxes(samples)
            masks = cut_masks(gt_instances, ground_truth, samples, boxes, size)
            masks = masks if self.mask_loss_on_negatives else masks[: samples.num_positive]
        valid = samples.is_valid
        counts = torch.stack(
            [valid[: samples.num_positive].sum(), valid[samples.num_positive :].sum()]
        )
        num_positive, num_negative = counts.tolist()
        storage.put_scalar("deepmask/num_pos_patches", num_positive)
        storage.put_scalar("deepmask/num_neg_patches", num_negative)
        return TrainingPatches(
            self.pixel_normalization(pixels), samples, masks, trains_mask, trains_score
        )

    def _cut_patches(self, images: ImageList, samples: PatchSamples) -> torch.Tensor:
        """(P, 3, S + 2 context, S + 2 context) of the model, the border's colour beyond images."""
        side = self.network.patch_size + 2 * self.network.context
        boxes = self.sampler.boxes(samples, self.network.context)
        arguments = (boxes, samples.image_index, (side, side), samples.flipped)
        color = self.network.canvas_style.border_color
        if not color:
            return crop_patches(images, *arguments)
        # Patches are zero beyond an image.
        border = self.pixel_normalization.to_model(color).to(images.tensor)
        shifted = torch.zeros_like(images.tensor)
        for pixels, image, (height, width) in zip(shifted, images, images.image_sizes, strict=True):
            pixels[:, :height, :width] = image - border
        return crop_patches(ImageList(shifted, images.image_sizes), *arguments) + border

    def losses(self, patches: TrainingPatches) -> dict[str, torch.Tensor]:
        """Eq. 1 on the patches of one iteration.

        It is a sum over the patches of the batch, of all processes, which average their gradients.

        Args:
            patches: P patches.

        Returns:
            dict[str, Tensor]: weighted losses "loss_deepmask_mask" and "loss_deepmask_score". The
            loss of a branch that is not trained in this iteration is zero, with a zero gradient:
            training on several processes needs one of every parameter.
        """
        samples, num_masks = patches.samples, len(patches.masks)
        mask_logits = score_logits = None
        if patches.trains_mask and patches.trains_score:
            mask_logits, score_logits = self.network.mask_and_score_logits(
                patches.pixels, num_masks
            )
        elif patches.trains_mask:
            mask_logits = self.network.mask_logits(patches.pixels[:num_masks])
        else:
            score_logits = self.network.score_logits(patches.pixels)
        if mask_logits is None:
            segmentation = idle_branch_loss(self.network.branch_parts("mask"))
        else:
            head = self.network.mask_head
            if head.target_size != head.mask_size:
                mask_logits = head.in_window(mask_logits, head.target_size)
            segmentation = mask_loss(mask_logits, patches.masks, samples.is_valid[:num_masks])
        if score_logits is None:
            objectness = idle_branch_loss(self.network.branch_parts("score"))
        else:
            objectness = score_loss(score_logits, samples.labels, samples.is_valid)
        losses = {"loss_deepmask_mask": segmentation, "loss_deepmask_score": objectness}
        num_processes = comm.get_world_size()
        return {
            name: loss * (num_processes * self.loss_weight.get(name, 1.0))
            for name, loss in losses.items()
        }

    def training_losses(
        self, predictions: ImageList, gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """See :meth:`losses`; of images, with ``gt_masks``. Of crowd see :class:`PatchSampler`.

        Raises:
            ValueError: objects without masks.
        """
        patches = self.label_and_sample_patches(predictions, gt_instances)
        losses = self.losses(patches)
        # Smoothed curves of losses that are zero in every second iteration say nothing.
        storage = get_event_storage()
        if patches.trains_mask:
            storage.put_scalar("deepmask/mask_loss", losses["loss_deepmask_mask"].detach())
        if patches.trains_score:
            storage.put_scalar("deepmask/score_loss", losses["loss_deepmask_score"].detach())
        return losses

    @torch.no_grad()
    def predict_proposals(self, images: ImageList) -> list[Instances]:
        """Proposals of each image, see :meth:`forward`."""
        proposals = []
        with in_evaluation(self.network):
            # Images one by one, without the padding of the batch.
            factors = self._native_scales(images.image_sizes)
            for i, (size, factor) in enumerate(zip(images.image_sizes, factors, strict=True)):
                windows = predict_windows(
                    self.network,
                    self.pixel_normalization,
                    images[i],
                    [scale * factor for scale in self.scales],
                    self.pre_nms_topk[self.training],
                )
                proposals.append(self._proposals_from_windows(windows, size))
        return proposals

    def _native_scales(self, image_sizes: Sequence[tuple[int, int]]) -> list[float]:
        """Factors that take the images of a batch to the size that scales refer to."""
        native_sizes = self.native_sizes(image_sizes)
        return [scale_between(*sizes) for sizes in zip(image_sizes, native_sizes, strict=True)]

    def _proposals_from_windows(
        self, windows: WindowPredictions, image_size: tuple[int, int]
    ) -> Instances:
        """The proposals of one image from its best windows."""
        head = self.network.mask_head
        finite = windows.score_logits.isfinite() & windows.mask_logits.flatten(1).isfinite().all(1)
        if self.training and not finite.all():
            raise FloatingPointError("DeepMask predicts Inf or NaN: training has diverged.")
        # An up-sampling that was learnt is part of the mask; bilinear resampling of the small
        # patches is what pasting does anyway.
        keeps_enlarged = head.upsampling == "trainable"
        boxes, patches = boxes_of_masks(
            windows.mask_logits, windows.frames, self.mask_thresh, head.enlarge, keeps_enlarged
        )
        height, width = image_size
        boxes = boxes * boxes.new_tensor([width, height, width, height])
        boxes, index = clip_candidates(boxes, finite.float() - 1, image_size, self.min_box_size)
        if self.nms_thresh < 1:
            keep = first_of_nms(boxes, self.nms_thresh, self.post_nms_topk[self.training])
            boxes, index = boxes[keep], index[keep]
        number = self.post_nms_topk[self.training]
        boxes, index = boxes[:number], index[:number]
        logits = windows.score_logits[index].float().clamp(-_MAX_SCORE_LOGIT, _MAX_SCORE_LOGIT)
        proposals = make_proposals(image_size, boxes, logits)
        if not self.training:
            proposals.proposal_masks = ProposalMasks(
                patches[index], windows.frames[index], threshold=self.mask_thresh
            )
        return proposals
