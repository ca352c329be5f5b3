"""Non-maximum suppression of all classes at a time, against one box after the other."""

import pytest
import torch
from torchvision.ops import nms

from d2proposals.detectornet.suppression import NMS_TYPES, best_boxes_of_classes


def intersection(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def greedy(boxes, scores, threshold, number, nms_type):
    """Positions that are kept of one class, by the definition; boxes and scores as lists."""
    kept = []
    for index, (box, score) in enumerate(zip(boxes, scores, strict=True)):
        overlaps = []
        for better in (boxes[i] for i in kept):
            both = intersection(box, better)
            whole = area(box) if nms_type == "own_area" else area(box) + area(better) - both
            overlaps.append(both / whole)
        if score > -float("inf") and len(kept) < number and max(overlaps, default=0) <= threshold:
            kept.append(index)
    return kept


def random_boxes(num_classes, number, seed=0):
    """Boxes with whole coordinates, so that areas are exact; scores with many ties."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 40, (num_classes, number, 2), generator=generator)
    sides = torch.randint(1, 30, (num_classes, number, 2), generator=generator)
    scores = torch.randint(-5, 6, (num_classes, number), generator=generator).float()
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -torch.inf
    return torch.cat([corner, corner + sides], dim=2).float(), scores.sort(1, descending=True)[0]


def by_class(result, num_classes):
    classes, index = result
    return [index[classes == k].tolist() for k in range(num_classes)]


@pytest.mark.parametrize("nms_type", NMS_TYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("number", [1, 7, 1000])
def test_equal_to_one_box_after_the_other(nms_type, threshold, number):
    boxes, scores = random_boxes(3, 150)
    scores[1, 4:] = -torch.inf  # a class with few boxes
    found = best_boxes_of_classes(boxes, scores, threshold, number, nms_type)
    expected = [
        greedy(b, s, threshold, number, nms_type)
        for b, s in zip(boxes.tolist(), scores.tolist(), strict=True)
    ]
    assert by_class(found, 3) == expected
    assert found[0].tolist() == sorted(found[0].tolist())


def test_iou_equals_torchvision_s():
    boxes, scores = random_boxes(1, 200)
    boxes, scores = boxes + torch.rand(boxes.shape) * 0.3, torch.arange(200.0, 0, -1)[None]
    (kept,) = by_class(best_boxes_of_classes(boxes, scores, 0.4, 200, "iou"), 1)
    assert kept == nms(boxes[0], scores[0], 0.4).tolist()


def test_the_part_of_the_worse_box_counts_by_hand():
    # A box, one inside it, one around it, and one that shares half of the first.
    boxes = torch.tensor([[[20.0, 20, 40, 40], [25, 25, 35, 35], [0, 0, 60, 60], [20, 30, 40, 50]]])
    scores = torch.tensor([[4.0, 3, 2, 1]])
    # Inside: all of it is covered. Around: 400 of 3600. Half: .5 of the first is not above .5, but
    # the box around covers all of it.
    assert by_class(best_boxes_of_classes(boxes, scores, 0.5, 9, "own_area"), 1) == [[0, 2]]
    assert by_class(best_boxes_of_classes(boxes[:, :2], scores[:, :2], 0.5, 9, "own_area"), 1) == [
        [0]
    ]
    half = boxes[:, [0, 3]]
    assert by_class(best_boxes_of_classes(half, scores[:, :2], 0.5, 9, "own_area"), 1) == [[0, 1]]
    assert by_class(best_boxes_of_classes(half, scores[:, :2], 0.49, 9, "own_area"), 1) == [[0]]
    # Intersection over union: 1 / 4, 1 / 9 and 1 / 3 of the first, 1 / 36 and 1 / 9 of the others.
    assert by_class(best_boxes_of_classes(boxes, scores, 0.5, 9, "iou"), 1) == [[0, 1, 2, 3]]
    assert by_class(best_boxes_of_classes(boxes, scores, 0.3, 9, "iou"), 1) == [[0, 1, 2]]


@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (0, 3)])
def test_nothing_to_keep(shape):
    classes, index = best_boxes_of_classes(
        torch.zeros(*shape, 4), torch.zeros(shape), 0.5, 5, "iou"
    )
    assert classes.shape == index.shape == (0,)
    assert classes.dtype == index.dtype == torch.int64


def test_boxes_without_a_number_are_not_kept():
    boxes, scores = random_boxes(2, 5)
    for value in (-torch.inf, torch.nan):
        classes, _ = best_boxes_of_classes(boxes, torch.full((2, 5), value), 0.5, 5, "own_area")
        assert len(classes) == 0


@pytest.mark.parametrize("nms_type", NMS_TYPES)
def test_memory_is_linear_in_the_number_of_boxes(nms_type):
    # A matrix of all pairs would be 2.5 GB, or 312 MB of bits.
    boxes, scores = random_boxes(1, 50_000)
    with torch.profiler.profile(profile_memory=True) as profile:
        best_boxes_of_classes(boxes, scores, 0.9, 20, nms_type)
    largest = max(x.cpu_memory_usage for x in profile.events() if x.cpu_memory_usage > 0)
    assert largest < 10 * 50_000 * 8


@pytest.mark.parametrize("nms_type", NMS_TYPES)
@pytest.mark.parametrize("number", [1, 4, 1000])
def test_pruning_before_the_suppression_equals_leaving_boxes_out(nms_type, number):
    boxes, scores = random_boxes(3, 60)
    torch.manual_seed(1)
    is_accepted = torch.rand(3, 60) < 0.5
    is_accepted[2] = False  # a class that the classifier never sees
    asked = []

    def accepts(asked_boxes, classes):
        # Which box of its class is it? Equal ones have equal verdicts below.
        same = (boxes[classes] == asked_boxes[:, None]).all(dim=2)
        asked.extend(zip(classes.tolist(), same.int().argmax(dim=1).tolist(), strict=True))
        return is_accepted[classes, same.int().argmax(dim=1)]

    for k in range(3):
        first = (boxes[k][:, None] == boxes[k]).all(dim=2).int().argmax(dim=1)
        is_accepted[k] = is_accepted[k, first]
    found = best_boxes_of_classes(boxes, scores, 0.5, number, nms_type, accepts, 60)
    pruned = scores.masked_fill(~is_accepted, -torch.inf)
    expected = [
        greedy(b, s, 0.5, number, nms_type)
        for b, s in zip(boxes.tolist(), pruned.tolist(), strict=True)
    ]
    assert by_class(found, 3) == expected and len(expected[0]) > 0 and expected[2] == []
    # Nobody asks about a box that a kept one suppresses, or once there are enough.
    assert len(asked) < (scores > -torch.inf).sum()
    if number == 1:
        assert [k for k, _ in asked].count(0) == 1 + (~is_accepted[0, : expected[0][0]]).sum()


def test_the_classifier_is_asked_about_no_more_boxes_than_its_budget_allows():
    corner = torch.arange(0.0, 100, 10)[None, :, None].expand(2, -1, 2)
    boxes, scores = torch.cat([corner, corner + 10], dim=2), torch.arange(10.0, 0, -1).expand(2, -1)
    asked = []

    def accepts(asked_boxes, classes):
        asked.append(asked_boxes[:, 0].tolist())
        return asked_boxes[:, 0] >= torch.tensor([20.0, 0])[classes]

    # Ten boxes apart. Of the first class the third is the first that is right.
    found = best_boxes_of_classes(boxes, scores, 0.5, 3, "iou", accepts, 4)
    assert by_class(found, 2) == [[2, 3], [0, 1, 2]]
    # The second class has its three boxes then, and is asked about no more.
    assert asked == [[0, 0], [10, 10], [20, 20], [30]]
    found = best_boxes_of_classes(boxes, scores, 0.5, 3, "iou", accepts, 2)
    assert by_class(found, 2) == [[], [0, 1]]
