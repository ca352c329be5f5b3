"""Files of proposals in any known format: recognised, read and written.

* ``detectron2``: Detectron2's precomputed proposals, a pickle with logits and without masks.
* ``coco``: COCO's results, JSON with boxes (XYWH), masks or both, and scores.
* ``mmdet3``: mmdetection 3's dumped proposals, a pickle from file names to boxes and scores.
* ``mmdet2``: mmdetection 2's, a pickle of (R, 5) arrays in the dataset's order.
* ``sam``: Segment-Anything's automatic masks, a folder with a JSON file per image.
* ``d2proposals``: this project's own JSON, with boxes, logits and masks.

A format is recognised by its content, never by its name. Pickles are read without running them.

Shape shorthand: R proposals of an image.
"""

import json
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from .atomic_files import atomic_write
from .json_formats import missing_scores, own_content, read_json, read_json_folder
from .precomputed_format import parse_proposals, write_proposal_file
from .proposal_set import DatasetImages, Fault, ProposalSet, name_some
from .safe_pickle import load_pickle, to_plain


def read_proposals(path: str | os.PathLike, images: DatasetImages | None = None) -> ProposalSet:
    """Read a file, or Segment-Anything's folder, of proposals in any known format.

    Args:
        path: of the file or folder.
        images: the dataset's images, for formats that have no ids of their own.

    Returns:
        The proposals as they stand in the file, with what can be told to be wrong without the
        dataset in ``faults``. Scores are not sorted.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: in one line, if the format is unknown or the content damaged.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return read_json_folder(path, images)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no proposal file at {path}")
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        raise ValueError(f"{path} is empty; write it again")
    # No pickle begins with a brace or a bracket of JSON.
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
        return read_json(path, images)
    return _read_pickle(path, images)


def write_proposals(
    path: str | os.PathLike,
    proposals: ProposalSet,
    format_name: str,
    images: DatasetImages | None = None,
) -> None:
    """Write proposals in a known format, atomically (a folder: each of its files).

    Args:
        path: of the file, for "sam" of the folder.
        proposals: boxes without masks may go to any format but "sam"; masks are left out of
            formats that have none.
        format_name: one of ``FORMATS``.
        images: the dataset's images: mmdetection's formats need them, for order or file names.

    Raises:
        ValueError: if the format cannot hold the proposals, or needs the dataset.
    """
    if format_name not in _WRITERS:
        raise ValueError(f"there is no format {format_name!r}; known: {', '.join(FORMATS)}")
    if len(set(map(str, proposals.image_ids))) < len(proposals.image_ids):
        raise ValueError("an image id occurs more than once; each image is written once")
    _WRITERS[format_name](Path(path), proposals, images)


def reinterpret_boxes(proposals: ProposalSet, box_mode: str) -> None:
    """Take the boxes of a file for what they are, against its format's convention; in place.

    Args:
        proposals: of a file; those of Segment-Anything have the boxes of their masks anyway.
        box_mode: "xyxy" or "xywh", what stands in the file.
    """
    convention = "xywh" if proposals.format == "coco" else "xyxy"
    if proposals.format == "sam" or box_mode == convention:
        return
    # On reading, XYWH has become XYXY by adding the corner.
    sign = -1 if convention == "xywh" else 1
    for boxes_i in proposals.boxes:
        boxes_i[:, 2:] += sign * boxes_i[:, :2]


def merge_images(proposals: ProposalSet, images: DatasetImages | None = None) -> ProposalSet:
    """One entry for each image, its proposals by descending score.

    Args:
        proposals: of a file, in which an image may be listed several times.
        images: of the dataset: all of them get an entry, which Detectron2 needs, in the dataset's
            order; images that are not in the dataset follow.

    Returns:
        A new set, without faults.
    """
    indices: dict[str, list[int]] = {}
    ids: dict[str, int | str] = {}
    for image_id in images.ids if images else ():
        indices[str(image_id)], ids[str(image_id)] = [], image_id
    for index, image_id in enumerate(proposals.image_ids):
        indices.setdefault(str(image_id), []).append(index)
        ids.setdefault(str(image_id), image_id)
    boxes, scores = [], []
    masks = None if proposals.masks is None else []
    for listed in indices.values():
        scores_i = np.concatenate([np.zeros(0), *(proposals.scores[index] for index in listed)])
        boxes_i = [np.zeros((0, 4), np.float32), *(proposals.boxes[index] for index in listed)]
        order = np.argsort(-scores_i, kind="stable")
        boxes.append(np.concatenate(boxes_i)[order])
        scores.append(scores_i[order])
        if masks is not None:
            masks_i = [mask for index in listed for mask in proposals.masks[index]]
            masks.append([masks_i[rank] for rank in order])
    return ProposalSet(
        proposals.format, list(ids.values()), boxes, scores, masks, proposals.scores_are_logits
    )


def drop_proposals(proposals: ProposalSet, top: int | None, unusable: bool) -> ProposalSet:
    """Leave proposals out.

    Args:
        proposals: sorted, as of :func:`merge_images`.
        top: keep so many best-scored ones of each image; None for all.
        unusable: leave out those that are not finite or have a negative side.
    """
    kept = []
    for boxes_i, scores_i in zip(proposals.boxes, proposals.scores, strict=True):
        keep = np.ones(len(boxes_i), bool)
        if unusable:
            keep = np.isfinite(boxes_i).all(axis=1) & np.isfinite(scores_i)
            keep &= (boxes_i[:, 2:] >= boxes_i[:, :2]).all(axis=1)
        kept.append(np.flatnonzero(keep)[:top])
    masks = proposals.masks
    if masks is not None:
        masks = [[m[rank] for rank in kept_i] for m, kept_i in zip(masks, kept, strict=True)]
    return ProposalSet(
        proposals.format,
        proposals.image_ids,
        [boxes_i[kept_i] for boxes_i, kept_i in zip(proposals.boxes, kept, strict=True)],
        [scores_i[kept_i] for scores_i, kept_i in zip(proposals.scores, kept, strict=True)],
        masks,
        proposals.scores_are_logits,
    )


def _read_pickle(path: str, images: DatasetImages | None) -> ProposalSet:
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
        f"{path} is not a proposal file: it holds a {type(content).__name__}; known formats: "
        f"{', '.join(FORMATS)}"
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


def _write_detectron2(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    write_proposal_file(path, proposals.image_ids, proposals.boxes, proposals.logits())


def _write_own(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    _check_finite(proposals)
    with atomic_write(path) as file:
        json.dump(own_content(proposals), file, allow_nan=False)


def _write_coco(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    _check_finite(proposals)
    with atomic_write(path) as file:
        separator = "["
        for entries in _result_entries(proposals):
            for entry in entries:
                file.write(separator + json.dumps(entry, allow_nan=False))
                separator = ",\n"
        file.write("[]\n" if separator == "[" else "]\n")


def _result_entries(proposals: ProposalSet) -> Iterator[list[dict[str, Any]]]:
    """COCO's result entries of each image."""
    probabilities = proposals.probabilities()
    for index, image_id in enumerate(proposals.image_ids):
        boxes = proposals.boxes[index].astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        entries = [
            {"image_id": image_id, "category_id": 1, "bbox": box, "score": score}
            for box, score in zip(boxes.tolist(), probabilities[index].tolist(), strict=True)
        ]
        if proposals.masks is not None:
            for entry, mask in zip(entries, proposals.masks[index], strict=True):
                entry["segmentation"] = _plain_mask(mask)
        yield entries


def _write_mmdet3(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    names = _file_names(proposals, images)
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


def _write_mmdet2(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
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


def _write_sam(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    if proposals.masks is None:
        raise ValueError("the format sam holds masks, and these proposals have boxes only")
    _check_finite(proposals)
    names = [os.path.splitext(os.path.basename(name))[0] for name in _file_names(proposals, images)]
    if len(set(names)) < len(names):
        raise ValueError("the format sam has a file per image, and two images have the same name")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists; give the name of a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The folder takes its name when all of its files are there.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        for name, entries in zip(names, _result_entries(proposals), strict=True):
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


def _plain_mask(mask: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}


def _file_names(proposals: ProposalSet, images: DatasetImages | None) -> list[str]:
    """The file name of each image; its id where the dataset is not given."""
    if images is None:
        return [str(image_id) for image_id in proposals.image_ids]
    names = {
        str(image_id): name or str(image_id)
        for image_id, name in zip(images.ids, images.file_names, strict=True)
    }
    return [names.get(str(image_id), str(image_id)) for image_id in proposals.image_ids]


def _check_finite(proposals: ProposalSet) -> None:
    """Raise ValueError for numbers that standard JSON cannot say."""
    for image_id, boxes_i, scores_i in zip(
        proposals.image_ids, proposals.boxes, proposals.scores, strict=True
    ):
        if not (np.isfinite(boxes_i).all() and np.isfinite(scores_i).all()):
            raise ValueError(
                f"image {image_id} has a box or a score that is not finite, which JSON cannot say; "
                "drop it (--drop-unusable)"
            )


def _dump(path: Path, content: Any) -> None:
    with atomic_write(path, "wb") as file:
        pickle.dump(content, file, protocol=4)


_WRITERS: dict[str, Callable[[Path, ProposalSet, DatasetImages | None], None]] = {
    "detectron2": _write_detectron2,
    "coco": _write_coco,
    "mmdet3": _write_mmdet3,
    "mmdet2": _write_mmdet2,
    "sam": _write_sam,
    "d2proposals": _write_own,
}
FORMATS = tuple(_WRITERS)
