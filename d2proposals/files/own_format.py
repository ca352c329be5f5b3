"""This project's own file of proposals: JSON with boxes, logits and masks, exact to the bit.

Shape shorthand: R proposals of an image.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .atomic_files import atomic_write
from .json_list import list_items
from .json_values import ContentError, check_finite, is_number, plain_id
from .proposal_set import DatasetImages, ProposalSet
from .run_length_encodings import check_size, make_encodings

OWN_FORMAT = "d2proposals"

# What is in front of the entries and behind them, as it is written here.
_HEAD = '{"format": "d2proposals", "version": 1, "proposals": ['
_BEFORE = re.compile(re.escape(_HEAD[:-1]))
_BEHIND = re.compile(r"\}\s*")


def read_own(content: dict[str, Any]) -> ProposalSet:
    """The proposals of this project's own file.

    Args:
        content: of the file.

    Raises:
        ValueError: it is of another version, or an image lacks what it must have: an id, boxes, as
            many logits, and masks of one size, as many too, or none in any image.
    """
    if content.get("version") != 1:
        raise ContentError(f"it is of version {content.get('version')!r}, not 1")
    entries = content.get("proposals")
    if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
        raise ContentError("its 'proposals' must be a list with an object per image")
    return _read_entries(entries, any("counts" in entry for entry in entries))


def take_own(text: TextIO) -> ProposalSet | None:
    """The proposals of a file as it is written here, never all of its text in memory; None for any
    other, which is read, and complained about, as a whole."""
    items = list_items(text, _BEFORE, _BEHIND)
    try:
        first = next(items, None)
        return _read_entries(_alike(first, items), "counts" in first)
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


def _alike(first: dict[str, Any], items: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """All entries, the first one among them."""
    for entry in itertools.chain([first], items):
        if not isinstance(entry, dict) or ("counts" in entry) != ("counts" in first):
            raise ContentError("some images have masks, some have none")
        yield entry


def _read_entries(entries: Iterable[dict[str, Any]], has_masks: bool) -> ProposalSet:
    ids, boxes, scores, masks = [], [], [], []
    for entry in entries:
        image_id = plain_id(entry.get("image_id"))
        boxes_i, scores_i = entry.get("boxes"), entry.get("objectness_logits")
        rows_are_boxes = isinstance(boxes_i, list) and all(
            isinstance(row, list) and len(row) == 4 and all(map(is_number, row)) for row in boxes_i
        )
        if not rows_are_boxes or not isinstance(scores_i, list):
            raise ContentError(f"image {image_id} needs 'boxes', rows of four numbers, and logits")
        if len(scores_i) != len(boxes_i) or not all(map(is_number, scores_i)):
            raise ContentError(f"image {image_id} must have as many numbers as logits as boxes")
        ids.append(image_id)
        boxes.append(np.array(boxes_i, np.float32).reshape(-1, 4))
        scores.append(np.array(scores_i, np.float64))
        if has_masks:
            counts = entry.get("counts")
            if not isinstance(counts, list) or len(counts) != len(boxes_i):
                raise ContentError(f"image {image_id} must have as many masks as boxes")
            size = check_size(entry.get("size")) if counts else (1, 1)
            masks.append(make_encodings(counts, [size] * len(counts)))
    return ProposalSet(
        OWN_FORMAT, ids, boxes, scores, masks if has_masks else None, scores_are_logits=True
    )


def write_own(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    """Write this project's own file.

    Args:
        path: of the file.
        proposals: with or without masks.
        images: not needed.

    Raises:
        ValueError: a box or a score is not finite.
    """
    check_finite(proposals)
    masks = itertools.repeat(None) if proposals.masks is None else proposals.masks
    entries = zip(proposals.image_ids, proposals.boxes, proposals.logits(), masks, strict=False)
    _write_entries(path, itertools.starmap(_entry, entries))


def write_own_images(
    path: str | os.PathLike,
    images: Iterable[tuple[int | str, np.ndarray, np.ndarray, Sequence[dict[str, Any]]]],
) -> None:
    """Write this project's own file image by image, never all of it in memory.

    Args:
        path: of the file.
        images: of each its id, (R, 4) boxes XYXY, (R,) logits, and R masks as encodings.

    Raises:
        ValueError: a box or a score is not finite. Nothing is written then.
    """

    def entries() -> Iterator[dict[str, Any]]:
        for image_id, boxes, logits, masks in images:
            own = ProposalSet(OWN_FORMAT, [image_id], [boxes], [logits], scores_are_logits=True)
            check_finite(own)
            yield _entry(image_id, boxes, logits, masks)

    _write_entries(path, entries())


def _write_entries(path: str | os.PathLike, entries: Iterable[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        file.write(_HEAD)
        for index, entry in enumerate(entries):
            # Each as a text of its own: the encoder of texts is the fast one, that of files is not.
            file.write((", " if index else "") + json.dumps(entry, allow_nan=False))
        file.write("]}")


def _entry(
    image_id: int | str,
    boxes: np.ndarray,
    logits: np.ndarray,
    masks: Sequence[dict[str, Any]] | None,
) -> dict[str, Any]:
    """What the file says of an image."""
    entry = {
        "image_id": image_id,
        "boxes": boxes.astype(np.float64).tolist(),
        "objectness_logits": logits.tolist(),
    }
    if masks is not None:
        entry["size"] = list(masks[0]["size"]) if masks else None
        entry["counts"] = [mask["counts"].decode("ascii") for mask in masks]
    return entry
