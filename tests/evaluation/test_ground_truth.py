"""Tests of the ground truth read from registered datasets."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict, register_coco_instances
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from d2proposals.evaluation.ground_truth import load_ground_truth

SQUARE = [0.0, 0.0, 4.0, 0.0, 4.0, 4.0, 0.0, 4.0]  # 16 square pixels


def make_record(image_id, *annotations, **extra):
    return {"image_id": image_id, "annotations": list(annotations), **extra}


def make_annotation(bbox=(1, 2, 10, 20), mode=BoxMode.XYWH_ABS, **extra):
    return {"bbox": list(bbox), "bbox_mode": mode, **extra}


def make_rle(compressed):
    mask = np.zeros((10, 10), np.uint8)
    mask[2:5, 3:8] = 1
    if compressed:
        return mask_util.encode(np.asfortranarray(mask))
    changes = np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=0, append=0))
    return {"size": [10, 10], "counts": np.diff(changes, prepend=0, append=100).tolist()}


def test_box_modes_images_and_crowd(register_dataset):
    rotated = make_annotation((6, 12, 10, 20, 0), BoxMode.XYWHA_ABS, category_id=5)
    records = [
        make_record("a", make_annotation(), make_annotation(iscrowd=1), height=30, width=40),
        make_record("b"),
        {"image_id": "c"},
        make_record(
            "d",
            make_annotation((1, 2, 10, 20), BoxMode.XYXY_ABS, iscrowd=0, category_id=3),
            rotated,
        ),
    ]
    ground_truth = load_ground_truth(register_dataset(records))
    assert ground_truth.image_ids == ["a", "b", "c", "d"]
    assert ground_truth.image_sizes == [(30, 40), None, None, None]
    assert ground_truth.num_per_image.tolist() == [1, 0, 0, 2]
    assert ground_truth.boxes.tolist() == [[1, 2, 11, 22], [1, 2, 10, 20], [1, 2, 11, 22]]
    assert ground_truth.boxes.dtype == np.float32
    assert ground_truth.areas.tolist() == [200, 9 * 18, 200]
    assert ground_truth.categories.tolist() == [0, 3, 5]
    assert [len(boxes) for boxes in ground_truth.boxes_by_image()] == [1, 0, 0, 2]
    assert ground_truth.is_annotated


def test_numpy_boxes(register_dataset):
    annotation = make_annotation()
    annotation["bbox"] = np.array([1, 2, 10, 20], np.float32)
    name = register_dataset([make_record(1, annotation)], json_file="does_not_exist.json")
    assert load_ground_truth(name).boxes.tolist() == [[1, 2, 11, 22]]


def test_area_comes_from_the_best_source(register_dataset, tmp_path):
    json_file = tmp_path / "annotations.json"
    in_file = {"image_id": 1, "bbox": [1, 2, 10, 20], "area": 77.5}
    json_file.write_text(json.dumps({"annotations": [in_file]}))
    annotations = [
        make_annotation(area=3.0, segmentation=[SQUARE]),
        make_annotation(segmentation=[SQUARE]),
        make_annotation((0, 0, 10, 20), segmentation=[SQUARE]),
        make_annotation((0, 0, 9, 20), segmentation=make_rle(compressed=True)),
        make_annotation((0, 0, 8, 20), segmentation=make_rle(compressed=False)),
        make_annotation((0, 0, 7, 20)),
    ]
    name = register_dataset([make_record(1, *annotations)], json_file=str(json_file))
    assert load_ground_truth(name).areas.tolist() == [3, 77.5, 16, 15, 15, 140]


def test_annotations_of_one_box_keep_their_areas(register_dataset, tmp_path):
    json_file = tmp_path / "annotations.json"
    same_box = {"image_id": 1, "bbox": [1, 2, 10, 20]}
    crowd = {**same_box, "area": 999, "iscrowd": 1}
    content = {"annotations": [crowd, {**same_box, "area": 5}, {**same_box, "area": 6}]}
    json_file.write_text(json.dumps(content))
    record = make_record(1, make_annotation(iscrowd=1), make_annotation(), make_annotation())
    assert load_ground_truth(
        register_dataset([record], json_file=str(json_file))
    ).areas.tolist() == [
        5,
        6,
    ]


@pytest.mark.parametrize("content", [[], {}, {"annotations": None}, {"annotations": [[], {}]}])
def test_json_file_of_another_kind_is_passed_over(register_dataset, tmp_path, content):
    json_file = tmp_path / "annotations.json"
    json_file.write_text(json.dumps(content))
    name = register_dataset([make_record(1, make_annotation())], json_file=str(json_file))
    assert load_ground_truth(name).areas.tolist() == [200]


def test_coco_file_gives_the_areas_of_its_masks(tmp_path):
    """A dataset registered by Detectron2, which drops the key "area"."""
    annotation = {"id": 1, "image_id": 9, "category_id": 4, "iscrowd": 0}
    content = {
        "images": [{"id": 9, "height": 50, "width": 60, "file_name": "9.jpg"}],
        "annotations": [{**annotation, "bbox": [1.1, 2, 10, 20], "area": 123.25}],
        "categories": [{"id": 4, "name": "thing"}],
    }
    json_file = tmp_path / "annotations.json"
    json_file.write_text(json.dumps(content))
    name = "evaluated_coco_dataset"
    register_coco_instances(name, {}, str(json_file), str(tmp_path))
    try:
        ground_truth = load_ground_truth(name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert ground_truth.areas.tolist() == [123.25]
    assert ground_truth.image_ids == [9] and ground_truth.image_sizes == [(50, 60)]


def test_areas_equal_those_of_detectron2s_conversion(register_dataset):
    """Without a COCO file, Detectron2 evaluates what it converts."""
    annotations = [
        make_annotation(segmentation=[SQUARE, [5.0, 5, 9, 5, 9, 9.5]], category_id=0),
        make_annotation(segmentation=make_rle(compressed=True), category_id=0),
        make_annotation((1.5, 2, 7, 9), BoxMode.XYXY_ABS, category_id=0),
    ]
    record = make_record(1, *annotations, height=50, width=60, file_name="1.jpg")
    name = register_dataset([record], thing_classes=["thing"])
    converted = convert_to_coco_dict(name)["annotations"]
    ground_truth = load_ground_truth(name)
    np.testing.assert_allclose(ground_truth.areas, [item["area"] for item in converted])
    boxes = [
        BoxMode.convert(item["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for item in converted
    ]
    np.testing.assert_allclose(ground_truth.boxes, boxes)


def test_dataset_without_annotations(register_dataset):
    ground_truth = load_ground_truth(register_dataset([{"image_id": 1}]))
    assert not ground_truth.is_annotated
    assert ground_truth.boxes.shape == (0, 4)


def test_empty_dataset(register_dataset):
    ground_truth = load_ground_truth(register_dataset([]))
    assert ground_truth.image_ids == [] and ground_truth.boxes_by_image() == []


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"annotations": []}], "1 images of the dataset 'evaluated_dataset' have no 'image_id'"),
        ([{"image_id": 1}, {"image_id": "1"}], "'image_id' .* occurs more than once"),
        ([make_record(1, {"bbox": [0, 0, 1, 1]})], "image 1 in .* lacks 'bbox' or 'bbox_mode'"),
        (
            [make_record(1), make_record(2, make_annotation((5, 5, float("nan"), 2)))],
            r"1 ground-truth boxes .* the first in image 2: \[5.0, 5.0, nan",
        ),
        (
            [make_record(1, make_annotation((9, 9, 2, 2), BoxMode.XYXY_ABS))],
            "not finite or have a negative side, the first in image 1",
        ),
        (
            [make_record(1, make_annotation((0, 0, 1, 1), BoxMode.XYXY_REL))],
            r"relative to the image \(XYXY_REL\)",
        ),
    ],
)
def test_unusable_ground_truth_is_named(register_dataset, records, message):
    with pytest.raises(ValueError, match=message):
        load_ground_truth(register_dataset(records))


def test_unknown_dataset_is_named():
    with pytest.raises(ValueError, match="'no_such_dataset' is not registered"):
        load_ground_truth("no_such_dataset")
