"""Images of one pixel in a side go through every generator, from the file to the proposals."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from PIL import Image

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.data.nonempty_resize import NonEmptyResize, without_empty_sides
from d2proposals.engine import network_input_of
from d2proposals.proposals.native_size_hosts import hand_over_native_sizes
from tests.test_contract import GENERATORS, host_cfg

SIZES = [(4000, 1), (1, 4000), (1, 1)]


@pytest.mark.parametrize("generator", GENERATORS)
def test_every_generator_proposes_on_them(generator):
    torch.manual_seed(1)
    sizes = ("INPUT.MIN_SIZE_TEST", 40, "INPUT.MAX_SIZE_TEST", 300)
    cfg = host_cfg(generator, "ProposalNetwork", *sizes)
    model = build_model(cfg).eval()
    hand_over_native_sizes(model)
    network_input = network_input_of(cfg)
    for height, width in SIZES:
        pixels = network_input(np.full((height, width, 3), 128, np.uint8))
        with torch.no_grad():
            inputs = [{"image": pixels, "height": height, "width": width}]
            proposals = model(inputs)[0]["proposals"]
        boxes = proposals.proposal_boxes.tensor
        assert proposals.image_size == (height, width)
        assert torch.isfinite(boxes).all() and torch.isfinite(proposals.objectness_logits).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((4000, 1), (300, 1)), ((1, 4000), (1, 300)), ((1, 1), (40, 40)), ((100, 200), (40, 80))],
)
def test_no_side_becomes_empty(size, expected):
    """Detectron2's own resize leaves (300, 0) of the first."""
    (resize,) = without_empty_sides([T.ResizeShortestEdge([40], 300, "choice")])
    assert isinstance(resize, NonEmptyResize)
    aug_input = T.AugInput(np.zeros((*size, 3), np.uint8))
    transform = T.AugmentationList([resize])(aug_input)
    assert aug_input.image.shape[:2] == expected
    far_corner = transform.apply_coords(np.float64([[size[1], size[0]]]))
    assert far_corner.tolist() == [[expected[1], expected[0]]]


def test_the_mapper_takes_them(tmp_path):
    cfg = host_cfg("RPN")
    for is_train in (True, False):
        mapper = ProposalDatasetMapper(cfg, is_train)
        for height, width in SIZES:
            Image.new("RGB", (width, height)).save(tmp_path / "a.png")
            record = {"file_name": str(tmp_path / "a.png"), "annotations": []}
            assert min(mapper(record)["image"].shape) >= 1


def test_ranges_of_sizes_stay_ranges():
    of_range = T.ResizeShortestEdge((20, 30), 300, "range")
    flip = T.RandomFlip()
    resize, other = without_empty_sides([of_range, flip])
    assert other is flip and resize.is_range and list(resize.short_edge_length) == [20, 30]
    assert (resize.max_size, resize.interp) == (300, of_range.interp)
