"""Scales of an image."""

import pytest
import torch

from d2proposals.proposals.image_pyramid import resize_image, scaled_size


def test_half_size_averages_a_linear_ramp_exactly():
    image = torch.arange(16.0).expand(1, 8, 16)
    half = resize_image(image, (4, 8))
    assert half.shape == (1, 4, 8)
    # Inside, a symmetric filter keeps a ramp: the centre of cell i is at pixel 2 i + 0.5.
    torch.testing.assert_close(half[0, 1, 1:-1], 2 * torch.arange(1.0, 7) + 0.5)


def test_smaller_images_do_not_alias():
    stripes = torch.arange(64) % 2 * 1.0
    image = stripes.expand(1, 64, 64)
    assert (resize_image(image, (16, 16))[0, 2:-2, 2:-2] - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    "scale, size", [(2.0, (6, 10)), (1.0, (3, 5)), (0.5, (2, 2)), (0.01, (1, 1))]
)
def test_sizes(scale, size):
    image = torch.rand(3, 3, 5)
    assert scaled_size((3, 5), scale) == size
    resized = resize_image(image, size)
    assert resized.shape == (3, *size) and (resized is image) is (scale == 1)
