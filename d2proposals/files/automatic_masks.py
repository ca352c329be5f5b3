"""Segment-Anything's automatic masks: a JSON file per image, alone or in a folder.

Shape shorthand: R proposals of an image.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from .atomic_files import check_output_folder
from .coco_results import result_entries
from .json_values import ContentError, boxes_of_masks, check_finite, is_number
from .proposal_set import DatasetImages, ProposalSet, file_names, missing_scores
from .run_length_encodings import check_size, make_encodings


def find_automatic_masks(content: Any, path: str) -> list[tuple[str, list]]:
    """(name of the image, its entries) in a file of Segment-Anything."""
    stem = os.path.splitext(os.path.basename(path))[0]
    if isinstance(content, list):
        return [(stem, content)]
    if isinstance(content, dict) and "images" in content:
        raise ContentError(
            "it looks like a file of annotations ('images'); give proposals here, annotations "
            "with --gt"
        )
    if isinstance(content, dict) and isinstance(content.get("image"), dict):
        name = content["image"].get("file_name")
        return [(name if isinstance(name, str) else stem, content.get("annotations"))]
    if (
        isinstance(content, dict)
        and content
        and all(isinstance(value, list) for value in content.values())
    ):
        return list(content.items())
    raise ContentError(
        "it is none of the known formats: COCO results, Segment-Anything's masks, own files"
    )


def read_automatic_masks(
    per_image: list[tuple[str, list]], images: DatasetImages | None
) -> ProposalSet:
    """The proposals of Segment-Anything's files; their boxes are those of the masks.

    Args:
        per_image: (name of the image, its entries), as of ``find_automatic_masks``.
        images: tell the ids of names; an image that they do not know, or any without them, has its
            name for an id.

    Raises:
        ValueError: an entry has no run-length encoding or one that does not fill its image, or a
            score that is no number.
    """
    ids, boxes, scores, masks, unnamed = [], [], [], [], 0
    for name, entries in per_image:
        if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
            raise ContentError(
                "it is none of the known formats: COCO results, Segment-Anything's masks, own files"
            )
        segmentations = [entry.get("segmentation") for entry in entries]
        if not all(isinstance(item, dict) for item in segmentations):
            raise ContentError(
                f"a segmentation of image {name} is no run-length encoding; write them with "
                "--convert-to-rle (output_mode 'coco_rle'), or give COCO results an image_id"
            )
        sizes = [check_size(item.get("size")) for item in segmentations]
        masks.append(make_encodings([item.get("counts") for item in segmentations], sizes))
        found = [entry.get("predicted_iou", entry.get("stability_score")) for entry in entries]
        unnamed += found.count(None)
        found = [0.0 if score is None else score for score in found]
        if not all(map(is_number, found)):
            raise ContentError(f"a predicted_iou of image {name} is not a number")
        image_id = images.find(name) if images else None
        ids.append(name if image_id is None else image_id)
        boxes.append(boxes_of_masks(masks[-1]).astype(np.float32))
        scores.append(np.array(found, np.float64))
    faults = [missing_scores(unnamed, sum(map(len, scores)))] if unnamed else []
    return ProposalSet("sam", ids, boxes, scores, masks, faults=faults)


def write_sam(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    """Write a folder with a file of Segment-Anything for each image, all of them or none.

    Args:
        path: of the folder, new or empty.
        proposals: with masks.
        images: tell the images' names, which become those of the files; the id of an image without.

    Raises:
        ValueError: there are no masks, a box or a score is not finite, two images have the same
            name, or something is at ``path``.
    """
    if proposals.masks is None:
        raise ValueError("the format sam holds masks, and these proposals have boxes only")
    check_finite(proposals)
    names = [os.path.splitext(os.path.basename(name))[0] for name in file_names(proposals, images)]
    if len(set(names)) < len(names):
        raise ValueError("the format sam has a file per image, and two images have the same name")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists; give the name of a new folder")
    check_output_folder(path.parent)
    # The folder takes its name when all of its files are there.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        for name, entries in zip(names, result_entries(proposals), strict=True):
            content = [_as_automatic_mask(entry) for entry in entries]
            (whole / f"{name}.json").write_text(json.dumps(content, allow_nan=False))
        if path.exists():
            path.rmdir()
        os.replace(whole, path)


def _as_automatic_mask(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of COCO's results under the names of Segment-Anything, as far as they are known."""
    counts = {**entry["segmentation"], "counts": entry["segmentation"]["counts"].encode()}
    return {
        "segmentation": entry["segmentation"],
        "area": int(mask_util.area(counts)),
        "bbox": entry["bbox"],
        "predicted_iou": entry["score"],
    }
