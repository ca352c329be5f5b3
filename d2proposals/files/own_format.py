"""This project's own file of proposals: JSON with boxes, logits and masks, exact to the bit.

Shape shorthand: R proposals of an image.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .atomic_files import atomic_write
from .json_list import list_items
from .json_values import ContentError, check_finite, is_number, plain_id
from .proposal_set import DatasetImages, ProposalSet
from .run_length_encodings import check_size, make_encodings

OWN_FORMAT = "d2proposals"

# What is in front of the entries and behind them, as ``write_own`` writes it.
_BEFORE = re.compile(r'\{"format": "d2proposals", "version": 1, "proposals": ')
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
    with atomic_write(path) as file:
        json.dump(own_content(proposals), file, allow_nan=False)


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
    return {"format": OWN_FORMAT, "version": 1, "proposals": entries}
