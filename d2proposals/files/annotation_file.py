"""Ground truth of a COCO-style JSON file, with as little in it as possible.

Needed are ``images`` with ``id``, for objects ``annotations`` with ``image_id`` and ``bbox`` (XYWH,
pixels). Used where they are there: ``file_name`` or ``coco_url``, ``height``, ``width`` (else those
of the image's file); ``category_id``, ``area``, ``iscrowd``, ``difficult``, ``segmentation``;
``categories`` with ``id`` and ``name``.

What is wrong with annotations is mended or left out, and counted (``annotation_faults.KINDS``).
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from .annotation_cleaning import NO_CATEGORY, AnnotationCleaner
from .annotation_faults import AnnotationFaults
from .annotation_values import read_id, read_side, read_whole
from .image_files import find_image_file, image_size
from .segmentations import is_dropped_by_detectron2

# The categories of PASCAL VOC under the names that COCO has for them.
VOC_CATEGORIES = (
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorcycle", "person", "potted plant", "sheep", "couch",
    "train", "tv",
)  # fmt: skip


class NoAnnotationFileError(ValueError):
    """A file is not a COCO-style file of annotations."""


class AnnotationOfFile(NamedTuple):
    """An annotation as the file has it.

    Attributes:
        category_id: None for none.
        box: XYWH in pixels; None for an annotation that is left out.
    """

    category_id: int | None
    box: list[float] | None


@dataclass(frozen=True)
class AnnotationFile:
    """What a COCO-style file says.

    Attributes:
        path: of the file.
        records: Detectron2's dataset dictionaries, an image each, in the file's order. Without
            ``annotations`` where the file has none at all.
        category_names: by category, in the order of the ids; empty if the file lists none.
        category_ids: those ids.
        faults: what was wrong with the annotations.
        read_by_detectron2: the annotations of each image, by its id as text, that Detectron2's
            reader keeps: it drops those with polygons none of which is valid.
    """

    path: str
    records: list[dict[str, Any]]
    category_names: list[str]
    category_ids: list[int]
    faults: AnnotationFaults
    read_by_detectron2: dict[str, list[AnnotationOfFile]]

    @property
    def image_ids(self) -> list[int | str]:
        """Of all images, in the file's order."""
        return [record["image_id"] for record in self.records]


# By the name under which :func:`register_annotation_file` registered them.
_REGISTERED: dict[str, AnnotationFile] = {}


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
        file = read_annotation_file(path, image_root)
        DatasetCatalog.register(name, lambda: file.records)
        MetadataCatalog.get(name).set(thing_classes=file.category_names)
        _REGISTERED[name] = file
    return name


def registered_annotation_file(name: str) -> AnnotationFile | None:
    """The file of a dataset that :func:`register_annotation_file` registered; None for others."""
    return _REGISTERED.get(name)


def find_categories(names: Sequence[str], known: dict[int, str]) -> set[int]:
    """Categories by name, by number, or "voc" for those of PASCAL VOC.

    Args:
        names: of categories.
        known: names of the dataset's categories.

    Raises:
        ValueError: for a name that the dataset does not have, or has twice.
    """
    by_name = defaultdict(list)
    for index, name in known.items():
        by_name[name].append(index)
    found = set()
    for name in names:
        if name == "voc" and name not in by_name:
            missing = [item for item in VOC_CATEGORIES if item not in by_name]
            if missing:
                raise ValueError(f"'voc' needs COCO's categories; {missing[0]!r} is not one here")
            found.update(_only_one(item, by_name[item]) for item in VOC_CATEGORIES)
        elif name in by_name:
            found.add(_only_one(name, by_name[name]))
        elif name.isdecimal() and (not known or int(name) in known):
            found.add(int(name))
        else:
            some = ", ".join(list(by_name)[:8])
            raise ValueError(
                f"the dataset has no category {name!r}; it has {some or 'no names'} ..."
            )
    return found


def _only_one(name: str, indices: list[int]) -> int:
    if len(indices) > 1:
        numbers = " and ".join(map(str, indices))
        raise ValueError(
            f"{len(indices)} categories of the dataset are called {name!r}; name the one that is "
            f"meant by its number, counted from 0 in the order of the ids: {numbers}"
        )
    return indices[0]


def read_annotation_file(path: str, image_root: str) -> AnnotationFile:
    """Read a COCO-style file; annotations that mean nothing are left out, and counted.

    Args:
        path: of the file.
        image_root: folder of the images.

    Raises:
        FileNotFoundError: if there is no such file.
        NoAnnotationFileError: in one line, if it is not a file of annotations.
        ValueError: in one line, if an image or a category has no id, or that of another one.
    """
    content = _parse(path)
    faults = AnnotationFaults()
    category_ids, category_names = _read_categories(content, path)
    records = _read_images(content["images"], image_root, path, faults)
    if "annotations" not in content:
        return AnnotationFile(path, records, category_names, category_ids, faults, {})
    for record in records:
        record["annotations"] = []
    # In the order of their ids and without gaps, as Detectron2 numbers them.
    index_of = {category_id: index for index, category_id in enumerate(category_ids)}
    if category_ids:
        cleaner = AnnotationCleaner(faults, lambda number: index_of.get(number, NO_CATEGORY))
    else:
        cleaner = AnnotationCleaner(faults, lambda number: max(number, NO_CATEGORY))
    read = _read_annotations(content["annotations"], records, cleaner, faults)
    return AnnotationFile(path, records, category_names, category_ids, faults, read)


def _parse(path: str) -> dict[str, Any]:
    """A file with a list of images and, if at all, a list of annotations."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no annotation file at {path}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise NoAnnotationFileError(
            f"{path} is no JSON file ({' '.join(str(error).split())})"
        ) from error
    needed = ("images", "annotations")
    lists = [content.get(key, []) for key in needed] if isinstance(content, dict) else []
    is_right = lists and "images" in content and all(isinstance(items, list) for items in lists)
    if not is_right or not all(isinstance(item, dict) for item in lists[0]):
        raise NoAnnotationFileError(
            f"{path} is not a COCO-style file of annotations: it needs a list of 'images' and, for "
            "objects, one of 'annotations'"
        )
    return content


def _read_categories(content: dict[str, Any], path: str) -> tuple[list[int], list[str]]:
    """Ids in ascending order, and names."""
    categories = content.get("categories")
    names: dict[int, str] = {}
    for item in categories if isinstance(categories, list) else []:
        category_id = read_whole(item.get("id")) if isinstance(item, dict) else None
        if category_id is None:
            continue
        name = str(item.get("name", category_id))
        if names.setdefault(category_id, name) != name:
            raise ValueError(
                f"{path}: the category id {category_id} is given twice, to "
                f"{names[category_id]!r} and to {name!r}; give each category an id of its own"
            )
    ids = sorted(names)
    return ids, [names[category_id] for category_id in ids]


def _read_images(
    images: list[dict[str, Any]], image_root: str, path: str, faults: AnnotationFaults
) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    for image in images:
        image_id = read_id(image.get("id"))
        if image_id is None:
            raise ValueError(
                f"{path}: an image has no 'id' that is a whole number or text "
                f"({str(image.get('file_name', image))[:80]!r})"
            )
        if type(image["id"]) is float:
            faults.add("gt-text", f"image {image['id']}", {"id": image["id"]})
        record = {"image_id": image_id}
        file_name = find_image_file(image_root, image)
        if file_name is not None:
            record["file_name"] = file_name
        record.update(_read_size(image, faults) or _size_of_file(record))
        # Compared as text, as Detectron2 does with proposals.
        if str(image_id) in records:
            other = records[str(image_id)].get("file_name", "?")
            raise ValueError(
                f"{path}: the image id {image_id} is given twice, to {os.path.basename(other)!r} "
                f"and to {os.path.basename(record.get('file_name', '?'))!r}; give each image an id "
                "of its own"
            )
        records[str(image_id)] = record
    return list(records.values())


def _read_size(image: dict[str, Any], faults: AnnotationFaults) -> dict[str, int]:
    """Height and width, {} unless both are there."""
    where = f"image {image['id']}"
    sides = {}
    for name in ("height", "width"):
        if name not in image:
            continue
        value = image[name]
        side = read_side(value)
        if side is None:
            faults.add("gt-image-size", where, {name: value})
            continue
        if type(value) is not int:
            faults.add("gt-text", where, {name: value})
        sides[name] = side
    return sides if len(sides) == 2 else {}


def _size_of_file(record: dict[str, Any]) -> dict[str, int]:
    """Height and width of an image whose annotations do not say; {} if it is not there."""
    size = image_size(record["file_name"]) if "file_name" in record else None
    return {"height": size[0], "width": size[1]} if size else {}


def _read_annotations(
    annotations: list[Any],
    records: list[dict[str, Any]],
    cleaner: AnnotationCleaner,
    faults: AnnotationFaults,
) -> dict[str, list[AnnotationOfFile]]:
    """Put the annotations into their records; return those that Detectron2 keeps, by image."""
    by_id = {str(record["image_id"]): record for record in records}
    read = defaultdict(list)
    ids: set = set()
    for position, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            faults.add("gt-no-box", f"annotation number {position}", annotation)
            continue
        where = f"annotation {annotation.get('id', f'number {position}')} of image "
        where += str(annotation.get("image_id"))
        record = _find_image(annotation.get("image_id"), by_id, where, faults)
        if record is None:
            continue
        annotation_id = annotation.get("id")
        if isinstance(annotation_id, (int, str, float)):
            if annotation_id in ids:
                faults.add("gt-same-id", where)
            ids.add(annotation_id)
        size = (record["height"], record["width"]) if "height" in record else None
        item = cleaner.clean(annotation, where, size)
        is_read = annotation["image_id"] == record["image_id"]  # its reader takes no text for it
        if is_read and not is_dropped_by_detectron2(annotation.get("segmentation")):
            category = read_whole(annotation.get("category_id"))
            kept = AnnotationOfFile(category, None if item is None else item["bbox"])
            read[str(record["image_id"])].append(kept)
        if item is not None:
            if _is_list_of_numbers(annotation.get("keypoints")):
                item["keypoints"] = annotation["keypoints"]
            record["annotations"].append(item)
    cleaner.finish()
    return read


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) in (int, float) for x in value)


def _find_image(
    image_id: Any, by_id: dict[str, dict[str, Any]], where: str, faults: AnnotationFaults
) -> dict[str, Any] | None:
    """The image of an annotation; None, and a fault, for one that is not there."""
    record = by_id.get(str(image_id)) if type(image_id) in (int, str) else None
    if record is not None and type(image_id) is type(record["image_id"]):
        return record
    whole = read_whole(image_id)
    if record is None and whole is not None:
        record = by_id.get(str(whole))
    if record is None:
        faults.add("gt-unknown-images", where)
        return None
    faults.add("gt-text", where, {"image_id": image_id})
    return record
