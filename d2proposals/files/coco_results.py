"""COCO's results as proposals: a JSON list of boxes (XYWH), masks or both, with scores.

Shape shorthand: R proposals of an image.
"""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .atomic_files import atomic_write
from .json_values import (
    ContentError,
    boxes_of_masks,
    check_finite,
    is_number,
    plain_id,
    plain_mask,
)
from .proposal_set import DatasetImages, Fault, ProposalSet, missing_scores
from .run_length_encodings import check_size, make_encodings

# What stands in the parsed list for an entry that has been taken out.
_TAKEN = None


class ResultEntries:
    """COCO's result entries, taken out of the file while it is parsed.

    A million parsed entries take a gigabyte, their numbers a thirtieth of it.
    """

    def __init__(self) -> None:
        self.ids: dict[int | str, int] = {}
        self._image = array("i")  # as an index of ids
        self._boxes = array("f")  # XYXY
        self._scores = array("d")
        self._without_box: list[int] = []
        self._counts: list[Any] = []
        self._sizes: list[tuple[int, int]] = []
        self._categories: set[Any] = set()
        self._num_without_score = 0
        self.error: ContentError | None = None

    def take_or_remember(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        """As :meth:`take`, but the first error is kept in ``error``: what the file is shows at its
        end."""
        is_entry = "image_id" in entry
        if self.error is not None:
            return _TAKEN if is_entry else entry
        try:
            return self.take(entry)
        except ContentError as error:
            self.error = error
            return _TAKEN

    def take(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        """A hook of json: keeps what it needs of an entry, and leaves other objects alone."""
        if "image_id" not in entry or not ("bbox" in entry or "segmentation" in entry):
            if {"image_id", "category_id", "score"} <= entry.keys():
                raise ContentError(
                    f"a result has neither 'bbox' nor 'segmentation', but {', '.join(entry)}"
                )
            return entry
        number = len(self._image)
        image_id = plain_id(entry["image_id"])
        self._image.append(self.ids.setdefault(image_id, len(self.ids)))
        segmentation = entry.get("segmentation")
        if isinstance(segmentation, dict):
            if len(self._counts) < number:
                raise ContentError(f"entry {number - 1} has no mask, but others do")
            self._sizes.append(check_size(segmentation.get("size")))
            self._counts.append(segmentation.get("counts"))
        elif segmentation is not None:
            raise ContentError(
                f"the segmentation of entry {number} is no run-length encoding "
                "(pycocotools.mask.encode, frPyObjects)"
            )
        elif self._counts:
            raise ContentError(f"entry {number} has no mask, but others do")
        box = entry.get("bbox")
        if box is None:
            if segmentation is None:
                raise ContentError(f"entry {number} has neither a box nor a mask")
            self._without_box.append(number)
            box = [0.0] * 4  # to be replaced by the mask's
        elif not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            raise ContentError(
                f"the bbox of entry {number} must be four numbers [x, y, w, h], not {box!r:.80}"
            )
        score = entry.get("score")
        if score is None:
            self._num_without_score += 1
            score = 0.0
        elif not is_number(score):
            raise ContentError(f"the score of entry {number} must be a number, not {score!r:.40}")
        x, y, width, height = map(float, box)
        self._boxes.extend((x, y, x + width, y + height))
        self._scores.append(score)
        category = entry.get("category_id")
        self._categories.add(category if isinstance(category, (int, str)) else None)
        return _TAKEN

    def to_set(self, num_items: int) -> ProposalSet:
        """The proposals by image; the file's order of images is that of their first entries."""
        if num_items != len(self._image):
            raise ContentError(
                f"{num_items - len(self._image)} of {num_items} items of the list are no results"
            )
        if not self.ids:
            return ProposalSet("coco", [], [], [])
        image = np.frombuffer(self._image, np.intc)
        # Views of what was read: a copy of each would be as much memory again.
        boxes = np.frombuffer(self._boxes, np.float32).reshape(-1, 4)
        scores = np.frombuffer(self._scores, np.float64)
        ends = np.cumsum(np.bincount(image, minlength=len(self.ids)))
        encodings = make_encodings(self._counts, self._sizes) if self._counts else None
        if self._without_box:
            boxes[self._without_box] = boxes_of_masks(
                [encodings[index] for index in self._without_box]
            )
        if (image[1:] < image[:-1]).any():
            order = np.argsort(image, kind="stable")
            boxes, scores = boxes[order], scores[order]
            encodings = encodings and [encodings[index] for index in order]
        masks = None
        if encodings:
            masks = [encodings[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return ProposalSet(
            "coco",
            list(self.ids),
            np.split(boxes, ends[:-1]),
            np.split(scores, ends[:-1]),
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


def write_coco(path: Path, proposals: ProposalSet, images: DatasetImages | None) -> None:
    """Write COCO's results, each proposal of category 1, with probabilities for scores.

    Args:
        path: of the file.
        proposals: with or without masks.
        images: not needed.

    Raises:
        ValueError: a box or a score is not finite.
    """
    check_finite(proposals)
    with atomic_write(path) as file:
        separator = "["
        for entries in result_entries(proposals):
            for entry in entries:
                file.write(separator + json.dumps(entry, allow_nan=False))
                separator = ",\n"
        file.write("[]\n" if separator == "[" else "]\n")


def result_entries(proposals: ProposalSet) -> Iterator[list[dict[str, Any]]]:
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
                entry["segmentation"] = plain_mask(mask)
        yield entries
