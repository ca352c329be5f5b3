"""Signs that boxes of several images are not what they should be.

Shape shorthand: S boxes of all images.
"""

from collections.abc import Sequence

import numpy as np

# Boxes may end so far outside of their image, in image sides and in pixels: less is rounding.
_OUTSIDE_SIDES = 0.05
OUTSIDE_PIXELS = 1
# A convention of boxes is taken for the other one if so many boxes speak against it, as a share,
# and nearly all for the other.
SHARE_AGAINST = 0.05
SHARE_FOR = 0.99


def reach_outside(
    boxes: np.ndarray, lengths: Sequence[int], image_sizes: Sequence[tuple[int, int] | None]
) -> np.ndarray:
    """Tell which boxes leave their image by more than rounding.

    Args:
        boxes: (S, 4) XYXY in pixels, image by image.
        lengths: how many of them each image has.
        image_sizes: (height, width) of each image in pixels, None if unknown.

    Returns:
        (S,) bool; none of an image of unknown size.
    """
    sizes = np.array([size or (np.inf, np.inf) for size in image_sizes], np.float32).reshape(-1, 2)
    margin = np.where(np.isfinite(sizes), _OUTSIDE_SIDES * sizes, 0) + OUTSIDE_PIXELS
    height_end, width_end = (sizes + margin).T
    height_margin, width_margin = margin.T
    return (
        (boxes[:, 0] < np.repeat(-width_margin, lengths))
        | (boxes[:, 1] < np.repeat(-height_margin, lengths))
        | (boxes[:, 2] > np.repeat(width_end, lengths))
        | (boxes[:, 3] > np.repeat(height_end, lengths))
    )


class CornerVotes:
    """Whether boxes that were read as XYWH are XYXY.

    Attributes:
        number: of boxes so far.
        num_against: of those which end outside of their image.
    """

    def __init__(self) -> None:
        self.number = self.num_against = self._num_for = 0

    def add(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Add boxes.

        Args:
            boxes: (S, 4) XYXY as they were read: the last two are sums if they are.
            sizes: (S, 2) height and width of their images, in pixels.

        Returns:
            (S,) bool, which of them end outside of their image.
        """
        x1, y1, x2, y2 = boxes.T
        height, width = sizes.T + OUTSIDE_PIXELS
        against = (x2 > width) | (y2 > height)
        other_x2, other_y2 = x2 - x1, y2 - y1
        agrees = (other_x2 >= x1) & (other_y2 >= y1) & (other_x2 <= width) & (other_y2 <= height)
        self.number += len(boxes)
        self.num_against += np.count_nonzero(against)
        self._num_for += np.count_nonzero(agrees)
        return against

    @property
    def are_corners(self) -> bool:
        """Whether enough boxes end outside, and nearly all fit as the corners they were before."""
        if not self.number:
            return False
        against, agrees = self.num_against / self.number, self._num_for / self.number
        return against > SHARE_AGAINST and agrees >= SHARE_FOR
