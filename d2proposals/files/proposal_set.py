"""Proposals of a whole dataset, whatever file they came from, and what was wrong with the file.

Shape shorthand: R proposals of an image.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# A message names at most so many images.
_NUM_NAMED = 5


class Fault(NamedTuple):
    """One kind of fault of a file of proposals.

    Attributes:
        name: for programs and for ``--strict``, e.g. "not-finite".
        message: what is wrong, where, and how to mend it; one line.
    """

    name: str
    message: str


@dataclass
class ProposalSet:
    """The proposals of a set of images, in the order of their file.

    Attributes:
        format: name of the file's format.
        image_ids: of the dataset, or names of image files where the format has no ids.
        boxes: per image (R, 4) float32, XYXY in pixels of the original image.
        scores: per image (R,) float64, higher is better.
        masks: per image R run-length encodings as pycocotools has them; None without masks.
        scores_are_logits: or else probabilities, or numbers of unknown meaning.
        faults: what is wrong with the file.
    """

    format: str
    image_ids: list[int | str]
    boxes: list[np.ndarray]
    scores: list[np.ndarray]
    masks: list[list[dict[str, Any]]] | None = None
    scores_are_logits: bool = False
    faults: list[Fault] = field(default_factory=list)

    def logits(self) -> list[np.ndarray]:
        """(R,) float64 scores of each image as logits, in an order that is the scores'.

        Numbers that are no probabilities stay as they are.
        """
        return list(map(logits_of, self.scores)) if self.has_probabilities() else self.scores

    def has_probabilities(self) -> bool:
        """Whether the scores are probabilities, as far as can be told."""
        scores = (scores_i for scores_i in self.scores if len(scores_i))
        return not self.scores_are_logits and all(
            scores_i.min() >= 0 and scores_i.max() <= 1 for scores_i in scores
        )

    def probabilities(self) -> list[np.ndarray]:
        """(R,) float64 scores of each image as probabilities, or as they are if they are neither
        logits nor probabilities."""
        if not self.scores_are_logits:
            return self.scores
        # The smaller exponential of the two cannot overflow.
        small = [np.exp(-np.abs(scores_i)) for scores_i in self.scores]
        return [
            np.where(scores_i >= 0, 1 / (1 + small_i), small_i / (1 + small_i))
            for scores_i, small_i in zip(self.scores, small, strict=True)
        ]


class DatasetImages:
    """What a format that has no image ids, or no sizes, needs to know of the dataset's images.

    Attributes:
        ids: in the dataset's order.
        file_names: of the images, "" where unknown.
        sizes: (height, width) in pixels, None where unknown.
        ids_in_file: of all images of the dataset's COCO-style file, in the file's order; None
            without one.
    """

    def __init__(
        self,
        ids: Sequence[int | str],
        file_names: Sequence[str],
        sizes: Sequence[tuple[int, int] | None],
        ids_in_file: Sequence[int | str] | None = None,
    ) -> None:
        self.ids_in_file = ids_in_file
        self.ids, self.file_names, self.sizes = list(ids), list(file_names), list(sizes)
        self._by_text = {str(image_id): image_id for image_id in self.ids}
        self._by_name: dict[str, int | str | None] = {}
        self._by_number: dict[Any, int | str | None] = {}
        self._by_stem: dict[Any, int | str | None] = {}
        for image_id, name in zip(self.ids, self.file_names, strict=True):
            _enter(self._by_number, whole_number(image_id), image_id)
            keys = _name_keys(name) if name else []
            for key in keys:
                _enter(self._by_name, key, image_id)
            for stem in keys[-1:]:
                _enter(self._by_stem, whole_number(stem), image_id)

    def resolve(self, image_ids: Sequence[int | str]) -> tuple[list[int | str], list[int | str]]:
        """Find out which images of the dataset the ids of a file mean.

        An id can be read in four ways: as it stands; as a number ("0139" for 139); as the name of
        the image's file, with or without folder and suffix; as the number in that name (139 for
        000000000139.jpg). If the first makes sense of all ids of the file, it is taken; else those
        of the others that do. If none does, an id that does not stand for itself is read in the
        second and in the third way. It means an image only if all ways taken find that one.

        Args:
            image_ids: of a file.

        Returns:
            list: for each id the dataset's, or the same id where it means no image.
            list: ids that could mean several images, and were left as they are.
        """
        by_text = [self._by_text.get(str(image_id)) for image_id in image_ids]
        if None not in by_text:
            return by_text, []
        by_number = [self._by_number.get(whole_number(image_id)) for image_id in image_ids]
        by_name = [self.find(x) if isinstance(x, str) else None for x in image_ids]
        by_stem = [self._by_stem.get(whole_number(image_id)) for image_id in image_ids]
        ways = [way for way in (by_number, by_name, by_stem) if None not in way]
        if not ways:
            ways = [by_number, by_name]
            # What stands for itself means nothing else.
            ways = [
                [x if itself is None else itself for x, itself in zip(way, by_text, strict=True)]
                for way in ways
            ]
        resolved, ambiguous = [], []
        for image_id, *readings in zip(image_ids, *ways, strict=True):
            found = {str(reading): reading for reading in readings if reading is not None}
            if len(found) > 1:
                ambiguous.append(image_id)
            resolved.append(next(iter(found.values())) if len(found) == 1 else image_id)
        return resolved, ambiguous

    def ids_in_order_of_file(self) -> list[int | str]:
        """The ids in the order in which mmdetection has the images: that of the dataset's file.

        Detectron2 sorts the images of a file by id, mmdetection takes them as they stand.

        Raises:
            ValueError: if the dataset has some images of its file, in an order of its own.
        """
        in_file = list(map(str, self.ids_in_file or ()))
        if not self._by_text.keys() <= set(in_file):
            return self.ids
        ordered = [self._by_text[text] for text in in_file if text in self._by_text]
        if len(ordered) < len(in_file) and ordered != self.ids:
            raise ValueError(
                "the dataset has some images of its annotation file in another order, and "
                "mmdetection 2's files have no ids; name the annotation file that mmdetection had "
                "(--gt)"
            )
        return ordered

    def find(self, name: str) -> int | str | None:
        """Id of the image of a file name, with or without folder and suffix; None if unknown."""
        for key in _name_keys(name):
            if self._by_name.get(key) is not None:
                return self._by_name[key]
        return None


def logits_of(probabilities: np.ndarray) -> np.ndarray:
    """(R,) logits of probabilities; those of 0 and 1, which have none, are of great size."""
    tiny = 1e-12
    clipped = np.clip(probabilities, tiny, 1 - tiny)
    return np.log(clipped / (1 - clipped))


def plain_value(value: Any) -> Any:
    """A scalar of NumPy as Python's own, which JSON can say; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def whole_number(value: Any) -> Any:
    """The integer that a number or a text of digits stands for; anything else as it is."""
    value = plain_value(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    # More digits than an id of 64 bits has are a text.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 30:
        return int(value)
    return value


def _enter(table: dict[Any, int | str | None], key: Any, image_id: int | str) -> None:
    """Enter an image under a key; one that several images share tells none of them."""
    is_shared = key in table and table[key] != image_id
    table[key] = None if is_shared else image_id


def _name_keys(name: str) -> list[str]:
    """A file name from the most to the least telling part: with its folder, alone, its stem."""
    parts = name.replace("\\", "/").split("/")[-2:]
    stem = os.path.splitext(parts[-1])[0]
    return ["/".join(parts), "/".join([*parts[:-1], stem]), parts[-1], stem]


def name_some(image_ids: Sequence[int | str]) -> str:
    """The first few ids as text."""
    rest = ", ..." if len(image_ids) > _NUM_NAMED else ""
    return ", ".join(str(image_id)[:80] for image_id in image_ids[:_NUM_NAMED]) + rest


def missing_scores(number: int, total: int) -> Fault:
    """The fault of proposals that have no score."""
    return Fault(
        "missing-scores",
        f"{number} of {total} proposals have no score; they count as 0, and equal scores keep the "
        "file's order",
    )


def file_names(proposals: ProposalSet, images: DatasetImages | None) -> list[str]:
    """The file name of each image; its id where the dataset is not given."""
    if images is None:
        return [str(image_id) for image_id in proposals.image_ids]
    names = {
        str(image_id): name or str(image_id)
        for image_id, name in zip(images.ids, images.file_names, strict=True)
    }
    return [names.get(str(image_id), str(image_id)) for image_id in proposals.image_ids]
