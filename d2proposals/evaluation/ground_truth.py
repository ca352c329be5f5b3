"""The ground truth of any registered dataset, as arrays.

Shape shorthand: G ground truths of an image, M of all images.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

from ..data.dataset_reading import DatasetReading, read_dataset
from ..files.annotation_cleaning import area_of
from ..files.annotation_values import is_finite, read_flag, read_number
from ..files.proposal_set import DatasetImages, Fault, plain_value
from ..files.segmentations import encode_segmentation
from .ground_truth_checks import find_ground_truth_faults

__all__ = [
    "GroundTruth",
    "encode_segmentation",
    "ground_truth_of",
    "load_ground_truth",
    "warn_of_faults",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroundTruth:
    """Annotated objects of a dataset without crowd regions.

    Attributes:
        image_ids: ids of all images, in the dataset's order.
        image_sizes: (height, width) of each image in pixels, None where the dataset has none.
        boxes: (M, 4) float32, XYXY in pixels of the original image, image by image.
        areas: (M,) float32, annotated area in square pixels.
        categories: (M,) int, -1 for annotations without category or of one that is not listed.
        num_per_image: (number of images,) int, G of each image.
        is_annotated: whether the dataset has annotations at all; a test set has none.
        file_names: of the images, "" where the dataset has none.
        category_names: by category, as far as the dataset names them.
        segmentations: per image the G segmentations as the dataset has them, None of objects
            without mask; None if no object has one, or if they were not asked for.
        num_difficult: how many objects are marked difficult.
        num_crowd: how many crowd regions there are.
        faults: what is wrong with the annotations.
        ids_in_file: ids of all images of the dataset's COCO-style file, in the file's order; None
            without one.
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
    num_difficult: int = 0
    num_crowd: int = 0
    faults: list[Fault] = field(default_factory=list)
    ids_in_file: list[int | str] | None = None

    @property
    def images(self) -> DatasetImages:
        """What readers of files of proposals need to know of the images."""
        names = self.file_names or [""] * len(self.image_ids)
        return DatasetImages(self.image_ids, names, self.image_sizes, self.ids_in_file)

    def with_masks(self) -> "GroundTruth":
        """The objects that have masks alone.

        Raises:
            ValueError: if no object has one.
        """
        if self.segmentations is None:
            raise ValueError("no object of the dataset has a mask")
        has_mask = [[item is not None for item in items] for items in self.segmentations]
        flat = np.array([item for items in has_mask for item in items], bool)
        if flat.all():
            return self
        return replace(
            self,
            boxes=self.boxes[flat],
            areas=self.areas[flat],
            categories=self.categories[flat],
            num_per_image=np.array([sum(items) for items in has_mask], np.int64),
            segmentations=[
                [item for item in items if item is not None] for items in self.segmentations
            ],
        )

    def masks_by_image(self) -> Iterator[list[dict[str, Any]]]:
        """G run-length encodings of each image, made when they are asked for."""
        for image_id, size, segmentations_i in zip(
            self.image_ids, self.image_sizes, self.segmentations, strict=True
        ):
            yield [encode_segmentation(item, size, image_id) for item in segmentations_i]

    def boxes_by_image(self) -> list[np.ndarray]:
        """(G, 4) boxes of each image."""
        return np.split(self.boxes, np.cumsum(self.num_per_image))[:-1]


def load_ground_truth(
    dataset_name: str, *, with_masks: bool = False, count_difficult: bool = True
) -> GroundTruth:
    """Read the ground truth of a registered dataset.

    Args:
        dataset_name: of a registered dataset.
        with_masks: keep the objects' segmentations, to measure masks.
        count_difficult: whether objects marked ``difficult`` count.

    Raises:
        ValueError: if the dataset is not registered, or an image id is not usable.
    """
    reading = read_dataset(dataset_name)
    return ground_truth_of(reading, with_masks=with_masks, count_difficult=count_difficult)


def ground_truth_of(
    reading: DatasetReading, *, with_masks: bool = False, count_difficult: bool = True
) -> GroundTruth:
    """The objects of a dataset that was read, as arrays.

    Annotations with ``iscrowd`` are left out; without the key an annotation is an object. The area,
    which decides between small, medium and large, is the first of these that there is:

    1. the annotation's own ``area``, also that in the dataset's COCO or LVIS file (``json_file`` of
       its metadata), whose areas Detectron2 drops when it loads one: the area of the object's mask,
       as in COCO's evaluation and in Detectron2's;
    2. the area of ``segmentation``, as in Detectron2's conversion to COCO;
    3. the area of the box.

    Args:
        reading: of the dataset.
        with_masks: keep the objects' segmentations, to measure masks.
        count_difficult: whether objects marked ``difficult`` count.
    """
    records = reading.records
    objects = [
        [item for item in _annotations_of(record) if not item["iscrowd"]] for record in records
    ]
    is_difficult = [[_is_difficult(item) for item in items] for items in objects]
    num_difficult = sum(map(sum, is_difficult))
    if num_difficult and not count_difficult:
        objects = [[item for item in items if not _is_difficult(item)] for items in objects]
    boxes = _read_boxes(objects)
    segmentations = [
        [item.get("segmentation") if _has_size(item, record) else None for item in items]
        for record, items in zip(records, objects, strict=True)
    ]
    has_mask = np.array([item is not None for items in segmentations for item in items], bool)
    ground_truth = GroundTruth(
        image_ids=[
            plain_value(record.get("image_id", index)) for index, record in enumerate(records)
        ],
        image_sizes=[
            (record["height"], record["width"]) if {"height", "width"} <= record.keys() else None
            for record in records
        ],
        boxes=boxes.astype(np.float32),
        areas=_read_areas(objects, boxes, reading),
        categories=np.array([item["category_id"] for items in objects for item in items], np.int64),
        num_per_image=np.array([len(items) for items in objects], np.int64),
        is_annotated=any("annotations" in record for record in records),
        file_names=[str(record.get("file_name", "")) for record in records],
        category_names=dict(enumerate(reading.category_names)),
        segmentations=segmentations if with_masks and has_mask.any() else None,
        num_difficult=num_difficult,
        num_crowd=sum(item["iscrowd"] for record in records for item in _annotations_of(record)),
        ids_in_file=reading.ids_in_file,
    )
    faults = reading.faults.to_list() + find_ground_truth_faults(
        ground_truth.boxes,
        has_mask,
        ground_truth.num_per_image,
        ground_truth.image_ids,
        ground_truth.image_sizes,
    )
    return replace(ground_truth, faults=faults)


def warn_of_faults(ground_truth: GroundTruth, dataset_name: str) -> None:
    """Log what is wrong with the annotations, and how many objects are difficult, once a run."""
    for fault in ground_truth.faults:
        message = f"{dataset_name}: [{fault.name}] {fault.message}"
        log_first_n(logging.WARNING, message, key="message", name=__name__)
    if ground_truth.num_difficult:
        message = f"{dataset_name}: {ground_truth.num_difficult} objects are difficult"
        log_first_n(logging.INFO, message, key="message", name=__name__)


def _annotations_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return record.get("annotations", [])


def _has_size(item: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether an object's mask, if it has one, has a size: polygons have that of their image."""
    return isinstance(item.get("segmentation"), (dict, np.ndarray)) or (
        "height" in record and "width" in record
    )


def _is_difficult(item: dict[str, Any]) -> bool:
    return "difficult" in item or "ignore" in item


def _read_boxes(objects: list[list[dict]]) -> np.ndarray:
    """(M, 4) float64 XYXY of all annotations, whatever their ``bbox_mode``."""
    by_mode = defaultdict(list)
    for items in objects:
        for item in items:
            by_mode[item["bbox_mode"]].append(item["bbox"])
    # The boxes of each mode are converted at once and go back to where they came from.
    modes = np.array([item["bbox_mode"] for items in objects for item in items], np.int64)
    boxes = np.zeros((len(modes), 4))
    for mode, boxes_of_mode in by_mode.items():
        boxes[modes == mode] = BoxMode.convert(
            np.array(boxes_of_mode, np.float64), BoxMode(mode), BoxMode.XYXY_ABS
        )
    return boxes


def _read_areas(
    objects: list[list[dict]], boxes: np.ndarray, reading: DatasetReading
) -> np.ndarray:
    """(M,) float32 areas in square pixels; for their origin see ``load_ground_truth``."""
    has_all = all("area" in item for items in objects for item in items)
    file_areas = {} if has_all or reading.is_of_file else _areas_of_json_file(reading.name)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    index = 0
    for record, items in zip(reading.records, objects, strict=True):
        for item in items:
            in_file = None
            if file_areas and "area" not in item:
                box = tuple(map(float, item["bbox"]))
                in_file = file_areas.get((str(record.get("image_id")), box))
            if in_file:
                # Of annotations with the same box each has its own area, in the file's order.
                areas[index] = in_file.pop(0) if len(in_file) > 1 else in_file[0]
            else:
                areas[index] = area_of(item) or areas[index]
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
        area = read_number(annotation.get("area"))
        box = [read_number(x) for x in annotation.get("bbox") or ()]
        is_usable = area is not None and is_finite(area) and area > 0 and None not in box
        if is_usable and not read_flag(annotation.get("iscrowd")):
            areas[(str(annotation.get("image_id")), tuple(map(float, box)))].append(float(area))
    if not areas:
        logger.warning(
            f"{json_file} of {dataset_name!r} has no areas; sizes are those of masks or boxes"
        )
    return areas


def _annotations(content: object) -> Iterable[dict]:
    """The annotations in a parsed COCO or LVIS file, none in anything else."""
    annotations = content.get("annotations") if isinstance(content, dict) else None
    return (item for item in annotations or [] if isinstance(item, dict))
