"""Targets and loss: Eq. 1 by hand and against its definition, the weighted L2 loss by hand."""

import pytest
import torch

from d2proposals.detectornet.box_masks import (
    MASK_TYPES,
    box_mask_loss,
    box_mask_targets,
    interval_coverage,
)


def targets(boxes, crops, mask_size=4, classes=None, num_classes=1):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.zeros(len(boxes), dtype=torch.int64) if classes is None else classes
    crops = torch.tensor(crops, dtype=torch.float32).reshape(-1, 4)
    return box_mask_targets(boxes, classes, crops, num_classes, mask_size)


def halves(box):
    x1, y1, x2, y2 = box
    x_mid, y_mid = (x1 + x2) / 2, (y1 + y2) / 2
    return {
        "full": box,
        "bottom": (x1, y_mid, x2, y2),
        "top": (x1, y1, x2, y_mid),
        "left": (x1, y1, x_mid, y2),
        "right": (x_mid, y1, x2, y2),
    }


def equation_1(box, crop, mask_size):
    """(5, d, d) by the definition: area(bb(h) and T(i, j)) / area(T(i, j)), cell by cell."""
    masks = torch.zeros(5, mask_size, mask_size)
    cell_w, cell_h = (crop[2] - crop[0]) / mask_size, (crop[3] - crop[1]) / mask_size
    for h, name in enumerate(MASK_TYPES):
        x1, y1, x2, y2 = halves(box)[name]
        for i in range(mask_size):
            for j in range(mask_size):
                left, top = crop[0] + j * cell_w, crop[1] + i * cell_h
                w = max(min(x2, left + cell_w) - max(x1, left), 0)
                h_ = max(min(y2, top + cell_h) - max(y1, top), 0)
                masks[h, i, j] = w * h_ / (cell_w * cell_h)
    return masks


def test_coverage_of_a_row_of_cells():
    coverage = interval_coverage(torch.tensor([0.25, -3.0, 2.5]), torch.tensor([2.5, 9.0, 1.0]), 3)
    assert coverage.tolist() == [[0.75, 1.0, 0.5], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]


def test_masks_by_hand():
    # Cells of 10x20 pixels; the box covers columns 1 and 2 and the upper half of the image.
    masks = targets([[10, 0, 30, 40]], [[0, 0, 40, 80]])[0, 0]
    full, bottom, top, left, right = masks
    upper = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).float()
    assert torch.equal(full, upper)
    assert torch.equal(top, upper * torch.tensor([1, 0, 0, 0])[:, None])
    assert torch.equal(bottom, upper * torch.tensor([0, 1, 0, 0])[:, None])
    assert torch.equal(left, upper * torch.tensor([0, 1, 0, 0]))
    assert torch.equal(right, upper * torch.tensor([0, 0, 1, 0]))


@pytest.mark.parametrize(
    "box",
    [
        (13.3, 7.7, 51.9, 30.2),
        (20, 20, 21, 21),
        (-30, -9, 500, 400),
        (0, 11, 96, 12),
        (70, 3, 99, 8),
    ],
)
def test_masks_equal_the_definition(box):
    crop, mask_size = (5.0, 2.0, 85.0, 50.0), 6
    masks = targets([box], [crop], mask_size)[0, 0]
    torch.testing.assert_close(masks, equation_1(box, crop, mask_size), atol=1e-5, rtol=1e-5)


def test_where_objects_overlap_the_larger_coverage_counts():
    boxes, crop = [(0.0, 0.0, 45.0, 60.0), (30.0, 20.0, 80.0, 80.0)], (0.0, 0.0, 80.0, 80.0)
    expected = torch.maximum(*(equation_1(box, crop, 5) for box in boxes))
    torch.testing.assert_close(targets(boxes, [crop], 5)[0, 0], expected)


def test_each_class_has_its_own_masks():
    boxes = [(0, 0, 20, 20), (20, 20, 40, 40), (0, 20, 20, 40)]
    masks = targets(boxes, [[0, 0, 40, 40]], 2, torch.tensor([2, 0, 2]), num_classes=3)[0, :, 0]
    assert masks.tolist() == [[[0, 0], [0, 1]], [[0, 0], [0, 0]], [[1, 0], [1, 0]]]


def test_each_crop_has_its_own_frame():
    # The same object fills the first crop, and lies in a corner of the second.
    masks = targets([[10, 10, 20, 20]], [[10, 10, 20, 20], [10, 10, 30, 30]], 2)[:, 0, 0]
    assert masks.tolist() == [[[1, 1], [1, 1]], [[1, 0], [0, 0]]]


@pytest.mark.parametrize("num_boxes, num_crops", [(0, 3), (2, 0), (0, 0)])
def test_without_objects_or_crops(num_boxes, num_crops):
    masks = targets([[1, 1, 9, 9]] * num_boxes, [[0, 0, 10, 10]] * num_crops, 24)
    assert masks.shape == (num_crops, 1, 5, 24, 24) and masks.sum() == 0


def test_the_loss_by_hand():
    gt = torch.tensor([1.0, 0.5, 0.0])
    pred = torch.tensor([0.5, 1.0, 2.0])
    # (1 + .1) * .25 + (.5 + .1) * .25 + .1 * 4
    assert box_mask_loss(pred, gt, 0.1).item() == pytest.approx(0.275 + 0.15 + 0.4)
    # As printed: the norm of a diagonal matrix times the error.
    weight = torch.diag(gt + 0.1 * torch.ones(3)).sqrt()
    assert box_mask_loss(pred, gt, 0.1).item() == pytest.approx(
        torch.linalg.vector_norm(weight @ (pred - gt)).item() ** 2
    )


def test_the_loss_has_the_right_gradient():
    gt = torch.rand(2, 1, 5, 3, 3, dtype=torch.float64)
    pred = torch.rand_like(gt).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: box_mask_loss(x, gt, 0.1), [pred])
