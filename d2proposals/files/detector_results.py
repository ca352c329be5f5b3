"""Results of detectors in pickles, taken as proposals: boxes and masks of all classes together.

Each is recognised by the items of its list, one per image or one per object:

* mmdetection 3's ``--out``: a dictionary per image with ``pred_instances`` (``bboxes`` XYXY,
  ``scores``, ``labels``, ``masks``), ``img_id`` and ``img_path``.
* mmdetection 2's ``--out``: per image a list with an (R, 5) array for each class, or a tuple of
  that list and one of masks; the images are in the order of the dataset's annotation file. Its
  proposals are one array of each image.
* Detectron2's ``instances_predictions.pth``: a dictionary per image with ``image_id`` and
  ``instances`` (COCO results) or ``proposals``.
* COCO results, a dictionary per object.
* Segment-Anything's list of one image, whose name is the file's.

Shape shorthand: R proposals of an image, H, W its height and width.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from .automatic_masks import read_automatic_masks
from .coco_results import ResultEntries
from .proposal_set import DatasetImages, Fault, ProposalSet, missing_scores, plain_value
from .run_length_encodings import check_size, make_encodings
from .safe_pickle import taken, to_plain


def read_result_list(
    content: Sequence[Any], path: str, images: DatasetImages | None
) -> ProposalSet:
    """The proposals in a list of a pickle.

    Args:
        content: of ``load_with_tensors``. A list is empty afterwards: an image is taken out of it,
            so that its arrays are in memory once.
        path: of the file, whose name is that of the image where nothing else is.
        images: of the dataset, which mmdetection 2's results need.

    Raises:
        ValueError, TypeError: if the content is none of the known ones.
    """
    content = content if isinstance(content, list) else list(content)
    items = [to_plain(item) for item in taken(content)]
    if items and all(isinstance(item, dict) for item in items):
        if all("pred_instances" in item for item in items):
            return _read_mmdet3_results(items, images)
        if all("image_id" in item and {"instances", "proposals"} & item.keys() for item in items):
            return _read_predictions(items)
        if all("image_id" in item for item in items):
            return _read_entries(items)
        if all("segmentation" in item for item in items):
            stem = os.path.splitext(os.path.basename(path))[0]
            entries = [{**item, "segmentation": _plain_mask(item)} for item in items]
            return read_automatic_masks([(stem, list(map(_plain_numbers, entries)))], images)
        raise TypeError(
            "its items are dictionaries of an unknown kind; known are mmdetection's results "
            "('pred_instances'), Detectron2's ('image_id', 'instances') and COCO's ('image_id', "
            f"'bbox'), the first one here has {', '.join(map(str, list(items[0])[:8]))}"
        )
    return _read_mmdet2(items, images)


def _read_mmdet3_results(items: list[dict], images: DatasetImages | None) -> ProposalSet:
    collected = Collected("mmdet3")
    labels: set[int] = set()
    for number, item in enumerate(taken(items)):
        found = to_plain(item["pred_instances"])
        path, image_id = item.get("img_path"), plain_value(item.get("img_id"))
        # Some of mmdetection's datasets count their images; the file's name is more telling.
        by_name = images.find(path) if images and isinstance(path, str) else None
        image_id = by_name if by_name is not None else path if image_id is None else image_id
        if image_id is None or not isinstance(found, dict):
            raise TypeError(f"item {number} has no 'img_id' and 'img_path', or no instances")
        collected.add(image_id, found.get("bboxes"), found.get("scores"), found.get("masks"))
        labels.update(np.asarray(to_plain(found.get("labels", ()))).ravel().tolist())
    return collected.to_set(len(labels))


def _read_mmdet2(items: list[Any], images: DatasetImages | None) -> ProposalSet:
    if images is None:
        raise TypeError(
            "its images have no ids, only the dataset's order; name the dataset (--dataset or --gt)"
        )
    if len(items) != len(images.ids):
        raise TypeError(
            f"it has {len(items)} images without ids, the dataset has {len(images.ids)}: it is "
            "of another dataset or split"
        )
    collected, num_classes = Collected("mmdet2"), 1
    for image_id, item in zip(images.ids_in_order_of_file(), taken(items), strict=True):
        masks = None
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], list):
            item, masks = item
            # Mask Scoring R-CNN's have scores of their own behind them.
            masks = masks[0] if isinstance(masks, tuple) else masks
            masks = [mask for of_class in masks for mask in to_plain(of_class)]
        if isinstance(item, (list, tuple)):
            # An array for each class.
            parts = [numbers_of(part, image_id) for part in item]
            num_classes = max(num_classes, len(parts))
            parts = [part.reshape(-1, 5) for part in parts if part.size]
            item = np.concatenate(parts) if parts else np.zeros((0, 5))
        collected.add(image_id, item, None, masks)
    return collected.to_set(num_classes)


def _read_predictions(items: list[dict]) -> ProposalSet:
    """Detectron2's: what its ``COCOEvaluator`` keeps of each image."""
    if not all("proposals" in item for item in items):
        entries = (to_plain(entry) for item in items for entry in item.get("instances", ()))
        result = _read_entries(entries)
        # Images without detections have no entry, but have been seen.
        seen = set(map(str, result.image_ids))
        for item in items:
            if str(to_plain(item["image_id"])) not in seen:
                result.image_ids.append(_plain_numbers(item)["image_id"])
                result.boxes.append(np.zeros((0, 4), np.float32))
                result.scores.append(np.zeros(0))
                if result.masks is not None:
                    result.masks.append([])
        return result
    collected = Collected("detectron2")
    for item in taken(items):
        found = to_plain(item["proposals"])
        if not isinstance(found, dict) or not isinstance(
            to_plain(found.get("proposal_boxes")), dict
        ):
            raise TypeError("its 'proposals' are not Detectron2's")
        boxes = to_plain(found["proposal_boxes"]).get("tensor")
        collected.add(item["image_id"], boxes, found.get("objectness_logits"), None)
    result = collected.to_set(1)
    result.scores_are_logits = True
    return result


def _read_entries(items: Iterable[dict]) -> ProposalSet:
    """COCO results."""
    entries, number = ResultEntries(), 0
    for item in items:
        number += 1
        entries.take(_plain_numbers({**item, "segmentation": _plain_mask(item)}))
    return entries.to_set(number)


class Collected:
    """Proposals of a file, image by image."""

    def __init__(self, format_name: str) -> None:
        self._format = format_name
        self._ids: list[int | str] = []
        self._boxes: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._masks: list[list[dict[str, Any]] | None] = []
        self._num_without = 0

    def add(self, image_id: Any, boxes: Any, scores: Any, masks: Any) -> None:
        """Add an image.

        Args:
            image_id: of any type; what it means is found later.
            boxes: (R, 4), or (R, 5) with scores.
            scores: (R,), None for none beside the boxes.
            masks: R encodings or bitmaps, or (R, H, W); None for none.

        Raises:
            TypeError, ValueError: if they do not belong together.
        """
        name = str(image_id)[:80]
        rows = numbers_of(boxes, name)
        if rows.size == 0:
            rows = np.zeros((0, 4 if scores is not None else 5))
        if rows.ndim != 2 or rows.shape[1] not in (4, 5):
            raise TypeError(f"the boxes of image {name} have the shape {rows.shape}, not (R, 4)")
        if scores is not None:
            scores_i = numbers_of(scores, name).reshape(-1).astype(np.float64)
        elif rows.shape[1] == 5:
            scores_i = rows[:, 4].astype(np.float64)
        else:
            self._num_without += len(rows)
            scores_i = np.zeros(len(rows))
        if len(scores_i) != len(rows):
            raise TypeError(f"image {name} has {len(rows)} boxes but {len(scores_i)} scores")
        masks_i = None if masks is None else _encode(to_plain(masks), name)
        if masks_i is not None and len(masks_i) != len(rows):
            raise TypeError(f"image {name} has {len(rows)} boxes but {len(masks_i)} masks")
        self._ids.append(image_id)
        self._boxes.append(rows[:, :4].astype(np.float32))
        self._scores.append(scores_i)
        self._masks.append(masks_i)

    def to_set(self, num_categories: int) -> ProposalSet:
        """All of it.

        Args:
            num_categories: that the proposals are sorted into; they are ranked together.
        """
        faults = []
        if self._num_without:
            faults.append(missing_scores(self._num_without, sum(map(len, self._boxes))))
        if num_categories > 1:
            faults.append(
                Fault(
                    "category-ids",
                    f"the boxes are sorted into {num_categories} categories; they are ranked "
                    "together and their categories ignored, because proposals are class-agnostic",
                )
            )
        without = [
            index for index, masks_i in enumerate(self._masks)
            if masks_i is None and len(self._boxes[index])
        ]  # fmt: skip
        has_masks = any(masks_i is not None for masks_i in self._masks)
        if has_masks and without:
            raise TypeError(f"image {str(self._ids[without[0]])[:80]} has no masks, but others do")
        return ProposalSet(
            self._format,
            self._ids,
            self._boxes,
            self._scores,
            [masks_i or [] for masks_i in self._masks] if has_masks else None,
            faults=faults,
        )


def numbers_of(value: Any, name: Any) -> np.ndarray:
    """An array of numbers.

    Raises:
        TypeError: for anything else.
    """
    value = to_plain(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise TypeError(
            f"image {str(name)[:80]} has a {type(value).__name__} instead of an array of numbers"
        )
    return value


def _encode(masks: Any, name: str) -> list[dict[str, Any]]:
    """R encodings of what stands for masks."""
    if not isinstance(masks, (list, tuple, np.ndarray)):
        raise TypeError(f"the masks of image {name} are a {type(masks).__name__}")
    masks = [to_plain(mask) for mask in masks]
    bitmaps = [isinstance(mask, np.ndarray) for mask in masks]
    if any(bitmaps):
        masks = [_encode_bitmap(m) if b else m for m, b in zip(masks, bitmaps, strict=True)]
    if not all(isinstance(mask, dict) for mask in masks):
        raise TypeError(f"a mask of image {name} is neither a run-length encoding nor a bitmap")
    sizes = [check_size(mask.get("size")) for mask in masks]
    return make_encodings([mask.get("counts") for mask in masks], sizes)


def _encode_bitmap(bitmap: np.ndarray) -> dict[str, Any]:
    """A bitmap, (H, W), as an encoding."""
    if bitmap.ndim != 2 or not bitmap.size or bitmap.dtype.kind not in "biu":
        raise TypeError(f"a mask of the shape {bitmap.shape} and type {bitmap.dtype}")
    return mask_util.encode(np.asfortranarray(bitmap > 0, np.uint8))


def _plain_mask(item: dict[str, Any]) -> Any:
    """The segmentation of an entry, a bitmap as an encoding."""
    mask = to_plain(item.get("segmentation"))
    return _encode_bitmap(mask) if isinstance(mask, np.ndarray) else mask


def _plain_numbers(item: dict[str, Any]) -> dict[str, Any]:
    """An entry whose arrays and NumPy's numbers are Python's."""
    plain = {key: to_plain(value) for key, value in item.items()}
    return {
        key: value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        for key, value in plain.items()
    }
