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

import io
import json
import os
from collections.abc import Iterator
from typing import IO, Any, TextIO

from .automatic_masks import find_automatic_masks, read_automatic_masks
from .coco_results import ResultEntries
from .json_list import list_items
from .json_values import ContentError
from .opened_files import open_content
from .own_format import OWN_FORMAT, read_own, take_own
from .proposal_set import DatasetImages, Fault, ProposalSet
from .safe_pickle import one_line

# Characters of an entry of COCO's results with its mask, and more.
_LONGEST_LINE = 1 << 20


def read_json(file: IO[bytes], path: str, images: DatasetImages | None) -> ProposalSet:
    """Read a JSON file of any of these formats.

    Args:
        file: open for reading, at its beginning, and seekable.
        path: of the file.
        images: of the dataset; without it, Segment-Anything's images have their names as ids.

    Raises:
        ValueError: in one line, if it is none of them or damaged.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    try:
        for take in (_take_results, take_own, _take_lines):
            if (taken := take(text)) is not None:
                return taken
            text.seek(0)
        content, entries = _parse(text)
        if entries.ids and isinstance(content, list):
            return entries.to_set(len(content))
        if isinstance(content, dict) and content.get("format") == OWN_FORMAT:
            return read_own(content)
        if content == [] and not _is_named_as_image(path, images):
            return ProposalSet("coco", [], [], [], None)
        per_image = find_automatic_masks(content, path)
        return read_automatic_masks(per_image, images)
    except ContentError as error:
        raise ValueError(f"{path} is not read: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not read: it is nested without end") from error
    except (json.JSONDecodeError, UnicodeError) as error:
        raise ValueError(f"{path} is truncated or damaged ({one_line(error)})") from error
    # pycocotools complains by several kinds of exceptions.
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not read: {one_line(error)}") from error
    finally:
        # Whoever opened the file closes it.
        text.detach()


def _take_results(text: TextIO) -> ProposalSet | None:
    """COCO's results, never all of their text in memory; None for anything else, also for what is
    damaged, which is read and complained about as a whole."""
    return _take_entries(list_items(text))


def _take_lines(text: TextIO) -> ProposalSet | None:
    """COCO's results as JSON lines; otherwise as :func:`_take_results`."""
    # A file in one line is no such file, and may be long.
    if not text.readline(_LONGEST_LINE).endswith("\n"):
        return None
    text.seek(0)
    return _take_entries(json.loads(line) for line in text if line.strip())


def _take_entries(items: Iterator[Any]) -> ProposalSet | None:
    entries, number = ResultEntries(), 0
    try:
        for item in items:
            if not isinstance(item, dict) or entries.take(item) is not None:
                return None
            number += 1
    except (json.JSONDecodeError, UnicodeError):
        return None
    return entries.to_set(number) if number else None


def _parse(text: TextIO) -> tuple[Any, ResultEntries]:
    """The content of a JSON file, or the list of those of JSON lines, without COCO's results, which
    come apart."""
    entries = ResultEntries()
    try:
        content = json.load(text, object_hook=entries.take_or_remember)
        # Annotations, whose masks are polygons, are no results with an error.
        if entries.error is not None and not (isinstance(content, dict) and "images" in content):
            raise entries.error
        return content, entries
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
    text.seek(0)
    entries = ResultEntries()
    lines = [json.loads(line, object_hook=entries.take) for line in text if line.strip()]
    if not entries.ids:
        raise ContentError("it has a JSON value on each line, but these are no COCO results")
    return lines, entries


def read_json_folder(path: str, images: DatasetImages | None) -> ProposalSet:
    """Read a folder of Segment-Anything's files, one per image; see :func:`read_json`."""
    names = sorted(name for name in os.listdir(path) if name.endswith((".json", ".json.gz")))
    if not names:
        raise ValueError(f"{path} is {_what_folder_is(path)}")
    sets = []
    for name in names:
        unpacked = os.path.join(path, name.removesuffix(".gz"))
        with open_content(os.path.join(path, name)) as file:
            item = read_json(file, unpacked, images)
        if item.format == "coco" and not item.image_ids:
            # An empty list, here of an image in which nothing was found.
            item = read_automatic_masks(find_automatic_masks([], unpacked), images)
        sets.append(item)
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


def _what_folder_is(path: str) -> str:
    """What a folder without JSON files is, and what to do instead of giving it."""
    inside = sorted(os.scandir(path), key=lambda entry: entry.name)
    folders = [entry.path for entry in inside if entry.is_dir()]
    names = [name for folder in [path, *folders[:3]] for name in os.listdir(folder)]
    if any(name.endswith(".png") for name in names) and (folders or "metadata.csv" in names):
        return (
            "a folder of Segment-Anything's masks as PNG files, which are not read: write them as "
            "run-length encodings (amg.py --convert-to-rle)"
        )
    if any(name.endswith((".txt", ".xml", ".csv")) for name in names):
        return (
            "a folder of text files, one per image, which are not read: write one file of COCO "
            "results, a JSON list of {image_id, bbox [x, y, w, h], score}"
        )
    return (
        "a folder without JSON files, one per image; give a file by its own name, or "
        "Segment-Anything's folder"
    )


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
