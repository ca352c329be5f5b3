"""Agreement with Detectron2 and pycocotools on real ground truth, for several kinds of proposals.

Needs up to 500 images of Detectron2's coco_2017_val below $DETECTRON2_DATASETS
(tools/select_images.py); skipped with more, which would take long.
"""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.evaluation.measurement import box_overlaps_of, mask_overlaps_of, measure
from d2proposals.evaluation.proposal_checks import ImageProposals

NAME = "coco_2017_val"
LIMITS = (10, 100, 1000)
MAX_IMAGES = 500
SIZES = {"": "all", "s": "small", "m": "medium", "l": "large"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(MetadataCatalog.get(NAME).json_file).is_file(), reason=f"needs {NAME}"
    ),
]


@pytest.fixture(scope="module")
def ground_truth():
    with contextlib.redirect_stdout(io.StringIO()):
        whole = load_ground_truth(NAME, with_masks=True)
    if len(whole.image_ids) > MAX_IMAGES:
        pytest.skip(f"compares part of {NAME}, up to {MAX_IMAGES} images")
    return whole


@pytest.fixture(scope="module")
def coco():
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(MetadataCatalog.get(NAME).json_file)


def anywhere(generator, number, size):
    """Boxes of log-uniform sides anywhere in the image."""
    height, width = size
    sides = np.exp(generator.uniform(np.log(8), np.log(600), (number, 2)))
    sides = np.minimum(sides, (width, height))
    corner = generator.uniform(size=(number, 2)) * ((width, height) - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def near(generator, boxes, copies, spread, size):
    """Objects whose corners are moved by a share of their sides."""
    moved = np.repeat(boxes, copies, axis=0).astype(np.float64)
    sides = np.tile(moved[:, 2:] - moved[:, :2], 2)
    moved += sides * spread * generator.normal(size=moved.shape)
    moved = np.clip(moved, 0, np.tile(size[::-1], 2))
    return moved[(moved[:, 2:] > moved[:, :2] + 1).all(axis=1)]


def simulate(ground_truth, kind):
    """Proposals of each image: (R, 4) boxes by descending score."""
    generator = np.random.default_rng(len(kind))
    for boxes, size in zip(ground_truth.boxes_by_image(), ground_truth.image_sizes, strict=True):
        noise = anywhere(generator, 300, size)
        if kind == "tight":
            found = np.concatenate([near(generator, boxes, 3, 0.05, size), noise])
        elif kind == "loose":
            found = np.concatenate([noise[:50], near(generator, boxes, 10, 0.2, size), noise[50:]])
        elif kind == "crowded":
            found = near(generator, boxes, 60, 0.1, size) if len(boxes) else noise
            found = generator.permutation(found)
        else:
            found = noise
        yield np.concatenate([found, noise[:1]])[:1500].astype(np.float32)


@pytest.mark.parametrize("kind", ["tight", "loose", "crowded", "noise"])
def test_boxes(ground_truth, coco, kind):
    boxes = list(simulate(ground_truth, kind))
    scores = [np.arange(len(boxes_i), 0, -1, dtype=np.float32) for boxes_i in boxes]
    proposals = [ImageProposals(b, s, None) for b, s in zip(boxes, scores, strict=True)]
    usable = [np.ones(len(boxes_i), bool) for boxes_i in boxes]
    ours = measure(box_overlaps_of(ground_truth, proposals, usable), ground_truth, LIMITS).metrics

    predictions = [
        {"image_id": image_id, "proposals": Instances(
            (1, 1), proposal_boxes=Boxes(torch.from_numpy(b)), objectness_logits=torch.tensor(s))}
        for image_id, b, s in zip(ground_truth.image_ids, boxes, scores, strict=True)
    ]  # fmt: skip
    for suffix, area in SIZES.items():
        for limit in LIMITS:
            theirs = _evaluate_box_proposals(predictions, coco, area=area, limit=limit)
            assert ours[f"AR{suffix}@{limit}"] == pytest.approx(100 * theirs["ar"].item(), abs=1e-4)

    results = [
        {"image_id": image_id, "category_id": 1, "score": float(s), "bbox": [
            float(x1), float(y1), float(x2) - float(x1), float(y2) - float(y1)]}
        for image_id, b, scores_i in zip(ground_truth.image_ids, boxes, scores, strict=True)
        for (x1, y1, x2, y2), s in zip(b, scores_i, strict=True)
    ]  # fmt: skip
    recall = class_agnostic_recall(coco, results, "bbox")
    # Their matching is in the order of scores, ours takes the best pair first.
    for row, suffix in enumerate(SIZES):
        for column, limit in enumerate(LIMITS):
            tolerance = 0.2 if suffix else 0.05
            if kind == "crowded":
                # Sixty proposals an object compete; the two orders differ more.
                tolerance *= 10
            difference = ours[f"AR{suffix}@{limit}"] - recall[row, column]
            assert abs(difference) <= tolerance, (suffix, limit, difference)


def class_agnostic_recall(coco, results, kind):
    """AR of pycocotools in percent, (sizes, limits)."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(LIMITS)
        evaluation.evaluate()
        evaluation.accumulate()
    return 100 * evaluation.eval["recall"][:, 0].mean(axis=0)


def test_masks(ground_truth, coco):
    """Moved masks of the objects: the IoU of each pair, and AR against pycocotools."""
    generator = np.random.default_rng(0)
    proposals, results = [], []
    for image_id, masks_i in zip(
        ground_truth.image_ids, ground_truth.masks_by_image(), strict=True
    ):
        moved = []
        for bitmap in (mask_util.decode(mask) for mask in masks_i):
            for shift in (1, 4, 12):
                by = generator.integers(-shift, shift + 1, 2)
                moved.append(mask_util.encode(np.asfortranarray(np.roll(bitmap, by, (0, 1)))))
        moved = [moved[index] for index in generator.permutation(len(moved))]
        scores = np.arange(len(moved), 0, -1, dtype=np.float32)
        proposals.append(ImageProposals(np.zeros((len(moved), 4), np.float32), scores, None, moved))
        results += [
            {"image_id": image_id, "category_id": 1, "segmentation": mask, "score": float(score)}
            for mask, score in zip(moved, scores, strict=True)
        ]
    usable = [np.ones(len(item.boxes), bool) for item in proposals]
    overlaps = list(mask_overlaps_of(ground_truth, proposals, usable))
    for overlaps_i, masks_i, item in zip(
        overlaps, ground_truth.masks_by_image(), proposals, strict=True
    ):
        if masks_i:
            exact = mask_util.iou(item.masks, masks_i, [0] * len(masks_i)).T
            np.testing.assert_array_equal(overlaps_i, exact.astype(np.float32))
    ours = measure(overlaps, ground_truth, LIMITS).metrics
    recall = class_agnostic_recall(coco, results, "segm")
    for row, suffix in enumerate(SIZES):
        for column, limit in enumerate(LIMITS):
            difference = ours[f"AR{suffix}@{limit}"] - recall[row, column]
            assert abs(difference) <= (0.2 if suffix else 0.05), (suffix, limit, difference)
    assert 30 < ours["AR@100"] < 95
