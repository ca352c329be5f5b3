"""Tests of the signs that ground truth is in another convention or scale."""

import numpy as np
import pytest

from d2proposals.evaluation.ground_truth_checks import find_ground_truth_faults

SIZE = (100, 200)


def random_objects(number=40, seed=0):
    """(number, 4) XYXY inside of the image, in its right lower three quarters."""
    generator = np.random.default_rng(seed)
    sides = generator.uniform(10, 40, (number, 2))
    corner = generator.uniform((60, 30), (150, 55), (number, 2))
    return np.concatenate([corner, corner + sides], axis=1).astype(np.float32)


def names_of(boxes, sizes=None, has_mask=None):
    """The faults of objects that lie in one image each."""
    number = len(boxes)
    has_mask = np.zeros(number, bool) if has_mask is None else has_mask
    sizes = [SIZE] * number if sizes is None else sizes
    return {
        fault.name: fault.message
        for fault in find_ground_truth_faults(
            boxes, has_mask, np.ones(number, np.int64), [f"i{k}" for k in range(number)], sizes
        )
    }


def test_right_boxes_have_no_faults():
    assert names_of(random_objects()) == {}
    assert names_of(random_objects()[:0]) == {}
    assert names_of(random_objects(), has_mask=np.ones(40, bool)) == {}


@pytest.mark.parametrize("seed", [0, 1])
def test_corners_read_as_sides(seed):
    boxes = random_objects(seed=seed)
    read = boxes.copy()
    read[:, 2:] += boxes[:, :2]
    faults = names_of(read)
    against = ((read[:, 2] > 201) | (read[:, 3] > 101)).sum()
    assert faults["gt-xyxy-boxes"].startswith(f"{against} of 40 objects end outside")
    assert "gt-outside" in faults
    # Without sizes nothing can be told, and a few boxes outside are no convention.
    assert names_of(read, [None] * 40) == {}
    # Small boxes near the corner would fit as corners, too.
    sides = np.repeat(np.linspace(20, 30, 40, dtype=np.float32)[:, None], 2, axis=1)
    near = np.concatenate([sides / 3, sides / 3 + sides], axis=1)
    near[0, [0, 2]] = 20, 215
    assert list(names_of(near)) == ["gt-outside"]


def test_relative_boxes():
    boxes = random_objects() / np.array([200, 100, 200, 100], np.float32)
    assert names_of(boxes)["gt-relative"].startswith("40 of 40 objects lie within the first pixel")
    # One tiny object among others is no sign.
    boxes = random_objects()
    boxes[3] = (0, 0, 1, 1)
    assert names_of(boxes) == {}


def test_outside_names_the_images():
    boxes = random_objects()
    boxes[[4, 7], 2] = 250
    message = names_of(boxes)["gt-outside"]
    assert message.startswith("2 of 40 objects reach outside") and message.endswith("i4, i7")
    # Up to a twentieth of the side and a pixel are rounding.
    boxes[[4, 7], 2] = 210.9
    assert names_of(boxes) == {}


def test_some_masks():
    has_mask = np.ones(40, bool)
    has_mask[[2, 5, 6]] = False
    message = names_of(random_objects(), has_mask=has_mask)["gt-some-masks"]
    assert message.startswith("3 of 40 objects have no mask") and message.endswith("i2, i5, i6")
