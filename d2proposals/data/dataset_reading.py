"""One reading of a registered dataset's ground truth, for measuring and for training.

Detectron2's reader of COCO-style files drops areas, ``difficult`` and every annotation whose
polygons are invalid, and stops at the first annotation that it cannot read; its evaluator and
pycocotools read the file itself. So does this: where the dataset is a COCO-style file, the file's
annotations count. A dataset whose own function chooses among them, or reads something else, counts
as its function gives it.
"""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import coco, lvis
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..files.annotation_cleaning import NO_CATEGORY, AnnotationCleaner
from ..files.annotation_faults import AnnotationFaults
from ..files.annotation_file import (
    AnnotationFile,
    NoAnnotationFileError,
    read_annotation_file,
    registered_annotation_file,
)
from ..files.annotation_values import is_finite, read_id, read_number, read_side, read_whole
from ..files.image_files import image_size

# Whose errors are about a file that they read.
_READERS = (coco.__file__, lvis.__file__)
# Boxes are the same up to this, in pixels: functions round, and store as float32.
_SAME_BOX_PIXELS = 0.01
# What `AnnotationCleaner` reads: left out where it leaves it out.
_CLEANED = {
    "bbox", "bbox_mode", "iscrowd", "difficult", "ignore", "category_id", "area", "segmentation",
}  # fmt: skip


@dataclass(frozen=True)
class DatasetReading:
    """The ground truth of a registered dataset.

    Attributes:
        name: of the dataset.
        records: dataset dictionaries, with annotations as ``AnnotationCleaner`` has them; without
            ``annotations`` where the dataset has none.
        category_names: by category, as far as the dataset names them.
        faults: what was wrong with the annotations.
        is_of_file: whether they were read from the dataset's COCO-style file.
        is_readable: whether the dataset's own function can read it.
        ids_in_file: ids of all images of its COCO-style file, in the file's order; None without
            one.
    """

    name: str
    records: list[dict[str, Any]]
    category_names: list[str]
    faults: AnnotationFaults
    is_of_file: bool
    is_readable: bool = True
    ids_in_file: list[int | str] | None = None


def read_dataset(name: str, *, needs_ids: bool = True) -> DatasetReading:
    """Read the ground truth of a registered dataset.

    Args:
        name: of the dataset.
        needs_ids: whether each image must have an id of its own; training needs none.

    Raises:
        ValueError: in one line, if the dataset is not registered, if an image has no id or that of
            another one, or if boxes are relative to the image's size or of unknown mode.
    """
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"the dataset {name!r} is not registered; names are those of DATASETS.TEST, "
            "and a dataset of your own is registered with DatasetCatalog.register or "
            "register_coco_instances"
        )
    file = registered_annotation_file(name)
    if file is not None:
        return _of_file(name, file, file.records)
    file, error = _file_of(name)
    records = _records_of(name, file, error)
    if records is None:
        # In the order of Detectron2's reader, which has failed.
        records = sorted(file.records, key=lambda record: _sorting_key(record["image_id"]))
        return replace(_of_file(name, file, records), is_readable=False)
    if file is not None and _is_reading_of(records, file):
        by_id = {str(record["image_id"]): record for record in file.records}
        # Detectron2's reader gives those of a file without annotations empty lists.
        left_out = set() if any("annotations" in x for x in file.records) else {"annotations"}
        kept = [
            {**_others(record, left_out), **by_id[_id_text(record)], **_path_of(record)}
            for record in records
        ]
        return _of_file(name, file, kept)
    if needs_ids:
        _check_ids(records, name)
    reading = _clean_records(records, name)
    return reading if file is None else replace(reading, ids_in_file=file.image_ids)


def _of_file(name: str, file: AnnotationFile, records: list[dict[str, Any]]) -> DatasetReading:
    """The reading of a dataset whose records are those of its file, or some of them."""
    return DatasetReading(
        name, records, file.category_names, file.faults, True, ids_in_file=file.image_ids
    )


def _sorting_key(image_id: int | str) -> tuple:
    return (isinstance(image_id, str), image_id)


def _id_text(record: dict[str, Any]) -> str:
    """The id of a record as text, 1.0 as "1", as the file's records have it."""
    return str(read_id(record.get("image_id")))


def _others(record: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """What a record has besides what is read of the file."""
    return {key: record[key] for key in record if key not in {"height", "width", *left_out}}


def _path_of(record: dict[str, Any]) -> dict[str, Any]:
    return {"file_name": record["file_name"]} if "file_name" in record else {}


def _file_of(name: str) -> tuple[AnnotationFile | None, NoAnnotationFileError | None]:
    """The COCO-style file of a dataset, or why its file is none; (None, None) without a file."""
    metadata = MetadataCatalog.get(name)
    # Asked for first: a dataset that makes its own files does so now.
    json_file = metadata.get("json_file")
    if not json_file or not PathManager.isfile(json_file):
        return None, None
    path = PathManager.get_local_path(json_file)
    try:
        return read_annotation_file(path, metadata.get("image_root") or ""), None
    except NoAnnotationFileError as error:
        return None, error


def _records_of(
    name: str, file: AnnotationFile | None, file_error: NoAnnotationFileError | None
) -> list[dict[str, Any]] | None:
    """What the dataset's function returns; None where Detectron2's reader cannot read its file.

    Raises:
        NoAnnotationFileError: ``file_error``, if that is why it cannot.
    """
    try:
        return DatasetCatalog.get(name)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(frame.filename in _READERS for frame in frames):
            raise
        if file_error is not None:
            raise file_error from error
        if file is None:
            raise
        return None


def _is_reading_of(records: list[dict[str, Any]], file: AnnotationFile) -> bool:
    """Whether records are what Detectron2's reader makes of a file, or of some of its images.

    The reader has categories as the file has them where it is not told the dataset's name.
    """
    index_of = {category_id: index for index, category_id in enumerate(file.category_ids)}
    by_id = {str(record["image_id"]): record for record in file.records}
    for record in records:
        known = by_id.get(_id_text(record))
        if known is None or ("annotations" in known and "annotations" not in record):
            return False
        annotations = record.get("annotations", [])
        read = file.read_by_detectron2.get(_id_text(record), [])
        if len(annotations) != len(read) or not _has_size_of(record, known):
            return False
        for item, (category, box) in zip(annotations, read, strict=True):
            if read_whole(item.get("category_id")) not in (category, index_of.get(category)):
                return False
            if item.get("bbox_mode") != BoxMode.XYWH_ABS or not _has_box(item.get("bbox"), box):
                return False
    return True


def _has_size_of(record: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether an image's size is that of its file; what is no size says nothing."""
    sides = {key: read_side(record.get(key)) for key in ("height", "width")}
    return all(side in (None, known.get(key, side)) for key, side in sides.items())


def _has_box(given: Any, box: list[float] | None) -> bool:
    """Whether a record's box is the file's, None for one that is left out as it means nothing."""
    if given is None or (isinstance(given, list) and given == box):
        return True
    given = given.tolist() if hasattr(given, "tolist") else given
    values = list(map(read_number, given)) if isinstance(given, (list, tuple)) else [None]
    if len(values) != 4 or None in values:
        return True  # nothing that could be another box
    if box is None:
        return not (all(map(is_finite, values)) and min(values[2:]) > 0)
    return all(abs(x - y) <= _SAME_BOX_PIXELS for x, y in zip(values, box, strict=True))


def _clean_records(records: list[dict[str, Any]], name: str) -> DatasetReading:
    """Records of a dataset's own function, their annotations mended or left out."""
    names = list(MetadataCatalog.get(name).get("thing_classes") or [])
    number = len(names) or float("inf")
    faults = AnnotationFaults()
    cleaner = AnnotationCleaner(
        faults, lambda category: category if 0 <= category < number else NO_CATEGORY
    )
    cleaned = [
        _clean_record(record, f"image {record.get('image_id', position)}", name, cleaner, faults)
        for position, record in enumerate(records)
    ]
    cleaner.finish()
    return DatasetReading(name, cleaned, names, faults, False)


def _check_ids(records: list[dict[str, Any]], name: str) -> None:
    unnamed = sum("image_id" not in record for record in records)
    if unnamed:
        raise ValueError(f"{unnamed} images of the dataset {name!r} have no 'image_id'")
    if len({str(record["image_id"]) for record in records}) < len(records):
        raise ValueError(f"an 'image_id' of the dataset {name!r} occurs more than once")


def _clean_record(
    record: dict[str, Any],
    where: str,
    name: str,
    cleaner: AnnotationCleaner,
    faults: AnnotationFaults,
) -> dict[str, Any]:
    """A record of which only annotations and size change."""
    cleaned = {key: value for key, value in record.items() if key not in ("height", "width")}
    sides = {key: record[key] for key in ("height", "width") if key in record}
    for key, value in sides.items():
        side = read_side(value)
        if side is None:
            faults.add("gt-image-size", where, {key: value})
            continue
        if isinstance(value, (str, float)):
            faults.add("gt-text", where, {key: value})
        cleaned[key] = side
    if not sides and isinstance(record.get("file_name"), str):
        size_of_file = image_size(record["file_name"])
        cleaned.update(zip(("height", "width"), size_of_file or (), strict=False))
    if "annotations" in record:
        size = None
        if "height" in cleaned and "width" in cleaned:
            size = (cleaned["height"], cleaned["width"])
        annotations = record["annotations"] or []
        cleaned["annotations"] = list(_clean_annotations(annotations, where, size, name, cleaner))
    return cleaned


def _clean_annotations(
    annotations: list[dict[str, Any]],
    image: str,
    size: tuple[int, int] | None,
    name: str,
    cleaner: AnnotationCleaner,
) -> Iterator[dict[str, Any]]:
    for position, annotation in enumerate(annotations):
        if "bbox" not in annotation or "bbox_mode" not in annotation:
            raise ValueError(
                f"an annotation of {image} in {name!r} lacks 'bbox' or 'bbox_mode'; Detectron2 "
                "needs both"
            )
        mode = BoxMode(annotation["bbox_mode"])
        if mode in (BoxMode.XYXY_REL, BoxMode.XYWH_REL):
            raise ValueError(
                f"{name!r} has boxes relative to the image ({mode.name}), which Detectron2 "
                "does not convert; give them in pixels"
            )
        where = f"annotation number {position} of {image}"
        item = cleaner.clean(annotation, where, size, mode)
        if item is not None:
            others = {key: annotation[key] for key in annotation.keys() - _CLEANED}
            yield {**others, **item}
