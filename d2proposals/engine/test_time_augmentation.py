"""Test-time augmentation for proposals: several image scales, with or without flips.

Detectron2's own wrapper takes R-CNN detectors only. The one for a stock ``ProposalNetwork`` is the
multi-scale test of the proposal papers (e.g. Li et al., IJCV 2018, Sec. 3.4: scales 1000 to 250).

A generator that reads the images has scales of its own, which refer to the images as they were
taken. An augmented image that is so much larger than that of the usual test stands for the original
image enlarged as much.

Shape shorthand in this module:

    R: number of boxes of one image, at one scale or over all of them
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.modeling.meta_arch import ProposalNetwork
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import batched_nms, nms

from ..data.nonempty_resize import NonEmptyResize
from ..proposals.native_size import ImageSizes, given_sizes


class NonEmptyDatasetMapperTTA(DatasetMapperTTA):
    """Detectron2's augmentations of an image, of which no side becomes less than a pixel."""

    def __call__(self, dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Augment an image.

        Args:
            dataset_dict: with "image" and, of the original, "height" and "width".

        Returns:
            a copy for each size and, with flips, one more for each: "image" augmented, and
            "transforms" from the original image to it.
        """
        pixels = dataset_dict["image"].permute(1, 2, 0).numpy()  # (C, H, W) -> (H, W, C)
        original = (dataset_dict["height"], dataset_dict["width"])
        # What the loader has done already.
        before = T.ResizeTransform(*original, *pixels.shape[:2])
        before = T.NoOpTransform() if pixels.shape[:2] == original else before
        flips = [[], [T.RandomFlip(prob=1.0)]] if self.flip else [[]]
        augmented = []
        for size, flip in itertools.product(self.min_sizes, flips):
            steps = T.AugmentationList([NonEmptyResize(size, self.max_size), *flip])
            seen = T.AugInput(pixels.copy())
            transforms = steps(seen)
            image = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
            augmented.append(
                {**copy.deepcopy(dataset_dict), "transforms": before + transforms, "image": image}
            )
        return augmented


class ProposalNetworkWithTTA(nn.Module):
    """A ``ProposalNetwork`` that sees each image at several scales and merges what it proposes.

    Inputs and outputs are those of ``ProposalNetwork`` in evaluation; the proposals have the
    fields ``proposal_boxes`` and ``objectness_logits``, nothing else.

    A generator can take part in the merge by two methods:

    * ``candidates(images, features) -> list[tuple[Tensor, Tensor]]``: of each image, boxes (R, 4)
      XYXY in pixels of the network input and scores (R,), before the last suppression;
    * ``select(boxes, scores, image_size) -> Instances``: the last suppression, called once per
      image, on the candidates of all scales in pixels of the original image.

    Proposals of any other generator are merged by a plain non-maximum suppression over all scales.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        tta_mapper: Callable[[dict], list[dict]],
        nms_thresh: float,
        post_nms_topk: int,
        test_size: tuple[int, int] = (0, 0),
    ):
        """
        Args:
            model: a ``ProposalNetwork``, possibly in ``DistributedDataParallel``.
            tta_mapper: makes a list of augmented inputs, each with its "transforms", from one
                input.
            nms_thresh: IoU above which a box is suppressed by a better one, for generators
                without ``candidates``.
            post_nms_topk: number of proposals kept per image, for the same generators.
            test_size: shorter and greatest longer side of an image in the usual test, in pixels;
                a shorter side of 0 for images as they were taken.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if not isinstance(model, ProposalNetwork):
            raise ValueError(
                "ProposalNetworkWithTTA needs MODEL.META_ARCHITECTURE 'ProposalNetwork', got a "
                f"{type(model).__name__}."
            )
        self.model = model
        self.tta_mapper = tta_mapper
        self.nms_thresh = nms_thresh
        self.post_nms_topk = post_nms_topk
        self.test_size = test_size
        self.train(model.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """The generator's own suppression and number, of its last boxes; RPN's keys where it has
        none of its own."""
        host = model.module if isinstance(model, DistributedDataParallel) else model
        generator = getattr(host, "proposal_generator", None)
        numbers = getattr(generator, "post_nms_topk", {})
        thresholds = (getattr(generator, x, None) for x in ("final_nms_thresh", "nms_thresh"))
        threshold = next((x for x in thresholds if x is not None), 1.0)
        return {
            "model": model,
            "tta_mapper": NonEmptyDatasetMapperTTA(cfg),
            # Without suppression an object would have a proposal of each scale.
            "nms_thresh": threshold if threshold < 1 else cfg.MODEL.RPN.NMS_THRESH,
            "post_nms_topk": numbers.get(False, cfg.MODEL.RPN.POST_NMS_TOPK_TEST),
            "test_size": (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Propose on each image.

        Args:
            batched_inputs: as for ``ProposalNetwork``.

        Returns:
            per image {"proposals": Instances}, in pixels of the original image ("height",
            "width").
        """
        return [{"proposals": self._propose(x)} for x in batched_inputs]

    def _propose(self, dataset_dict: dict[str, Any]) -> Instances:
        """Propose on one image: every scale by itself, then one merge."""
        height, width = dataset_dict["image"].shape[1:]
        image_size = (dataset_dict.get("height", height), dataset_dict.get("width", width))
        dataset_dict = {**dataset_dict, "height": image_size[0], "width": image_size[1]}
        generator = self.model.proposal_generator
        merges_itself = hasattr(generator, "candidates") and hasattr(generator, "select")
        all_boxes, all_scores, all_classes = [], [], []
        inputs = self.tta_mapper(dataset_dict)
        # One by one: batched with larger ones, a small image would be mostly padding.
        for augmented in inputs:
            images, features = self._images_and_features(augmented["image"])
            with given_sizes([_augmented_sizes(augmented, self.test_size)]):
                if merges_itself:
                    ((boxes, scores),) = generator.candidates(images, features)
                else:
                    (proposals,), _ = generator(images, features, None)
                    boxes, scores = proposals.proposal_boxes.tensor, proposals.objectness_logits
            boxes, keep = _to_original_image(boxes, augmented["transforms"], image_size)
            all_boxes.append(boxes)
            all_scores.append(scores[keep])
            if not merges_itself and proposals.has("proposal_classes"):
                all_classes.append(proposals.proposal_classes[keep])
        boxes, scores = torch.cat(all_boxes), torch.cat(all_scores)
        if merges_itself:
            return generator.select(boxes, scores, image_size)
        # The generator has already suppressed within a scale, so one scale needs no merge.
        classes = torch.cat(all_classes) if all_classes else None
        if len(inputs) == 1:
            keep = scores.argsort(descending=True, stable=True)
        elif classes is None:
            keep = nms(boxes, scores, self.nms_thresh)
        else:
            keep = batched_nms(boxes, scores, classes, self.nms_thresh)
        keep = keep[: self.post_nms_topk]
        merged = Instances(
            image_size, proposal_boxes=Boxes(boxes[keep]), objectness_logits=scores[keep]
        )
        if classes is not None:
            merged.proposal_classes = classes[keep]
        return merged

    def _images_and_features(
        self, image: torch.Tensor
    ) -> tuple[ImageList, dict[str, torch.Tensor]]:
        """Normalise one image (C, H, W) and run the backbone, as ``ProposalNetwork`` does."""
        model = self.model
        image = (image.to(model.device) - model.pixel_mean) / model.pixel_std
        images = ImageList.from_tensors(
            [image],
            model.backbone.size_divisibility,
            padding_constraints=model.backbone.padding_constraints,
        )
        return images, model.backbone(images.tensor)


class DetectorWithTTA(GeneralizedRCNNWithTTA):
    """Detectron2's augmented detector, whose generator is told the sizes of the original images.

    It runs ``model.inference``, past the hooks of the model.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        """
        Args:
            cfg: of the job.
            model: a ``GeneralizedRCNN``, possibly in ``DistributedDataParallel``.
        """
        super().__init__(cfg, model, NonEmptyDatasetMapperTTA(cfg))

    def _batch_inference(
        self, batched_inputs: list[dict[str, Any]], detected_instances: list | None = None
    ) -> list[Instances]:
        """As Detectron2's; each batch of ``self.batch_size`` with its own sizes."""
        test_size = (self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST)
        outputs = []
        for start in range(0, len(batched_inputs), self.batch_size):
            batch = slice(start, start + self.batch_size)
            inputs = batched_inputs[batch]
            detected = None if detected_instances is None else detected_instances[batch]
            with given_sizes([_augmented_sizes(x, test_size) for x in inputs]):
                outputs += super()._batch_inference(inputs, detected)
        return outputs


def without_test_resize(cfg: CfgNode) -> CfgNode:
    """A copy for the loader of an augmented test: each scale is resized from the original image,
    not from a resized one."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.freeze()
    return cfg


def _augmented_sizes(augmented: dict[str, Any], test_size: Sequence[int]) -> ImageSizes:
    """Sizes of an augmented image.

    Args:
        augmented: with "image" and, of the original, "height" and "width".
        test_size: shorter and greatest longer side in the usual test.
    """
    native = ImageSizes.of_input(augmented).native
    short_edge, long_edge = test_size
    usual = native
    if short_edge > 0:
        height, width = T.ResizeShortestEdge.get_output_shape(*native, short_edge, long_edge)
        usual = (max(height, 1), max(width, 1))  # as NonEmptyResize has it
    return ImageSizes.of_input(augmented, usual)


def _to_original_image(
    boxes: torch.Tensor,
    transforms: T.TransformList,
    image_size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo an input's transforms on its boxes; clip them, and drop those left empty.

    Args:
        boxes: (R, 4) XYXY, pixels of the network input.
        transforms: from the original image to the network input.
        image_size: (height, width) of the original image.

    Returns:
        boxes (R', 4) XYXY, pixels of the original image, R' <= R, and (R,) bool, those kept.
    """
    original = transforms.inverse().apply_box(boxes.cpu().numpy())
    original = Boxes(torch.from_numpy(original).to(boxes))
    original.clip(image_size)
    keep = original.nonempty()
    return original.tensor[keep], keep
