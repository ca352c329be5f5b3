"""Tests of the recall of masks: against pycocotools, by brute force, and in the evaluator."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from d2proposals.evaluation import ProposalEvaluator
from d2proposals.evaluation.ground_truth import encode_segmentation, load_ground_truth
from d2proposals.evaluation.mask_overlaps import mask_iou, mask_overlaps
from d2proposals.evaluation.recall import IOU_THRESHOLDS, average_recall, match_proposals
from d2proposals.files.conversion import read_proposals
from d2proposals.files.segmentations import filled_boxes
from d2proposals.proposals.mask_proposals import ProposalMasks

SIZE = (60, 80)
SQUARE = [10, 20, 30, 20, 30, 40, 10, 40]
BITMAP = np.zeros(SIZE, bool)
BITMAP[20:40, 10:30] = True


def random_bitmaps(number, seed, size=SIZE):
    """Blobs: a coarse random pattern, enlarged."""
    generator = np.random.default_rng(seed)
    coarse = generator.random((number, 6, 8)) > 0.5
    return np.repeat(np.repeat(coarse, size[0] // 6, axis=1), size[1] // 8, axis=2)


def encode(bitmaps):
    return mask_util.encode(np.asfortranarray(bitmaps.transpose(1, 2, 0), np.uint8))


def test_iou_is_exact():
    gt, proposals = random_bitmaps(5, 0), random_bitmaps(9, 1)
    overlaps = mask_iou(encode(gt), encode(proposals))
    intersection = (gt[:, None] & proposals).sum(axis=(2, 3))
    union = (gt[:, None] | proposals).sum(axis=(2, 3))
    np.testing.assert_array_equal(overlaps, (intersection / union).astype(np.float32))
    assert overlaps.dtype == np.float32 and overlaps.flags.c_contiguous


def test_iou_of_odd_masks():
    """Empty masks, other sizes, none at all; an IoU that is a threshold reaches it."""
    empty, whole = np.zeros((1, *SIZE), bool), np.ones((1, *SIZE), bool)
    masks = encode(np.concatenate([empty, whole]))
    assert mask_iou(masks, masks).tolist() == [[0, 0], [0, 1]]
    assert mask_iou(masks, encode(np.ones((1, 5, 5), bool))).tolist() == [[0], [0]]
    assert mask_iou([], masks).shape == (0, 2) and mask_iou(masks, []).shape == (2, 0)
    for threshold in IOU_THRESHOLDS:
        part = whole.copy()
        part.reshape(-1)[round(float(threshold) * part.size) :] = False
        assert mask_iou(encode(whole), encode(part))[0, 0] >= threshold


def greedy_average_recall(overlaps, limit):
    """Brute force: the best pair first, one to one, on pycocotools' double-precision IoU."""
    reached = []
    for overlaps_i in overlaps:
        left = overlaps_i[:, :limit].copy()
        matched = np.zeros(len(left))
        while left.size and left.max() > 0:
            gt, proposal = np.unravel_index(left.argmax(), left.shape)
            matched[gt] = left[gt, proposal]
            left[gt], left[:, proposal] = -1, -1
        reached += [(matched >= t - 1e-12).tolist() for t in np.arange(50, 100, 5) / 100]
    return np.mean(np.concatenate(reached))


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_average_recall_of_masks_is_that_of_pycocotools_iou(limit):
    generator = np.random.default_rng(0)
    gt, proposals = [], []
    for seed in range(12):
        objects = random_bitmaps(4, seed)
        moved = [np.roll(item, generator.integers(-6, 7, 2), (0, 1)) for item in objects] * 3
        gt.append(encode(objects))
        proposals.append(encode(np.stack([moved[k] for k in generator.permutation(12)])))
    pairs = zip(gt, proposals, strict=True)
    exact = [mask_util.iou(p, g, [0] * len(g)).T for g, p in pairs]
    matches = match_proposals(mask_overlaps(gt, proposals), np.ones(48), (limit,))
    assert average_recall(matches)[0, 0] == pytest.approx(greedy_average_recall(exact, limit))
    assert 0.05 < average_recall(matches)[0, 0] < 0.99


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        [[10, 20, 20, 20, 20, 40, 10, 40], [20, 20, 30, 20, 30, 40, 20, 40]],
        BITMAP,
        BITMAP.astype(np.uint8) * 255,
        mask_util.encode(np.asfortranarray(BITMAP, np.uint8)),
        {"size": list(SIZE), "counts": mask_util.encode(
            np.asfortranarray(BITMAP, np.uint8))["counts"].decode()},
        {"size": list(SIZE), "counts": [620, *[20, 40] * 19, 20, 60 * 80 - 620 - 19 * 60 - 20]},
    ],
    ids=["polygon", "polygons", "bitmap", "bytes", "encoding", "text", "uncompressed"],
)  # fmt: skip
def test_annotations_of_every_kind(segmentation):
    mask = encode_segmentation(segmentation, SIZE, 7)
    np.testing.assert_array_equal(mask_util.decode(mask), BITMAP)


@pytest.mark.parametrize(
    ("segmentation", "size", "message"),
    [
        ([SQUARE], None, "image 7 has polygons but no height and width"),
        ([[1, 2, 3, 4]], SIZE, "segmentation of image 7 is neither polygons"),
        ([SQUARE[:-1]], SIZE, "segmentation of image 7 is neither polygons"),
        (["text"], SIZE, "segmentation of image 7 is neither polygons"),
        ([[*SQUARE[:-1], float("nan")]], SIZE, "segmentation of image 7 is neither polygons"),
        (BITMAP, (60, 81), r"mask of image 7 has the size \(60, 80\), the image has \(60, 81\)"),
        ({"size": [2, 2], "counts": "5"}, (2, 2), "fill 5 pixels"),
    ],
)
def test_annotations_that_are_no_masks(segmentation, size, message):
    with pytest.raises(ValueError, match=message):
        encode_segmentation(segmentation, size, 7)


def make_records(**extra):
    """Two images with a square of 20 pixels and a crowd region."""
    square = {"bbox": [10, 20, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, **extra}
    crowd = {**square, "iscrowd": 1, "segmentation": {"size": [1, 1], "counts": "bad"}}
    return [
        {"image_id": i, "height": SIZE[0], "width": SIZE[1], "annotations": [square, crowd]}
        for i in range(2)
    ]


def make_output(coverage, scores=(1.0, 2.0)):
    """The object's box; its mask covers a share of the box from the left, then is a stray one."""
    patches = torch.full((2, 1, 20), -5.0)
    patches[0, :, : round(20 * coverage)] = patches[1] = 5.0
    frames = torch.tensor([[10, 20, 30, 40], [50, 0, 70, 10]]) / torch.tensor([80.0, 60, 80, 60])
    instances = Instances(
        SIZE,
        proposal_boxes=Boxes(torch.tensor([[10.0, 20, 30, 40], [50, 0, 70, 10]])),
        objectness_logits=torch.tensor(scores),
        proposal_masks=ProposalMasks(patches, frames),
    )
    return {"proposals": instances}


def evaluate(name, records, outputs, **arguments):
    evaluator = ProposalEvaluator(name, limits=(1, 10), **arguments)
    evaluator.process(records, outputs)
    return evaluator.evaluate()


def test_evaluator_measures_masks_beside_boxes(register_dataset, tmp_path, caplog):
    """Mask IoUs of .6 and 1: three thresholds of ten, then all; the stray one has rank 1."""
    records = make_records(segmentation=[SQUARE])
    outputs = [make_output(0.6), make_output(1)]
    name = register_dataset(records)
    with caplog.at_level(logging.INFO, "d2proposals"):
        results = evaluate(name, records, outputs, output_dir=str(tmp_path))
    assert set(results) == {"box_proposals", "mask_proposals"}
    assert results["box_proposals"]["AR@10"] == 100 and results["mask_proposals"]["AR@1"] == 0
    assert results["mask_proposals"]["AR@10"] == pytest.approx((30 + 100) / 2)
    assert results["mask_proposals"]["ABO@10"] == pytest.approx(80)
    assert "Masks of proposals on evaluated_dataset" in caplog.text
    content = json.loads((tmp_path / "mask_proposal_results.json").read_text())
    assert content["metrics_in_percent"] == results["mask_proposals"]
    assert (tmp_path / "mask_proposal_curves.png").stat().st_size > 10_000
    written = read_proposals(tmp_path / "mask_proposals.json")
    assert written.image_ids == [0, 1] and [len(m) for m in written.masks] == [2, 2]
    # By descending score: the stray one first.
    assert mask_util.area(written.masks[0]).tolist() == [200, 240]
    assert written.scores[0].tolist() == [2, 1]
    ground_truth = load_ground_truth(name, with_masks=True)
    matches = match_proposals(
        mask_overlaps(ground_truth.masks_by_image(), written.masks), ground_truth.areas, (10,)
    )
    assert 100 * average_recall(matches)[0, 0] == pytest.approx(results["mask_proposals"]["AR@10"])


def test_dataset_without_masks(register_dataset, caplog):
    records = make_records()
    for record in records:
        del record["annotations"][1]
    with caplog.at_level(logging.INFO, "d2proposals"):
        results = evaluate(register_dataset(records), records, [make_output(1)] * 2)
    assert set(results) == {"box_proposals"} and "have no masks" in caplog.text


def test_unusable_proposals_have_no_mask_either(register_dataset, tmp_path):
    records = make_records(segmentation=[SQUARE])
    outputs = [make_output(1, (float("nan"), 0.0)), make_output(1)]
    name = register_dataset(records)
    results = evaluate(name, records, outputs, output_dir=str(tmp_path))
    assert results["mask_proposals"]["AR@10"] == 50
    assert [len(m) for m in read_proposals(tmp_path / "mask_proposals.json").masks] == [1, 2]


def test_an_infinite_logit_of_a_mask_loses_no_numbers(register_dataset, tmp_path, caplog):
    records = make_records(segmentation=[SQUARE])
    outputs = [make_output(1, scores=(1.0, np.inf)), make_output(1)]
    results = evaluate(register_dataset(records), records, outputs, output_dir=str(tmp_path))
    assert results["mask_proposals"]["AR@10"] == 100
    assert "proposals are not kept" in caplog.text and "not finite" in caplog.text
    written = {path.name for path in tmp_path.iterdir()}
    assert "mask_proposal_results.json" in written and "mask_proposals.json" not in written


def test_image_ids_of_numpy_are_written(register_dataset, tmp_path):
    records = make_records(segmentation=[SQUARE])
    for record in records:
        record["image_id"] = np.int64(record["image_id"])
    outputs = [make_output(1)] * 2
    results = evaluate(register_dataset(records), records, outputs, output_dir=str(tmp_path))
    assert results["mask_proposals"]["AR@10"] == 100
    assert read_proposals(tmp_path / "mask_proposals.json").image_ids == [0, 1]


def test_difficult_objects_count_as_with_boxes(register_dataset, tmp_path):
    records = make_records(segmentation=[SQUARE])
    # The two images share the annotations of make_records.
    records[1]["annotations"] = [{**x, "difficult": 1} for x in records[1]["annotations"]]
    name, outputs = register_dataset(records), [make_output(1)] * 2
    for counts in (True, False):
        evaluate(name, records, outputs, output_dir=str(tmp_path), count_difficult=counts)
        numbers = [
            json.loads((tmp_path / f"{prefix}proposal_results.json").read_text())[
                "num_ground_truth"
            ]["all"]
            for prefix in ("", "mask_")
        ]
        assert numbers == ([2, 2] if counts else [1, 1])


def test_image_without_proposals_counts(register_dataset):
    records = make_records(segmentation=[SQUARE])
    empty = {"proposals": make_output(1)["proposals"][:0]}
    results = evaluate(register_dataset(records), records, [make_output(1), empty])
    assert results["mask_proposals"]["AR@10"] == 50


def test_boxes_as_masks(register_dataset, tmp_path):
    """Of an object that fills three quarters of its box, a filled box has an IoU of .75, six
    thresholds of ten, whatever mask came with it; and so has that of a generator without masks."""
    l_shape = [10, 20, 30, 20, 30, 30, 20, 30, 20, 40, 10, 40]
    records = make_records(segmentation=[l_shape])
    without_masks = make_output(1)
    without_masks["proposals"].remove("proposal_masks")
    outputs = [make_output(0.5), without_masks]
    name = register_dataset(records)
    results = evaluate(name, records, outputs, boxes_as_masks=True, output_dir=str(tmp_path))
    assert results["box_proposals"]["AR@10"] == 100
    assert results["mask_proposals"]["AR@10"] == pytest.approx(60)
    assert results["mask_proposals"]["ABO@10"] == pytest.approx(75)
    written = read_proposals(tmp_path / "mask_proposals.json")
    # The stray box first.
    assert [mask_util.area(masks).tolist() for masks in written.masks] == [[200, 400]] * 2


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ([10, 5, 20, 12], (5, 12), (10, 20)),
        # Pixels whose centre is inside.
        ([10.4, 5.6, 19.6, 11.5], (6, 11), (10, 20)),
        ([-2, 1.4, 4.6, 400], (1, 60), (0, 5)),
        ([90, 5, 95, 12], (0, 0), (0, 0)),
        ([20, 5, 10, 12], (0, 0), (0, 0)),
        ([10, 5, np.nan, 12], (0, 0), (0, 0)),
        ([10, 5, np.inf, 12], (5, 12), (10, 80)),
    ],
)
def test_a_filled_box(box, rows, columns):
    expected = np.zeros(SIZE, np.uint8)
    expected[slice(*rows), slice(*columns)] = 1
    (mask,) = filled_boxes(np.array([box], np.float32), SIZE)
    np.testing.assert_array_equal(mask_util.decode(mask), expected)
    assert filled_boxes(np.zeros((0, 4), np.float32), SIZE) == []
