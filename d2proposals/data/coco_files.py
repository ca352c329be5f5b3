"""COCO-style files of one's own as datasets, by configuration alone (``DATASETS.COCO_FILES``)."""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

_FORM = "a list of [name, JSON file, folder of the images] or [..., year of PASCAL VOC]"


def register_coco_files(entries: Sequence[Any]) -> None:
    """Register COCO-style files as datasets; those that are registered so already stay.

    Args:
        entries: of ``DATASETS.COCO_FILES``: (name, path of the JSON file, folder of the images),
            and of PASCAL VOC's objects the year, by which detections are measured as VOC does.

    Nothing is read yet: that a file is missing, ``engine.check_datasets`` says of those that a job
    needs.

    Raises:
        ValueError: when an entry is of another form, or its name is another dataset's.
    """
    if isinstance(entries, str) or not all(map(_is_entry, entries)):
        raise ValueError(
            f"DATASETS.COCO_FILES is {_FORM}, for example [['mine_train', 'train.json', "
            f"'images/']], not {entries!r:.200}"
        )
    for name, json_file, image_root, *year in entries:
        metadata = {"year": year[0]} if year else {}
        _register(name, _full_path(json_file), _full_path(image_root), metadata)


def _full_path(path: str) -> str:
    """From the working folder; "~" is the home, as Detectron2 has it in DETECTRON2_DATASETS."""
    return os.path.abspath(os.path.expanduser(path))


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) not in (3, 4):
        return False
    has_year = len(entry) == 3 or type(entry[3]) is int
    return has_year and all(isinstance(text, str) and text for text in entry[:3])


def _register(name: str, json_file: str, image_root: str, metadata: dict[str, Any]) -> None:
    if name in DatasetCatalog.list():
        registered = MetadataCatalog.get(name)
        known = tuple(registered.get(key) for key in ("json_file", "image_root", "year"))
        if known != (json_file, image_root, metadata.get("year")):
            raise ValueError(
                f"DATASETS.COCO_FILES: there is another dataset of the name {name!r} "
                f"({known[0] or 'without a JSON file'}); take another name"
            )
        return
    register_coco_instances(name, metadata, json_file, image_root)
