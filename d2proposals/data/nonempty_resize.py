"""Detectron2's resize by the shortest edge, for images that are thousands of times as long as wide.

``INPUT.MAX_SIZE_*`` bounds the longest edge, and the shortest one of such an image would become
less than half a pixel: no pixel, which PIL refuses.
"""

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T


class NonEmptyResize(T.ResizeShortestEdge):
    """``ResizeShortestEdge`` that leaves each side at least a pixel."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if not isinstance(transform, T.ResizeTransform) or min(transform.new_h, transform.new_w):
            return transform
        new_size = max(transform.new_h, 1), max(transform.new_w, 1)
        return T.ResizeTransform(*image.shape[:2], *new_size, self.interp)


def without_empty_sides(
    augmentations: Sequence[T.Augmentation | T.Transform],
) -> list[T.Augmentation | T.Transform]:
    """Replace each ``ResizeShortestEdge`` of a list by :class:`NonEmptyResize`."""
    return [
        NonEmptyResize(
            list(x.short_edge_length), x.max_size, "range" if x.is_range else "choice", x.interp
        )
        if type(x) is T.ResizeShortestEdge
        else x
        for x in augmentations
    ]
