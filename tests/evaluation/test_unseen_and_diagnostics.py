"""Tests of recall of unseen categories, and of the diagnostics."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from d2proposals.engine import Trainer
from d2proposals.evaluation import ProposalEvaluator
from d2proposals.evaluation.diagnostics import (
    ASPECT_EDGES,
    HighQualityCounts,
    OverlapHistogram,
    aspect_bins,
    diagnose,
)
from d2proposals.evaluation.ground_truth import GroundTruth
from d2proposals.evaluation.measurement import measure
from d2proposals.evaluation.recall import match_proposals
from d2proposals.evaluation.unseen_categories import find_on_seen
from tests.common import make_cfg


def find_by_loops(overlaps, is_seen):
    """The matching of COCO's evaluation at IoU .5, seen objects as those to ignore."""
    taken, on_seen = set(), []
    for rank in range(overlaps.shape[1]):
        best, best_gt = 0.5, None
        for seen in (False, True):
            for gt in np.flatnonzero(is_seen == seen):
                if best_gt is None or is_seen[best_gt] == seen:
                    if gt not in taken and overlaps[gt, rank] >= best:
                        if best_gt is None or overlaps[gt, rank] > best:
                            best, best_gt = overlaps[gt, rank], gt
            if best_gt is not None:
                break
        if best_gt is not None:
            taken.add(best_gt)
        on_seen.append(best_gt is not None and bool(is_seen[best_gt]))
    return on_seen


def test_proposals_on_seen_objects_equal_those_of_loops():
    generator = np.random.default_rng(0)
    overlaps, is_seen = [], []
    for num_gt, num_proposals in [(5, 40), (0, 7), (9, 60), (3, 0), (1, 1), (8, 3)] * 5:
        overlaps.append(generator.random((num_gt, num_proposals)).astype(np.float32) ** 2)
        is_seen.append(generator.random(num_gt) < 0.5)
    found = find_on_seen(overlaps, is_seen)
    for found_i, overlaps_i, is_seen_i in zip(found, overlaps, is_seen, strict=True):
        assert found_i.tolist() == find_by_loops(overlaps_i, is_seen_i)
    assert sum(found_i.sum() for found_i in found) > 20


def test_budget_hand_worked():
    """Columns: on the seen object, again on it, on both, on the unseen one.

    The first leaves. The second finds the seen object taken and stays. The third prefers the
    unseen object although its IoU is lower. The fourth finds that one taken and stays.
    """
    overlaps = np.array([[0.9, 0.8, 0.9, 0.1], [0.0, 0.0, 0.6, 1.0]], np.float32)
    (found,) = find_on_seen([overlaps], [np.array([True, False])])
    assert found.tolist() == [True, False, False, False]


def make_ground_truth(boxes, categories, num_per_image):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    ids = list(range(len(num_per_image)))
    return GroundTruth(ids, [None] * len(ids), boxes, areas, np.array(categories),
                       np.array(num_per_image), True)  # fmt: skip


def test_all_seen_and_unseen_in_one_pass():
    """As if each subset were the whole ground truth; the budget moves by one."""
    boxes = [[0, 0, 10, 10], [0, 0, 20, 20], [0, 0, 40, 40]]
    ground_truth = make_ground_truth(boxes, [0, 1, 1], [2, 1])
    overlaps = [
        np.array([[0.9, 0.1, 0.2], [0.1, 0.1, 0.8]], np.float32),
        np.array([[0.95]], np.float32),
    ]
    result = measure(overlaps, ground_truth, (1, 2), unseen={1})
    assert result.metrics["AR@1"] == pytest.approx(100 * (9 + 0 + 10) / 30)
    assert result.by_categories["seen"]["AR@1"] == pytest.approx(90)
    assert result.by_categories["unseen"]["AR@2"] == pytest.approx(100 * (0 + 10) / 20)
    assert result.by_categories["unseen_budget"]["AR@1"] == pytest.approx(50)
    assert result.by_categories["unseen_budget"]["AR@2"] == pytest.approx(100 * (7 + 10) / 20)
    assert measure(overlaps, ground_truth, (1, 2)).by_categories == {}


def make_evaluator(cfg, name, folder):
    return ProposalEvaluator(cfg, name, output_dir=folder)


@pytest.mark.parametrize("make", [make_evaluator, Trainer.build_proposal_evaluator])
def test_the_evaluator_measures_seen_and_unseen_apart(make, register_dataset, tmp_path):
    """A cat, which was trained on and is found, and a zebra, which is found by half."""
    boxes, halves = [[0, 0, 40, 40], [50, 0, 90, 40]], [[0, 0, 40, 40], [50, 0, 90, 24]]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": k}
        for k, box in enumerate(boxes)
    ]
    records = [{"image_id": 1, "height": 100, "width": 120, "annotations": annotations}]
    name = register_dataset(records, thing_classes=["cat", "zebra"])
    proposals = Instances((100, 120))
    proposals.proposal_boxes = Boxes(torch.tensor(halves, dtype=torch.float32))
    proposals.objectness_logits = torch.tensor([2.0, 1.0])
    overrides = ["TEST.PROPOSALS.SEEN", ("cat",), "TEST.PROPOSALS.LIMITS", (1, 2)]
    cfg = make_cfg(None, *overrides, "DATASETS.TEST", (name,))
    evaluator = make(cfg, name, str(tmp_path))
    evaluator.process(records, [{"proposals": proposals}])
    results = evaluator.evaluate()
    # IoU 1 and .6: ten of ten thresholds and three.
    tasks = {
        "box_proposals": (50, 65),
        "box_proposals_seen": (100, 100),
        "box_proposals_unseen": (0, 30),
        # The cat's box leaves the budget.
        "box_proposals_unseen_budget": (30, 30),
    }
    assert results.keys() == tasks.keys()
    for task, recall in tasks.items():
        assert (results[task]["AR@1"], results[task]["AR@2"]) == pytest.approx(recall)
    content = json.loads((tmp_path / "proposal_results.json").read_text())
    subsets = content["metrics_by_categories_in_percent"]
    assert subsets["unseen"]["AR@2"] == pytest.approx(30)


@pytest.mark.parametrize(
    ("seen", "line"),
    [
        (("dog",), "TEST.PROPOSALS.SEEN, of '.*': the dataset has no category 'dog'"),
        (("cat", "zebra"), "TEST.PROPOSALS.SEEN, of '.*': none of the dataset's objects are of"),
    ],
)
def test_wrong_seen_categories_are_one_line_before_the_evaluation(register_dataset, seen, line):
    annotation = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    records = [{"image_id": 1, "height": 20, "width": 20, "annotations": [annotation]}]
    name = register_dataset(records, thing_classes=["cat", "zebra"])
    with pytest.raises(ValueError, match=line):
        ProposalEvaluator(name, seen=seen)


def test_blocks_of_images_change_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    numbers = generator.integers(0, 6, 200)
    total = int(numbers.sum())
    corner = generator.random((total, 2)) * 50
    boxes = np.concatenate([corner, corner + 10 + generator.random((total, 2)) * 90], axis=1)
    ground_truth = make_ground_truth(boxes, generator.integers(0, 4, total), numbers)
    overlaps = [generator.random((number, 30)).astype(np.float32) for number in numbers]
    expected = measure(overlaps, ground_truth, (1, 10), unseen={0, 2}).by_categories
    for size in (1, 7):
        monkeypatch.setattr("d2proposals.evaluation.measurement._UNSEEN_IMAGES", size)
        assert measure(overlaps, ground_truth, (1, 10), unseen={0, 2}).by_categories == expected


def test_a_block_of_images_keeps_within_its_number_of_ious(monkeypatch):
    """Also where one image has many objects and another one many proposals; in 13 bytes for each:
    the IoU, whether it reaches, and the preference with what it is made of."""
    shapes = []

    def find(overlaps, is_seen):
        shapes.append(np.array([len(overlaps), *np.max([x.shape for x in overlaps], axis=0)]))
        return find_on_seen(overlaps, is_seen)

    monkeypatch.setattr("d2proposals.evaluation.measurement.find_on_seen", find)
    monkeypatch.setattr("d2proposals.evaluation.measurement._UNSEEN_OVERLAPS", 4000)
    numbers = np.array([5] * 6 + [160] + [5] * 6)
    boxes = np.tile([0, 0, 10, 10], (int(numbers.sum()), 1))
    categories = np.arange(len(boxes)) % 2
    ranks = [100, 10, 10, 100, 10, 10, 10, 10, 100, 10, 10, 400, 10]
    overlaps = [np.zeros(shape, np.float32) for shape in zip(numbers, ranks, strict=True)]
    measure(overlaps, make_ground_truth(boxes, categories, numbers), (1,), unseen={1})
    assert sum(shape[0] for shape in shapes) == 13 > len(shapes)
    assert max(shape.prod() for shape in shapes) <= 4000

    overlaps = [np.full((100, 1000), 0.6, np.float32)] * 2
    tracemalloc.start()
    find_on_seen(overlaps, [np.ones(100, bool)] * 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 100_000 * 14


def test_histogram_hand_worked():
    histogram = OverlapHistogram((2, 3))
    histogram.add(np.array([0.04, 1.0, 0.52], np.float32))
    histogram.add(np.zeros(2, np.float32))  # no ground truth
    histogram.add(np.zeros(0, np.float32))
    assert np.flatnonzero(histogram.counts[0]).tolist() == [0, 19]
    assert histogram.counts[0][[0, 19]].tolist() == [3, 1]
    assert histogram.counts[1][[0, 10, 19]].tolist() == [3, 1, 1]


def test_aspect_ratios_and_sizes_hand_worked():
    """A square of 16 pixels (IoU .8), a bar of 4:1 (IoU .75), a point (IoU 0)."""
    boxes = np.array([[0, 0, 16, 16], [0, 0, 64, 16], [5, 5, 5, 5]], np.float32)
    areas = np.array([256, 1024, 0], np.float32)
    overlaps = np.array([[0.8, 0], [0, 0.75], [0, 0]], np.float32)
    matches = match_proposals([overlaps], areas, (1, 2))
    content = diagnose(matches, OverlapHistogram(), HighQualityCounts(), boxes, areas, (1, 2))
    ratios = content["aspect_ratio"]
    edges = ratios["edges"]
    assert edges[0] == 1 / 8 and edges[-1] == 8
    square, bar, point = edges.index(1) + 1, edges.index(4) + 1, len(edges)
    expected = np.zeros(len(edges) + 1)
    expected[[square, bar, point]] = 1
    assert ratios["num_ground_truth"] == expected.tolist()
    assert np.flatnonzero(ratios["covered"]["2"]["IoU70"]).tolist() == [square, bar]
    assert np.flatnonzero(ratios["covered"]["2"]["IoU80"]).tolist() == [square]
    assert np.flatnonzero(ratios["covered"]["1"]["IoU70"]).tolist() == [square]
    sides = content["abo_by_side"]
    index = np.searchsorted(sides["edges"], [16, 32], side="right")
    assert [sides["2"][i] for i in index] == pytest.approx([80, 75])
    assert sides["2"][0] == 0 and sides["2"].count(None) == len(sides["2"]) - 3


def test_high_quality_proposals_by_their_objects_aspect_ratio():
    """A square with three good proposals, a 4:1 bar with one that overlaps the square too."""
    boxes = np.array([[0, 0, 16, 16], [0, 0, 64, 16]], np.float32)
    overlaps = np.array([[0.9, 0.75, 0.1, 0.72, 0.7], [0.1, 0.3, 0.85, 0.71, 0.2]], np.float32)
    counts = HighQualityCounts((3, 5))
    bins = aspect_bins(boxes)
    counts.add(overlaps, overlaps.max(axis=0), bins)
    counts.add(np.zeros((0, 4), np.float32), np.zeros(4, np.float32), bins[:0])
    counts.add(np.zeros((2, 0), np.float32), np.zeros(0, np.float32), bins)
    content = counts.content()
    square, bar = (np.searchsorted(ASPECT_EDGES, x, side="right") for x in (1, 4))
    for limit, iou, of_square, of_bar in (
        ("3", "IoU70", 2, 1),
        ("3", "IoU80", 1, 1),
        ("5", "IoU70", 3, 1),  # .7 is not above .7; the fourth counts for the square alone
        ("5", "IoU80", 1, 1),
    ):
        row = content[limit][iou]
        assert (row[square], row[bar], sum(row)) == (of_square, of_bar, of_square + of_bar)
        assert len(row) == len(ASPECT_EDGES) + 1


def test_diagnostics_of_a_measurement_count_high_quality_proposals():
    ground_truth = make_ground_truth([[0, 0, 16, 16], [0, 0, 64, 16]], [0, 0], [1, 1])
    overlaps = [np.array([[0.9, 0.75]], np.float32), np.array([[0.85]], np.float32)]
    content = measure(overlaps, ground_truth, (1, 2)).diagnostics["aspect_ratio"]
    counts = content["high_quality_proposals"]
    assert list(counts) == ["300", "1000"]
    square, bar = (np.searchsorted(content["edges"], x, side="right") for x in (1, 4))
    assert counts["300"]["IoU70"][square] == 2 and counts["300"]["IoU70"][bar] == 1
    assert counts["1000"]["IoU80"][square] == counts["1000"]["IoU80"][bar] == 1


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_a_loop_over_proposals(seed):
    generator = np.random.default_rng(seed)
    numbers = generator.integers(0, 5, 12)
    boxes = generator.integers(0, 9, (numbers.sum(), 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    ground_truth = make_ground_truth(boxes, [0] * len(boxes), numbers)
    # Of tenths, so that many are equal and some are on a threshold.
    overlaps = [
        generator.integers(0, 11, (number, generator.integers(0, 400))) / np.float32(10)
        for number in numbers
    ]
    content = measure(overlaps, ground_truth, (1, 10)).diagnostics
    bins = np.split(aspect_bins(boxes), np.cumsum(numbers))
    for limit in (300, 1000):
        histogram, good = np.zeros(20, int), np.zeros((2, len(ASPECT_EDGES) + 1), int)
        for overlaps_i, bins_i in zip(overlaps, bins, strict=False):
            for column in overlaps_i.T[:limit]:
                best = max(column, default=np.float32(0))
                histogram[min(int(best * 20), 19)] += 1
                for row, percent in enumerate((70, 80)):
                    if best > np.float32(percent) / np.float32(100):
                        good[row, bins_i[list(column).index(best)]] += 1
        assert content["proposal_iou"][str(limit)] == histogram.tolist()
        counts = content["aspect_ratio"]["high_quality_proposals"][str(limit)]
        assert [counts["IoU70"], counts["IoU80"]] == good.tolist()


def test_detected_objects_by_size_hand_worked():
    """Sides 16 and 17 (one bin), 32, 64: best IoU .5, .49, .6 (second proposal), .9."""
    boxes = np.array([[0, 0, s, s] for s in (16, 17, 32, 64)], np.float32)
    overlaps = np.array([[0.5, 0], [0.49, 0.1], [0.2, 0.6], [0.9, 0]], np.float32)
    areas = boxes[:, 2] ** 2
    matches = match_proposals([overlaps], areas, (1, 2))
    content = diagnose(matches, OverlapHistogram(), HighQualityCounts(), boxes, areas, (1, 2))[
        "detected_by_side"
    ]
    index = np.searchsorted(content["edges"], [16, 32, 64], side="right")
    for key, expected in {"num_ground_truth": [2, 1, 1], "1": [1, 0, 1], "2": [1, 1, 1]}.items():
        assert [content[key][i] for i in index] == expected
        assert len(content[key]) == len(content["edges"]) + 1
        assert sum(content[key]) == sum(expected)
