"""Batches of images of like sizes, so that a batch is little larger than its images.

Li, Liu, Ouyang, Wang. Zoom Out-and-In Network with Map Attention Decision for Region Proposal and
Object Detection. IJCV 2018. Sec. 5.2: with dyTrainScale "the total training time is one third
less". There each GPU has one image; in a batch, images are padded to the largest one.

Shape shorthand in this module:

    B: images in a batch
    P: images that a batch is chosen from
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

# Detectron2 pads a batch's sides to multiples of the backbone's size divisibility: 32 of ZIP's.
DIVISIBILITY = 32


class SizeGroupedBatches:
    """Chooses, for the image that has waited longest, the others of its batch.

    No image waits forever, and none is left out, but for the last ones that are no full batch.
    Within the images of a buffer the order is by size; over longer times it is the loader's.
    """

    def __init__(
        self, loader: Iterable[list[dict[str, Any]]], batch_size: int, buffer_size: int
    ) -> None:
        """
        Args:
            loader: yields lists of images, in Detectron2's format ("image": (C, H, W)).
            batch_size: B.
            buffer_size: P, at least B.
        """
        assert 1 <= batch_size <= buffer_size, (batch_size, buffer_size)
        self.loader = loader
        self.batch_size = batch_size
        self.buffer_size = buffer_size

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yields lists of B images."""
        images = itertools.chain.from_iterable(self.loader)
        buffer: list[dict[str, Any]] = []
        for image in images:
            buffer.append(image)
            if len(buffer) == self.buffer_size:
                yield self._take_batch(buffer)
        while len(buffer) >= self.batch_size:
            yield self._take_batch(buffer)

    def _take_batch(self, buffer: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take a batch out of the buffer, in place."""
        sizes = np.array([image["image"].shape[-2:] for image in buffer])
        chosen = choose_like_sizes(sizes, self.batch_size)
        batch = [buffer[index] for index in chosen]
        for index in sorted(chosen, reverse=True):
            del buffer[index]
        return batch


def choose_like_sizes(sizes: np.ndarray, number: int) -> list[int]:
    """The first of some images and others that make a batch of the least padding with it, greedily.

    Args:
        sizes: (P, 2) height and width, in pixels.
        number: of images, at most P.

    Returns:
        Their indices, the first one 0.
    """
    chosen = [0]
    batch_size = padded(sizes[0])
    while len(chosen) < number:
        grown = np.maximum(batch_size, padded(sizes))  # (P, 2) the batch with one image more
        waste = grown.prod(axis=1) * (len(chosen) + 1) - sizes.prod(axis=1)
        waste[chosen] = np.iinfo(waste.dtype).max
        best = int(waste.argmin())
        chosen.append(best)
        batch_size = grown[best]
    return chosen


def padded(sizes: np.ndarray) -> np.ndarray:
    """Sides in pixels, as they are computed: up to the next multiple of the divisibility."""
    return -(-np.asarray(sizes, np.int64) // DIVISIBILITY) * DIVISIBILITY


def computed_pixels(batches: Iterable[np.ndarray]) -> int:
    """Pixels that batches of (B, 2) sizes have with their padding."""
    return sum(len(sizes) * int(padded(sizes).max(axis=0).prod()) for sizes in batches)
