"""Algorithm 1: boxes from the masks of windows at several scales, refined in crops around them.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 5.2, 5.3 and Algorithm 1.

Shape shorthand in this module:

    N: number of images in the batch
    P: number of crops
    K: number of classes; 1 for class-agnostic masks
    d: cells per side of a mask
    R: number of boxes

Naming convention:

    crop: a box of an image, mapped affinely to the network's input.
    window: a crop of the first stage, one of a fixed set that covers the image.
    score: S of Eq. 3.
"""

from __future__ import annotations

import math

import torch
from detectron2.layers import batched_nms
from detectron2.structures import ImageList, Instances
from torch import nn

from ..proposals.candidates import clip_candidates, make_proposals
from ..proposals.evaluation_mode import in_evaluation
from ..proposals.patches import crop_patches
from ..proposals.proposal_generator import ProposalGenerator
from .box_search import box_shapes
from .crop_sampling import enlarge_boxes
from .detection import Detections, SearchGrid, best_boxes, detect_boxes
from .suppression import NMS_TYPES
from .windows import make_windows, merge_masks


class CoarseToFine(ProposalGenerator):
    """A mask network and its two stages of inference."""

    def __init__(
        self,
        *,
        network: nn.Module,
        normalization: nn.Module,
        classifier: nn.Module | None = None,
        num_scales: int = 3,
        window_overlap: float = 0.2,
        grid: SearchGrid,
        min_coverage: float = 0.5,
        pre_nms_topk: int = 1000,
        pruning_budget: int = 0,
        nms_thresh: float = 0.5,
        nms_type: str = "own_area",
        topk_per_scale: int = 5,
        refinement_grid: SearchGrid | None,
        refinement_topk: int = -1,
        enlargement: float = 1.2,
        final_nms_thresh: float = 1.0,
        min_box_size: float = 0.0,
        crops_at_once: int = 64,
        predicts_classes: bool = False,
    ):
        """
        Args:
            network: a :class:`BoxMaskNetwork`, or a module with its ``forward``, ``num_classes``,
                ``mask_size`` and ``input_size``.
            normalization: from pixels of the network input to those of ``network``.
            classifier: a :class:`CropClassifier` that prunes boxes before their suppression; None
                prunes none.
            num_scales: of windows.
            window_overlap: part of a window that its neighbour overlaps at least.
            grid: boxes that are searched in the masks of a scale, in pixels of the network input.
            min_coverage: detections are covered more than this by the full mask (Eq. 2).
            pre_nms_topk: boxes of each shape that enter non-maximum suppression.
            pruning_budget: boxes of each scale and class that ``classifier`` sees at most.
            nms_thresh: threshold of the non-maximum suppression of each scale.
            nms_type: what it is compared with: "own_area", the part of a box that lies in a better
                one; "iou", intersection over union.
            topk_per_scale: detections of each scale and class.
            refinement_grid: boxes that are searched in the masks of a detection's crop, in pixels
                of the crop at the network's input; None to leave detections as they are.
            refinement_topk: detections of an image, the best ones, that are refined; the others
                stay as they are. -1 for all.
            enlargement: sides of that crop, relative to the detection's.
            final_nms_thresh: IoU threshold of non-maximum suppression over the proposals of a
                class; 1 for none.
            min_box_size: smaller proposals are dropped, in pixels of the network input.
            crops_at_once: that the network is run on, in evaluation.
            predicts_classes: whether proposals have a class in evaluation.

        Raises:
            ValueError: settings that make no sense.
        """
        super().__init__()
        self.network = network
        self.normalization = normalization
        self.classifier = classifier
        self.num_scales = num_scales
        self.window_overlap = window_overlap
        self.grid = grid
        self.min_coverage = min_coverage
        self.pre_nms_topk = pre_nms_topk
        self.pruning_budget = pruning_budget
        self.nms_thresh = nms_thresh
        self.nms_type = nms_type
        self.topk_per_scale = topk_per_scale
        self.refinement_grid = refinement_grid
        self.refinement_topk = refinement_topk
        self.enlargement = enlargement
        self.final_nms_thresh = final_nms_thresh
        self.min_box_size = min_box_size
        self.crops_at_once = crops_at_once
        self.predicts_classes = predicts_classes
        self._check_inference_settings()

    def _check_inference_settings(self) -> None:
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
        check_settings(
            ("NUM_SCALES", self.num_scales, self.num_scales >= 1),
            ("WINDOW_OVERLAP", self.window_overlap, 0 <= self.window_overlap < 1),
            ("PRE_NMS_TOPK", self.pre_nms_topk, self.pre_nms_topk >= 1),
            ("CLASSIFIER.PRUNING_BUDGET", self.pruning_budget, self.pruning_budget >= 0),
            ("SCORE_THRESH", self.min_coverage, not math.isnan(self.min_coverage)),
            ("NMS_THRESH", self.nms_thresh, 0 <= self.nms_thresh <= 1),
            ("FINAL_NMS_THRESH", self.final_nms_thresh, 0 <= self.final_nms_thresh <= 1),
            ("TOPK_PER_SCALE", self.topk_per_scale, self.topk_per_scale >= 1),
            ("REFINEMENT.TOPK", self.refinement_topk, self.refinement_topk >= -1),
            ("REFINEMENT.ENLARGEMENT", self.enlargement, self.enlargement > 0),
            ("MIN_BOX_SIZE", self.min_box_size, self.min_box_size >= 0),
            ("CROPS_AT_ONCE", self.crops_at_once, self.crops_at_once >= 1),
        )

    @torch.no_grad()
    def predict_proposals(self, images: ImageList) -> list[Instances]:
        """Algorithm 1, with all classes at a time.

        Args:
            images: N images, normalised and padded.

        Returns:
            list[Instances]: of each image, ``proposal_boxes`` (XYXY, pixels of the network input,
            clipped, not empty) and ``objectness_logits`` (the score S in [-5, 5], descending); in
            evaluation with masks of each class, ``proposal_classes`` (R,) int64.
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
        scales = make_windows(size, self.num_scales, self.window_overlap)
        windows = [x.boxes().to(images.tensor.device) for x in scales]
        # The windows of all scales in as few runs of the network as its crops at once allow.
        masks = self.predict_masks(images, image, torch.cat(windows)).split(
            [len(x) for x in windows]
        )
        detections = [
            detect_boxes(
                merge_masks(masks_i, windows_i),
                size,
                self.grid,
                min_coverage=self.min_coverage,
                topk_per_shape=self.pre_nms_topk,
                nms_thresh=self.nms_thresh,
                topk=self.topk_per_scale,
                nms_type=self.nms_type,
                accepts=None if self.classifier is None else self._verdict_on(images, image),
                budget=self.pruning_budget,
            )
            for masks_i, windows_i in zip(masks, scales, strict=True)
        ]
        return Detections.cat(detections)

    def refine(self, images: ImageList, image: int, detections: Detections) -> Detections:
        """Second stage of Algorithm 1: the best box in an enlarged crop of each detection.

        Args:
            images: N images, normalised and padded.
            image: index of one of them.
            detections: of the first stage.
        """
        if 0 <= self.refinement_topk < len(detections.boxes):
            order = detections.scores.argsort(descending=True, stable=True)
            best, rest = order.tensor_split([self.refinement_topk])
            refined = self._refine_all(images, image, detections.select(best))
            return Detections.cat([refined, detections.select(rest)])
        return self._refine_all(images, image, detections)

    def _refine_all(self, images: ImageList, image: int, detections: Detections) -> Detections:
        """:meth:`refine`, of each detection."""
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
        single = _one_image(images, image)
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

    def _classify(
        self, images: ImageList, crops: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """Logits of the classifier for crops (P, 4) of images (P,), the background last."""
        patches = crop_patches(images, crops, index, (self.classifier.input_size,) * 2)
        return self.classifier(self.normalization(patches))

    def _verdict_on(self, images: ImageList, image: int):
        """What tells which boxes (R, 4) of classes (R,) the classifier agrees with (Sec. 5.2).

        With masks of each class, that is a box whose most probable class is its own; else one
        whose most probable class is any but the background.
        """
        single = _one_image(images, image)

        def accepts(boxes: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            with in_evaluation(self.classifier):
                logits = torch.cat(
                    [
                        self._classify(single, x, torch.zeros_like(x[:, 0], dtype=torch.int64))
                        for x in boxes.split(self.crops_at_once)
                    ]
                )
            predicted = logits.argmax(dim=1)
            background = logits.shape[1] - 1
            return predicted == classes if self.predicts_classes else predicted != background

        return accepts


def check_settings(*settings: tuple[str, object, bool]) -> None:
    """Raise ValueError for the first of these (key, value, whether it is right) that is wrong."""
    for name, value, is_right in settings:
        if not is_right:
            raise ValueError(f"MODEL.DETECTORNET.{name} makes no sense: {value}.")


def _one_image(images: ImageList, image: int) -> ImageList:
    """An image of a batch alone: the others would be copied for each group of crops."""
    return ImageList(images.tensor[image : image + 1], [images.image_sizes[image]])
