"""The size that scales of a pyramid refer to."""

import logging

import pytest
import torch

from d2proposals.proposals.native_size import (
    ImageSizes,
    NativeSizes,
    given_sizes,
    scale_between,
)


def sizes_of(*images, **settings):
    """What a generator is told of images, each (network input, native, usual input or None)."""
    given = [ImageSizes(size, native, usual or size) for size, native, usual in images]
    with given_sizes(given):
        return NativeSizes("MODEL.X", **settings)([size for size, _, _ in images])


def test_the_resize_of_a_detector_is_undone():
    # 480 x 640 enlarged to 800 x 1067 (a rounded factor), 600 x 375 to 1280 x 800.
    assert sizes_of(((800, 1067), (480, 640), None), ((1280, 800), (600, 375), None)) == [
        (480, 640),
        (600, 375),
    ]
    # One that was made smaller, and one whose aspect ratio was not kept.
    assert sizes_of(((500, 666), (900, 1200), None), ((513, 513), (480, 640), None)) == [
        (900, 1200),
        (480, 640),
    ]


def test_an_image_at_its_own_size_stays_however_large():
    assert sizes_of(((3000, 4000), (3000, 4000), None), long_edge=100) == [(3000, 4000)]


def test_the_longer_side_is_bounded():
    # A strip of 100 x 6665 that the detector made 20 x 1333; another that it made larger.
    assert sizes_of(((20, 1333), (100, 6665), None)) == [(20, 1333)]
    assert sizes_of(((800, 1067), (1500, 2000), None), long_edge=1000) == [(750, 1000)]
    assert sizes_of(((3, 1000), (1, 4000), None), long_edge=1000) == [(1, 1000)]


def test_augmented_images_are_enlarged_as_much_as_they_are():
    # The usual test makes 480 x 640 an input of 800 x 1067; this one is 1.5 times as large.
    assert sizes_of(((1200, 1601), (480, 640), (800, 1067))) == [(720, 960)]
    assert sizes_of(((400, 533), (480, 640), (800, 1067))) == [(240, 320)]
    # The bound is on the native size, and enlarged as well.
    assert sizes_of(((1200, 1600), (1500, 2000), (800, 1000)), long_edge=1000) == [(1125, 1600)]
    # The usual test takes images as they are: so does this.
    assert sizes_of(((250, 333), (480, 640), (480, 640)), long_edge=10) == [(250, 333)]


@pytest.mark.parametrize(
    ("size", "short_edge", "expected"),
    [
        ((800, 1216), 480, (480, 730)),
        ((800, 1216), 0, (800, 1216)),
        # Detectron2's rule for the longer side, at scale 24 otherwise.
        ((20, 1333), 480, (20, 1333)),
        ((1, 5000), 480, (1, 1333)),
    ],
)
def test_without_sizes_by_the_shorter_side(size, short_edge, expected):
    assert NativeSizes("MODEL.X", short_edge=short_edge)([size]) == [expected]


def test_one_warning_without_sizes(caplog):
    sizes = NativeSizes("MODEL.X", short_edge=48)
    with caplog.at_level(logging.WARNING):
        sizes([(96, 96)])
        sizes([(96, 96)])
    (record,) = caplog.records
    assert "48 pixels (MODEL.X.NATIVE_SHORT_EDGE)" in record.message
    assert "hand_over_native_sizes" in record.message
    caplog.clear()
    sizes_of(((8, 8), (4, 4), None))
    assert not caplog.records


def test_sizes_of_other_images_are_not_taken():
    # As of a host that runs its generator on other images than it was given.
    sizes = NativeSizes("MODEL.X", short_edge=4)
    given = [ImageSizes((8, 8), (6, 6), (8, 8)), ImageSizes((9, 8), (6, 6), (9, 8))]
    with given_sizes(given):
        assert sizes([(8, 8), (9, 8)]) == [(6, 6), (6, 6)]
        assert sizes([(9, 8), (8, 8)]) == [(4, 4), (4, 4)]
        assert sizes([(8, 8)]) == [(4, 4)]
        with given_sizes(None):
            assert sizes([(8, 8), (9, 8)])[0] == (4, 4)
        assert sizes([(8, 8), (9, 8)]) == [(6, 6), (6, 6)]
    assert sizes([(8, 8), (9, 8)])[0] == (4, 4)


def test_sizes_of_an_input():
    image = torch.zeros(3, 8, 12)
    assert ImageSizes.of_input({"image": image, "height": 4, "width": 6}) == (
        (8, 12), (4, 6), (8, 12),
    )  # fmt: skip
    # A crop of 4 x 6 of an original of 9 x 9.
    cropped = {"image": image, "height": 9, "width": 9, "native_size": (4, 6)}
    assert ImageSizes.of_input(cropped).native == (4, 6)
    # Detectron2's hosts return boxes in pixels of the image itself then.
    assert ImageSizes.of_input({"image": image}) == ((8, 12), (8, 12), (8, 12))


def test_scale_between_sizes():
    assert scale_between((800, 1216), (400, 608)) == 0.5
    assert scale_between((10, 10), (20, 80)) == 4.0


@pytest.mark.parametrize("settings", [{"short_edge": -1}, {"long_edge": 0}])
def test_values_that_are_not_allowed(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"MODEL.X.NATIVE_{name.upper()} must"):
        NativeSizes("MODEL.X", **settings)
