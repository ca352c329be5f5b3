"""Proposals of many images that stay out of memory until they are read.

100,000 images of 1,000 proposals are two gigabytes as boxes and scores alone.

Shape shorthand: R proposals of an image.
"""

import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .proposal_checks import ImageProposals

# Bytes up to which there is no file.
_BYTES_IN_MEMORY = 1 << 25

NO_PROPOSALS = ImageProposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), None)


class _Entry(NamedTuple):
    """Where the proposals of an image begin in the file, how many they are, and what is not among
    their numbers."""

    place: int
    number: int
    image_size: tuple[int, int] | None
    has_masks: bool


class ProposalSpool(Mapping):
    """The proposals of images by id, in a temporary file; each is read when it is asked for."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_BYTES_IN_MEMORY)  # noqa: SIM115
        self._end = 0
        self._entries: dict[int | str, _Entry] = {}
        self.has_masks = False

    def add(self, image_id: int | str, proposals: ImageProposals) -> None:
        """Keep the proposals of an image, in the place of those that it may have already."""
        numbers = proposals.boxes, proposals.objectness_logits
        parts = [np.ascontiguousarray(array, np.float32).tobytes() for array in numbers]
        if proposals.masks is not None:
            parts.append(pickle.dumps(proposals.masks, protocol=5))
            self.has_masks = True
        self._file.seek(self._end)
        self._file.write(b"".join(parts))
        self._entries[image_id] = _Entry(
            self._end, len(proposals.boxes), proposals.image_size, proposals.masks is not None
        )
        self._end += sum(map(len, parts))

    def number(self, image_id: int | str) -> int:
        """How many proposals an image has, which needs no reading; 0 for an unknown image."""
        return self._entries[image_id].number if image_id in self._entries else 0

    def __getitem__(self, image_id: int | str) -> ImageProposals:
        entry = self._entries[image_id]
        self._file.seek(entry.place)
        # Bytes that may be changed, and so an array that may.
        numbers = np.frombuffer(bytearray(self._file.read(20 * entry.number)), np.float32)
        boxes, logits = np.split(numbers, [4 * entry.number])
        masks = pickle.load(self._file) if entry.has_masks else None
        return ImageProposals(boxes.reshape(-1, 4), logits, entry.image_size, masks)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._entries

    def __iter__(self) -> Iterator[int | str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class OrderedProposals(Sequence):
    """The proposals of a dataset's images in its order; an image that is not known has none."""

    def __init__(self, spool: ProposalSpool, image_ids: Sequence[int | str]) -> None:
        """
        Args:
            spool: by image; what it has of other images is left out.
            image_ids: of the dataset.
        """
        self._spool = spool
        self._image_ids = image_ids

    @property
    def numbers(self) -> list[int]:
        """How many proposals each image has."""
        return [self._spool.number(image_id) for image_id in self._image_ids]

    @property
    def has_masks(self) -> bool:
        """Whether the proposals of any image have masks."""
        return self._spool.has_masks

    def __getitem__(self, index: int) -> ImageProposals:
        return self._spool.get(self._image_ids[index], NO_PROPOSALS)

    def __len__(self) -> int:
        return len(self._image_ids)
