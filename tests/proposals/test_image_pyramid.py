"""Scales of an image."""

import pytest
import torch

from d2proposals.proposals.image_pyramid import native_scale, resize_image


def test_half_size_averages_a_linear_ramp_exactly():
    image = torch.arange(16.0).expand(1, 8, 16)
    half = resize_image(image, 0.5)
    assert half.shape == (1, 4, 8)
    # Inside, a symmetric filter keeps a ramp: the centre of cell i is at pixel 2 i + 0.5.
    torch.testing.assert_close(half[0, 1, 1:-1], 2 * torch.arange(1.0, 7) + 0.5)


def test_smaller_images_do_not_alias():
    stripes = torch.arange(64) % 2 * 1.0
    image = stripes.expand(1, 64, 64)
    assert (resize_image(image, 0.25)[0, 2:-2, 2:-2] - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    "scale, size", [(2.0, (6, 10)), (1.0, (3, 5)), (0.5, (2, 2)), (0.01, (1, 1))]
)
def test_sizes(scale, size):
    assert resize_image(torch.rand(3, 3, 5), scale).shape == (3, *size)


def test_native_scale():
    assert native_scale((800, 1216), 480) == 0.6
    assert native_scale((800, 1216), 0) == 1.0
