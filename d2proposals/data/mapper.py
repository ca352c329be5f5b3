"""The one dataset mapper: Detectron2's, and what the proposal papers need besides.

In training, ``instances`` gets two more fields:

* ``gt_areas``: (M,) float32, each object's area in pixels of the **original** image: the
  annotation's "area", else its mask's, else its box's.
* ``crowd_regions``: a :class:`CrowdRegions`, the image's crowd annotations. They stay apart from
  the ground truth, and the field's name does not begin with "gt_", so that Detectron2's ROI heads
  never see them.

A generator reads them as ``gt_instances[i].gt_areas`` and ``gt_instances[i].crowd_regions.boxes``.

Beside ``instances`` stands ``native_size``: (height, width), in pixels of the original image, of
what the network input shows of it: with ``INPUT.CROP`` less than the image's "height" and "width".

Images with nothing but crowd annotations are left out of the training set by Detectron2 unless
``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` is False.

Shape shorthand in this module:

    M: number of objects in an image
    K: number of crowd regions in an image
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, PolygonMasks
from PIL import Image
from pycocotools import mask as mask_util

from ..files.image_files import too_large
from .image_reading import readable_name
from .nonempty_resize import without_empty_sides
from .training_scale import RULES, ObjectScaleResize, measurable_boxes


class CrowdRegions:
    """The crowd regions of one image, as a field of that image's ``Instances``.

    A field of ``Instances`` has one entry per object, but the regions belong to the image. So this
    container has the length of the ``Instances`` it travels on, and whichever objects are picked
    by an index, all regions come along.

    Attributes:
        boxes: ``Boxes`` of K regions, XYXY, pixels of the network input.
        masks: ``BitMasks`` (K, H, W) at the network input's size, or None without
            ``INPUT.USE_INSTANCE_MASK``.
        classes: (K,) int64, contiguous ids of their categories, or None where nobody knows.
    """

    def __init__(
        self,
        boxes: Boxes,
        masks: BitMasks | None,
        num_instances: int,
        classes: torch.Tensor | None = None,
    ):
        """
        Args:
            boxes: of K regions, XYXY, pixels of the network input.
            masks: of the same K regions, or None.
            num_instances: number of objects in the ``Instances`` that this is a field of.
            classes: of the same K regions, or None.
        """
        assert masks is None or len(masks) == len(boxes), f"{len(masks)} != {len(boxes)}"
        assert classes is None or len(classes) == len(boxes), f"{len(classes)} != {len(boxes)}"
        self.boxes = boxes
        self.masks = masks
        self.num_instances = num_instances
        self.classes = classes

    def __len__(self) -> int:
        return self.num_instances

    def __getitem__(self, item: int | slice | list | torch.Tensor) -> CrowdRegions:
        """Return the same regions, with the length that ``item`` picks out of the objects."""
        picked = torch.arange(self.num_instances)[item.cpu() if torch.is_tensor(item) else item]
        return CrowdRegions(self.boxes, self.masks, picked.numel(), self.classes)

    def of_class(self, class_id: int) -> CrowdRegions:
        """Return the regions of one class; where nobody knows their classes, all of them."""
        if self.classes is None:
            return self
        picked = self.classes == class_id
        masks = None if self.masks is None else self.masks[picked]
        return CrowdRegions(self.boxes[picked], masks, self.num_instances, self.classes[picked])

    def to(self, device: torch.device | str) -> CrowdRegions:
        """Return a copy on ``device``."""
        masks = None if self.masks is None else self.masks.to(device)
        classes = None if self.classes is None else self.classes.to(device)
        return CrowdRegions(self.boxes.to(device), masks, self.num_instances, classes)

    @staticmethod
    def cat(regions: list[CrowdRegions]) -> CrowdRegions:
        """Join fields of one image (as in ``Instances.cat``): the regions are the first one's."""
        assert len(regions) > 0
        first, num_instances = regions[0], sum(len(x) for x in regions)
        return CrowdRegions(first.boxes, first.masks, num_instances, first.classes)

    def __repr__(self) -> str:
        return f"CrowdRegions(num_regions={len(self.boxes)}, masks={self.masks is not None})"


class ProposalDatasetMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` with areas, crowd, masks without a mask head, and sizes.

    The keys it reads besides Detectron2's are ``INPUT.USE_INSTANCE_MASK``, ``INPUT.WARP_SIZE`` and
    ``INPUT.DY_TRAIN_SCALE``. The last two replace Detectron2's training resize; flips stay.

    Raises:
        FileNotFoundError: when called, if the image's file is missing.
        ValueError: when called, if the image's file is corrupt, too large, or of another size than
            its annotation says, or if masks are wanted that the dataset lacks.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation | T.Transform],
        training_scale: dict[str, Any] | None = None,
        **kwargs,
    ):
        """
        Args:
            is_train: whether it is used in training.
            augmentations: as for ``DatasetMapper``.
            training_scale: dyTrainScale's bounds, the keyword arguments of
                :class:`ObjectScaleResize`; None without dyTrainScale. Used in training only. It
                needs a ``ResizeShortestEdge`` among ``augmentations``, which it stands in for.
            kwargs: as for ``DatasetMapper``.
        """
        super().__init__(is_train, augmentations=augmentations, **kwargs)
        self.training_scale = training_scale if is_train else None
        if self.training_scale is not None:
            self.resize_index = _resize_index(augmentations)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """
        Raises:
            ValueError: when a key of ``INPUT`` has a value that makes no sense; names the key.
        """
        ret = super().from_config(cfg, is_train)
        ret["use_instance_mask"] = cfg.MODEL.MASK_ON or cfg.INPUT.USE_INSTANCE_MASK
        ret["recompute_boxes"] = cfg.INPUT.CROP.ENABLED and is_train and ret["use_instance_mask"]
        ret["augmentations"] = without_empty_sides(ret["augmentations"])
        _check_input_config(cfg)
        if is_train and len(cfg.INPUT.WARP_SIZE) > 0:
            index = _resize_index(ret["augmentations"])
            ret["augmentations"][index] = T.Resize(tuple(cfg.INPUT.WARP_SIZE))
        if cfg.INPUT.DY_TRAIN_SCALE.ENABLED:
            ret["training_scale"] = {
                "object_side": tuple(cfg.INPUT.DY_TRAIN_SCALE.OBJECT_SIDE),
                "min_image_side": cfg.INPUT.DY_TRAIN_SCALE.MIN_IMAGE_SIDE,
                "max_image_side": cfg.INPUT.DY_TRAIN_SCALE.MAX_IMAGE_SIDE,
                "rule": cfg.INPUT.DY_TRAIN_SCALE.RULE,
                "area_sides": tuple(cfg.INPUT.DY_TRAIN_SCALE.AREA_SIDES),
                "area_tolerance": cfg.INPUT.DY_TRAIN_SCALE.AREA_TOLERANCE,
            }
        return ret

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one image, as ``DatasetMapper`` does.

        Args:
            dataset_dict: of one image, in Detectron2's dataset format.

        Returns:
            the format of Detectron2's models, in training with the fields named in this module's
            docstring.
        """
        mapper = self._at_training_scale(dataset_dict)
        file_name = dataset_dict["file_name"]
        try:
            readable = {**dataset_dict, "file_name": readable_name(dataset_dict)}
            return {
                **super(ProposalDatasetMapper, mapper).__call__(readable),
                "file_name": file_name,
            }
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"Image file {error.filename or file_name} is missing; the dataset's annotations "
                "name it. Complete the images, or set DETECTRON2_DATASETS to the folder that has "
                "them."
            ) from error
        # PIL says "broken PNG file" by a SyntaxError.
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"Image file {file_name} cannot be read ({error}). Replace it, or take it out of "
                "the dataset's annotations."
            ) from error
        except Image.DecompressionBombError as error:
            raise ValueError(too_large(file_name)) from error
        except utils.SizeMismatchError as error:
            raise ValueError(
                f"{error} Of an image with an EXIF orientation, it is that of the upright image or "
                "of the stored pixels."
            ) from error

    def _at_training_scale(self, dataset_dict: dict[str, Any]) -> ProposalDatasetMapper:
        """Return the mapper for this image: with dyTrainScale, a copy that has the image's resize.

        ``DatasetMapper`` gives augmentations no boxes, so the resize gets them here. A copy,
        because one mapper may serve several threads.
        """
        resize = self.training_resize(dataset_dict)
        if resize is None:
            return self
        mapper = copy.copy(self)
        augmentations = list(self.augmentations.augs)
        augmentations[self.resize_index] = resize
        mapper.augmentations = T.AugmentationList(augmentations)
        return mapper

    def training_resize(self, dataset_dict: dict[str, Any]) -> ObjectScaleResize | None:
        """The resize by one of an image's objects; None for the configuration's usual one."""
        if self.training_scale is None:
            return None
        objects = [x for x in dataset_dict.get("annotations", []) if x.get("iscrowd", 0) == 0]
        boxes = np.asarray([_box_xyxy(x) for x in objects], dtype=np.float64).reshape(-1, 4)
        size = (dataset_dict.get("height", np.inf), dataset_dict.get("width", np.inf))
        boxes = measurable_boxes(boxes, size)
        if len(boxes) == 0:
            return None  # nothing to choose by
        return ObjectScaleResize(boxes, **self.training_scale)

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        """Set ``dataset_dict["instances"]`` from ``dataset_dict["annotations"]``, which it pops."""
        if self.use_instance_mask:
            self._check_masks(dataset_dict)
        annotations = dataset_dict["annotations"]
        for x in annotations:
            _to_floats(x)
        objects = [x for x in annotations if x.get("iscrowd", 0) == 0]
        crowd = [x for x in annotations if x.get("iscrowd", 0) != 0]
        categories = torch.tensor([x["category_id"] for x in objects], dtype=torch.int64)
        areas = torch.tensor([_original_area(x) for x in objects], dtype=torch.float32)

        # Detectron2 drops objects that the transforms left empty, and does not say which. It keeps
        # their classes, so the objects' numbers travel as classes and then stand for both.
        for number, x in enumerate(objects):
            x["category_id"] = number
        dataset_dict["annotations"] = objects
        mapper = self
        if not objects and self.recompute_boxes:
            # Detectron2 would recompute them from masks that an image without objects has not.
            mapper = copy.copy(self)
            mapper.recompute_boxes = False
        super(ProposalDatasetMapper, mapper)._transform_annotations(
            dataset_dict, transforms, image_shape
        )
        dataset_dict["native_size"] = _native_size(transforms, image_shape)
        instances = dataset_dict["instances"]
        kept = instances.gt_classes
        instances.gt_classes = categories[kept]
        instances.gt_areas = areas[kept]
        if self.use_instance_mask and not instances.has("gt_masks"):
            instances.gt_masks = self._no_masks(image_shape)
        instances.crowd_regions = self._crowd_regions(
            crowd, transforms, image_shape, num_instances=len(instances)
        )

    def _crowd_regions(
        self,
        crowd: list[dict[str, Any]],
        transforms: T.Transform,
        image_shape: tuple[int, int],
        num_instances: int,
    ) -> CrowdRegions:
        """Transform the crowd annotations of an image; regions left empty are dropped."""
        for x in crowd:
            x.pop("keypoints", None)
            if not self.use_instance_mask:
                x.pop("segmentation", None)
        crowd = [utils.transform_instance_annotations(x, transforms, image_shape) for x in crowd]
        # Bit masks whatever INPUT.MASK_FORMAT says: crowd masks are run-length encoded.
        regions = utils.annotations_to_instances(crowd, image_shape, mask_format="bitmask")
        regions = utils.filter_empty_instances(regions)
        masks = None
        if self.use_instance_mask:
            masks = BitMasks(torch.zeros(0, *image_shape, dtype=torch.bool))
            masks = regions.gt_masks if regions.has("gt_masks") else masks
        return CrowdRegions(regions.gt_boxes, masks, num_instances, regions.gt_classes)

    def _no_masks(self, image_shape: tuple[int, int]) -> PolygonMasks | BitMasks:
        """Masks of no objects, in the configured format; Detectron2 leaves the field out then."""
        if self.instance_mask_format == "polygon":
            return PolygonMasks([])
        return BitMasks(torch.zeros(0, *image_shape, dtype=torch.bool))

    def _check_masks(self, dataset_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: when an annotation has no mask, or one that the configured format cannot
                hold.
        """
        file_name = dataset_dict["file_name"]
        for x in dataset_dict["annotations"]:
            if not x.get("segmentation"):
                raise ValueError(
                    f"An annotation of image {file_name} has no mask ('segmentation'), which "
                    "INPUT.USE_INSTANCE_MASK (or MODEL.MASK_ON) asks for. Take a dataset with "
                    "masks, or, where nothing learns from them, set the key to False."
                )
            is_polygon = isinstance(x["segmentation"], list)
            if self.instance_mask_format == "polygon" and not is_polygon and not x.get("iscrowd"):
                raise ValueError(
                    f"A mask of image {file_name} is run-length encoded, but INPUT.MASK_FORMAT is "
                    "'polygon'. Set INPUT.MASK_FORMAT to 'bitmask'."
                )


def _box_xyxy(annotation: dict[str, Any]) -> list[float]:
    """The annotation's box, XYXY, pixels of the original image."""
    return BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)


def _to_floats(annotation: dict[str, Any]) -> None:
    """Make an annotation's coordinates floats, in place: Detectron2 would scale integers to
    integers, and truncate."""
    annotation["bbox"] = [float(x) for x in annotation["bbox"]]
    if isinstance(annotation.get("segmentation"), list):
        polygons = [np.asarray(x, dtype=np.float64) for x in annotation["segmentation"]]
        annotation["segmentation"] = polygons


def _native_size(transforms: T.Transform, image_shape: tuple[int, int]) -> tuple[int, int]:
    """(height, width), in pixels of the original image, of what the network input shows of it.

    Without a crop, the size of the image.

    Args:
        transforms: from the original image to the network input, along its axes.
        image_shape: (height, width) of the network input, in pixels.
    """
    corner, *steps = transforms.apply_coords(np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    height, width = (
        max(round(side / float(np.abs(step - corner).max())), 1)
        for side, step in zip(image_shape, steps, strict=True)
    )
    return height, width


def _original_area(annotation: dict[str, Any]) -> float:
    """An object's area in pixels of the original image: annotated, else its mask's, its box's."""
    if "area" in annotation:
        return float(annotation["area"])
    mask = annotation.get("segmentation")
    if isinstance(mask, list) and len(mask) > 0:
        return float(PolygonMasks([mask]).area().sum())
    if isinstance(mask, dict):
        return float(mask_util.area(mask))
    x1, y1, x2, y2 = _box_xyxy(annotation)
    return float(max(x2 - x1, 0) * max(y2 - y1, 0))


def _resize_index(augmentations: list[T.Augmentation | T.Transform]) -> int:
    """Where Detectron2's training resize stands in a list of augmentations."""
    indices = [i for i, x in enumerate(augmentations) if isinstance(x, T.ResizeShortestEdge)]
    assert len(indices) == 1, f"expected one ResizeShortestEdge, got {augmentations}"
    return indices[0]


def _check_input_config(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: when a key of ``INPUT`` that this mapper reads has a value that makes no sense.
    """
    warp_size, scale = tuple(cfg.INPUT.WARP_SIZE), cfg.INPUT.DY_TRAIN_SCALE
    if len(warp_size) not in (0, 2) or not all(_is_positive_int(x) for x in warp_size):
        raise ValueError(
            f"INPUT.WARP_SIZE must be () or (height, width) in whole pixels, got {warp_size}."
        )
    if not scale.ENABLED:
        return
    if len(warp_size) > 0:
        raise ValueError(
            "INPUT.WARP_SIZE and INPUT.DY_TRAIN_SCALE.ENABLED both set the size of a training "
            "image: set INPUT.WARP_SIZE to () or INPUT.DY_TRAIN_SCALE.ENABLED to False."
        )
    if cfg.INPUT.CROP.ENABLED:
        raise ValueError(
            "INPUT.CROP.ENABLED may crop away the object that INPUT.DY_TRAIN_SCALE.ENABLED "
            "scales the image to: set one of them to False."
        )
    side = tuple(scale.OBJECT_SIDE)
    if len(side) != 2 or not all(_is_positive_int(x) for x in side) or side[0] > side[1]:
        raise ValueError(
            "INPUT.DY_TRAIN_SCALE.OBJECT_SIDE must be two whole numbers of pixels, lowest and "
            f"highest, got {side}."
        )
    if scale.RULE not in RULES:
        raise ValueError(f"INPUT.DY_TRAIN_SCALE.RULE must be one of {RULES}, got '{scale.RULE}'.")
    sides = tuple(scale.AREA_SIDES)
    if (
        not sides
        or not all(_is_positive_int(x) for x in sides)
        or not 0 <= scale.AREA_TOLERANCE < 1
    ):
        raise ValueError(
            "INPUT.DY_TRAIN_SCALE.AREA_SIDES must be whole numbers of pixels and AREA_TOLERANCE "
            f"at least 0 and below 1, got {sides} and {scale.AREA_TOLERANCE}."
        )
    if not _is_positive_int(scale.GROUPED_BATCHES):
        raise ValueError(
            "INPUT.DY_TRAIN_SCALE.GROUPED_BATCHES must be a whole number of batches, at least 1, "
            f"got {scale.GROUPED_BATCHES}."
        )
    if not 1 <= scale.MIN_IMAGE_SIDE <= scale.MAX_IMAGE_SIDE:
        raise ValueError(
            "INPUT.DY_TRAIN_SCALE.MIN_IMAGE_SIDE must lie between 1 and MAX_IMAGE_SIDE, got "
            f"{scale.MIN_IMAGE_SIDE} and {scale.MAX_IMAGE_SIDE}."
        )


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
