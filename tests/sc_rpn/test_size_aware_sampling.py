"""Algorithms 1 and 2 and Eq. 1-2 against plain-Python twins of the paper's pseudo-code."""

import pytest
import torch

from d2proposals.sc_rpn import size_aware_sampling
from d2proposals.sc_rpn.locations import GroundTruth
from d2proposals.sc_rpn.size_aware_sampling import (
    adjacent_level,
    assign_positive_region,
    assign_size_aware_threshold,
    candidate_levels,
    check_strides,
    nearest_candidates,
    object_level,
)
from d2proposals.sc_rpn.stage_sampling import StageSampler
from tests.sc_rpn.size_aware_twins import (
    STRIDES,
    build_ground_truth,
    build_locations,
    positives,
    random_boxes,
    random_case,
    twin_level,
    twin_levels,
    twin_positive_region,
    twin_size_aware_threshold,
)


@pytest.mark.parametrize("exponent", range(8, 21))
def test_equations_1_and_2_tabulated(exponent):
    # S from 2^8 to 2^20: i_g = floor((log2 S - 9) / 2), and its nearer neighbour.
    i_g = dict(zip(range(8, 21), [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4], strict=True))
    # [2^10, 2^11): i_g 0 and above its middle, so 1. [2^11, 2^12): i_g 1, below its middle, so 0.
    j_g = dict(zip(range(8, 21), [-1, -1, 1, 0, 2, 1, 3, 2, 4, 3, -1, -1, -1], strict=True))
    first = torch.tensor(2.0**exponent)
    area = torch.stack([first, torch.nextafter(first * 2, first)])
    level = object_level(area, 5)
    assert level.tolist() == [i_g[exponent]] * 2
    assert adjacent_level(area, level, 5).tolist() == [j_g[exponent]] * 2
    assert level.tolist() == [twin_level(a) for a in area.tolist()]
    for num_levels in range(1, 6):
        selected = candidate_levels(area, 5, 4, num_levels)
        for row, a in zip(selected, area.tolist(), strict=True):
            assert row.nonzero().flatten().tolist() == sorted(twin_levels(a, num_levels))


def test_levels_of_a_pyramid_that_begins_elsewhere():
    # A square of 8 strides a side belongs to the map of that stride, whatever the first map is.
    for first_stride in (2, 8):
        areas = torch.tensor([(8.0 * first_stride * 2**i) ** 2 for i in range(3)])
        assert object_level(areas, 3, first_stride).tolist() == [0, 1, 2]
        assert adjacent_level(areas, torch.arange(3), 3, first_stride).tolist() == [1, 2, -1]


def test_strides_must_double():
    check_strides([8, 16, 32])
    with pytest.raises(ValueError, match=r"double from each to the next, got strides \[4, 8, 32\]"):
        check_strides([4, 8, 32])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sigma", [0.0, 0.2, 0.5, 1.0])
def test_positive_region_equals_its_twin(seed, sigma):
    locations, ground_truth, _ = random_case(seed)
    assignment = assign_positive_region(locations, ground_truth, sigma)
    expected = twin_positive_region(locations, ground_truth, sigma)
    assert len(expected) >= 10
    assert positives(assignment) == expected


@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.0])
def test_algorithm_1_by_the_letter_equals_its_twin(sigma):
    locations, ground_truth, _ = random_case(3)
    assignment = assign_positive_region(locations, ground_truth, sigma, "inside")
    expected = twin_positive_region(locations, ground_truth, sigma, "inside")
    assert positives(assignment) == expected and expected
    touched = positives(assign_positive_region(locations, ground_truth, sigma))
    assert len(touched) > len(expected)


def test_samples_inside_the_region_by_hand():
    # sigma .5 of 16 x 16 pixels around (40, 40) on the map of stride 4, whose centres are 2, 6,
    # ...: 38 and 42 are inside 36 to 44, 34 and 46 are not. At .2 the region is 38.4 to 41.6: none.
    locations = build_locations([(128, 128)], (128, 128))
    truth = build_ground_truth([[[32, 32, 48, 48]]])
    found = positives(assign_positive_region(locations, truth, 0.5, "inside"))
    centers = {tuple(locations.centers[i].tolist()) for _, i in found}
    assert centers == {(x, y) for x in (38, 42) for y in (38, 42)}
    assert positives(assign_positive_region(locations, truth, 0.2, "inside")) == {}
    assert len(positives(assign_positive_region(locations, truth, 0.2))) == 4


def mirrored_positives(boxes, sigma, image_size=(256, 320)):
    """Cells (row, column, map) of each box, one box an image; of mirrored boxes mirrored back."""
    locations = build_locations([image_size] * len(boxes), image_size)
    width = image_size[1]
    found = []
    for mirror in (False, True):
        if mirror:
            boxes = [[width - x2, y1, width - x1, y2] for x1, y1, x2, y2 in boxes]
        assignment = assign_positive_region(
            locations, build_ground_truth([[box] for box in boxes]), sigma
        )
        cells = [set() for _ in boxes]
        for image, index in positives(assignment):
            x, y = locations.centers[index].tolist()
            stride = int(locations.stride_of_location[index])
            cells[image].add((width - x if mirror else x, y, stride))
        found.append(cells)
    return found


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_mirrored_boxes_have_mirrored_positives(sigma):
    # The image's width is a multiple of all strides. Both sides are longer than a cell: the centre
    # of a narrower object can lie on a border between two cells of which neither is centred in it.
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2000, 2, 2, generator=generator) * torch.tensor([320, 256])
    low, high = corners.round().sort(dim=1).values.unbind(1)
    level = object_level(((high - low).prod(dim=1)).clamp(min=1), 5)
    is_wide = ((high - low) > torch.tensor(STRIDES)[level, None]).all(dim=1)
    boxes = torch.cat([low, high], dim=1)[is_wide][:300].tolist()
    assert len(boxes) == 300
    straight, mirrored = mirrored_positives(boxes, sigma)
    assert straight == mirrored
    assert {stride for cells in straight for *_, stride in cells} >= {4, 8, 16, 32}


def test_a_region_that_ends_on_a_border_does_not_touch_the_next_cell():
    # Region of 8 x 8 pixels from (36, 36) to (44, 44), sides multiples of the stride of 4.
    locations = build_locations([(128, 128)], (128, 128))
    assignment = assign_positive_region(locations, build_ground_truth([[[32, 32, 48, 48]]]), 0.5)
    expected = {(x, y) for x in (38, 42) for y in (38, 42)}
    assert {tuple(locations.centers[i].tolist()) for _, i in positives(assignment)} == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("k", "num_levels"), [(9, 2), (3, 1), (18, 3), (5, 5), (1, 2)])
def test_size_aware_threshold_equals_its_twin(seed, k, num_levels):
    locations, ground_truth, init_boxes = random_case(seed)
    assignment = assign_size_aware_threshold(locations, ground_truth, init_boxes, k, num_levels)
    expected = twin_size_aware_threshold(locations, ground_truth, init_boxes, k, num_levels)
    assert positives(assignment) == expected
    assert expected or k == 1  # a single candidate per map is seldom above the mean of two


def test_ties_are_broken_by_position():
    # On the regular grid, objects centred on a cell's corner have four nearest cells.
    locations = build_locations([(256, 256)], (256, 256))
    side = locations.stride_of_location[:, None] * 4
    init_boxes = torch.cat([locations.centers - side, locations.centers + side], dim=1)[None]
    ground_truth = build_ground_truth([[[44, 44, 84, 84], [64, 64, 192, 192]]])
    for k in (1, 2, 3, 9):
        assignment = assign_size_aware_threshold(locations, ground_truth, init_boxes, k, 2)
        assert positives(assignment) == twin_size_aware_threshold(
            locations, ground_truth, init_boxes, k, 2
        )


def test_equal_ious_give_no_positive():
    locations = build_locations([(64, 64)], (64, 64))
    init_boxes = torch.tensor([10.0, 10, 43, 43]).expand(1, locations.num_locations, 4)
    ground_truth = build_ground_truth([[[10, 10, 50, 50]]])
    assignment = assign_size_aware_threshold(locations, ground_truth, init_boxes, 9, 2)
    assert (assignment.labels == 0).sum() == locations.is_valid.sum()


@pytest.mark.parametrize("seed", range(2))
def test_the_best_candidate_of_each_object_equals_its_twin(seed):
    # Four pixels of noise: many of the objects of a few pixels hold no centre.
    locations, ground_truth, init_boxes = random_case(seed, num_boxes=(40, 30))
    arguments = (locations, ground_truth, init_boxes, 9, 2)
    found = positives(assign_size_aware_threshold(*arguments, keep_best=True))
    assert found == twin_size_aware_threshold(*arguments, keep_best=True)
    assert len(found) > len(positives(assign_size_aware_threshold(*arguments)))


def test_squares_of_one_size_leave_the_nearest_with_keep_best():
    # Untrained: squares of 32 pixels on the first map all hold the object of 8, at one IoU.
    locations = build_locations([(128, 128)], (128, 128))
    side = locations.stride_of_location[:, None] * 4
    init_boxes = torch.cat([locations.centers - side, locations.centers + side], dim=1)[None]
    truth = build_ground_truth([[[49, 49, 57, 57], [100, 100, 108, 108]]])  # centred at 53
    arguments = (locations, truth, init_boxes, 9, 1)
    assert positives(assign_size_aware_threshold(*arguments)) == {}
    found = positives(assign_size_aware_threshold(*arguments, keep_best=True))
    # The nearest centres of 2, 6, 10, ...: 54; of those around 104 the first, 102.
    cells = {g: locations.centers[i].tolist() for (_, i), g in found.items()}
    assert cells == {0: [54, 54], 1: [102, 102]}
    # No candidate overlaps the object: none is kept.
    far = init_boxes + 1000
    assert positives(assign_size_aware_threshold(*arguments[:2], far, 9, 1, keep_best=True)) == {}


def test_hand_worked_threshold():
    # A 32 x 32 object (i_g 0, j_g 1) and four proposals nearby, of IoU 1, .5, .25 and .25; k 2.
    locations = build_locations([(64, 64)], (64, 64))
    init_boxes = torch.tensor([500.0, 500, 501, 501]).repeat(1, locations.num_locations, 1)
    first, second = locations.starts[:2]
    init_boxes[0, first + 5] = torch.tensor([16.0, 16, 48, 48])
    init_boxes[0, first + 9] = torch.tensor([16.0, 24, 48, 40])
    init_boxes[0, second + 3] = torch.tensor([24.0, 24, 40, 40])
    init_boxes[0, second + 7] = torch.tensor([24.0, 24, 40, 40])
    ground_truth = build_ground_truth([[[16, 16, 48, 48]]])
    candidates = nearest_candidates(locations, ground_truth, init_boxes, 2, 2)
    assert candidates[candidates >= 0].tolist() == [first + 5, first + 9, second + 3, second + 7]
    # The mean is .5: only the first proposal is above it.
    assignment = assign_size_aware_threshold(locations, ground_truth, init_boxes, 2, 2)
    assert positives(assignment) == {(0, first + 5): 0}


def test_samples_do_not_depend_on_padding_or_on_other_images():
    sizes = [(190, 333), (256, 200)]
    together, ground_truth, init_boxes = random_case(0, tuple(sizes), (9, 6))
    for image, size in enumerate(sizes):
        alone = build_locations([size], (size[0] // 32 * 32 + 32, size[1] // 32 * 32 + 32))
        own = ground_truth.image_index == image
        own_truth = GroundTruth(
            ground_truth.boxes[own], torch.zeros(int(own.sum()), dtype=torch.long)
        )
        # Where the same cell is in both layouts.
        lookup = {
            (x, y, s): i
            for i, ((x, y), s) in enumerate(
                zip(together.centers.tolist(), together.stride_of_location.tolist(), strict=True)
            )
        }
        index = torch.tensor(
            [
                lookup.get((x, y, s), -1)
                for (x, y), s in zip(
                    alone.centers.tolist(), alone.stride_of_location.tolist(), strict=True
                )
            ]
        )
        assert (index >= 0).all()
        pairs = [
            (
                assign_positive_region(alone, own_truth, 0.2),
                assign_positive_region(together, ground_truth, 0.2),
            ),
            (
                assign_size_aware_threshold(
                    alone, own_truth, init_boxes[image : image + 1, index], 9, 2
                ),
                assign_size_aware_threshold(together, ground_truth, init_boxes, 9, 2),
            ),
        ]
        first_object = int((ground_truth.image_index < image).sum())
        for by_itself, in_batch in pairs:
            torch.testing.assert_close(by_itself.labels[0], in_batch.labels[image, index])
            matched = in_batch.matched[image, index]
            matched = torch.where(matched >= 0, matched - first_object, matched)
            torch.testing.assert_close(by_itself.matched[0], matched)
            # Nothing is positive or negative outside of the image.
            outside = torch.ones(together.num_locations, dtype=torch.bool)
            outside[index[alone.is_valid[0]]] = False
            assert (in_batch.labels[image, outside] == -1).all()


def test_objects_are_balanced_and_positives_are_inside():
    """Objects of 16 to 256 pixels, far from each other: both stages."""
    sides = torch.tensor([16.0, 32, 64, 128, 256])
    low = torch.tensor([[40.0, 40], [40, 400], [400, 40], [600, 400], [700, 700]])
    ground_truth = build_ground_truth([torch.cat([low, low + sides[:, None]], dim=1).tolist()])
    locations = build_locations([(1024, 1024)], (1024, 1024))
    init = assign_positive_region(locations, ground_truth, 0.2)
    # Initial proposals as large as the nearest object.
    nearest = (locations.centers[:, None] - ground_truth.boxes[:, :2] - sides[:, None] / 2).abs()
    side = sides[nearest.amax(dim=2).argmin(dim=1)][:, None] / 2
    init_boxes = torch.cat([locations.centers - side, locations.centers + side], dim=1)[None]
    refined = assign_size_aware_threshold(locations, ground_truth, init_boxes, 9, 2)
    for assignment, centers in (
        (init, locations.centers),
        (refined, (init_boxes[0, :, :2] + init_boxes[0, :, 2:]) / 2),
    ):
        (location,) = (assignment.labels[0] == 1).nonzero(as_tuple=True)
        matched = assignment.matched[0, location]
        box = ground_truth.boxes[matched]
        assert ((centers[location] > box[:, :2]) & (centers[location] < box[:, 2:])).all()
        assert set(matched.tolist()) == set(range(5))
    counts = torch.bincount(matched, minlength=5)
    # An object of 256 pixels has 256 times the area of one of 16, and hardly more positives.
    assert counts.max() <= 4 * counts.min()


EDGE_BOXES = {
    "none": [],
    "one pixel wide": [[50, 20, 51, 120]],
    "one pixel": [[50, 20, 51, 21]],
    "bigger than the image": [[-100, -100, 500, 500]],
    "whole image": [[0, 0, 128, 128]],
    "in the corner": [[126, 126, 128, 128]],
    "twice the same": [[20, 20, 60, 60], [20, 20, 60, 60]],
    "beyond the image": [[300, 300, 340, 340]],
}


@pytest.mark.parametrize("boxes", EDGE_BOXES.values(), ids=EDGE_BOXES.keys())
def test_edge_cases_equal_the_twins(boxes):
    locations = build_locations([(128, 128), (100, 60)], (128, 160))
    ground_truth = build_ground_truth([boxes, []])
    side = locations.stride_of_location[:, None] * 4
    init_boxes = torch.cat([locations.centers - side, locations.centers + side], dim=1).expand(
        2, -1, -1
    )
    first = assign_positive_region(locations, ground_truth, 0.2)
    assert positives(first) == twin_positive_region(locations, ground_truth, 0.2)
    second = assign_size_aware_threshold(locations, ground_truth, init_boxes, 9, 2)
    assert positives(second) == twin_size_aware_threshold(locations, ground_truth, init_boxes, 9, 2)
    if boxes:
        assert (first.labels == 1).any()
    assert (first.labels[1] <= 0).all()


def test_an_image_smaller_than_a_cell_keeps_a_location_on_each_map():
    locations = build_locations([(20, 10), (256, 256)], (256, 256))
    per_map = [locations.is_valid[0, locations.level_slice(i)].sum().item() for i in range(5)]
    # 5 x 2 cells of stride 4 (centres up to 18 and 6), 2 x 1 of stride 8, then one each.
    assert per_map == [5 * 2, 2 * 1, 1, 1, 1]


def test_five_hundred_objects_in_bounded_memory(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    locations = build_locations([(800, 1216)], (800, 1216))
    ground_truth = build_ground_truth([random_boxes((800, 1216), 500, generator)])
    side = locations.stride_of_location[:, None] * 4
    init_boxes = torch.cat([locations.centers - side, locations.centers + side], dim=1)[None]
    largest = []
    smallest = size_aware_sampling._smallest

    def watched(values, k):
        largest.append(values.numel())
        return smallest(values, k)

    monkeypatch.setattr(size_aware_sampling, "_smallest", watched)
    assignment = assign_size_aware_threshold(locations, ground_truth, init_boxes, 9, 2)
    assert max(largest) <= size_aware_sampling._MAX_DISTANCES
    monkeypatch.setattr(size_aware_sampling, "_MAX_DISTANCES", 1 << 30)
    at_once = assign_size_aware_threshold(locations, ground_truth, init_boxes, 9, 2)
    torch.testing.assert_close(assignment.matched, at_once.matched)
    assert len(at_once.matched.unique()) > 100


@pytest.mark.parametrize(("region", "num_init"), [("touched", 4), ("inside", 0)])
@pytest.mark.parametrize("keep_best", [False, True])
def test_a_stage_sampler_passes_its_settings_on(region, num_init, keep_best):
    locations = build_locations([(128, 128)], (128, 128))
    side = locations.stride_of_location[:, None] * 4
    squares = torch.cat([locations.centers - side, locations.centers + side], dim=1)
    sampler = StageSampler(positive_region=region, keep_best=keep_best, num_levels=1)
    truth = build_ground_truth([[[32, 32, 48, 48]]])
    samples = sampler(locations, truth, squares, squares[None], num_stages=2)
    assert (samples.init.labels == 1).sum() == num_init
    assert (samples.refined.labels == 1).sum() == keep_best
