"""Reader and evaluator over generated COCO-style files, valid ones and spoiled ones."""

import contextlib
import copy
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, Instances
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from d2proposals.engine.bad_input import bad_input_in_one_line
from d2proposals.engine.checked_datasets import checked_dataset
from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.evaluation.measurement import box_overlaps_of, measure
from d2proposals.evaluation.proposal_checks import ImageProposals
from d2proposals.files.annotation_file import register_annotation_file
from tests.common import make_cfg

LIMITS = (1, 3, 100)
AREAS = {"": "all", "s": "small", "m": "medium", "l": "large"}
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    # A failure shows at once; a smaller example would take minutes.
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": list(HealthCheck),
}


@st.composite
def boxes(draw, width, height):
    x, y = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
    return [x, y, draw(st.integers(1, width - x)), draw(st.integers(1, height - y))]


def encode_box(box, width, height, compressed):
    bitmap = np.zeros((height, width), np.uint8)
    x, y, w, h = box
    bitmap[y : y + h, x : x + w] = 1
    if compressed:
        return {
            "size": [height, width],
            "counts": mask_util.encode(np.asfortranarray(bitmap))["counts"].decode(),
        }
    flat = bitmap.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    return {"size": [height, width], "counts": np.diff(changes, prepend=0).tolist()}


@st.composite
def segmentations(draw, box, width, height):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    kind = draw(st.sampled_from(["polygon", "two", "short", "compressed", "runs"]))
    if kind in ("compressed", "runs"):
        return encode_box(box, width, height, kind == "compressed")
    return {"polygon": [polygon], "two": [polygon, [x, y, x + w, y, x + w, y + h]],
            "short": [[x, y, x + w, y + h]]}[kind]  # fmt: skip


@st.composite
def coco_files(draw):
    """A valid file and for each of its images proposals (x, y, w, h), best first."""
    images, annotations, proposals = [], [], []
    ids = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=3, unique=True))
    for image_id in ids:
        width, height = draw(st.integers(2, 300)), draw(st.integers(2, 300))
        images.append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "width": width, "height": height}
        )
        for _ in range(draw(st.integers(0, 4))):
            box = draw(boxes(width, height))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "bbox": box,
                "category_id": draw(st.sampled_from([3, 7])),
                "area": draw(st.integers(1, box[2] * box[3])),
                "iscrowd": int(draw(st.integers(0, 4)) == 0),
            }
            if draw(st.booleans()):
                annotation["segmentation"] = draw(segmentations(box, width, height))
            if draw(st.booleans()):
                annotation["difficult"] = draw(st.integers(0, 1))
            annotations.append(annotation)
        own = [item["bbox"] for item in annotations if item["image_id"] == image_id]
        moved = [[x, y, max(1, w - 1), h] for x, y, w, h in own]
        others = draw(st.lists(boxes(width, height), min_size=1, max_size=3))
        proposals.append(draw(st.permutations(own + moved + others)))
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}, proposals


@contextlib.contextmanager
def written(content):
    """The names of a file that the toolbox registers and of the one that Detectron2 does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        path.write_text(json.dumps(content))
        name = f"generated {folder}"
        register_coco_instances(name, {}, str(path), folder)
        before = set(DatasetCatalog.list())
        try:
            yield path, name
        finally:
            for each in {name} | (set(DatasetCatalog.list()) - before):
                DatasetCatalog.remove(each)
                MetadataCatalog.remove(each)


def greedy_recall(ground_truths, proposals, limit):
    """Brute force: of (area, box) objects and boxes of each image, best pair first."""
    reached, total = 0, 0
    for objects, boxes_i in zip(ground_truths, proposals, strict=True):
        pairs = sorted(
            (-iou(box, proposal), index, rank)
            for index, (_, box) in enumerate(objects)
            for rank, proposal in enumerate(boxes_i[:limit])
        )
        used = set()
        for negative, index, rank in pairs:
            if used & {("gt", index), ("proposal", rank)}:
                continue
            used |= {("gt", index), ("proposal", rank)}
            reached += sum(-negative >= percent / 100 - 1e-7 for percent in range(50, 100, 5))
        total += len(objects)
    return 100 * reached / (10 * total)


def iou(a, b):
    sides = [min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k]) for k in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def our_metrics(ground_truth, proposals):
    corners = [np.array(x, np.float32) @ SUMS for x in proposals]
    scores = [np.arange(len(x), 0, -1, dtype=np.float32) for x in proposals]
    aligned = [ImageProposals(b, s, None) for b, s in zip(corners, scores, strict=True)]
    usable = [np.ones(len(x), bool) for x in proposals]
    overlaps = box_overlaps_of(ground_truth, aligned, usable)
    return measure(overlaps, ground_truth, LIMITS).metrics


# XYWH @ SUMS = XYXY.
SUMS = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)


@settings(max_examples=25, **SETTINGS)
@given(coco_files())
def test_valid_files_have_the_numbers_of_detectron2_and_of_brute_force(generated):
    content, proposals = generated
    by_id = {
        image["id"]: boxes_i for image, boxes_i in zip(content["images"], proposals, strict=True)
    }
    with written(content) as (path, name):
        registered = load_ground_truth(name, with_masks=True)
        of_file = load_ground_truth(register_annotation_file(path), with_masks=True)
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(path))
    assert sorted(registered.boxes.tolist()) == sorted(of_file.boxes.tolist())
    objects = [item for item in content["annotations"] if not item["iscrowd"]]
    assert len(registered.boxes) == len(objects)
    assert registered.num_difficult == sum(item.get("difficult", 0) for item in objects)
    if not objects:
        return
    ours = our_metrics(registered, [by_id[image_id] for image_id in registered.image_ids])
    same = our_metrics(of_file, proposals)
    assert ours == pytest.approx(same)
    predictions = [
        {"image_id": image_id, "proposals": Instances(
            (1, 1), proposal_boxes=Boxes(torch.tensor(np.array(boxes_i, np.float32) @ SUMS)),
            objectness_logits=torch.arange(len(boxes_i), 0, -1.0))}
        for image_id, boxes_i in by_id.items()
    ]  # fmt: skip
    for suffix, area in AREAS.items():
        for limit in LIMITS:
            theirs = 100 * _evaluate_box_proposals(predictions, coco, area=area, limit=limit)["ar"]
            if torch.isnan(theirs):
                assert f"AR{suffix}@{limit}" not in ours
            else:
                assert ours[f"AR{suffix}@{limit}"] == pytest.approx(theirs.item(), abs=1e-4)
    truths = [
        [(x["area"], x["bbox"]) for x in objects if x["image_id"] == image["id"]]
        for image in content["images"]
    ]
    for limit in LIMITS:
        assert ours[f"AR@{limit}"] == pytest.approx(greedy_recall(truths, proposals, limit))


JUNK = st.sampled_from(
    [None, True, "x", "0", "12", "nan", "", -1, 0, 0.5, 7.0, float("nan"), float("inf"), 1e300,
     10**30, [], {}, [[]], [1, 2, 3, 4], ["1", "2", "3", "4"], [[1, 2, 3, 4]],
     [[1, 2, "x", 4, 5, 6]],
     [5, 5, -2, 3], [[float("nan")] * 6], {"size": [2, 2], "counts": [4]}, {"size": "x"},
     {"size": [10**6, 10**6], "counts": "ab"}, {"size": [2, 2], "counts": "zzzz"}]
)  # fmt: skip


@st.composite
def spoiled_files(draw):
    """A file with one to three things deleted, doubled or replaced."""
    content = copy.deepcopy(draw(coco_files())[0])
    for _ in range(draw(st.integers(1, 3))):
        spot, key = content, draw(st.sampled_from(sorted(content)))
        while draw(st.integers(0, 4)) and isinstance(spot[key], (list, dict)) and spot[key]:
            spot = spot[key]
            keys = sorted(spot) if isinstance(spot, dict) else list(range(len(spot)))
            key = draw(st.sampled_from(keys))
        action = draw(st.sampled_from(["replace", "replace", "delete", "double"]))
        if action == "double" and isinstance(spot, list):
            spot.append(copy.deepcopy(spot[key]))
        elif action == "delete" and spot is not content:
            del spot[key]
        else:
            spot[key] = copy.deepcopy(draw(JUNK))
    return content


def check_all(name):
    """All that is done with a dataset's ground truth, or one line."""
    try:
        with bad_input_in_one_line():
            ground_truth = load_ground_truth(name, with_masks=True)
    except SystemExit as stop:
        assert str(stop).startswith("Error: ") and "\n" not in str(stop)
        return
    assert np.isfinite(ground_truth.boxes).all() and np.isfinite(ground_truth.areas).all()
    assert (ground_truth.boxes[:, 2:] >= ground_truth.boxes[:, :2]).all()
    assert all("\n" not in fault.message for fault in ground_truth.faults)
    if ground_truth.segmentations is not None:
        with_masks = ground_truth.with_masks()
        masks = [mask for masks_i in with_masks.masks_by_image() for mask in masks_i]
        assert len(masks) == len(with_masks.boxes)
    proposals = [[[0, 0, 5, 5]] for _ in ground_truth.image_ids]
    our_metrics(ground_truth, proposals)


def train_on(cfg, name):
    """What the loader does with each annotation of a training set, but for the image."""
    try:
        with bad_input_in_one_line():
            records = DatasetCatalog.get(checked_dataset(cfg, name, "TRAIN"))
    except SystemExit as stop:
        assert str(stop).startswith("Error: ") and "\n" not in str(stop)
        return
    for record in records:
        # Masks of an image of unknown size have that of the file, which is not there.
        is_known = "height" in record and "width" in record
        size = (record["height"], record["width"]) if is_known else (100, 100)
        objects = [x for x in record.get("annotations", []) if x.get("iscrowd", 0) == 0]
        objects = objects if is_known else list(map(without_mask, objects))
        annotations = [
            utils.transform_instance_annotations(copy.deepcopy(x), T.NoOpTransform(), size)
            for x in objects
        ]
        if all("segmentation" in x for x in annotations):
            utils.annotations_to_instances(annotations, size, "bitmask")
        else:
            utils.annotations_to_instances([without_mask(x) for x in annotations], size)


def without_mask(annotation):
    return {key: value for key, value in annotation.items() if key != "segmentation"}


CFG = make_cfg(None, "MODEL.META_ARCHITECTURE", "ProposalNetwork")


@settings(max_examples=80, **SETTINGS)
@given(spoiled_files())
def test_spoiled_files_give_a_result_or_one_line(content):
    with written(content) as (path, name):
        check_all(name)
        train_on(CFG, name)
        try:
            with bad_input_in_one_line():
                own = register_annotation_file(path)
        except SystemExit as stop:
            assert "\n" not in str(stop)
            return
        check_all(own)
