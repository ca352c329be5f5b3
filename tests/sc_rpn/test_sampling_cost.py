"""Choosing the samples costs little beside the network."""

import time

import pytest
import torch
from detectron2.modeling import build_model

from d2proposals.sc_rpn.locations import GroundTruth, PyramidLocations
from d2proposals.sc_rpn.pixel_boxes import reference_boxes
from tests.common import make_cfg, make_instances

SIZE = (800, 1216)
NUM_OBJECTS = 100  # per image


@pytest.mark.slow
def test_sampling_takes_less_than_fifteen_percent_of_a_step():
    """In processor time, beside the forward pass of one of the two images: a part of the step."""
    torch.manual_seed(0)
    model = build_model(make_cfg("sc_rpn_only.yaml", "MODEL.WEIGHTS", "")).eval()
    sampler = model.proposal_generator.sampler
    strides = model.proposal_generator.strides
    map_sizes = [(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in strides]
    locations = PyramidLocations.build(map_sizes, strides, [SIZE, SIZE], torch.device("cpu"))
    corners = torch.rand(NUM_OBJECTS, 2) * torch.tensor([1000.0, 600.0])
    boxes = torch.cat([corners, corners + torch.rand(NUM_OBJECTS, 2) * 200 + 8], dim=1)
    ground_truth = GroundTruth.from_instances([make_instances(SIZE, boxes.tolist())] * 2)
    references = reference_boxes(model.proposal_generator.head.representation, locations)
    init_boxes = references + torch.randn(2, len(references), 4)

    def seconds(function) -> float:
        function()
        start = time.process_time()
        function()
        return time.process_time() - start

    with torch.no_grad():
        sampling = seconds(lambda: sampler(locations, ground_truth, references, init_boxes, 2))
        image = torch.randint(0, 256, (3, *SIZE)).float()
        forward = seconds(lambda: model([{"image": image}]))
    print(f"sampling {sampling:.3f} s, forward pass of one image {forward:.3f} s")
    assert sampling < 0.15 * forward
