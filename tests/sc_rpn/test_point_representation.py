"""Points and anchors as boxes, by hand."""

import pytest
import torch

from d2proposals.sc_rpn.point_representation import (
    BoxRepresentation,
    PointRepresentation,
    build_representation,
)


def test_untrained_points_cover_the_square():
    points = PointRepresentation(side=8.0)
    shape = points.decode_init(torch.zeros(1, 18))
    assert shape[0, :6].tolist() == [-4, -4, -4, 0, -4, 4]  # (y, x) of the first row
    assert points.to_boxes(shape).tolist() == [[-4, -4, 4, 4]]
    assert points.reference_boxes(torch.device("cpu")).tolist() == [[-4, -4, 4, 4]]


def test_box_is_minimum_and_maximum_of_the_points():
    # Points (y, x): (0, 1), (5, -2), (-3, 7) and six at the origin.
    shape = torch.tensor([0.0, 1, 5, -2, -3, 7] + [0.0] * 12)
    assert PointRepresentation().to_boxes(shape).tolist() == [-2, -3, 7, 5]


def test_refined_points_add_offsets_and_hold_back_the_gradient():
    points = PointRepresentation()
    init = torch.randn(3, 18, requires_grad=True)
    secondary = torch.randn(3, 18, requires_grad=True)
    refined = points.decode_refined(init, secondary)
    torch.testing.assert_close(refined, init + secondary)
    refined.sum().backward()
    assert init.grad is None
    assert secondary.grad.eq(1).all()


def test_the_unit_is_how_far_an_output_moves_a_point():
    points = build_representation("points", 8.0, (1.0,), 4.0)
    prediction = torch.zeros(1, 18)
    prediction[0, :2] = torch.tensor([0.5, -1.0])  # (y, x) of the first point, from (-4, -4)
    shape = points.decode_init(prediction)
    assert shape[0, :4].tolist() == [-2, -8, -4, 0]
    assert points.to_boxes(shape).tolist() == [[-8, -4, 4, 4]]
    refined = points.decode_refined(shape, -prediction)
    assert points.to_boxes(refined).tolist() == [[-4, -4, 4, 4]]
    # Where an untrained head begins has no unit.
    assert points.decode_init(torch.zeros(1, 18)).equal(
        PointRepresentation(8.0).decode_init(torch.zeros(1, 18))
    )


def test_anchors_have_equal_area_and_the_ratios():
    anchors = BoxRepresentation(8.0, (0.5, 1.0, 2.0)).reference_boxes(torch.device("cpu"))
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    torch.testing.assert_close(width * height, torch.full((3,), 64.0))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(anchors[:, :2], -anchors[:, 2:])


def test_box_stages_apply_deltas_one_after_the_other():
    boxes = BoxRepresentation(8.0)
    # Half a width to the right and twice as high, then back and twice as wide.
    init = boxes.decode_init(
        torch.tensor([[[0.5, 0.0, 0.0, 2.0]]]).log1p().mul(0) + torch.tensor([0.5, 0, 0, 0.6931472])
    )
    torch.testing.assert_close(init, torch.tensor([[[0.0, -8.0, 8.0, 8.0]]]))
    refined = boxes.decode_refined(init, torch.tensor([[[-0.5, 0.0, 0.6931472, 0.0]]]))
    torch.testing.assert_close(refined, torch.tensor([[[-8.0, -8.0, 8.0, 8.0]]]))


def test_refined_boxes_hold_back_the_gradient():
    init = torch.tensor([[[-4.0, -4.0, 4.0, 4.0]]], requires_grad=True)
    secondary = torch.zeros(1, 1, 4, requires_grad=True)
    # Four different factors: those of a plain sum would cancel for the deltas of width and height.
    refined = BoxRepresentation(8.0).decode_refined(init, secondary)
    (refined * torch.tensor([1.0, 2, 3, 5])).sum().backward()
    assert init.grad is None
    # A delta of the centre moves both sides by the width, 8; one of the width by half of it, 4.
    assert secondary.grad.tolist() == [[[32, 56, 8, 12]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("circle", 8.0, (1.0,)), "unknown MODEL.SCRPN.REPRESENTATION 'circle'"),
        (("points", 8.0, (0.5, 1.0)), "points have no anchors"),
        (("box", 0.0, (1.0,)), "must be positive, got 0.0"),
        (("box", 8.0, ()), "must be positive"),
        (("points", 8.0, (1.0,), 0.0), "POINT_UNIT must be positive, got 0.0"),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_representation(*arguments)
