"""Proposals of many images that stay out of memory until they are read.

100,000 images of 1,000 proposals are two gigabytes as boxes and scores alone.

Shape shorthand: R proposals of an image.
"""

import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .proposal_checks import ImageProposals

# Bytes up to which there is no file.
_BYTES_IN_MEMORY = 1 << 25

NO_PROPOSALS = ImageProposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), None)


class ProposalSpool(Mapping):
    """The proposals of images by id, in a temporary file; each is read when it is asked for."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_BYTES_IN_MEMORY)  # noqa: SIM115
        self._end = 0
        self._places: dict[int | str, int] = {}
        self._numbers: dict[int | str, int] = {}
        self.has_masks = False

    def add(self, image_id: int | str, proposals: ImageProposals) -> None:
        """Keep the proposals of an image, in the place of those that it may have already."""
        content = pickle.dumps(tuple(proposals), protocol=5)
        self._file.seek(self._end)
        self._file.write(content)
        self._places[image_id] = self._end
        self._numbers[image_id] = len(proposals.boxes)
        self._end += len(content)
        self.has_masks |= proposals.masks is not None

    def number(self, image_id: int | str) -> int:
        """How many proposals an image has, which needs no reading; 0 for an unknown image."""
        return self._numbers.get(image_id, 0)

    def __getitem__(self, image_id: int | str) -> ImageProposals:
        self._file.seek(self._places[image_id])
        return ImageProposals(*pickle.load(self._file))

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._places

    def __iter__(self) -> Iterator[int | str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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
