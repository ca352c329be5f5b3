"""Silhouettes: exact pixels, exact polygons."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from matplotlib.path import Path
from scipy.ndimage import binary_fill_holes

from d2proposals.data.shapes_outlines import (
    CATEGORIES,
    OUTLINES,
    SUBPIXELS,
    UNIT,
    encode_runs,
    polygon_area,
    rasterize_outline,
    trace_polygons,
    transform_outline,
)

NO_STRETCH = (UNIT, UNIT)


def decode_polygons(polygons, height, width):
    runs = mask_util.frPyObjects(
        [p.ravel().astype(float).tolist() for p in polygons], height, width
    )
    return mask_util.decode(mask_util.merge(runs)).astype(bool)


def test_rasterize_rectangle_by_hand():
    # From x = 1.5 to 4.5 and y = 0.5 to 2.0 px: the centres 1.5 (on the left border, inside),
    # 2.5 and 3.5 in x, and 0.5 (on the upper border, inside) and 1.5 in y.
    corners = np.array([[24, 8], [72, 8], [72, 32], [24, 32]])
    mask = rasterize_outline(corners, height=4, width=6)
    expected = np.zeros((4, 6), dtype=bool)
    expected[0:2, 1:4] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("category", range(len(CATEGORIES)), ids=CATEGORIES)
def test_rasterize_matches_point_in_polygon(category):
    height, width = 40, 50
    rng = np.random.default_rng(category)
    rows, columns = np.mgrid[:height, :width]
    centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1) * SUBPIXELS
    for _ in range(5):
        stretch = tuple(rng.integers(UNIT // 2, 2 * UNIT, size=2).tolist())
        outline = transform_outline(OUTLINES[category], stretch, int(rng.integers(360)), 600)
        # Many of the outlines reach out of the canvas.
        outline = outline + rng.integers(-300, 500, size=2)
        mask = rasterize_outline(outline, height, width)
        expected = Path(outline).contains_points(centres).reshape(height, width)
        # Centres on an edge belong to one of its sides by convention: leave out those nearby.
        closed = Path(np.concatenate([outline, outline[:1]]))
        grown, shrunk = (closed.contains_points(centres, radius=radius) for radius in (1, -1))
        sure = (grown == shrunk).reshape(height, width)
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(mask[sure], expected[sure])


def test_neighbours_share_no_pixel_and_leave_no_gap():
    left = np.array([[0, 0], [83, 0], [31, 160], [0, 160]])
    right = np.array([[83, 0], [160, 0], [160, 160], [31, 160]])
    masks = [rasterize_outline(outline, 10, 10).astype(int) for outline in (left, right)]
    np.testing.assert_array_equal(masks[0] + masks[1], 1)


@pytest.mark.parametrize("place", [(-1000, 0), (0, -1000), (1000, 0), (0, 1000)])
def test_outline_outside_canvas_is_empty(place):
    outline = transform_outline(OUTLINES[0], NO_STRETCH, 0, 100) + np.array(place)
    assert not rasterize_outline(outline, 20, 20).any()


@pytest.mark.parametrize("category", range(len(CATEGORIES)), ids=CATEGORIES)
@pytest.mark.parametrize("degrees", [0, 90, 217])
def test_transform_gives_side_and_turns(category, degrees):
    side = 100 * SUBPIXELS
    outline = transform_outline(OUTLINES[category], (2 * UNIT, UNIT), degrees, side)
    assert outline.min(axis=0).tolist() == [0, 0]
    width, height = outline.max(axis=0)
    assert np.sqrt(float(width) * height) == pytest.approx(side, abs=2)
    if degrees != 217:
        # Twice as wide as high, a quarter turn swaps the two.
        ratio = width / height if degrees == 0 else height / width
        assert ratio == pytest.approx(2, rel=0.01)


def test_trace_polygons_by_hand():
    mask = np.array(
        [
            [0, 0, 0, 0],
            [0, 1, 0, 0],
            [0, 1, 1, 0],
        ],
        dtype=bool,
    )
    (polygon,) = trace_polygons(mask)
    assert polygon.tolist() == [[1, 1], [1, 3], [3, 3], [3, 2], [2, 2], [2, 1]]
    assert polygon_area(polygon) == 3


def test_trace_polygons_of_single_pixel_and_of_nothing():
    mask = np.zeros((3, 3), dtype=bool)
    assert trace_polygons(mask) == []
    mask[2, 2] = True
    assert trace_polygons(mask)[0].tolist() == [[2, 2], [2, 3], [3, 3], [3, 2]]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.7, 0.95, 1.0])
def test_polygons_reproduce_filled_masks(density):
    """Noise has every local pattern: pixels that touch at corners, thin lines, holes."""
    rng = np.random.default_rng(int(density * 100))
    for height, width in [(1, 1), (1, 9), (12, 7), (30, 31)]:
        mask = rng.random((height, width)) < density
        polygons = trace_polygons(mask)
        filled = binary_fill_holes(mask)
        assert sum(polygon_area(p) for p in polygons) == filled.sum()
        if mask.any():
            np.testing.assert_array_equal(decode_polygons(polygons, height, width), filled)
            corners = np.concatenate(polygons)
            rows, columns = np.nonzero(mask)
            assert corners.min(axis=0).tolist() == [columns.min(), rows.min()]
            assert corners.max(axis=0).tolist() == [columns.max() + 1, rows.max() + 1]


def test_encode_runs_by_hand_and_by_library():
    # Columns: (1, 0), (1, 1): no background first, one pixel, one gap, two pixels.
    assert encode_runs(np.array([[1, 1], [0, 1]], dtype=bool)) == [0, 1, 1, 2]
    rng = np.random.default_rng(0)
    for density in (0.0, 0.4, 1.0):
        mask = rng.random((9, 13)) < density
        runs = {"counts": encode_runs(mask), "size": [9, 13]}
        decoded = mask_util.decode(mask_util.frPyObjects(runs, 9, 13))
        np.testing.assert_array_equal(decoded.astype(bool), mask)


def test_silhouettes_differ():
    """No two categories look alike at 64 px."""
    side = 64 * SUBPIXELS
    masks = np.stack(
        [
            rasterize_outline(transform_outline(o, NO_STRETCH, 0, side), 64, 64).ravel()
            for o in OUTLINES
        ]
    ).astype(int)
    intersections = masks @ masks.T
    areas = np.diag(intersections)
    ious = intersections / (areas[:, None] + areas - intersections)
    np.fill_diagonal(ious, 0)
    assert len(CATEGORIES) >= 12
    assert ious.max() < 0.9
