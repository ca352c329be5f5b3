"""Proposals in JSON: COCO's results, Segment-Anything's automatic masks, and this project's own.

Each is recognised by what is in it:

* COCO's results: a list of entries with ``image_id``, ``bbox`` (XYWH) or ``segmentation`` (a
  run-length encoding) or both, and ``score``; ``category_id`` means nothing here.
* Segment-Anything: a file per image, named as the image, with a list of entries that have
  ``segmentation``, ``predicted_iou`` and ``stability_score``; or such a file of SA-1B, with
  ``image`` and ``annotations``; or a folder of either. The score is ``predicted_iou``. The box is
  that of the mask: Segment-Anything's own ``bbox`` is a pixel too short in both directions.
* Own files: ``"format": "d2proposals"``; one entry per image with ``image_id``, ``boxes`` (XYXY),
  ``objectness_logits`` and, with masks, ``size`` and ``counts``. Images without proposals are in
  it, too, and all numbers are exact.

Shape shorthand: R proposals of an image.
"""

import json
import math
import os
from array import array
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from .proposal_set import DatasetImages, Fault, ProposalSet
from .run_length_encodings import check_size, make_encodings
from .safe_pickle import one_line

_OWN_FORMAT = "d2proposals"
# What stands in the parsed list for an entry that has been taken out.
_TAKEN = None


def read_json(path: str, images: DatasetImages | None) -> ProposalSet:
    """Read a JSON file of any of these formats.

    Args:
        path: of the file.
        images: of the dataset; without it, Segment-Anything's images have their names as ids.

    Raises:
        ValueError: in one line, if it is none of them or damaged.
    """
    entries = _ResultEntries()
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=entries.take)
        if entries.ids and isinstance(content, list):
            return entries.to_set(len(content))
        if isinstance(content, dict) and content.get("format") == _OWN_FORMAT:
            return _read_own(content)
        if content == [] and not _is_named_as_image(path, images):
            return ProposalSet("coco", [], [], [], None)
        per_image = _find_automatic_masks(content, path)
        return _read_automatic_masks(per_image, images)
    except _ContentError as error:
        raise ValueError(f"{path} is not read: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not read: it is nested without end") from error
    # json and pycocotools complain by several kinds of exceptions.
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError, UnicodeError) as error:
        raise ValueError(f"{path} is truncated or damaged ({one_line(error)})") from error


def read_json_folder(path: str, images: DatasetImages | None) -> ProposalSet:
    """Read a folder of Segment-Anything's files, one per image; see :func:`read_json`."""
    names = sorted(name for name in os.listdir(path) if name.endswith(".json"))
    if not names:
        raise ValueError(f"{path} is a folder without JSON files, one per image")
    sets = [read_json(os.path.join(path, name), images) for name in names]
    foreign = [name for name, item in zip(names, sets, strict=True) if item.format != "sam"]
    if foreign:
        raise ValueError(
            f"{os.path.join(path, foreign[0])} in a folder of Segment-Anything's files is not one "
            "of them; give a single file of another format by its own name"
        )
    return ProposalSet(
        "sam",
        [image_id for item in sets for image_id in item.image_ids],
        [boxes_i for item in sets for boxes_i in item.boxes],
        [scores_i for item in sets for scores_i in item.scores],
        [masks_i for item in sets for masks_i in item.masks],
        faults=_merge_faults([fault for item in sets for fault in item.faults]),
    )


def own_content(proposals: ProposalSet) -> dict[str, Any]:
    """What this project's own file of proposals says."""
    logits = proposals.logits()
    entries = []
    for index, image_id in enumerate(proposals.image_ids):
        entry = {
            "image_id": image_id,
            "boxes": proposals.boxes[index].astype(np.float64).tolist(),
            "objectness_logits": logits[index].tolist(),
        }
        if proposals.masks is not None:
            masks = proposals.masks[index]
            entry["size"] = list(masks[0]["size"]) if masks else None
            entry["counts"] = [mask["counts"].decode("ascii") for mask in masks]
        entries.append(entry)
    return {"format": _OWN_FORMAT, "version": 1, "proposals": entries}


class _ContentError(ValueError):
    """A file is whole, but its content is not what it must be."""


class _ResultEntries:
    """COCO's result entries, taken out of the file while it is parsed.

    A million parsed entries take a gigabyte, their numbers a twentieth of it.
    """

    def __init__(self) -> None:
        self.ids: dict[int | str, int] = {}
        self._image = array("q")
        self._numbers = array("d")  # x, y, w, h, score
        self._counts: list[Any] = []
        self._sizes: list[tuple[int, int]] = []
        self._categories: set[Any] = set()
        self._num_without_score = 0

    def take(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        """A hook of json: keeps what it needs of an entry, and leaves other objects alone."""
        if "image_id" not in entry or not ("bbox" in entry or "segmentation" in entry):
            return entry
        number = len(self._image)
        image_id = entry["image_id"]
        _check_id(image_id)
        self._image.append(self.ids.setdefault(image_id, len(self.ids)))
        segmentation = entry.get("segmentation")
        if isinstance(segmentation, dict):
            if len(self._counts) < number:
                raise _ContentError(f"entry {number - 1} has no mask, but others do")
            self._sizes.append(check_size(segmentation.get("size")))
            self._counts.append(segmentation.get("counts"))
        elif segmentation is not None:
            raise _ContentError(
                f"the segmentation of entry {number} is no run-length encoding "
                "(pycocotools.mask.encode, frPyObjects)"
            )
        elif self._counts:
            raise _ContentError(f"entry {number} has no mask, but others do")
        box = entry.get("bbox")
        if box is None:
            if segmentation is None:
                raise _ContentError(f"entry {number} has neither a box nor a mask")
            box = [math.inf] * 4  # to be replaced by the mask's
        elif not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise _ContentError(f"the bbox of entry {number} must be four numbers [x, y, w, h]")
        score = entry.get("score")
        if score is None:
            self._num_without_score += 1
            score = 0.0
        elif not _is_number(score):
            raise _ContentError(f"the score of entry {number} must be a number")
        self._numbers.extend((*box, score))
        category = entry.get("category_id")
        self._categories.add(category if isinstance(category, (int, str)) else None)
        return _TAKEN

    def to_set(self, num_items: int) -> ProposalSet:
        """The proposals by image; the file's order of images is that of their first entries."""
        if num_items != len(self._image):
            raise _ContentError(
                f"{num_items - len(self._image)} of {num_items} items of the list are no results"
            )
        image = np.frombuffer(self._image, np.int64)
        numbers = np.frombuffer(self._numbers, np.float64).reshape(-1, 5)
        order = np.argsort(image, kind="stable")
        ends = np.cumsum(np.bincount(image, minlength=len(self.ids)))
        numbers = numbers[order]
        boxes = numbers[:, :4].copy()
        boxes[:, 2:] += boxes[:, :2]
        masks = None
        if self._counts:
            encodings = make_encodings(self._counts, self._sizes)
            encodings = [encodings[index] for index in order]
            without_box = np.isinf(numbers[:, :4]).all(axis=1)
            of_masks = [encodings[index] for index in np.flatnonzero(without_box)]
            boxes[without_box] = boxes_of_masks(of_masks)
            masks = [encodings[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return ProposalSet(
            "coco",
            list(self.ids),
            np.split(boxes.astype(np.float32), ends[:-1]),
            np.split(numbers[:, 4], ends[:-1]),
            masks,
            faults=self._faults(),
        )

    def _faults(self) -> list[Fault]:
        faults = []
        if len(self._categories) > 1:
            faults.append(
                Fault(
                    "category-ids",
                    f"the entries have {len(self._categories)} different category ids; they are "
                    "ranked together and their categories ignored, because proposals are "
                    "class-agnostic",
                )
            )
        if self._num_without_score:
            faults.append(missing_scores(self._num_without_score, len(self._image)))
        return faults


def missing_scores(number: int, total: int) -> Fault:
    """The fault of proposals that have no score."""
    return Fault(
        "missing-scores",
        f"{number} of {total} proposals have no score; they count as 0, and equal scores keep the "
        "file's order",
    )


def boxes_of_masks(masks: list[dict[str, Any]]) -> np.ndarray:
    """(R, 4) float64 XYXY boxes around masks; an empty mask has an empty box."""
    boxes = np.asarray(mask_util.toBbox(masks), np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _read_own(content: dict[str, Any]) -> ProposalSet:
    if content.get("version") != 1:
        raise _ContentError(f"it is of version {content.get('version')!r}, not 1")
    entries = content.get("proposals")
    if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
        raise _ContentError("its 'proposals' must be a list with an object per image")
    has_masks = any("counts" in entry for entry in entries)
    ids, boxes, scores, masks = [], [], [], []
    for entry in entries:
        image_id = entry.get("image_id")
        _check_id(image_id)
        boxes_i, scores_i = entry.get("boxes"), entry.get("objectness_logits")
        rows_are_boxes = isinstance(boxes_i, list) and all(
            isinstance(row, list) and len(row) == 4 and all(map(_is_number, row)) for row in boxes_i
        )
        if not rows_are_boxes or not isinstance(scores_i, list):
            raise _ContentError(f"image {image_id} needs 'boxes', rows of four numbers, and logits")
        if len(scores_i) != len(boxes_i) or not all(map(_is_number, scores_i)):
            raise _ContentError(f"image {image_id} must have as many numbers as logits as boxes")
        ids.append(image_id)
        boxes.append(np.array(boxes_i, np.float32).reshape(-1, 4))
        scores.append(np.array(scores_i, np.float64))
        if has_masks:
            counts = entry.get("counts")
            if not isinstance(counts, list) or len(counts) != len(boxes_i):
                raise _ContentError(f"image {image_id} must have as many masks as boxes")
            size = check_size(entry.get("size")) if counts else (1, 1)
            masks.append(make_encodings(counts, [size] * len(counts)))
    return ProposalSet(
        _OWN_FORMAT, ids, boxes, scores, masks if has_masks else None, scores_are_logits=True
    )


def _find_automatic_masks(content: Any, path: str) -> list[tuple[str, list]]:
    """(name of the image, its entries) in a file of Segment-Anything."""
    stem = os.path.splitext(os.path.basename(path))[0]
    if isinstance(content, list):
        return [(stem, content)]
    if isinstance(content, dict) and "images" in content:
        raise _ContentError(
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
    raise _ContentError(
        "it is none of the known formats: COCO results, Segment-Anything's masks, own files"
    )


def _read_automatic_masks(
    per_image: list[tuple[str, list]], images: DatasetImages | None
) -> ProposalSet:
    ids, boxes, scores, masks, unnamed = [], [], [], [], 0
    for name, entries in per_image:
        if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
            raise _ContentError(
                "it is none of the known formats: COCO results, Segment-Anything's masks, own files"
            )
        segmentations = [entry.get("segmentation") for entry in entries]
        if not all(isinstance(item, dict) for item in segmentations):
            raise _ContentError(
                f"a segmentation of image {name} is no run-length encoding; write them with "
                "--convert-to-rle (output_mode 'coco_rle'), or give COCO results an image_id"
            )
        sizes = [check_size(item.get("size")) for item in segmentations]
        masks.append(make_encodings([item.get("counts") for item in segmentations], sizes))
        found = [entry.get("predicted_iou", entry.get("stability_score")) for entry in entries]
        unnamed += found.count(None)
        found = [0.0 if score is None else score for score in found]
        if not all(map(_is_number, found)):
            raise _ContentError(f"a predicted_iou of image {name} is not a number")
        image_id = images.find(name) if images else None
        ids.append(name if image_id is None else image_id)
        boxes.append(boxes_of_masks(masks[-1]).astype(np.float32))
        scores.append(np.array(found, np.float64))
    faults = [missing_scores(unnamed, sum(map(len, scores)))] if unnamed else []
    return ProposalSet("sam", ids, boxes, scores, masks, faults=faults)


def _is_named_as_image(path: str, images: DatasetImages | None) -> bool:
    """Whether an empty list is Segment-Anything's for an image, rather than no results."""
    return images is not None and images.find(os.path.basename(path)) is not None


def _merge_faults(faults: list[Fault]) -> list[Fault]:
    """One fault of each kind, with the number of files that have it."""
    names = list(dict.fromkeys(fault.name for fault in faults))
    merged = []
    for name in names:
        same = [fault for fault in faults if fault.name == name]
        more = f" (and likewise in {len(same) - 1} more files)" if len(same) > 1 else ""
        merged.append(Fault(name, same[0].message + more))
    return merged


def _is_number(value: Any) -> bool:
    # Integers beyond a float's range would raise later.
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _check_id(image_id: Any) -> None:
    is_id = isinstance(image_id, str) or (type(image_id) is int and abs(image_id) < 2**63)
    if not is_id:
        raise _ContentError(f"an image_id is an integer or text, not {type(image_id).__name__}")
