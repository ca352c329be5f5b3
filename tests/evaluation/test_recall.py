"""Tests of matching and measures against hand-worked cases, a brute-force twin and libraries."""

import contextlib
import io

import numpy as np
import pytest
import torch
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2proposals.evaluation import recall
from d2proposals.evaluation.recall import (
    AREA_RANGES,
    CURVE_NUM_PROPOSALS,
    area_under_curve,
    average_recall,
    box_iou,
    box_overlaps,
    check_limits,
    match_proposals,
    mean_average_best_overlap,
    recall_at_iou,
    recall_metrics,
)
from d2proposals.evaluation.simulation import simulate_dataset, simulate_outputs

MEDIUM = 50.0**2


def match_one(overlaps, num_proposals=(1, 10), areas=None):
    """Matches of one image by its IoU."""
    overlaps = np.array(overlaps, np.float32)
    areas = np.full(len(overlaps), MEDIUM) if areas is None else areas
    return match_proposals([overlaps], areas, num_proposals)


def metrics_of(overlaps, areas, limits=(10,), categories=None):
    matches = match_proposals(overlaps, areas, sorted({*limits, *CURVE_NUM_PROPOSALS}))
    categories = np.zeros(len(areas), int) if categories is None else np.array(categories)
    return recall_metrics(matches, categories, limits)


def match_slowly(overlaps, num_proposals):
    """Greedy matching as one would say it: best pair first, in a loop."""
    overlaps = overlaps[:, :num_proposals].copy()
    matched = np.zeros(len(overlaps), np.float32)
    while overlaps.size and overlaps.max() >= 0.5:
        gt, proposal = np.unravel_index(overlaps.argmax(), overlaps.shape)
        matched[gt] = overlaps[gt, proposal]
        overlaps[gt] = overlaps[:, proposal] = -1
    return matched


def test_best_pair_goes_first():
    # Ground truth 0 prefers proposal 0 too, but ground truth 1 fits it better.
    matches = match_one([[0.8, 0.6], [0.9, 0.55]])
    np.testing.assert_allclose(matches.matched_iou[0, :, 1], [0.6, 0.9])
    # With one proposal, the worse fit goes without.
    np.testing.assert_allclose(matches.matched_iou[0, :, 0], [0, 0.9])
    np.testing.assert_allclose(matches.best_iou, [[0.8, 0.8], [0.9, 0.9]])


def test_area_ranges_are_matched_apart():
    # As Detectron2: small ground truth does not lose its proposal to a large one.
    overlaps = np.array([[0.8], [0.9]], np.float32)
    matches = match_proposals([overlaps], [10.0**2, 100.0**2], (1,))
    by_range = dict(zip(AREA_RANGES, matches.matched_iou[:, :, 0], strict=True))
    np.testing.assert_allclose(by_range[""], [0, 0.9])
    np.testing.assert_allclose(by_range["s"], [0.8, 0])
    np.testing.assert_allclose(by_range["m"], [0, 0])
    np.testing.assert_allclose(by_range["l"], [0, 0.9])


def test_area_on_a_border_is_in_both_ranges():
    matches = match_one([[0.8], [0.7]], areas=[32.0**2, 96.0**2])
    assert matches.in_range.T.tolist() == [[True, True, True, False], [True, False, True, True]]


def test_equal_overlaps_go_to_the_first_ground_truth_and_the_best_rank():
    matches = match_one([[0.7, 0.7], [0.7, 0.5]])
    np.testing.assert_allclose(matches.matched_iou[0, :, 1], [0.7, 0.5])


def test_chain_of_rivals():
    # Each round frees one pair only: the longest possible chain.
    size = 12
    overlaps = np.zeros((size, size))
    for index in range(size):
        overlaps[index, index] = 0.95 - 0.03 * index
        if index + 1 < size:
            overlaps[index + 1, index] = 0.94 - 0.03 * index
    matches = match_one(overlaps, (size,))
    np.testing.assert_allclose(matches.matched_iou[0, :, 0], overlaps.diagonal(), rtol=1e-6)


@pytest.mark.parametrize("decimals", [1, 2, 8])
@pytest.mark.parametrize("block_images", [1, 3, 256])
def test_matching_equals_the_loop(monkeypatch, decimals, block_images):
    """Random IoU with many, some and no ties, in one block and over several."""
    monkeypatch.setattr(recall, "_BLOCK_IMAGES", block_images)
    generator = np.random.default_rng(decimals)
    shapes = [(0, 5), (4, 0), (1, 1), (6, 30), (9, 4), (0, 0), (5, 12)]
    overlaps = [generator.random(shape).round(decimals).astype(np.float32) for shape in shapes]
    num_gt = sum(len(overlaps_i) for overlaps_i in overlaps)
    areas = generator.choice([10.0**2, 32.0**2, 50.0**2, 200.0**2], num_gt)
    numbers = (1, 3, 4, 10, 100)
    matches = match_proposals(overlaps, areas, numbers)
    starts = np.cumsum([0] + [len(overlaps_i) for overlaps_i in overlaps])
    for image, overlaps_i in enumerate(overlaps):
        rows = slice(starts[image], starts[image + 1])
        for column, number in enumerate(numbers):
            best = overlaps_i[:, :number].max(axis=1, initial=0)
            np.testing.assert_array_equal(matches.best_iou[rows, column], best)
            for in_range, matched in zip(matches.in_range, matches.matched_iou, strict=True):
                kept = in_range[rows]
                expected = match_slowly(overlaps_i[kept], number)
                np.testing.assert_array_equal(matched[rows, column][kept], expected)
                assert not matched[rows, column][~kept].any()
    assert (matches.best_iou >= matches.matched_iou).all()


def test_measures_by_hand():
    # Two small ground truths of categories 5 and 6, a medium one of 6; the last has no match.
    overlaps = [np.array([[0.8, 0.6], [0.75, 0.1]], np.float32), np.zeros((1, 0), np.float32)]
    metrics = metrics_of(overlaps, [100, 100, MEDIUM], categories=[5, 6, 6])
    # Matched: .8 (7 of 10 thresholds); the second gets the other proposal's .1 (none).
    assert metrics["AR@10"] == pytest.approx(100 * 0.7 / 3)
    assert metrics["ARs@10"] == pytest.approx(100 * 0.7 / 2)
    assert metrics["ARm@10"] == 0
    assert metrics["AR-cont@10"] == pytest.approx(100 * 2 * 0.3 / 3)
    assert metrics["ABO@10"] == pytest.approx(100 * (0.8 + 0.75 + 0) / 3)
    assert metrics["ABO-s@10"] == pytest.approx(100 * (0.8 + 0.75) / 2)
    assert metrics["MABO@10"] == pytest.approx(100 * (0.8 + 0.75 / 2) / 2)
    assert metrics["Recall-IoU50@10"] == pytest.approx(100 / 3)
    # The curve is flat: already the first proposal matches.
    assert metrics["AUC"] == pytest.approx(metrics["AR@10"])
    assert metrics["AUCs"] == pytest.approx(metrics["ARs@10"])
    assert not any(name.startswith(("ARl", "ABO-l", "AUCl")) for name in metrics)
    assert all(type(value) is float and np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(("num_gt", "num_proposals"), [(0, 0), (0, 3), (3, 0), (1, 1), (40, 200)])
def test_overlaps_equal_those_of_detectron2(num_gt, num_proposals):
    """To the bit, with points, boxes that touch, equal boxes and boxes far apart."""
    generator = np.random.default_rng(0)
    boxes = generator.integers(0, 40, (num_gt + num_proposals, 4)) / np.float32(3)
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32)
    gt_boxes, proposal_boxes = boxes[:num_gt], boxes[num_gt:]
    expected = pairwise_iou(
        Boxes(torch.from_numpy(gt_boxes)), Boxes(torch.from_numpy(proposal_boxes))
    )
    overlaps = box_iou(gt_boxes, proposal_boxes)
    np.testing.assert_array_equal(overlaps, expected)
    assert overlaps.dtype == np.float32


@pytest.mark.parametrize("scale", [1e-22, 1e-19, 1.0, 1e18])
def test_overlaps_of_tiny_and_huge_boxes_equal_those_of_detectron2(scale):
    """Where areas are no normal numbers any more, or nearly infinite."""
    generator = np.random.default_rng(1)
    boxes = (generator.integers(0, 6, (60, 4)) * scale).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    expected = pairwise_iou(
        Boxes(torch.from_numpy(boxes[:20])), Boxes(torch.from_numpy(boxes[20:]))
    )
    np.testing.assert_array_equal(box_iou(boxes[:20], boxes[20:]), expected)


def test_overlap_on_a_threshold_is_recalled():
    # A box of 3 pixels in one of 5: IoU .6 reaches .50, .55 and .60.
    gt, box = np.array([[0, 0, 5, 1]], np.float32), np.array([[0, 0, 3, 1]], np.float32)
    matches = match_proposals(box_overlaps([gt], [box]), [5.0], (1,))
    assert average_recall(matches)[0, 0] == pytest.approx(0.3)
    assert recall_at_iou(matches.matched_iou[0, :, 0], np.float32([0.6, 0.61])).tolist() == [1, 0]


def test_no_ground_truth_gives_no_measures():
    assert metrics_of([np.zeros((0, 7), np.float32)], np.zeros(0)) == {}


def test_mean_average_best_overlap_weighs_categories_equally():
    best_iou = np.array([[1.0], [0.0], [0.0], [0.6]])
    assert mean_average_best_overlap(best_iou, np.array([1, 9, 9, 9])) == pytest.approx([0.6])
    single = mean_average_best_overlap(best_iou, np.zeros(4, int))
    assert single == pytest.approx([0.4])


def test_areas_must_belong_to_the_overlaps():
    with pytest.raises(ValueError, match="3 areas given for 2 ground truths"):
        match_proposals([np.zeros((2, 1), np.float32)], np.ones(3), (1,))


@pytest.mark.parametrize("limits", [(), (0,), (2001,), (10, -1), (1.5,)])
def test_wrong_limits_are_named(limits):
    with pytest.raises(ValueError, match="whole numbers from 1 to 2000"):
        check_limits(limits)


def test_area_under_curve_by_hand():
    # A line in log k: its mean height.
    assert area_under_curve((1, 10, 1000), np.array([0.0, 1.0, 3.0])) == pytest.approx(1.5)


# AR@10, AR@100, AR@1000 and AUC of DeepMask's Tables 1 (boxes, then masks) and 2.
@pytest.mark.parametrize(
    "row",
    [
        (0.153, 0.313, 0.446, 0.233),
        (0.150, 0.326, 0.482, 0.242),
        (0.149, 0.310, 0.442, 0.231),
        (0.139, 0.286, 0.431, 0.217),
        (0.126, 0.245, 0.331, 0.183),
        (0.127, 0.261, 0.366, 0.194),
        (0.337, 0.561, 0.690, 0.433),
    ],
)
def test_published_area_under_curve(row):
    """From 1 to 1000 the published values fit AR@1 (not published) of 0 to half of AR@10."""
    *published, auc = row
    numbers = (1, 10, 100, 1000)
    lowest = area_under_curve(numbers, np.array([0, *published]))
    highest = area_under_curve(numbers, np.array([published[0] / 2, *published]))
    assert lowest - 5e-4 < auc < highest + 5e-4
    assert area_under_curve(numbers[1:], np.array(published)) > auc + 0.04


def simulate(num_images=40, num_proposals=300, num_gt=12):
    """Records, outputs and our matches' measures at 100 and 1000 of a simulated dataset."""
    records = simulate_dataset(num_images, num_gt, seed=3)
    outputs = [output["proposals"] for _, output in simulate_outputs(records, num_proposals)]
    return records, outputs


def measure(records, outputs, limits):
    objects = [[item for item in r["annotations"] if not item["iscrowd"]] for r in records]
    gt_boxes = [
        np.array([BoxMode.convert(item["bbox"], 1, 0) for item in items], np.float32).reshape(-1, 4)
        for items in objects
    ]
    outputs = [item[item.objectness_logits.argsort(descending=True)] for item in outputs]
    overlaps = box_overlaps(gt_boxes, [item.proposal_boxes.tensor.numpy() for item in outputs])
    areas = [item["area"] for items in objects for item in items]
    return metrics_of(overlaps, areas, limits)


def make_coco(records):
    coco = COCO()
    annotations = [
        {**item, "image_id": record["image_id"], "category_id": 1}
        for record in records
        for item in record["annotations"]
    ]
    coco.dataset = {
        "images": [
            {"id": r["image_id"], "height": r["height"], "width": r["width"]} for r in records
        ],
        "annotations": [{**item, "id": index + 1} for index, item in enumerate(annotations)],
        "categories": [{"id": 1}],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def detectron2_recall(records, outputs, area, limit):
    predictions = [
        {"image_id": record["image_id"], "proposals": output}
        for record, output in zip(records, outputs, strict=True)
    ]
    return _evaluate_box_proposals(predictions, make_coco(records), area=area, limit=limit)


def test_equals_detectron2():
    records, outputs = simulate()
    metrics = measure(records, outputs, (1, 10, 100, 1000))
    assert 20 < metrics["AR@10"] < metrics["AR@100"] < 95
    for suffix, area in {"": "all", "s": "small", "m": "medium", "l": "large"}.items():
        for limit in (1, 10, 100, 1000):
            expected = 100 * detectron2_recall(records, outputs, area, limit)["ar"].item()
            assert metrics[f"AR{suffix}@{limit}"] == pytest.approx(expected, abs=1e-4)


def test_image_without_proposals_counts_unlike_detectron2():
    """One perfect and one empty image: 50, where Detectron2 leaves the empty one out."""
    annotation = {"bbox": [10, 10, 50, 50], "bbox_mode": 1, "area": MEDIUM, "iscrowd": 0}
    size = {"height": 100, "width": 100}
    records = [{"image_id": index, "annotations": [annotation], **size} for index in (0, 1)]
    outputs = []
    for boxes in ([[10.0, 10, 60, 60]], []):
        output = Instances((100, 100), proposal_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
        output.objectness_logits = torch.zeros(len(boxes))
        outputs.append(output)
    assert detectron2_recall(records, outputs, "all", 100)["ar"].item() == pytest.approx(1)
    metrics = measure(records, outputs, (100,))
    assert metrics["AR@100"] == pytest.approx(50)
    # An empty area range is NaN there.
    assert np.isnan(detectron2_recall(records, outputs, "small", 100)["ar"].item())
    assert "ARs@100" not in metrics


def test_agrees_with_pycocotools():
    """COCOeval matches in the order of scores, so that sizes agree less closely."""
    records, outputs = simulate(num_images=30, num_proposals=200)
    results = [
        {"image_id": record["image_id"], "category_id": 1, "bbox": box, "score": score}
        for record, output in zip(records, outputs, strict=True)
        for box, score in zip(
            BoxMode.convert(output.proposal_boxes.tensor, 0, 1).tolist(),
            output.objectness_logits.tolist(),
            strict=True,
        )
    ]
    coco = make_coco(records)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [10, 100, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    reference = evaluation.eval["recall"].mean(axis=0)[0]  # (area ranges, limits)
    metrics = measure(records, outputs, (10, 100, 1000))
    for column, limit in enumerate((10, 100, 1000)):
        for row, suffix in enumerate(AREA_RANGES):
            ours = metrics[f"AR{suffix}@{limit}"]
            tolerance = 0.2 if suffix else 0.05
            assert ours == pytest.approx(100 * reference[row, column], abs=tolerance), (
                suffix,
                limit,
            )


def test_monotonicity():
    records, outputs = simulate(num_images=10)
    metrics = measure(records, outputs, (1, 10, 100, 300))
    for name in ("AR", "ARs", "ARm", "ARl", "AR-cont", "ABO", "MABO", "Recall-IoU50"):
        values = [metrics[f"{name}@{limit}"] for limit in (1, 10, 100, 300)]
        assert values == sorted(values)
    for limit in (1, 10, 100, 300):
        assert metrics[f"Recall-IoU50@{limit}"] >= metrics[f"Recall-IoU70@{limit}"]
        assert metrics[f"AR-cont@{limit}"] < metrics[f"AR@{limit}"]


@pytest.mark.parametrize("num_columns", [1, 7, 99, 100, 101, 230, 900, 1500])
@pytest.mark.parametrize("numbers", [(1, 3, 100, 101, 230, 240, 1000), (300,), (1, 2)])
def test_best_of_the_first_proposals(num_columns, numbers):
    """Short and long stretches, and stretches that begin behind the last proposal."""
    overlaps = np.random.default_rng(0).random((5, num_columns), np.float32)
    cut = overlaps[:, : numbers[-1]]
    best = recall._best_of_first(cut, numbers)
    np.testing.assert_array_equal(best.T, [cut[:, :number].max(axis=1) for number in numbers])
