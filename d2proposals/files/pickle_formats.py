"""Pickled files of proposals: Detectron2's precomputed ones, and mmdetection's.

Shape shorthand: R proposals of an image.
"""

import pickle
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np

from .atomic_files import atomic_write
from .detector_results import Collected, read_result_list
from .precomputed_format import parse_proposals, write_proposal_file
from .proposal_set import (
    DatasetImages,
    ProposalSet,
    file_names,
    missing_scores,
    name_some,
    whole_number,
)
from .safe_pickle import load_with_tensors, one_line, taken, to_plain

_NONE = type(None)


def read_pickle(file: IO[bytes], path: str, images: DatasetImages | None) -> ProposalSet:
    """Read a pickle, or a file of ``torch.save``, of any of these formats.

    Args:
        file: open for reading, at its beginning, and seekable.
        path: of the file.
        images: of the dataset, for formats that have no ids of their own.

    Raises:
        ValueError: in one line, if it is none of them, damaged, or asks for code.
    """
    content = load_with_tensors(file, path)
    if isinstance(content, dict) and {"ids", "indexes", "objectness_logits"} & content.keys():
        return _read_detectron2(content, path)
    try:
        if isinstance(content, dict):
            return _read_mmdet3(content, images)
        if isinstance(content, (list, tuple)):
            return read_result_list(content, path, images)
    # What a file has in the place of what it should have raises any of these.
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError) as error:
        raise ValueError(f"{path} is not read: {one_line(error)}") from error
    raise ValueError(
        f"{path} is not a proposal file: it holds a {type(content).__name__}; known formats of "
        "pickles: detectron2, mmdet3, mmdet2, coco"
    )


def _read_detectron2(content: dict[str, Any], path: str) -> ProposalSet:
    key = "scores" if "scores" in content else "objectness_logits"
    boxes, logits = to_plain(content.get("boxes")), to_plain(content.get(key))
    faults = []
    if isinstance(boxes, list) and isinstance(logits, list) and set(map(type, logits)) == {_NONE}:
        # Some methods have an order, but no scores.
        numbers = [len(item) if hasattr(item, "__len__") else 0 for item in map(to_plain, boxes)]
        content = {**content, key: [np.zeros(number) for number in numbers]}
        faults.append(missing_scores(sum(numbers), sum(numbers)))
    key = "indexes" if "indexes" in content else "ids"
    if isinstance(ids := to_plain(content.get(key)), (list, np.ndarray)):
        content = {**content, key: list(map(whole_number, ids))}
    parsed = parse_proposals(content, path, consume=True)
    scores = [logits_i.astype(np.float64) for logits_i in taken(parsed.objectness_logits)]
    return ProposalSet(
        "detectron2", parsed.image_ids, parsed.boxes, scores, scores_are_logits=True, faults=faults
    )


def _read_mmdet3(content: dict[Any, Any], images: DatasetImages | None) -> ProposalSet:
    """File name -> ``InstanceData`` or dictionary with bboxes and scores, or (R, 5) array."""
    collected = Collected("mmdet3")
    for name in list(content):
        value = to_plain(content.pop(name))
        image_id = images.find(name) if images and isinstance(name, str) else None
        image_id = name if image_id is None else image_id
        if isinstance(value, dict):
            boxes, masks = value.get("bboxes", value.get("boxes")), value.get("masks")
            collected.add(image_id, boxes, value.get("scores"), masks)
        else:
            collected.add(image_id, value, None, None)
    return collected.to_set(1)


def write_detectron2(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    """Write Detectron2's precomputed proposals, with logits for scores and without masks.

    Args:
        path: of the file.
        proposals: by descending score.
        images: not needed.

    Raises:
        ValueError: an image has not as many scores as boxes, or an id occurs more than once.
    """
    write_proposal_file(path, proposals.image_ids, proposals.boxes, proposals.logits())


def write_mmdet3(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    """Write mmdetection 3's proposals by file name, with probabilities and without masks.

    Args:
        path: of the file.
        proposals: of the dataset's images.
        images: tell their file names; an image without one has its id for a name.

    Raises:
        ValueError: several images have the same folder and name.
    """
    # The folder and the name, by which mmdetection finds an image's proposals.
    names = [
        "/".join(name.replace("\\", "/").split("/")[-2:]) for name in file_names(proposals, images)
    ]
    shared = [name for name, number in Counter(names).items() if number > 1]
    if shared:
        raise ValueError(
            "the format mmdet3 tells images by folder and name, and several images have the same: "
            f"{name_some(shared)}"
        )
    probabilities = proposals.probabilities()
    _dump(
        path,
        {
            name: {"bboxes": boxes_i, "scores": scores_i.astype(np.float32)}
            for name, boxes_i, scores_i in zip(names, proposals.boxes, probabilities, strict=True)
        },
    )


def write_mmdet2(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    """Write mmdetection 2's proposals, an array for each image in the order of the dataset's file,
    with probabilities and without masks; an image without proposals has an empty one.

    Args:
        path: of the file.
        proposals: of the dataset's images, or some of them.
        images: all of the dataset.

    Raises:
        ValueError: there is no dataset, an image is not in it, or the order of its file is unknown.
    """
    if images is None:
        raise ValueError("the format mmdet2 is in the dataset's order; name it (--dataset or --gt)")
    ids = images.ids_in_order_of_file()
    position = {str(image_id): index for index, image_id in enumerate(proposals.image_ids)}
    foreign = position.keys() - set(map(str, ids))
    if foreign:
        raise ValueError(
            f"{len(foreign)} images are not in the dataset, whose order the format mmdet2 has: "
            f"{name_some(sorted(foreign))}"
        )
    probabilities = proposals.probabilities()
    rows = []
    for image_id in ids:
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
