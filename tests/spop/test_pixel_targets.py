"""Pixel-wise targets: by hand, against a plain twin, and at the edges."""

import logging

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks

from d2proposals.backbones.deeplab_largefov import output_size
from d2proposals.spop.pixel_targets import (
    BACKGROUND,
    FOREGROUND,
    IGNORED,
    PixelLabeler,
    PixelTargets,
    sample_large_objects,
)
from tests.spop.ground_truth import fill, make_gt

LABELER = PixelLabeler(stride=8, normalizer=513.0)


def map_size(image_size):
    return tuple(output_size(side) for side in image_size)


def label(gt, labeler=LABELER):
    return labeler(gt, map_size(gt.image_size))


def test_by_hand():
    # 25 x 33 pixels: 4 x 5 cells at 0, 8, 16, 24 (, 32). Object 0, large by its original area,
    # holds pixels (8..16, 0..9); object 1 holds x 16..24, y 16..23.
    gt = make_gt((25, 33), [[8, 0, 17, 10], [16, 16, 25, 24]], areas=[2000, 1999])
    targets = label(gt)
    expected = torch.full((4, 5), -1)
    expected[0:2, 1:3] = 0
    expected[2, 2:4] = 1
    assert torch.equal(targets.object_index.view(4, 5), expected)
    assert torch.equal(targets.objectness.view(4, 5), (expected >= 0).long())
    assert torch.equal(targets.is_large.view(4, 5), expected == 0)
    assert torch.equal(targets.is_small.view(4, 5), expected == 1)
    boxes = targets.boxes.view(4, 5, 4) * 513
    assert boxes[1, 2].tolist() == pytest.approx([8, 0, 17, 10])
    assert boxes[2, 3].tolist() == pytest.approx([16, 16, 25, 24])
    assert not boxes[3].any() and not boxes[0, 0].any()


def test_areas_count_in_the_original_image():
    # 20 x 20 pixels here, 2,000 in the original image: large. Without areas: small, and said so.
    box = [[0, 0, 20, 20]]
    assert label(make_gt((32, 32), box, areas=[2000.0])).is_large.sum() == 9
    labeler = PixelLabeler(stride=8, normalizer=513.0)
    assert label(make_gt((32, 32), box), labeler).is_large.sum() == 0
    assert label(make_gt((32, 32), box), PixelLabeler(stride=8, normalizer=1, large_area=400.0)
                 ).is_large.sum() == 9  # fmt: skip


def test_missing_areas_are_said_once(caplog):
    labeler = PixelLabeler(stride=8, normalizer=513.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            label(make_gt((32, 32), [[0, 0, 20, 20]]), labeler)
    assert sum("gt_areas" in x.message for x in caplog.records) == 1


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("crowd_masks", [False, True])
def test_cells_of_a_copy_of_another_size(polygons, crowd_masks):
    # The ground truth of a copy three times as high and twice as wide; every object is a box.
    boxes, crowd = [[8, 0, 17, 10], [16, 16, 25, 24]], [[24, 8, 33, 20]]
    plain = make_gt((25, 33), boxes, [2000, 1999], crowd, crowd_masks)

    def enlarge(some):
        return [[2 * x1, 3 * y1, 2 * x2, 3 * y2] for x1, y1, x2, y2 in some]

    large = make_gt((75, 66), enlarge(boxes), [2000, 1999], enlarge(crowd), crowd_masks)
    if polygons:
        large.gt_masks = PolygonMasks(
            [
                [np.array([x1, y1, x2, y1, x2, y2, x1, y2], float)]
                for x1, y1, x2, y2 in enlarge(boxes)
            ]
        )
    expected = label(plain)
    targets = LABELER(large, map_size((25, 33)), (25, 33))
    assert (expected.objectness == IGNORED).any() and expected.is_large.any()
    for name in ("objectness", "object_index", "is_large"):
        assert torch.equal(getattr(targets, name), getattr(expected, name)), name
    torch.testing.assert_close(targets.boxes, expected.boxes)
    # Areas that are not given are those in the copy that the networks see.
    large.remove("gt_areas")
    labeler = PixelLabeler(stride=8, normalizer=513.0, large_area=80.0)
    assert labeler(large, map_size((25, 33)), (25, 33)).is_large.sum() == 4  # 90 pixels, not 72


def test_cells_outside_a_copy_are_those_outside_its_own_size():
    # Of 24 x 32 pixels, the last row and column of 4 x 5 cells; of 72 x 64 they would be inside.
    targets = LABELER(make_gt((72, 64)), map_size((24, 32)), (24, 32))
    expected = label(make_gt((24, 32)))
    assert torch.equal(targets.objectness, expected.objectness)
    assert (expected.objectness == IGNORED).sum() == 8


def test_cells_of_a_copy_read_the_pixel_that_they_lie_in():
    # Of 10 columns, a copy of 24: cells at 0, 8 and 16, whose middles are 0.2, 3.5 and 6.9.
    gt = make_gt((1, 10), [[x, 0, x + 1, 1] for x in range(10)], [1.0] * 10)
    assert LABELER(gt, (1, 3), (1, 24)).object_index.tolist() == [0, 3, 6]
    # Of 30 columns, a copy of 15: cells at 0 and 8, whose middles are 1 and 17.
    gt = make_gt((1, 30), [[x, 0, x + 1, 1] for x in range(30)], [1.0] * 30)
    assert LABELER(gt, (1, 2), (1, 15)).object_index.tolist() == [1, 17]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_the_smaller_object_wins_whatever_the_order(order):
    boxes = np.array([[0, 0, 64, 64], [8, 8, 40, 40], [16, 16, 24, 24]])[order].tolist()
    areas = np.array([4096.0, 1024.0, 64.0])[order].tolist()
    targets = label(make_gt((64, 64), boxes, areas))
    sides = (targets.boxes[:, 2] - targets.boxes[:, 0]).view(9, 9) * 513
    assert sides[2, 2].item() == pytest.approx(8) and sides[3, 3].item() == pytest.approx(32)
    assert sides[7, 7].item() == pytest.approx(64) and sides[5, 1].item() == pytest.approx(64)


def test_crowd_is_ignored_where_no_object_is():
    gt = make_gt((32, 32), [[0, 0, 9, 9]], [81.0], crowd=[[0, 0, 17, 9]])
    objectness = label(gt).objectness.view(5, 5)
    assert objectness[:2, :2].eq(FOREGROUND).all() and objectness[:2, 2].eq(IGNORED).all()
    assert objectness[2:4, :4].eq(BACKGROUND).all() and objectness[:2, 3].eq(BACKGROUND).all()


def test_crowd_without_masks_is_ignored_by_its_boxes():
    gt = make_gt((32, 32), [], [], crowd=[[0, 0, 16.4, 8.6]], crowd_masks=False)
    ignored = label(gt).objectness.view(5, 5)[:4, :4].eq(IGNORED)
    # Pixel 16 ends at 17, its centre is at 16.5; pixel 8's is at 8.5.
    assert ignored.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_all_crowd():
    targets = label(make_gt((32, 40), [], [], crowd=[[0, 0, 40, 32]]))
    assert targets.objectness.eq(IGNORED).all()


def test_cells_outside_the_image_are_ignored():
    # 640 -> 81 cells, the last on pixel 640.
    objectness = label(make_gt((480, 640), [[0, 0, 640, 480]], [3e5])).objectness.view(61, 81)
    assert objectness[:60, :80].eq(FOREGROUND).all()
    assert objectness[60].eq(IGNORED).all() and objectness[:, 80].eq(IGNORED).all()
    # 513 -> 65 cells, the last on pixel 512: inside.
    assert label(make_gt((513, 513), [], [])).objectness.eq(BACKGROUND).all()


@pytest.mark.parametrize(
    "boxes",
    [[], [[8, 0, 9, 60]], [[9, 9, 16, 16]], [[-20, -20, 300, 300]], [[300, 300, 320, 320]]],
    ids=["none", "one pixel wide", "between cells", "bigger than the image", "outside"],
)
def test_strange_objects(boxes):
    targets = label(make_gt((60, 60), boxes, [100.0] * len(boxes)))
    expected = fill((60, 60), boxes)[:, ::8, ::8].sum()
    assert targets.is_foreground.sum() == expected
    assert targets.boxes.isfinite().all()


def test_equals_its_twin():
    generator = np.random.default_rng(0)
    for _ in range(20):
        height, width = generator.integers(1, 90, 2)
        num = generator.integers(0, 8)
        corners = generator.integers(-10, 90, (num, 2))
        boxes = np.concatenate([corners, corners + generator.integers(1, 60, (num, 2))], 1)
        areas = generator.integers(100, 4000, num).astype(float)
        gt = make_gt((height, width), boxes.tolist(), areas.tolist(), crowd=[[5, 5, 30, 20]])
        targets = label(gt)
        rows, columns = map_size((height, width))
        for t in range(rows * columns):
            y, x = 8 * (t // columns), 8 * (t % columns)
            hits = [i for i, (x1, y1, x2, y2) in enumerate(boxes) if x1 <= x < x2 and y1 <= y < y2]
            if y >= height or x >= width:
                expected = (IGNORED, None)
            elif hits:
                expected = (FOREGROUND, min(hits, key=lambda i: (areas[i], i)))
            elif 5 <= x < 30 and 5 <= y < 20:
                expected = (IGNORED, None)
            else:
                expected = (BACKGROUND, None)
            assert targets.objectness[t] == expected[0]
            if expected[1] is not None:
                assert targets.object_index[t] == expected[1]
                assert targets.is_large[t] == (areas[expected[1]] >= 2000)
                assert np.allclose(targets.boxes[t] * 513, boxes[expected[1]], atol=1e-3)


def test_polygons_are_read_as_bit_masks():
    gt = make_gt((64, 64), [[8, 16, 40, 48]], [1024.0])
    other = make_gt((64, 64), [[8, 16, 40, 48]], [1024.0])
    other.gt_masks = PolygonMasks([[np.array([8, 16, 40, 16, 40, 48, 8, 48], dtype=float)]])
    assert torch.equal(label(gt).object_index, label(other).object_index)


def test_missing_masks_are_one_clear_line():
    gt = make_gt((32, 32), [[0, 0, 9, 9]])
    gt.remove("gt_masks")
    with pytest.raises(ValueError, match="INPUT.USE_INSTANCE_MASK True") as error:
        label(gt)
    assert "\n" not in str(error.value)
    empty = make_gt((32, 32))
    empty.remove("gt_masks")  # Detectron2's mapper leaves the field out where there is no object
    assert not label(empty).is_foreground.any()


def test_objects_of_several_images_stay_apart():
    a = label(make_gt((32, 32), [[0, 0, 9, 9]], [10.0]))
    b = label(make_gt((32, 32), [[0, 0, 9, 9], [16, 16, 25, 25]], [10.0, 10.0]))
    joined = PixelTargets.cat([a, b])
    assert len(joined.objectness) == 50
    assert len(joined.object_index[joined.is_foreground].unique()) == 3
    assert torch.equal(joined.object_index >= 0, joined.is_foreground)


def test_objects_of_an_image_with_fewer_cells_than_objects_stay_apart():
    # 2 x 2 cells; the last of six objects has one, those before it none.
    boxes = [[1, 1, 7, 7]] * 5 + [[0, 0, 8, 8]]
    a = label(make_gt((8, 8), boxes, [9000.0] * 6))
    b = label(make_gt((32, 32), [[24, 24, 32, 32], [0, 0, 9, 9]], [9000.0] * 2))
    joined = PixelTargets.cat([a, b])
    assert joined.num_objects == 8
    assert joined.object_index[joined.is_foreground].tolist() == [5, 7, 7, 7, 7, 6]
    assert len(sample_large_objects(joined, 1)) == 3


def test_100_cells_of_each_large_object_and_all_of_small_ones():
    # 40 x 40 cells of the first object, 5 x 5 of the second (fewer than 100), 2 x 2 of the small.
    boxes = [[0, 0, 320, 320], [328, 0, 368, 40], [328, 328, 344, 344]]
    targets = label(make_gt((400, 400), boxes, [1e5, 2000.0, 256.0]))
    assert [int((targets.object_index == i).sum()) for i in range(3)] == [1600, 25, 4]
    generator = torch.Generator().manual_seed(0)
    cells = sample_large_objects(targets, 100, generator)
    assert len(cells.unique()) == len(cells) == 129
    assert targets.object_index[cells].bincount().tolist() == [100, 25, 4]
    # Evenly over the object: each of its cells in 100 of 1,600 draws.
    counts = torch.zeros(len(targets.objectness))
    for _ in range(200):
        counts[sample_large_objects(targets, 100, generator)] += 1
    first = counts[targets.object_index == 0]
    assert first.mean().item() == pytest.approx(12.5) and first.max() < 30 and first.min() > 1


def test_nothing_to_sample():
    targets = label(make_gt((40, 40)))
    assert len(sample_large_objects(targets, 100)) == 0


def test_masks_of_other_kinds():
    gt = make_gt((32, 32), [[0, 0, 9, 9]], [81.0])
    assert isinstance(gt.gt_masks, BitMasks)
    flipped = label(gt[torch.tensor([0])])
    assert torch.equal(flipped.object_index, label(gt).object_index)
