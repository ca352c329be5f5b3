"""Tests of the fixed grid: numbers, places and ranks of its boxes, and its evaluation."""

import pytest
import torch
from detectron2.structures import BoxMode

from d2proposals.evaluation.fixed_grid import evaluate_fixed_grid, grid_boxes, split_boxes


@pytest.mark.parametrize(
    ("sides", "number", "expected"),
    [
        ((32, 64, 128), 100, {32: 34, 64: 33, 128: 33}),
        ((128, 32, 64), 5, {32: 2, 64: 2, 128: 1}),
        ((32, 64, 128), 3, {32: 1, 64: 1, 128: 1}),
        ((50,), 7, {50: 7}),
    ],
)
def test_split(sides, number, expected):
    assert split_boxes(sides, number) == expected


def test_four_boxes_worked_by_hand():
    grid = grid_boxes((30, 50), (10,), 4)
    # Corners lie in 20 x 40 pixels: round(sqrt(4 * 20 / 40)) = 1 row, a box in each quarter of it.
    # Nearest to the middle first.
    expected = [[15, 10, 25, 20], [25, 10, 35, 20], [5, 10, 15, 20], [35, 10, 45, 20]]
    assert grid.proposal_boxes.tensor.tolist() == expected
    probabilities = torch.tensor([0.8, 0.6, 0.4, 0.2])
    assert torch.allclose(grid.objectness_logits.sigmoid(), probabilities)


def test_rows_share_the_boxes_as_evenly_as_they_can():
    grid = grid_boxes((110, 110), (10,), 7)
    rows = grid.proposal_boxes.tensor[:, 1].unique(return_counts=True)[1]
    assert sorted(rows.tolist()) == [2, 2, 3]  # sqrt(7) rounds to 3 rows


@pytest.mark.parametrize("size", [(256, 384), (480, 640), (33, 500), (100, 20), (1, 1), (7, 900)])
@pytest.mark.parametrize("number", [3, 100, 101, 997])
def test_boxes_of_any_image_and_number(size, number):
    grid = grid_boxes(size, (32, 64, 128), number)
    boxes = grid.proposal_boxes
    assert len(grid) == number and grid.image_size == size
    assert boxes.nonempty().all()
    assert (boxes.tensor[:, :2] >= 0).all()
    assert (boxes.tensor[:, 2:] <= torch.tensor(size[::-1])).all()
    assert (grid.objectness_logits.diff() < 0).all() and grid.objectness_logits.isfinite().all()
    # Larger ones first, and none cut in an image that has room for it.
    sides = boxes.tensor[:, 2:] - boxes.tensor[:, :2]
    assert (sides.prod(1).diff() <= 1e-2).all()
    if min(size) >= 128:
        numbers = split_boxes((32, 64, 128), number)
        for side, expected in numbers.items():
            assert ((sides - side).abs() < 1e-3).all(dim=1).sum() == expected
    # Rows differ by a box, so the mean of the centres is near the middle, not on it.
    middle = boxes.get_centers().mean(0)
    assert torch.allclose(middle, torch.tensor(size[::-1]) / 2, atol=0.06 * max(size) + 0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 10), (5,), 1), r"image_size must be a positive \(height, width\), not \(0, 10\)"),
        (((10, 10), (), 1), r"sides must be different positive numbers of pixels, not \(\)"),
        (((10, 10), (5, -1), 2), "sides must be different positive numbers"),
        (((10, 10), (5, 5), 2), "sides must be different positive numbers"),
        (((10, 10), (5, 6), 1), r"num_boxes \(1\) must be at least one per side: 2"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid_boxes(*arguments)


def make_record(image_id, box, **extra):
    item = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return {"image_id": image_id, "file_name": "nowhere.jpg", "annotations": [item], **extra}


def test_evaluation_reads_no_image_and_finds_its_own_boxes(register_dataset):
    # Of four boxes in the 30 x 50 image the second one is an object, of those in the other none.
    records = [
        make_record(0, [25, 10, 35, 20], height=30, width=50),
        make_record(1, [0, 0, 100, 3], height=100, width=100),
    ]
    results = evaluate_fixed_grid(
        register_dataset(records), sides=(10,), num_boxes=4, limits=(1, 2)
    )["box_proposals"]
    assert results["AR@1"] == 0 and results["AR@2"] == pytest.approx(50)


def test_evaluation_writes_the_evaluators_files(register_dataset, tmp_path):
    records = [make_record(0, [25, 10, 35, 20], height=30, width=50)]
    evaluate_fixed_grid(register_dataset(records), output_dir=str(tmp_path))
    assert (tmp_path / "box_proposals.pkl").is_file()


def test_evaluation_without_image_sizes(register_dataset):
    name = register_dataset([make_record(7, [0, 0, 5, 5], height=30)])
    with pytest.raises(ValueError, match="image 7 of the dataset .* has no 'height' or 'width'"):
        evaluate_fixed_grid(name)


def test_unknown_dataset():
    with pytest.raises(ValueError, match="'no_such_dataset' is not registered"):
        evaluate_fixed_grid("no_such_dataset")
