"""Tests of the ground truth read from registered datasets."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.coco import convert_to_coco_dict, register_coco_instances
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.files.annotation_file import register_annotation_file
from tests.common import forgotten_datasets

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
    assert ground_truth.categories.tolist() == [-1, 3, 5]
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
    record = make_record(1, *annotations, height=10, width=10, file_name="1.jpg")
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
            [make_record(1, make_annotation((0, 0, 1, 1), BoxMode.XYXY_REL))],
            r"relative to the image \(XYXY_REL\)",
        ),
    ],
)
def test_unusable_ground_truth_is_named(register_dataset, records, message):
    with pytest.raises(ValueError, match=message):
        load_ground_truth(register_dataset(records))


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (make_annotation((5, 5, float("nan"), 2)), "gt-not-finite"),
        (make_annotation((5, 5, 1e20, 2)), "gt-not-finite"),
        (make_annotation((9, 9, 2, 2), BoxMode.XYXY_ABS), "gt-negative-side"),
        (make_annotation((9, 9, -2, 2)), "gt-negative-side"),
        (make_annotation((9, 9, 9, 12), BoxMode.XYXY_ABS), "gt-empty-box"),
        (make_annotation((9, 9, 2)), "gt-no-box"),
        (make_annotation((1, 2, -1, 20, 30), BoxMode.XYWHA_ABS), "gt-negative-side"),
    ],
)
def test_boxes_that_mean_nothing_are_left_out_and_named(register_dataset, annotation, name):
    records = [make_record(1, make_annotation()), make_record(2, annotation, make_annotation())]
    ground_truth = load_ground_truth(register_dataset(records))
    assert ground_truth.boxes.tolist() == [[1, 2, 11, 22]] * 2
    (fault,) = ground_truth.faults
    assert fault.name == name and fault.message.startswith("1 annotations have ")
    assert "The first: annotation number 0 of image 2" in fault.message


def test_categories_that_are_not_listed_are_one_of_their_own(register_dataset):
    annotations = [make_annotation(category_id=k) for k in (0, 1, 2, -1, None)]
    name = register_dataset([make_record(1, *annotations)], thing_classes=["cat", "dog"])
    ground_truth = load_ground_truth(name)
    assert ground_truth.categories.tolist() == [0, 1, -1, -1, -1]
    (fault,) = ground_truth.faults
    assert fault.name == "gt-category" and fault.message.startswith("3 annotations")


def write_coco(path, annotations, images=None):
    """A COCO-style file; annotations have ids of their own."""
    images = images or [
        {"id": i, "height": 50, "width": 60, "file_name": f"{i}.jpg"} for i in (5, 3)
    ]
    content = {
        "images": images,
        "annotations": [{"id": k, "category_id": 4, **x} for k, x in enumerate(annotations, 1)],
        "categories": [{"id": 4, "name": "thing"}],
    }
    path.write_text(json.dumps(content))
    return str(path)


def in_file(bbox=(1, 2, 10, 20), image_id=3, **extra):
    return {"image_id": image_id, "bbox": list(bbox), "iscrowd": 0, "area": 50, **extra}


@pytest.fixture
def register_coco(tmp_path):
    def register(annotations, name="evaluated_coco_file", images=None):
        json_file = write_coco(tmp_path / f"{name}.json", annotations, images)
        register_coco_instances(name, {}, json_file, str(tmp_path))
        names.append(name)
        return name

    with forgotten_datasets() as names:
        yield register


# Detectron2's reader drops the first, and stops at the others.
READ_OTHERWISE = {
    "four numbers": in_file(segmentation=[[30, 20, 90, 60]]),
    "odd number": in_file(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
    "one list": in_file(segmentation=[1, 2, 3, 4, 5, 6]),
    "same id": in_file(id=1),
    "category": in_file(category_id=99),
    "ignore": in_file(ignore=1),
}


@pytest.mark.parametrize("kind", READ_OTHERWISE)
def test_a_registered_file_is_read_as_the_file_itself(register_coco, kind):
    good = in_file((5, 5, 9, 9), segmentation=[SQUARE], area=16, difficult=1)
    name = register_coco([good, READ_OTHERWISE[kind], in_file(image_id=5, iscrowd=1)])
    own = load_ground_truth(register_annotation_file(MetadataCatalog.get(name).json_file))
    ground_truth = load_ground_truth(name)
    # Detectron2 sorts images by their ids, the file has its own order.
    assert ground_truth.image_ids == [3, 5] and own.image_ids == [5, 3]
    for each in (own, ground_truth):
        assert each.images.ids_in_order_of_file() == [5, 3]
        assert each.boxes.tolist() == [[5, 5, 14, 14], [1, 2, 11, 22]]
        assert each.areas.tolist() == [16, 50]
        assert [fault.name for fault in each.faults] == [fault.name for fault in own.faults]
    assert own.num_difficult == ground_truth.num_difficult == (2 if kind == "ignore" else 1)


def test_a_function_that_chooses_keeps_its_choice(register_dataset, register_coco, tmp_path):
    """Its metadata name a file, of which it returns a part."""
    annotations = [in_file(), in_file((5, 5, 9, 9), difficult=1), in_file(image_id=5)]
    json_file = MetadataCatalog.get(register_coco(annotations)).json_file
    records = load_coco_json(json_file, str(tmp_path))
    one_image = register_dataset(records[:1], "one_image", json_file=json_file)
    assert len(load_ground_truth(one_image).boxes) == 2
    assert load_ground_truth(one_image).num_difficult == 1
    without = [{**records[0], "annotations": records[0]["annotations"][1:]}, records[1]]
    chosen = register_dataset(without, "without_some", json_file=json_file)
    assert load_ground_truth(chosen).boxes.tolist() == [[5, 5, 14, 14], [1, 2, 11, 22]]
    assert load_ground_truth(chosen).areas.tolist() == [50, 50]
    assert load_ground_truth(chosen).images.ids_in_order_of_file() == [5, 3]


def test_an_error_of_an_own_function_is_not_hidden(register_coco):
    def broken():
        raise KeyError("mine")

    json_file = MetadataCatalog.get(register_coco([in_file()])).json_file
    DatasetCatalog.register("broken_one", broken)
    MetadataCatalog.get("broken_one").set(json_file=json_file)
    try:
        with pytest.raises(KeyError, match="mine"):
            load_ground_truth("broken_one")
    finally:
        DatasetCatalog.remove("broken_one")
        MetadataCatalog.remove("broken_one")


def test_difficult_objects_count_unless_they_are_left_out(register_dataset):
    annotations = [make_annotation(), make_annotation((5, 5, 9, 9), difficult=1, area=7),
                   make_annotation((5, 5, 9, 9), difficult=1, iscrowd=1)]  # fmt: skip
    name = register_dataset([make_record(1, *annotations), make_record(2, annotations[1])])
    ground_truth = load_ground_truth(name)
    assert len(ground_truth.boxes) == 3 and ground_truth.num_difficult == 2
    ground_truth = load_ground_truth(name, count_difficult=False)
    assert ground_truth.boxes.tolist() == [[1, 2, 11, 22]] and ground_truth.num_difficult == 2
    assert ground_truth.num_per_image.tolist() == [1, 0]


@pytest.mark.parametrize("area", [0, -3, float("nan"), "big", None])
def test_an_area_that_is_none_is_that_of_the_mask_or_box(register_dataset, area):
    annotations = [make_annotation(area=area, segmentation=[SQUARE]), make_annotation(area=area),
                   make_annotation(area=5)]  # fmt: skip
    name = register_dataset([make_record(1, *annotations, height=50, width=60)])
    ground_truth = load_ground_truth(name)
    assert ground_truth.areas.tolist() == [16, 200, 5]
    assert [fault.name for fault in ground_truth.faults] == ["gt-area", "gt-some-masks"]
    assert ground_truth.faults[0].message.startswith("2 annotations have an 'area' that is missing")


def test_masks_are_measured_where_they_are(register_dataset):
    tiny = {"size": [5, 5], "counts": [25]}  # of another image
    annotations = [make_annotation(segmentation=[SQUARE], area=3), make_annotation(area=4),
                   make_annotation(segmentation=tiny, area=5)]  # fmt: skip
    records = [
        make_record(1, *annotations, height=50, width=60),
        make_record(2, make_annotation(segmentation=[SQUARE], area=6)),
    ]
    name = register_dataset(records)
    ground_truth = load_ground_truth(name, with_masks=True)
    assert ground_truth.num_per_image.tolist() == [3, 1]
    with_masks = ground_truth.with_masks()
    assert with_masks.areas.tolist() == [3] and with_masks.num_per_image.tolist() == [1, 0]
    assert [len(masks) for masks in with_masks.masks_by_image()] == [1, 0]
    named = {fault.name: fault.message for fault in ground_truth.faults}
    assert set(named) == {"gt-no-mask", "gt-some-masks"}
    # Polygons need the size of their image.
    assert named["gt-some-masks"].startswith("3 of 4 objects have no mask")
    del records[0]["annotations"][0]["segmentation"]
    bare = load_ground_truth(name, with_masks=True)
    assert bare.segmentations is None
    with pytest.raises(ValueError, match="no object of the dataset has a mask"):
        bare.with_masks()


def test_unknown_dataset_is_named():
    with pytest.raises(ValueError, match="'no_such_dataset' is not registered"):
        load_ground_truth("no_such_dataset")
