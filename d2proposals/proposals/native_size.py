"""The size that images had when they were taken, for generators that read the images themselves.

Scales of a pyramid refer to images as they were taken. A detector resizes them first, and hands its
generator the resized ones alone. So whoever runs a host says in :func:`given_sizes` what it knows
(hosts by their hooks, see native_size_hosts.py), and the generator asks :class:`NativeSizes`.

All sizes are (height, width) in pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from .image_pyramid import scaled_size

logger = logging.getLogger(__name__)


class ImageSizes(NamedTuple):
    """Sizes of one image, (height, width) in pixels.

    Attributes:
        network_input: as the generator gets it, without padding.
        native: as it was taken.
        usual_input: the network input that stands for the image as it was taken. Test-time
            augmentation has network inputs of other sizes: they show the image enlarged or shrunk.
    """

    network_input: tuple[int, int]
    native: tuple[int, int]
    usual_input: tuple[int, int]

    @classmethod
    def of_input(
        cls, mapped: dict[str, Any], usual_input: tuple[int, int] | None = None
    ) -> ImageSizes:
        """The sizes of an image in a host's input.

        Args:
            mapped: with "image" (C, H, W), and "native_size" (height, width), which this project's
                mapper adds in training, or "height" and "width" of the original; without these,
                hosts take the image for the original, and so does this.
            usual_input: None for the size of the image.
        """
        height, width = mapped["image"].shape[-2:]
        original = (mapped.get("height", height), mapped.get("width", width))
        native = tuple(mapped.get("native_size", original))
        return cls((height, width), native, usual_input or (height, width))


# Batches that hosts are running, the innermost last; None for a batch of unknown sizes. Not on a
# module: copies of a model, threads and processes have nothing of each other.
_batches: ContextVar[tuple[tuple[ImageSizes, ...] | None, ...]] = ContextVar("batches", default=())


def push_sizes(sizes: Sequence[ImageSizes] | None) -> None:
    """Say the sizes of the batch that a host begins with; ``pop_sizes`` follows."""
    _batches.set((*_batches.get(), None if sizes is None else tuple(sizes)))


def pop_sizes() -> None:
    """Forget the sizes that were said last."""
    _batches.set(_batches.get()[:-1])


@contextmanager
def given_sizes(sizes: Sequence[ImageSizes] | None) -> Iterator[None]:
    """Say the sizes of the batch that a host sees within this context."""
    push_sizes(sizes)
    try:
        yield
    finally:
        pop_sizes()


class NativeSizes:
    """Tells a generator to which size of an image its scales refer."""

    def __init__(self, node: str, *, short_edge: int = 0, long_edge: int = 1333):
        """
        Args:
            node: of the configuration, for messages.
            short_edge: shorter side of images as they were taken, in pixels, for batches of which
                nobody says the sizes; 0: the network input has that size.
            long_edge: a network input of another size than the image had is brought to at most this
                longer side, in pixels.

        Raises:
            ValueError: a value is not allowed.
        """
        if short_edge < 0:
            raise ValueError(
                f"{node}.NATIVE_SHORT_EDGE must be a number of pixels, or 0 for images at their "
                f"own size, got {short_edge}."
            )
        if long_edge < 1:
            raise ValueError(
                f"{node}.NATIVE_LONG_EDGE must be at least 1 pixel, got {long_edge}: it bounds the "
                "size that an image is brought back to in a detector that resizes."
            )
        self.node = node
        self.short_edge = short_edge
        self.long_edge = long_edge
        self._has_warned = False

    def __call__(self, image_sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The sizes at scale 1 of a batch's images, each at least 1 x 1.

        A network input that has the size of the image as it was taken stays as it is, however
        large. Others are brought back to that size, their longer side to ``long_edge`` at most.

        Args:
            image_sizes: of the network inputs, without padding.
        """
        batches = _batches.get()
        given = batches[-1] if batches else None
        inputs = [tuple(int(side) for side in size) for size in image_sizes]
        # A host that makes other images of its inputs has told of those alone.
        if given is None or [x.network_input for x in given] != inputs:
            self._warn_once()
            return [self._guess(size) for size in inputs]
        return [self._undo_resize(sizes) for sizes in given]

    def _undo_resize(self, sizes: ImageSizes) -> tuple[int, int]:
        if sizes.usual_input == sizes.native:
            return sizes.network_input
        factor = self._bound(sizes.native)
        height, width = (
            max(round(native * factor * side / usual), 1)
            for side, native, usual in zip(*sizes, strict=True)
        )
        return height, width

    def bounded(self, size: tuple[int, int]) -> tuple[int, int]:
        """A size, its longer side at most ``long_edge``."""
        return scaled_size(size, self._bound(size))

    def _bound(self, size: tuple[int, int]) -> float:
        """Factor, at most 1, that brings a size within ``long_edge``."""
        return min(self.long_edge / max(size), 1.0)

    def _guess(self, size: tuple[int, int]) -> tuple[int, int]:
        """By Detectron2's rule for a shorter and a longer side."""
        if self.short_edge == 0:
            return size
        return scaled_size(size, min(self.short_edge / min(size), self.long_edge / max(size)))

    def _warn_once(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        refers = (
            f"to images with a shorter side of {self.short_edge} pixels ({self.node}."
            "NATIVE_SHORT_EDGE)"
            if self.short_edge
            else f"to the network input as it is ({self.node}.NATIVE_SHORT_EDGE 0)"
        )
        logger.warning(
            "Nobody told the generator how large the images were before they were resized; its "
            f"scales refer {refers}. Models that d2proposals builds or loads tell it; for others "
            "call d2proposals.proposals.native_size_hosts.hand_over_native_sizes(model)."
        )


def scale_between(size: tuple[int, int], other: tuple[int, int]) -> float:
    """One factor that takes ``size`` to ``other``: the root of the factor between their areas."""
    return ((other[0] * other[1]) / (size[0] * size[1])) ** 0.5
