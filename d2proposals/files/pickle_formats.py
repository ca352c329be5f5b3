"""Pickled files of proposals: Detectron2's precomputed ones, and mmdetection's.

Shape shorthand: R proposals of an image.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from .atomic_files import atomic_write
from .precomputed_format import parse_proposals, write_proposal_file
from .proposal_set import DatasetImages, Fault, ProposalSet, file_names, missing_scores, name_some
from .safe_pickle import load_pickle, to_plain


def read_pickle(path: str, images: DatasetImages | None) -> ProposalSet:
    content = load_pickle(path)
    if isinstance(content, dict) and {"ids", "indexes", "objectness_logits"} & content.keys():
        parsed = parse_proposals(content, path)
        scores = [logits_i.astype(np.float64) for logits_i in parsed.objectness_logits]
        return ProposalSet(
            "detectron2", parsed.image_ids, parsed.boxes, scores, scores_are_logits=True
        )
    try:
        if isinstance(content, dict):
            return _read_mmdet3(content, images)
        if isinstance(content, (list, tuple)):
            return _read_mmdet2(content, images)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not read: {error}") from error
    raise ValueError(
        f"{path} is not a proposal file: it holds a {type(content).__name__}; known formats of "
        "pickles: detectron2, mmdet3, mmdet2"
    )


def _read_mmdet3(content: dict[Any, Any], images: DatasetImages | None) -> ProposalSet:
    """File name -> ``InstanceData`` or dictionary with bboxes and scores, or (R, 5) array."""
    ids, boxes, scores, num_without = [], [], [], 0
    for name, value in content.items():
        value = to_plain(value)
        if isinstance(value, dict):
            boxes_i = _numbers(to_plain(value.get("bboxes", value.get("boxes"))), name)
            scores_i = to_plain(value.get("scores"))
            scores_i = None if scores_i is None else _numbers(scores_i, name).reshape(-1)
        else:
            boxes_i, scores_i = _split_scores(_numbers(value, name), name)
        if boxes_i.size == 0:
            boxes_i = np.zeros((0, 4))
        if boxes_i.ndim != 2 or boxes_i.shape[1] != 4:
            raise TypeError(f"the boxes of {str(name)[:80]} have the shape {boxes_i.shape}")
        if scores_i is None:
            num_without += len(boxes_i)
            scores_i = np.zeros(len(boxes_i))
        if len(scores_i) != len(boxes_i):
            raise TypeError(f"{str(name)[:80]} has {len(boxes_i)} boxes but {len(scores_i)} scores")
        image_id = images.find(name) if images and isinstance(name, str) else None
        ids.append(name if image_id is None else image_id)
        boxes.append(boxes_i.astype(np.float32))
        scores.append(scores_i.astype(np.float64))
    faults = [missing_scores(num_without, sum(map(len, boxes)))] if num_without else []
    return ProposalSet("mmdet3", ids, boxes, scores, faults=faults)


def _read_mmdet2(content: list | tuple, images: DatasetImages | None) -> ProposalSet:
    """(R, 5) arrays of the images in the dataset's order, or lists of such arrays by category."""
    if images is None:
        raise TypeError(
            "its images have no ids, only the dataset's order; name the dataset (--dataset or --gt)"
        )
    if len(content) != len(images.ids):
        raise TypeError(
            f"it has {len(content)} images without ids, the dataset has {len(images.ids)}: it is "
            "of another dataset or split"
        )
    boxes, scores, num_without, num_categories = [], [], 0, 1
    for image_id, item in zip(images.ids, content, strict=True):
        item = to_plain(item)
        if isinstance(item, (list, tuple)):
            # A detector's results: an array for each category.
            parts = [_numbers(to_plain(part), image_id) for part in item]
            num_categories = max(num_categories, len(parts))
            parts = [part.reshape(-1, 5) for part in parts if part.size]
            item = np.concatenate(parts) if parts else np.zeros((0, 5))
        boxes_i, scores_i = _split_scores(_numbers(item, image_id), image_id)
        if scores_i is None:
            num_without += len(boxes_i)
            scores_i = np.zeros(len(boxes_i))
        boxes.append(boxes_i.astype(np.float32))
        scores.append(scores_i.astype(np.float64))
    faults = [missing_scores(num_without, sum(map(len, boxes)))] if num_without else []
    if num_categories > 1:
        faults.append(
            Fault(
                "category-ids",
                f"the boxes are sorted into {num_categories} categories; they are ranked together "
                "and their categories ignored, because proposals are class-agnostic",
            )
        )
    return ProposalSet("mmdet2", list(images.ids), boxes, scores, faults=faults)


def _numbers(value: Any, name: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise TypeError(
            f"image {str(name)[:80]} has a {type(value).__name__} instead of an array of numbers"
        )
    return value


def _split_scores(rows: np.ndarray, name: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Boxes and scores of (R, 5) rows; None for the scores of (R, 4)."""
    if rows.size == 0:
        return np.zeros((0, 4)), np.zeros(0)
    if rows.ndim != 2 or rows.shape[1] not in (4, 5):
        raise TypeError(f"image {str(name)[:80]} has rows of the shape {rows.shape}, not (R, 5)")
    return rows[:, :4], rows[:, 4] if rows.shape[1] == 5 else None


def write_detectron2(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    write_proposal_file(path, proposals.image_ids, proposals.boxes, proposals.logits())


def write_mmdet3(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    names = file_names(proposals, images)
    probabilities = proposals.probabilities()
    _dump(
        path,
        {
            # The folder and the name, by which mmdetection finds an image's proposals.
            "/".join(name.replace("\\", "/").split("/")[-2:]): {
                "bboxes": boxes_i,
                "scores": scores_i.astype(np.float32),
            }
            for name, boxes_i, scores_i in zip(names, proposals.boxes, probabilities, strict=True)
        },
    )


def write_mmdet2(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    if images is None:
        raise ValueError("the format mmdet2 is in the dataset's order; name it (--dataset or --gt)")
    position = {str(image_id): index for index, image_id in enumerate(proposals.image_ids)}
    foreign = position.keys() - set(map(str, images.ids))
    if foreign:
        raise ValueError(
            f"{len(foreign)} images are not in the dataset, whose order the format mmdet2 has: "
            f"{name_some(sorted(foreign))}"
        )
    probabilities = proposals.probabilities()
    rows = []
    for image_id in images.ids:
        index = position.get(str(image_id))
        if index is None:
            rows.append(np.zeros((0, 5), np.float32))
        else:
            scores = probabilities[index][:, None].astype(np.float32)
            rows.append(np.concatenate([proposals.boxes[index], scores], axis=1))
    _dump(path, rows)


def _dump(path: Path, content: Any) -> None:
    with atomic_write(path, "wb") as file:
        pickle.dump(content, file, protocol=4)
