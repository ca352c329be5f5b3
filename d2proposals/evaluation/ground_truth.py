"""The ground truth of any registered dataset, as arrays.

Shape shorthand: G ground truths of an image, M of all images.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode, PolygonMasks
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from ..files.proposal_set import DatasetImages
from ..files.run_length_encodings import check_size, make_encodings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroundTruth:
    """Annotated objects of a dataset without crowd regions.

    Attributes:
        image_ids: ids of all images, in the dataset's order.
        image_sizes: (height, width) of each image in pixels, None where the dataset has none.
        boxes: (M, 4) float32, XYXY in pixels of the original image, image by image.
        areas: (M,) float32, annotated area in square pixels.
        categories: (M,) int, 0 for annotations without category.
        num_per_image: (number of images,) int, G of each image.
        is_annotated: whether the dataset has annotations at all; a test set has none.
        file_names: of the images, "" where the dataset has none.
        category_names: by category, as far as the dataset names them.
        segmentations: per image the G segmentations as the dataset has them; None if it has none
            for at least one object, or if they were not asked for.
    """

    image_ids: list[int | str]
    image_sizes: list[tuple[int, int] | None]
    boxes: np.ndarray
    areas: np.ndarray
    categories: np.ndarray
    num_per_image: np.ndarray
    is_annotated: bool
    file_names: list[str] = field(default_factory=list)
    category_names: dict[int, str] = field(default_factory=dict)
    segmentations: list[list[Any]] | None = None

    @property
    def images(self) -> DatasetImages:
        """What readers of files of proposals need to know of the images."""
        names = self.file_names or [""] * len(self.image_ids)
        return DatasetImages(self.image_ids, names, self.image_sizes)

    def masks_by_image(self) -> Iterator[list[dict[str, Any]]]:
        """G run-length encodings of each image, made when they are asked for."""
        for image_id, size, segmentations_i in zip(
            self.image_ids, self.image_sizes, self.segmentations, strict=True
        ):
            yield [encode_segmentation(item, size, image_id) for item in segmentations_i]

    def boxes_by_image(self) -> list[np.ndarray]:
        """(G, 4) boxes of each image."""
        return np.split(self.boxes, np.cumsum(self.num_per_image))[:-1]


def load_ground_truth(dataset_name: str, *, with_masks: bool = False) -> GroundTruth:
    """Read the ground truth of a registered dataset from its dictionaries.

    Annotations with ``iscrowd`` are left out; without the key an annotation is an object. The area,
    which decides between small, medium and large, is the first of these that there is:

    1. the annotation's own ``area``;
    2. ``area`` in the dataset's COCO or LVIS file (``json_file`` of its metadata), whose areas
       Detectron2 drops when it loads one: the area of the object's mask, as in COCO's evaluation
       and in Detectron2's;
    3. the area of ``segmentation``, as in Detectron2's conversion to COCO;
    4. the area of the box.

    Args:
        dataset_name: of a registered dataset.
        with_masks: keep the objects' segmentations, to measure masks.

    Raises:
        ValueError: if the dataset is not registered, or an image id or a box is not usable.
    """
    if dataset_name not in DatasetCatalog.list():
        raise ValueError(
            f"the dataset {dataset_name!r} is not registered; names are those of DATASETS.TEST, "
            "and a dataset of your own is registered with DatasetCatalog.register or "
            "register_coco_instances"
        )
    records = DatasetCatalog.get(dataset_name)
    unnamed = sum("image_id" not in record for record in records)
    if unnamed:
        raise ValueError(f"{unnamed} images of the dataset {dataset_name!r} have no 'image_id'")
    image_ids = [record["image_id"] for record in records]
    if len({str(image_id) for image_id in image_ids}) < len(image_ids):
        raise ValueError(f"an 'image_id' of the dataset {dataset_name!r} occurs more than once")
    objects = [
        [item for item in record.get("annotations", []) if not item.get("iscrowd", 0)]
        for record in records
    ]
    boxes = _read_boxes(objects, image_ids, dataset_name)
    return GroundTruth(
        image_ids=image_ids,
        image_sizes=[
            (record["height"], record["width"]) if {"height", "width"} <= record.keys() else None
            for record in records
        ],
        boxes=boxes.astype(np.float32),
        areas=_read_areas(objects, image_ids, boxes, dataset_name),
        categories=np.array(
            [item.get("category_id", 0) for items in objects for item in items], np.int64
        ),
        num_per_image=np.array([len(items) for items in objects], np.int64),
        is_annotated=any("annotations" in record for record in records),
        file_names=[str(record.get("file_name", "")) for record in records],
        category_names=dict(
            enumerate(MetadataCatalog.get(dataset_name).get("thing_classes") or [])
        ),
        segmentations=_read_segmentations(objects) if with_masks else None,
    )


def _read_segmentations(objects: list[list[dict]]) -> list[list[Any]] | None:
    """Segmentations of each image's objects; None if one of the objects has none."""
    segmentations = [[item.get("segmentation") for item in items] for items in objects]
    # Not by truth alone: a bitmap is an array.
    is_missing = [item is None or len(item) == 0 for items in segmentations for item in items]
    return None if any(is_missing) or not is_missing else segmentations


def encode_segmentation(
    segmentation: list | dict | np.ndarray, size: tuple[int, int] | None, image_id: int | str
) -> dict[str, Any]:
    """Polygons, a run-length encoding (compressed or not) or a bitmap as an encoding.

    Args:
        segmentation: as in a dataset's dictionaries.
        size: (height, width) of the image in pixels, which polygons need.
        image_id: named in errors.

    Raises:
        ValueError: if it is none of these, or its size is not the image's.
    """
    if isinstance(segmentation, np.ndarray):
        mask = mask_util.encode(np.asfortranarray(segmentation > 0, np.uint8))
    elif isinstance(segmentation, dict):
        size_of_mask = check_size(segmentation.get("size"))
        mask = make_encodings([segmentation.get("counts")], [size_of_mask])[0]
    elif size is None:
        raise ValueError(
            f"image {image_id} has polygons but no height and width in its dataset dictionary, "
            "which masks need"
        )
    else:
        mask = _encode_polygons(segmentation, size, image_id)
    if size is not None and tuple(mask["size"]) != tuple(size):
        raise ValueError(
            f"a mask of image {image_id} has the size {tuple(mask['size'])}, the image has "
            f"{tuple(size)}"
        )
    return mask


def _encode_polygons(polygons: list, size: tuple[int, int], image_id: int | str) -> dict[str, Any]:
    """The union of polygons (x1, y1, x2, y2, ...) as an encoding."""
    try:
        arrays = [np.asarray(polygon, np.float64).reshape(-1) for polygon in polygons]
    except (TypeError, ValueError):
        arrays = []
    # pycocotools takes any list that is shorter for something else.
    if not arrays or any(len(a) < 6 or len(a) % 2 or not np.isfinite(a).all() for a in arrays):
        raise ValueError(
            f"a segmentation of image {image_id} is neither polygons of at least three points, nor "
            "a run-length encoding, nor a bitmap"
        )
    return mask_util.merge(mask_util.frPyObjects([a.tolist() for a in arrays], *size))


def _read_boxes(
    objects: list[list[dict]], image_ids: list[int | str], dataset_name: str
) -> np.ndarray:
    """(M, 4) float64 XYXY of all annotations, whatever their ``bbox_mode``."""
    by_mode = defaultdict(list)
    for items, image_id in zip(objects, image_ids, strict=True):
        for item in items:
            if "bbox" not in item or "bbox_mode" not in item:
                raise ValueError(
                    f"an annotation of image {image_id} in {dataset_name!r} lacks 'bbox' or "
                    "'bbox_mode'"
                )
            by_mode[BoxMode(item["bbox_mode"])].append(item["bbox"])
    # The boxes of each mode are converted at once and go back to where they came from.
    modes = np.array([item["bbox_mode"] for items in objects for item in items], np.int64)
    boxes = np.zeros((len(modes), 4))
    for mode, boxes_of_mode in by_mode.items():
        if mode in (BoxMode.XYXY_REL, BoxMode.XYWH_REL):
            raise ValueError(
                f"{dataset_name!r} has boxes relative to the image ({mode.name}), which Detectron2 "
                "does not convert; give them in pixels"
            )
        converted = BoxMode.convert(np.array(boxes_of_mode, np.float64), mode, BoxMode.XYXY_ABS)
        boxes[modes == mode.value] = converted
    _check_boxes(boxes, [len(items) for items in objects], image_ids, dataset_name)
    return boxes


def _check_boxes(
    boxes: np.ndarray, num_per_image: list[int], image_ids: list[int | str], dataset_name: str
) -> None:
    """Raise ValueError for a box that is not finite or has a negative side."""
    wrong = np.flatnonzero(~np.isfinite(boxes).all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1))
    if len(wrong):
        image = np.repeat(np.arange(len(image_ids)), num_per_image)[wrong[0]]
        raise ValueError(
            f"{len(wrong)} ground-truth boxes of {dataset_name!r} are not finite or have a "
            f"negative side, the first in image {image_ids[image]}: {boxes[wrong[0]].tolist()} "
            "(XYXY); check its 'bbox' and 'bbox_mode'"
        )


def _read_areas(
    objects: list[list[dict]],
    image_ids: list[int | str],
    boxes: np.ndarray,
    dataset_name: str,
) -> np.ndarray:
    """(M,) float32 areas in square pixels; for their origin see ``load_ground_truth``."""
    has_all = all("area" in item for items in objects for item in items)
    file_areas = {} if has_all else _areas_of_json_file(dataset_name)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    index = 0
    for items, image_id in zip(objects, image_ids, strict=True):
        for item in items:
            in_file = file_areas.get((str(image_id), tuple(item["bbox"])))
            if "area" in item:
                areas[index] = item["area"]
            elif in_file:
                # Of annotations with the same box each has its own area, in the file's order.
                areas[index] = in_file.pop(0) if len(in_file) > 1 else in_file[0]
            elif item.get("segmentation") is not None and len(item["segmentation"]):
                areas[index] = _segmentation_area(item["segmentation"])
            index += 1
    return areas.astype(np.float32)


def _areas_of_json_file(dataset_name: str) -> dict[tuple[str, tuple], list[float]]:
    """Areas in the dataset's COCO file by image id and box, {} if there is no such file."""
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if not json_file or not PathManager.isfile(json_file):
        return {}
    with PathManager.open(json_file) as file:
        content = json.load(file)
    areas = defaultdict(list)
    for annotation in _annotations(content):
        if "area" in annotation and not annotation.get("iscrowd", 0):
            key = (str(annotation.get("image_id")), tuple(annotation.get("bbox", ())))
            areas[key].append(float(annotation["area"]))
    if not areas:
        logger.warning(
            f"{json_file} of {dataset_name!r} has no areas; sizes are those of masks or boxes"
        )
    return areas


def _annotations(content: object) -> Iterable[dict]:
    """The annotations in a parsed COCO or LVIS file, none in anything else."""
    annotations = content.get("annotations") if isinstance(content, dict) else None
    return (item for item in annotations or [] if isinstance(item, dict))


def _segmentation_area(segmentation: list | dict | np.ndarray) -> float:
    """Area of polygons, of a bitmap or of a run-length encoding, in square pixels."""
    if isinstance(segmentation, np.ndarray):
        return float(np.count_nonzero(segmentation))
    if isinstance(segmentation, list):
        return float(PolygonMasks([segmentation]).area()[0])
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    return float(mask_util.area(segmentation))
