import math

import pytest
import torch
from detectron2.layers import ShapeSpec

from d2proposals.proposals.candidates import (
    clip_candidates,
    make_empty_proposals,
    make_proposals,
    select_input_shapes,
)


def test_clip_candidates_by_hand():
    boxes = torch.tensor(
        [
            [-5.0, 2, 8, 30],  # clipped at the left and the bottom
            [math.nan, 0, 5, 5],
            [0, 0, math.inf, 5],
            [40, 0, 50, 5],  # right of the image: nothing is left
            [1, 1, 3, 9],  # a side of 2
            [1, 1, 9, 9],  # dropped by its score
            [0, 0, 20, 10],
        ]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, -1.0, 0.0])
    clipped, index = clip_candidates(boxes, scores, (20, 32), min_box_size=2)
    assert index.tolist() == [0, 6]
    assert clipped.tolist() == [[0, 2, 8, 20], [0, 0, 20, 10]]
    assert boxes[0].tolist() == [-5, 2, 8, 30]  # the input is left alone


def test_clip_candidates_of_nothing():
    clipped, index = clip_candidates(torch.zeros(0, 4), torch.zeros(0), (20, 32), 0)
    assert clipped.shape == (0, 4) and index.shape == (0,)


def test_make_proposals_has_the_two_fields():
    proposals = make_proposals((20, 32), torch.ones(3, 4), torch.arange(3.0))
    assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits"}
    empty = make_empty_proposals([(20, 32), (8, 8)], torch.device("cpu"))
    assert [(len(p), p.image_size) for p in empty] == [(0, (20, 32)), (0, (8, 8))]
    assert empty[0].proposal_boxes.tensor.shape == (0, 4)


def test_select_input_shapes_names_what_is_missing():
    shapes = {"p2": ShapeSpec(channels=8, stride=4), "p3": ShapeSpec(channels=8, stride=8)}
    assert select_input_shapes("KEY", ["p3"], shapes, "fpn") == [shapes["p3"]]
    with pytest.raises(ValueError, match=r"KEY has \['p9'\], which the backbone fpn does not"):
        select_input_shapes("KEY", ["p2", "p9"], shapes, "fpn")
