"""Outlines of masks as paths of SVG, small enough to travel by the thousand."""

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util

# In pixels of the image: how far an outline may be from the mask's.
_TOLERANCE = 1.0


def outline_path(mask: dict[str, Any]) -> str:
    """The outline of a mask, to be filled by the even-odd rule.

    It runs through the middles of the pixels at the mask's edge.

    Args:
        mask: a run-length encoding of pycocotools.

    Returns:
        what SVG's ``d`` takes, in pixels of the mask; "" for an empty one.
    """
    bitmap = mask_util.decode(mask)
    contours, _ = cv2.findContours(bitmap, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    polygons = (cv2.approxPolyDP(contour, _TOLERANCE, True) for contour in contours)
    return "".join(_path_of(polygon[:, 0]) for polygon in polygons)


def _path_of(polygon: np.ndarray) -> str:
    """(P, 2) int x, y -> a closed path, whose points lie in the middles of pixels."""
    return f"M{' '.join(f'{x}.5 {y}.5' for x, y in polygon.tolist())}Z"
