"""Tests of whether a dataset's function gives what its COCO-style file says."""

import copy
import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from d2proposals.data.dataset_reading import read_dataset
from tests.common import forgotten_datasets


def shift(record):
    record["annotations"][0]["bbox"][0] += 1


def mend(record):
    record["annotations"][1]["bbox"] = (1, 1, 5, 5)


def resize(record):
    record["width"] = 30


def to_tuples(record):
    for item in record["annotations"]:
        item["bbox"] = tuple(item["bbox"])


@pytest.mark.parametrize(
    ("change", "is_of_file"),
    [(None, True), (to_tuples, True), (shift, False), (mend, False), (resize, False)],
)
def test_a_function_that_changes_boxes_or_sizes_counts_as_it_is(tmp_path, change, is_of_file):
    boxes = [[5, 6, 7.5, 8], [1, 1, 5, -5], ["9", 9, 9, 9]]
    annotations = [
        {"id": k, "image_id": 1, "category_id": 3, "iscrowd": 0, "bbox": box}
        for k, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}],
    }
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    (record,) = load_coco_json(str(file), str(tmp_path), "changed_by_a_function")
    if change is not None:
        change(record)
    expected = copy.deepcopy(record)
    with forgotten_datasets() as names:
        names.append("changed_by_a_function")
        DatasetCatalog.register(names[0], lambda: [record])
        MetadataCatalog.get(names[0]).set(json_file=str(file), image_root=str(tmp_path))
        reading = read_dataset(names[0])
    assert reading.is_of_file == is_of_file
    (read,) = reading.records
    assert read["annotations"][0]["bbox"] == list(expected["annotations"][0]["bbox"])
    assert len(read["annotations"]) == (3 if change is mend else 2)
    assert read["width"] == expected["width"]


@pytest.mark.parametrize(
    ("of_image", "of_annotation"),
    [(int, int), (int, float), (int, str), (float, int), (float, float), (str, int), (str, str)],
)
def test_ids_of_another_kind_find_their_image_and_are_named(tmp_path, of_image, of_annotation):
    box = [5, 6, 7, 8]
    content = {
        "images": [{"id": of_image(1), "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [
            {"id": 1, "image_id": of_annotation(1), "category_id": 3, "bbox": box, "iscrowd": 0}
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    with forgotten_datasets() as names:
        names.append("ids_of_another_kind")
        register_coco_instances(names[0], {}, str(file), str(tmp_path))
        reading = read_dataset(names[0])
    assert reading.is_of_file
    (record,) = reading.records
    assert record["image_id"] == (of_image(1) if of_image is str else 1)
    assert type(record["image_id"]) is not float
    assert [item["bbox"] for item in record["annotations"]] == [box]
    is_wrong = of_image is not of_annotation or of_image is float
    assert bool(reading.faults.count("gt-text")) == is_wrong
    assert reading.faults.need_mending == is_wrong
