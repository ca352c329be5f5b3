"""Ground truth of a COCO-style JSON file that is not registered, with as little in it as possible.

Needed are ``images`` with ``id`` and ``annotations`` with ``image_id`` and ``bbox`` (XYWH, pixels).
Used where they are there: ``file_name``, ``height``, ``width``; ``category_id``, ``area``,
``iscrowd``, ``segmentation``; ``categories`` with ``id`` and ``name``.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

# The categories of PASCAL VOC under the names that COCO has for them.
VOC_CATEGORIES = (
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorcycle", "person", "potted plant", "sheep", "couch",
    "train", "tv",
)  # fmt: skip


def register_annotation_file(path: str | os.PathLike, image_root: str | None = None) -> str:
    """Register a COCO-style file as a dataset for evaluation, once.

    Args:
        path: of the file.
        image_root: folder of the images; by default the file's own.

    Returns:
        the dataset's name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line, if it is not a file of annotations.
    """
    path = os.path.abspath(path)
    image_root = os.path.dirname(path) if image_root is None else os.path.abspath(image_root)
    name = f"{path} with images in {image_root}"
    if name not in DatasetCatalog:
        records, categories = _read_records(path, image_root)
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=categories)
    return name


def find_categories(names: Sequence[str], known: dict[int, str]) -> set[int]:
    """Categories by name, by number, or "voc" for those of PASCAL VOC.

    Args:
        names: of categories.
        known: names of the dataset's categories.

    Raises:
        ValueError: for a name that the dataset does not have.
    """
    by_name = {name: index for index, name in known.items()}
    found = set()
    for name in names:
        if name == "voc" and name not in by_name:
            missing = [item for item in VOC_CATEGORIES if item not in by_name]
            if missing:
                raise ValueError(f"'voc' needs COCO's categories; {missing[0]!r} is not one here")
            found.update(by_name[item] for item in VOC_CATEGORIES)
        elif name in by_name:
            found.add(by_name[name])
        elif name.isdecimal() and (not known or int(name) in known):
            found.add(int(name))
        else:
            some = ", ".join(list(by_name)[:8])
            raise ValueError(
                f"the dataset has no category {name!r}; it has {some or 'no names'} ..."
            )
    return found


def _read_records(path: str, image_root: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Dictionaries in Detectron2's format and the names of the categories."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no annotation file at {path}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file ({' '.join(str(error).split())})") from error
    lists = (
        [content.get(key) for key in ("images", "annotations")] if isinstance(content, dict) else []
    )
    if not lists or not all(
        isinstance(items, list) and all(isinstance(item, dict) for item in items) for items in lists
    ):
        raise ValueError(
            f"{path} is not a COCO-style file of annotations: it needs lists of 'images' and of "
            "'annotations'"
        )
    images, annotations = lists
    categories = [item for item in content.get("categories") or [] if isinstance(item, dict)]
    categories = {item.get("id"): str(item.get("name", item.get("id"))) for item in categories}
    # In the order of their ids and without gaps, as Detectron2 numbers them.
    ids = sorted(item for item in categories if type(item) is int)
    contiguous = {category_id: index for index, category_id in enumerate(ids)}
    records = {}
    for image in images:
        if not isinstance(image.get("id"), (int, str)):
            raise ValueError(f"{path}: an image has no 'id'")
        record = {"image_id": image["id"], "annotations": []}
        if isinstance(image.get("file_name"), str):
            record["file_name"] = os.path.join(image_root, image["file_name"])
        if all(type(image.get(key)) is int and image[key] > 0 for key in ("height", "width")):
            record.update(height=image["height"], width=image["width"])
        records[image["id"]] = record
    for annotation in annotations:
        record = records.get(annotation.get("image_id"))
        if record is None:
            raise ValueError(
                f"{path}: an annotation is of image {annotation.get('image_id')!r}, which is not "
                "among its images"
            )
        record["annotations"].append(_read_annotation(annotation, contiguous, path))
    return list(records.values()), [categories[category_id] for category_id in ids]


def _read_annotation(
    annotation: dict[str, Any], contiguous: dict[int, int], path: str
) -> dict[str, Any]:
    image_id = annotation["image_id"]
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"{path}: an annotation of image {image_id} needs a 'bbox' [x, y, w, h]")
    category = annotation.get("category_id", 0)
    if type(category) is not int:
        raise ValueError(f"{path}: a 'category_id' of image {image_id} is not an integer")
    item = {
        "bbox": box,
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": contiguous.get(category, category),
        "iscrowd": 1 if annotation.get("iscrowd") else 0,
    }
    if annotation.get("area") is not None:
        if not _is_number(annotation["area"]):
            raise ValueError(f"{path}: an 'area' of image {image_id} is not a number")
        item["area"] = annotation["area"]
    if isinstance(annotation.get("segmentation"), (list, dict)):
        item["segmentation"] = annotation["segmentation"]
    return item


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
