"""Equation 5 and decoding, by hand."""

import math

import pytest
import torch

from d2proposals.spop.networks import coordinate_map
from d2proposals.spop.pixel_proposals import fuse_coordinates, to_image_pixels, two_way_log_odds


def test_equation_5():
    # z = 3/4 in the first cell, 1/2 in the second.
    size_logits = torch.tensor([[1.0, 2.0], [1 + math.log(3), 2.0]]).view(1, 2, 1, 2)
    large = torch.tensor([0.0, 0.4, 0.8, 1.2])[None, :, None, None].expand(1, 4, 1, 2)
    small = torch.tensor([0.4, 0.4, 0.4, 0.4])[None, :, None, None].expand(1, 4, 1, 2)
    fused = fuse_coordinates(large, small, size_logits)
    assert fused[0, :, 0, 0].tolist() == pytest.approx([0.1, 0.4, 0.7, 1.0])
    assert fused[0, :, 0, 1].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_fused_offsets_are_offsets_of_fused_coordinates():
    large, small = torch.randn(2, 1, 4, 3, 5)
    size_logits = torch.randn(1, 2, 3, 5)
    cells = coordinate_map((3, 5), 8, 513.0)
    assert torch.allclose(
        fuse_coordinates(large, small, size_logits) + cells,
        fuse_coordinates(large + cells, small + cells, size_logits),
        atol=1e-6,
    )


def test_log_odds_tell_certain_cells_apart():
    logits = torch.tensor([[0.0, 0.0], [50.0, 60.0]]).view(1, 2, 1, 2)
    assert logits.softmax(dim=1)[0, 1, 0].tolist() == [1.0, 1.0]
    assert two_way_log_odds(logits).flatten().tolist() == [50.0, 60.0]
    other = torch.randn(1, 2, 4, 4)
    assert torch.allclose(two_way_log_odds(other).sigmoid(), other.softmax(dim=1)[:, 1])


def test_boxes_go_back_to_the_image():
    # One row, two cells; a box of 513 x 1026 pixels in a copy twice as wide, 1.5 times as high.
    coordinates = torch.tensor([0.0, 1.0, 1.0, 3.0])[:, None, None].expand(4, 1, 2).clone()
    coordinates[:, 0, 1] = 0.5
    boxes = to_image_pixels(coordinates, 513.0, (1.5, 2.0))
    assert boxes[0].tolist() == pytest.approx([0, 342, 256.5, 1026])
    assert boxes[1].tolist() == pytest.approx([128.25, 171, 128.25, 171])
