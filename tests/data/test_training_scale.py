"""Tests of d2proposals.data.training_scale (dyTrainScale)."""

import numpy as np
import pytest

from d2proposals.data.training_scale import (
    ObjectScaleResize,
    bounded_image_size,
    measurable_boxes,
)

BOUNDS = {"object_side": (72, 128), "min_image_side": 100, "max_image_side": 1000}


def new_size(boxes, image_size, **bounds):
    resize = ObjectScaleResize(np.array(boxes, dtype=float), **{**BOUNDS, **bounds})
    transform = resize.get_transform(np.zeros((*image_size, 3), np.uint8))
    assert (transform.h, transform.w) == image_size
    return transform.new_h, transform.new_w


@pytest.mark.parametrize(
    ("image_size", "scale", "expected"),
    [
        ((200, 300), 2.0, (400, 600)),
        ((200, 300), 10.0, (667, 1000)),  # longer side bounded: scale 10 / 3
        ((200, 300), 0.1, (100, 150)),  # shorter side bounded: scale 0.5
        ((10, 2000), 1.0, (5, 1000)),  # both cannot hold: the longer side's bound wins
        ((1, 5000), 1.0, (1, 1000)),  # never below one pixel
    ],
)
def test_bounded_image_size_by_hand(image_size, scale, expected):
    assert bounded_image_size(image_size, scale, 100, 1000) == expected


def test_measurable_boxes_drops_what_has_no_extent_in_the_image():
    boxes = np.array(
        [
            [10, 10, 10, 50],  # no width
            [10, 10, 50, 8],  # negative height
            [-30, 5, 0, 20],  # left of the image
            [210, 5, 260, 20],  # right of the image
            [-10, -10, 500, 500],  # larger than the image
            [5, 5, 6, 6],  # one pixel
        ],
        dtype=float,
    )
    kept = measurable_boxes(boxes, (100, 200))
    np.testing.assert_array_equal(kept, [[0, 0, 200, 100], [5, 5, 6, 6]])
    assert measurable_boxes(np.zeros((0, 4)), (100, 200)).shape == (0, 4)


def test_thousand_draws_follow_the_rule():
    """Twin: of each drawn size, some object and some length in the range explain it."""
    rng = np.random.default_rng(0)
    np.random.seed(0)
    sides_seen = set()
    for _ in range(1000):
        height, width = (int(x) for x in rng.integers(50, 900, size=2))
        x1y1 = rng.uniform(0, 0.6, size=(3, 2)) * [width, height]
        boxes = np.concatenate([x1y1, x1y1 + rng.uniform(1, 0.4 * min(height, width), (3, 2))], 1)
        got = new_size(boxes, (height, width))
        explained = set()
        for box in boxes:
            for side in range(72, 129):
                scale = side / min(box[2] - box[0], box[3] - box[1])
                shorter = min(height, width) * scale
                if shorter < 100:
                    scale = 100 / min(height, width)
                if max(height, width) * scale > 1000:
                    scale = 1000 / max(height, width)
                size = (round(height * scale), round(width * scale))
                explained.add(size)
                if size == got:
                    sides_seen.add(side)
        assert got in explained, (got, boxes, height, width)
        assert max(got) <= 1000
        assert min(got) >= 100 or max(got) == 1000
    assert sides_seen == set(range(72, 129))


def test_drawn_side_is_the_objects_shorter_side_after_the_resize():
    np.random.seed(0)
    heights = {
        new_size([[10, 20, 110, 60]], (200, 200), max_image_side=10000)[0] for _ in range(500)
    }
    # The object's shorter side is 40 of the image's 200 pixels: the image becomes 5 times the side.
    assert heights == {5 * side for side in range(72, 129)}


def test_area_rule_brings_the_object_s_area_to_a_medium_anchor_s():
    """By hand: an object of 20 x 80 pixels has the area of 40 x 40."""
    np.random.seed(0)
    area_rule = {"rule": "area", "max_image_side": 10**6, "min_image_side": 1}
    exact = {
        new_size([[10, 20, 30, 100]], (4000, 4000), area_tolerance=0.0, **area_rule)
        for _ in range(50)
    }
    assert exact == {(6400, 6400), (12800, 12800)}  # 64 / 40 and 128 / 40
    scales = np.array(
        [
            new_size([[10, 20, 30, 100]], (4000, 4000), area_sides=(60,), **area_rule)[0] / 4000
            for _ in range(500)
        ]
    )
    sides = 40 * scales
    assert 54 <= sides.min() < 55 and 65 < sides.max() <= 66  # a tenth about 60, uniformly
    assert abs(np.mean(sides < 57) - 0.25) < 0.06
    assert new_size([[10, 20, 30, 100]], (400, 400), **{**BOUNDS, "rule": "area"})[0] <= 1000


def test_every_object_is_drawn():
    np.random.seed(0)
    boxes = [[0, 0, 10, 10], [0, 0, 20, 20], [0, 0, 40, 40]]
    sizes = [
        new_size(boxes, (100, 100), object_side=(40, 40), max_image_side=10000)[0]
        for _ in range(600)
    ]
    counts = [sizes.count(size) for size in (400, 200, 100)]
    assert sum(counts) == 600
    assert min(counts) > 150


def test_seed_decides():
    draws = []
    for _ in range(2):
        np.random.seed(7)
        draws.append([new_size([[0, 0, 30, 50]], (300, 400)) for _ in range(5)])
    assert draws[0] == draws[1]
