"""Contents of the embedded dataset, on its first images."""

import hashlib
import json
import time

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from scipy.ndimage import binary_fill_holes

from d2proposals.data import shapes_layout
from d2proposals.data.shapes_layout import (
    Layout,
    SceneObject,
    Shape,
    annotate,
    sample_layout,
)
from d2proposals.data.shapes_outlines import CATEGORIES
from d2proposals.data.shapes_rendering import paint_layout, render_image

NUM_LAYOUTS = 400


@pytest.fixture(scope="module")
def layouts():
    return [sample_layout(np.random.default_rng([0, index, 0])) for index in range(NUM_LAYOUTS)]


@pytest.fixture(scope="module")
def annotations(layouts):
    return [annotate(layout) for layout in layouts]


def rectangle(category, x0, y0, x1, y1):
    """A shape that fills its crop."""
    mask = np.ones((y1 - y0, x1 - x0), dtype=bool)
    return Shape(category, (x0, y0, x1, y1), mask, int(mask.sum()))


def stack(height, width, *objects):
    """A layout of the given objects, painted in order."""
    owner = np.full((height, width), -1, dtype=np.int16)
    for index, placed in enumerate(objects):
        owner[placed.footprint.crop][placed.footprint.mask] = index
    return Layout(owner=owner, objects=objects)


def single(shape):
    return SceneObject(footprint=shape, members=(shape,))


def decode(segmentation, height, width):
    runs = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(mask_util.merge(runs) if isinstance(runs, list) else runs).astype(bool)


# The layout of an image is made of integers only: these digests hold on every machine.
@pytest.mark.parametrize(
    ("seed", "digest"),
    [
        (0, "b3905f9fe7352737"),
        (1, "be3905ba2c025de8"),
    ],
)
def test_annotations_are_the_same_everywhere(seed, digest):
    found = [annotate(sample_layout(np.random.default_rng([seed, i, 0]))) for i in range(20)]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == digest


def test_image_depends_on_its_own_number_only():
    image, annotations = render_image(seed=5, index=3)
    render_image(seed=5, index=2)
    again, annotations_again = render_image(seed=5, index=3)
    np.testing.assert_array_equal(image, again)
    assert annotations == annotations_again
    for other in (render_image(seed=5, index=4), render_image(seed=6, index=3)):
        assert other[1] != annotations


def test_occluded_object_by_hand():
    """The upper object covers the right half of the lower one; its own box is whole."""
    layout = stack(20, 30, single(rectangle(2, 4, 5, 14, 11)), single(rectangle(0, 9, 2, 20, 15)))
    lower, upper = annotate(layout)
    assert lower["category_id"] == 3 and upper["category_id"] == 1
    assert lower["bbox"] == [4, 5, 5, 6] and lower["area"] == 30
    assert lower["segmentation"] == [[4, 5, 4, 11, 9, 11, 9, 5]]
    assert upper["bbox"] == [9, 2, 11, 13] and upper["area"] == 143
    assert all(isinstance(value, float) for value in lower["segmentation"][0] + lower["bbox"])


def test_hole_is_filled_and_cut_object_has_two_polygons():
    hole = stack(20, 30, single(rectangle(0, 2, 2, 12, 12)), single(rectangle(1, 5, 5, 8, 8)))
    assert annotate(hole)[0]["area"] == 100
    cut = stack(20, 30, single(rectangle(0, 2, 2, 12, 12)), single(rectangle(1, 5, 0, 8, 20)))
    annotation = annotate(cut)[0]
    assert len(annotation["segmentation"]) == 2
    assert annotation["area"] == 70 and annotation["bbox"] == [2, 2, 10, 10]


def test_crowd_by_hand():
    """A crowd is one region with exact runs, the pixels under later objects left out."""
    members = (rectangle(4, 2, 2, 5, 5), rectangle(4, 6, 3, 9, 6))
    crowd = SceneObject(footprint=shapes_layout._unite(members, 20, 30), members=members)
    layout = stack(20, 30, crowd, single(rectangle(0, 8, 0, 20, 20)))
    annotation = annotate(layout)[0]
    assert annotation["iscrowd"] == 1
    assert annotation["area"] == 9 + 6
    assert annotation["bbox"] == [2, 2, 6, 4]
    np.testing.assert_array_equal(decode(annotation["segmentation"], 20, 30), layout.owner == 0)


def test_masks_boxes_and_areas_agree(layouts, annotations):
    """pycocotools decodes each mask to the visible pixels, holes filled; boxes are tight."""
    for layout, image_annotations in zip(layouts[:80], annotations[:80], strict=True):
        height, width = layout.owner.shape
        for index, annotation in enumerate(image_annotations):
            mask = decode(annotation["segmentation"], height, width)
            visible = layout.owner == index
            expected = visible if annotation["iscrowd"] else binary_fill_holes(visible)
            np.testing.assert_array_equal(mask, expected)
            assert annotation["area"] == mask.sum()
            assert (
                annotation["bbox"]
                == mask_util.toBbox(mask_util.encode(np.asfortranarray(mask))).tolist()
            )


def test_every_object_keeps_enough_visible_pixels(layouts):
    numerator, denominator = shapes_layout.MIN_VISIBLE
    for layout in layouts:
        for index, placed in enumerate(layout.objects):
            visible = (layout.owner == index).sum()
            assert visible >= shapes_layout.MIN_VISIBLE_PIXELS
            assert visible * denominator >= placed.footprint.num_pixels * numerator


def test_occlusion_crowds_truncation_and_empty_images_occur(layouts, annotations):
    occluded = truncated = total = 0
    for layout in layouts:
        for index, placed in enumerate(layout.objects):
            total += 1
            inside = placed.footprint.mask.sum()
            occluded += (layout.owner == index).sum() < 0.9 * inside
            truncated += inside < 0.9 * placed.footprint.num_pixels
    assert occluded > 0.05 * total
    assert truncated > 0.02 * total
    crowds = [sum(a["iscrowd"] for a in image) for image in annotations]
    assert max(crowds) == 1
    assert 0.05 < np.mean(crowds) < 0.2
    assert 0 < sum(not image for image in annotations) < 0.06 * NUM_LAYOUTS


def test_numbers_categories_and_image_sizes(layouts, annotations):
    counts = np.array([len(image) for image in annotations])
    assert counts.min() == 0 and counts.max() >= 10 and 5 < counts.mean() < 8
    categories = [a["category_id"] for image in annotations for a in image]
    frequencies = np.bincount(categories, minlength=len(CATEGORIES) + 1)[1:] / len(categories)
    assert frequencies.min() > 0.5 / len(CATEGORIES)
    sides = np.array([layout.owner.shape for layout in layouts])
    assert sides.min() >= 224 and sides.max() <= 352
    aspect_ratios = sides[:, 0] / sides[:, 1]
    assert aspect_ratios.min() < 0.75 and aspect_ratios.max() > 1.33


def test_sides_are_spread_log_uniformly(annotations):
    boxes = np.array([a["bbox"] for image in annotations for a in image if not a["iscrowd"]])
    sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
    octaves = np.log2(sides / 8)
    # Four octaves from 8 to 128 px have about as many objects each; few are left above.
    fractions = np.histogram(octaves, bins=[0, 1, 2, 3, 4])[0] / len(octaves)
    assert np.all(np.abs(fractions - fractions.mean()) < 0.04), fractions
    assert 0.85 < fractions.sum() < 1
    # Sizes as COCO counts them, by the area of the mask.
    areas = np.array([a["area"] for image in annotations for a in image if not a["iscrowd"]])
    bins = np.histogram(areas, bins=[0, 32**2, 96**2, np.inf])[0] / len(areas)
    assert bins.min() > 0.02
    aspect_ratios = boxes[:, 2] / boxes[:, 3]
    assert np.quantile(aspect_ratios, 0.02) < 0.5 and np.quantile(aspect_ratios, 0.98) > 2


def test_painting_changes_object_pixels_only():
    """With the same draws, an object alters the image at its own pixels (and the blur's rim)."""
    layout = sample_layout(np.random.default_rng([0, 0, 0]))
    one = stack(*layout.owner.shape, layout.objects[-1])
    none = stack(*layout.owner.shape)
    images = [paint_layout(np.random.default_rng(1), each).astype(int) for each in (one, none)]
    difference = np.abs(images[0] - images[1]).max(axis=2)
    near = cv2.dilate((one.owner == 0).astype(np.uint8), np.ones((3, 3), np.uint8)) != 0
    # Grain is drawn after the objects, so that it differs everywhere, by 10 levels at most.
    assert difference[~near].max() <= 10
    assert np.median(difference[one.owner == 0]) > 30


def test_image_format():
    image, annotations = render_image(seed=0, index=0)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        assert 0 <= x < x + width <= image.shape[1]
        assert 0 <= y < y + height <= image.shape[0]
    # Textured everywhere: no two neighbouring rows are the same.
    assert np.abs(np.diff(image.astype(int), axis=0)).max(axis=(1, 2)).min() > 0


@pytest.mark.slow
def test_rendering_is_fast():
    """At least 20 images a second with encoding: a loose bound, for a busy machine."""
    start = time.process_time()
    for index in range(60):
        image, annotations = render_image(0, index)
        cv2.imencode(".jpg", image)
        json.dumps(annotations)
    assert 60 / (time.process_time() - start) > 20
