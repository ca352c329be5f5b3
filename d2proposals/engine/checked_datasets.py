"""Datasets as a job reads them: annotations that would end or spoil it are mended or left out.

Detectron2's reader stops at the first annotation that it cannot read, often after hours of training
where it is in the test set, and takes others for something else (``iscrowd`` "0" for a crowd).
Here every dataset of a job is read before it begins (``data.dataset_reading``); each kind of fault
is one warning, or with ``DATASETS.STRICT`` an error. Where Detectron2 would stop or err, the job
reads the mended records, under the name of the dataset with an end of its own; elsewhere it reads
the dataset itself.
"""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.dataset_reading import DatasetReading, read_dataset
from ..evaluation.ground_truth import ground_truth_of, warn_of_faults
from ..files.annotation_cleaning import BAD_MASK, NO_CATEGORY
from ..files.image_files import missing_files
from ..files.proposal_set import Fault
from ..files.segmentations import encode_segmentation

logger = logging.getLogger(__name__)

# What the mended datasets' names end with.
_SUFFIXES = {"TRAIN": "_checked_for_training", "TEST": "_checked"}


class _Checked(NamedTuple):
    """A dataset that was checked.

    Attributes:
        function: that it was registered with then.
        name: under which the job reads it.
        faults: that it has.
        num_unlisted: objects whose category it does not list.
        imageless: what is wrong where images have no file; "" where all have.
    """

    function: Callable[[], list[dict]]
    name: str
    faults: list[Fault]
    num_unlisted: int
    imageless: str


_CHECKED: dict[tuple[str, str], _Checked] = {}


def with_checked_datasets(cfg: CfgNode, part: str) -> CfgNode:
    """Check the datasets of a job.

    Args:
        cfg: of the job.
        part: "TRAIN" or "TEST".

    Returns:
        the configuration, naming instead of datasets that Detectron2 could not read their mended
        copies.

    Raises:
        ValueError: in one line, for what cannot be mended, for objects of unlisted categories
            where the model tells categories apart, and with ``DATASETS.STRICT`` for any fault.
    """
    names = {name: checked_dataset(cfg, name, part) for name in cfg.DATASETS[part]}
    return with_copies(cfg, part, names)


def own_name(name: str) -> str:
    """The name by which the configuration knows a dataset, from that of its mended copy."""
    return name.removesuffix(_SUFFIXES["TRAIN"]).removesuffix(_SUFFIXES["TEST"])


def check_image_files(names: Iterable[str], part: str) -> None:
    """Check, where the images are read, that each has a file: others take the annotations alone.

    Args:
        names: of datasets that were checked.
        part: "TRAIN" or "TEST".

    Raises:
        ValueError: an image of one has no file name, or, of a test, its file was not there.
    """
    for name in names:
        if (name, part) in _CHECKED and _CHECKED[name, part].imageless:
            # Checked anew after it is mended.
            raise ValueError(_CHECKED.pop((name, part)).imageless)


def records_to_test(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    """The images of a dataset as a test of the job reads them; errors as
    :func:`with_checked_datasets`.

    Args:
        cfg: of the job.
        name: of the dataset.
    """
    return DatasetCatalog.get(checked_dataset(cfg, name, "TEST"))


def with_copies(cfg: CfgNode, part: str, names: dict[str, str]) -> CfgNode:
    """A configuration that names copies of datasets instead of them, and their weights with them.

    Args:
        cfg: of a job.
        part: "TRAIN" or "TEST".
        names: of the copies, by the names of all datasets of that part.

    Returns:
        the configuration itself, where each dataset is its own copy.
    """
    if all(name == copy for name, copy in names.items()):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    # One that is there twice stays so.
    cfg.DATASETS[part] = tuple(names[name] for name in cfg.DATASETS[part])
    # Newer versions of Detectron2 have weights by name.
    factors = cfg.DATASETS.get("TRAIN_REPEAT_FACTOR", [])
    if part == "TRAIN" and factors:
        cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(names[name], factor) for name, factor in factors]
    cfg.freeze()
    return cfg


def checked_dataset(cfg: CfgNode, name: str, part: str) -> str:
    """Check a dataset, once a run; arguments and errors as :func:`with_checked_datasets`.

    Args:
        name: of the dataset.

    Returns:
        the name under which to read it: its own, or that of its mended copy.
    """
    if name not in DatasetCatalog.list():
        return name  # whoever reads it says so
    checked = _CHECKED.get((name, part))
    if checked is None or checked.function is not DatasetCatalog[name]:
        checked = _check(name, part)
        _CHECKED[name, part] = checked
    if checked.faults and cfg.DATASETS.STRICT:
        first = checked.faults[0]
        others = ", ".join(fault.name for fault in checked.faults[1:])
        raise ValueError(
            f"DATASETS.STRICT, and something is wrong with {name!r}: [{first.name}] "
            f"{first.message}{'; also ' + others if others else ''}"
        )
    if checked.num_unlisted and cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork":
        raise ValueError(
            f"{checked.num_unlisted} objects of {name!r} have no category that the dataset lists, "
            f"which MODEL.META_ARCHITECTURE '{cfg.MODEL.META_ARCHITECTURE}' needs; mend their "
            "'category_id' or the list of 'categories', or take them out"
        )
    return checked.name


def _check(name: str, part: str) -> _Checked:
    """Read a dataset, name its faults, and register its mended copy where that is needed."""
    reading = read_dataset(name, needs_ids=False)
    if part == "TEST" and not reading.records:
        raise ValueError(f"the dataset {name!r} has no images to test on: its list is empty")
    imageless = _find_imageless(reading, part)
    ground_truth = ground_truth_of(reading)
    if part == "TEST" and ground_truth.is_annotated and not len(ground_truth.boxes):
        crowd = f": its {ground_truth.num_crowd} annotations are crowd regions, which do not count"
        words = f"there are no objects to find{crowd if ground_truth.num_crowd else ''}"
        faults = [*ground_truth.faults, Fault("gt-no-objects", words)]
        ground_truth = replace(ground_truth, faults=faults)
    warn_of_faults(ground_truth, name)
    is_unlisted = ground_truth.categories == NO_CATEGORY
    lists_none = reading.is_of_file and not reading.category_names
    if lists_none:
        is_unlisted[:] = True
    num_unlisted = int(is_unlisted.sum())
    function = DatasetCatalog[name]
    if _lacks_categories(reading):
        logger.warning(
            f"{name}: no annotation has a 'category_id'; all are read as objects of one category"
        )
    elif lists_none and len(is_unlisted):
        logger.warning(
            f"{name}: its file lists no 'categories'; all objects are read as of one category"
        )
    elif reading.is_readable and not reading.faults.need_mending:
        return _Checked(function, name, ground_truth.faults, num_unlisted, imageless)
    mended = _register_mended(reading, part)
    return _Checked(function, mended, ground_truth.faults, num_unlisted, imageless)


def _find_imageless(reading: DatasetReading, part: str) -> str:
    """What is wrong where images have no file; "" where all have."""
    without_name = [
        record
        for record in reading.records
        if not isinstance(record.get("file_name"), str | os.PathLike)
    ]
    if without_name:
        return (
            f"{len(without_name)} images of {reading.name!r} have no 'file_name' (image id "
            f"{without_name[0].get('image_id')} is the first): give each the name of its file"
        )
    # Of a training those alone that are left to train on.
    return _describe_missing(reading.records, reading.name) if part == "TEST" else ""


def _describe_missing(records: list[dict[str, Any]], name: str) -> str:
    missing = missing_files(record["file_name"] for record in records)
    if not missing:
        return ""
    return (
        f"{len(missing)} of {len(records)} images of {name!r} are not there, the first is "
        f"{missing[0]}: correct the folder (DATASETS.COCO_FILES, or DETECTRON2_DATASETS) or take "
        "them out of the annotations"
    )


def check_images_to_train_on(records: list[dict[str, Any]], names: Iterable[str]) -> None:
    """Check that the images that a training reads are there.

    Args:
        records: of the training, each with ``file_name``.
        names: of its datasets.

    Raises:
        ValueError: in one line, if one is not.
    """
    message = _describe_missing(records, ", ".join(names))
    if message:
        raise ValueError(message)


def _lacks_categories(reading: DatasetReading) -> bool:
    """Whether there are annotations and none has a category, not even one that is not listed."""
    annotations = (item for record in reading.records for item in record.get("annotations", ()))
    first = next(annotations, None)
    return (
        first is not None
        and not reading.faults.count("gt-category")
        and first["category_id"] == NO_CATEGORY
        and all(item["category_id"] == NO_CATEGORY for item in annotations)
    )


def _register_mended(reading: DatasetReading, part: str) -> str:
    name = reading.name + _SUFFIXES[part]
    lacks_categories = _lacks_categories(reading)
    names = ["object"] if lacks_categories else reading.category_names or ["object"]
    if lacks_categories:
        reading = replace(reading, category_names=[])
    # Without the file, which evaluators would read instead.
    metadata = MetadataCatalog.get(reading.name).as_dict()
    left_out = {"json_file", "name"}
    if lacks_categories or not reading.category_names:
        left_out |= {"thing_classes", "thing_dataset_id_to_contiguous_id"}
    metadata = {"thing_classes": names} | {key: metadata[key] for key in metadata.keys() - left_out}
    unlisted = len(metadata["thing_classes"])
    records = [_mended(record, part, reading, unlisted) for record in reading.records]
    if part == "TEST" and reading.category_names and reading.faults.count("gt-category"):
        metadata["thing_classes"] = [*metadata["thing_classes"], "unlisted"]
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**metadata)
    logger.info(f"{reading.name} is read as {name}: with its annotations mended")
    return name


def _mended(
    record: dict[str, Any], part: str, reading: DatasetReading, unlisted: int
) -> dict[str, Any]:
    """A record as Detectron2's reader would have it; ``unlisted`` is the category of objects that
    have none of the dataset's, whose loader of tests takes no negative one.
    """
    has_categories = bool(reading.category_names)
    if "annotations" not in record:
        return record
    annotations = []
    for item in record["annotations"]:
        is_bad = item.get(BAD_MASK) or (has_categories and item["category_id"] == NO_CATEGORY)
        if is_bad and part == "TRAIN":
            continue
        item = {key: item[key] for key in item.keys() - {BAD_MASK}}
        # A function's own numbers stay, where it gives any.
        if not has_categories and (reading.is_of_file or item["category_id"] == NO_CATEGORY):
            item["category_id"] = 0
        elif item["category_id"] == NO_CATEGORY:
            item["category_id"] = unlisted
        if item.pop("ignore", 0) and part == "TRAIN":
            item["iscrowd"] = 1
        if reading.is_of_file and "keypoints" in item:
            # From indices of pixels to coordinates; every third number is the visibility.
            item["keypoints"] = [
                x if k % 3 == 2 else x + 0.5 for k, x in enumerate(item["keypoints"])
            ]
        segmentation = item.get("segmentation")
        if isinstance(segmentation, dict):
            item["segmentation"] = encode_segmentation(segmentation, None, "")
        annotations.append(item)
    return {**record, "annotations": annotations}
