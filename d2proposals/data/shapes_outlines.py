"""Silhouettes of the embedded dataset: outlines, their pixels and their polygons.

Everything here is integer arithmetic, so that masks and boxes are the same on every machine:
trigonometric and exponential functions appear only in small tables, rounded once. For the same
reason outlines are rasterised here instead of by a drawing library, whose handling of border pixels
differs between versions.

Units:

    UNIT: outlines are stored in a square from (-UNIT, -UNIT) to (UNIT, UNIT), x right, y down.
    SUBPIXELS: placed outlines are in 1 / SUBPIXELS of a pixel. The centre of the pixel in column c
        is at SUBPIXELS * c + SUBPIXELS / 2.

Shape shorthand:

    V: number of vertices of an outline.
    h, w: height and width of a crop, in pixels.
"""

import math

import cv2
import numpy as np

UNIT = 1 << 12
SUBPIXELS = 16
# Cosines are stored as multiples of 1 / (1 << COSINE_BITS).
COSINE_BITS = 14


def _polar(radii: list[float], repeat: int) -> np.ndarray:
    """Return vertices at equal angles, the first on top, from ``repeat`` rounds of ``radii``."""
    radius = np.tile(np.asarray(radii, dtype=np.float64), repeat)
    angle = 2 * np.pi * np.arange(len(radius)) / len(radius)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def _arc(radius: float, centre_x: float, first: float, last: float, num: int) -> list[list[float]]:
    """Return ``num`` points of a circle around (centre_x, 0), between two angles in degrees."""
    angles = np.deg2rad(np.linspace(first, last, num))
    return [[centre_x + radius * math.cos(a), radius * math.sin(a)] for a in angles]


def _flower() -> np.ndarray:
    angle = 2 * np.pi * np.arange(50) / 50
    return _polar(list(0.7 + 0.3 * np.cos(5 * angle)), 1)


def _heart() -> np.ndarray:
    t = 2 * np.pi * np.arange(32) / 32
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


def _drop() -> np.ndarray:
    t = 2 * np.pi * np.arange(32) / 32
    return np.stack([np.sin(t) * np.sin(t / 2) ** 2, -np.cos(t)], axis=1)


def _fish() -> np.ndarray:
    body = _arc(1.0, 0.0, 150, -150, 25)
    tail = [[-1.8, -0.9], [-1.5, 0.0], [-1.8, 0.9]]
    return np.array([[x, 0.8 * y] for x, y in body] + tail)


# Vertices of each category in any scale; none has a hole, so that polygons describe all masks.
_VERTICES = {
    "disk": _polar([1.0], 32),
    "brick": [[-1, -1], [1, -1], [1, 1], [-1, 1]],
    "triangle": _polar([1.0], 3),
    "hexagon": _polar([1.0], 6),
    "star": _polar([1.0, 0.42], 5),
    "cross": [
        [-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1],
        [1, 3], [-1, 3], [-1, 1], [-3, 1], [-3, -1], [-1, -1],
    ],
    "heart": _heart(),
    "crescent": _arc(1.0, 0.0, 52, 308, 28) + _arc(0.8, 0.5, 272, 88, 20),
    "arrow": [[-3, -1], [0, -1], [0, -2.5], [3, 0], [0, 2.5], [0, 1], [-3, 1]],
    "gear": _polar([1.0, 1.0, 0.74, 0.74], 9),
    "house": [
        [-3, 3], [-3, -0.5], [0, -3], [1.2, -2], [1.2, -3], [2, -3], [2, -1.3], [3, -0.5], [3, 3],
    ],
    "drop": _drop(),
    "bolt": [[0.5, -3], [-2, 0.5], [-0.3, 0.5], [-1, 3], [2, -0.8], [0.2, -0.8], [1.6, -3]],
    "flower": _flower(),
    "fish": _fish(),
    "comb": [
        [-2, -3], [2, -3], [2, -1.8], [-0.7, -1.8], [-0.7, -0.6], [2, -0.6], [2, 0.6],
        [-0.7, 0.6], [-0.7, 1.8], [2, 1.8], [2, 3], [-2, 3],
    ],
}  # fmt: skip


def _to_unit_square(vertices: np.ndarray) -> np.ndarray:
    """Stretch an outline's tight box onto the unit square, (V, 2) int64."""
    vertices = np.asarray(vertices, dtype=np.float64)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    return np.rint((2 * vertices - low - high) / (high - low) * UNIT).astype(np.int64)


CATEGORIES: tuple[str, ...] = tuple(_VERTICES)
"""Names of the categories; category i has the COCO id i + 1."""

OUTLINES: tuple[np.ndarray, ...] = tuple(_to_unit_square(_VERTICES[name]) for name in CATEGORIES)
"""Outline of each category, (V, 2) int64 in [-UNIT, UNIT]."""

_COSINES = np.rint(np.cos(np.deg2rad(np.arange(360))) * (1 << COSINE_BITS)).astype(np.int64)


def transform_outline(
    outline: np.ndarray, stretch: tuple[int, int], degrees: int, side: int
) -> np.ndarray:
    """Stretch, rotate and scale an outline.

    Args:
        outline: (V, 2) int64 in [-UNIT, UNIT].
        stretch: factors on x and y before the rotation, in units of 1 / UNIT, at most 2 * UNIT.
        degrees: rotation, in [0, 360).
        side: square root of the area of the result's tight box, in 1 / SUBPIXELS pixels.

    Returns:
        (V, 2) int64, in 1 / SUBPIXELS pixels; the minimum of each coordinate is 0.
    """
    x, y = (outline * np.asarray(stretch, dtype=np.int64)).T
    cosine, sine = _COSINES[degrees], _COSINES[degrees - 90]
    points = np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=1) >> COSINE_BITS
    points -= points.min(axis=0)
    box_width, box_height = points.max(axis=0)
    return points * side // math.isqrt(int(box_width) * int(box_height))


def rasterize_outline(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the pixels whose centres lie inside an outline (even-odd rule).

    Args:
        outline: (V, 2) int64, in 1 / SUBPIXELS pixels; it may reach out of the canvas.
        height, width: size of the canvas, in pixels.

    Returns:
        (height, width) bool.
    """
    begin, end = outline, np.roll(outline, -1, axis=0)
    # Let every edge point down, so that the height of an edge is positive.
    upward = (begin[:, 1] > end[:, 1])[:, None]
    begin, end = np.where(upward, end, begin), np.where(upward, begin, end)
    x0, y0 = begin.T
    edge_width, edge_height = (end - begin).T

    row_y = np.arange(height)[:, None] * SUBPIXELS + SUBPIXELS // 2  # (height, 1)
    row, edge = np.nonzero((row_y >= y0) & (row_y < y0 + edge_height))
    # The pixels to the right of a crossing at x = x0 + (y - y0) * edge_width / edge_height begin
    # at the column ceil((x - SUBPIXELS / 2) / SUBPIXELS): one exact division.
    rise = edge_height[edge]
    numerator = (x0[edge] - SUBPIXELS // 2) * rise + (row_y[row, 0] - y0[edge]) * edge_width[edge]
    column = np.clip(-(-numerator // (rise * SUBPIXELS)), 0, width)

    crossings = np.bincount(row * (width + 1) + column, minlength=height * (width + 1))
    crossings = crossings.reshape(height, width + 1)[:, :width]
    return (np.cumsum(crossings, axis=1) & 1).astype(bool)


def trace_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the outer borders of a mask along the edges of its pixels; holes are filled.

    Rasterising the polygons (pycocotools) gives exactly the mask with its holes filled, their tight
    box is the mask's, and the shoelace formula gives its number of pixels.

    Args:
        mask: (h, w) bool.

    Returns:
        One (V, 2) int64 array of x, y corners per 8-connected part, in [0, w] and [0, h], in the
        order of their first vertices; each starts at its first vertex from the top left.
    """
    # cv2 traces the centres of border pixels. On the doubled image each pixel has four, one by each
    # of its corners: even coordinates belong to the left or top edge, odd ones to the other.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [_tidy_polygon((c.reshape(-1, 2).astype(np.int64) + 1) // 2) for c in contours]
    return sorted(polygons, key=lambda polygon: (polygon[0, 1], polygon[0, 0]))


def _tidy_polygon(polygon: np.ndarray) -> np.ndarray:
    """Drop repeated and collinear vertices, and start at the first vertex from the top left."""
    polygon = polygon[np.any(polygon != np.roll(polygon, 1, axis=0), axis=1)]
    before, after = polygon - np.roll(polygon, 1, axis=0), np.roll(polygon, -1, axis=0) - polygon
    # All edges are horizontal or vertical: a vertex between two of the same kind is no corner.
    polygon = polygon[(before[:, 0] == 0) != (after[:, 0] == 0)]
    return np.roll(polygon, -np.lexsort((polygon[:, 0], polygon[:, 1]))[0], axis=0)


def polygon_area(polygon: np.ndarray) -> int:
    """Return the number of pixels inside a polygon of `trace_polygons` (shoelace formula)."""
    x, y = polygon.T
    return abs(int(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) // 2


def encode_runs(mask: np.ndarray) -> list[int]:
    """Encode a mask as COCO's uncompressed runs: column by column, the first run is background."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], starts, [mask.size]])).tolist()
