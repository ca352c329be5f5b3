"""Tests of the papers' dataset splits, on folders in their layouts."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from scipy.io import savemat

from d2proposals.data.paper_splits import load_coco_style, load_first_images, load_sbd, load_voc
from d2proposals.engine import check_datasets
from d2proposals.evaluation.ground_truth import load_ground_truth

NAMES = (
    "coco_2014_val_first5k", "voc_2007_test_difficult", "voc_2007_test_easy", "voc_2012_sbd_train",
    "voc_2012_sbd_val", "voc_2012_sbd_trainval", "imagenet_det_train", "imagenet_det_val2",
)  # fmt: skip

VOC_XML = """<annotation><size><width>50</width><height>40</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>50</xmax><ymax>20</ymax></bndbox></object>
<object><name>dog</name><difficult>1</difficult>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>
</annotation>"""


@pytest.mark.parametrize("name", NAMES)
def test_names_are_registered_and_missing_files_named(name):
    assert name in DatasetCatalog
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file") or metadata.dirname
    if name.startswith("voc"):
        assert len(metadata.thing_classes) == 20
    try:
        check_datasets([name])
    except FileNotFoundError as error:
        assert path in str(error) and "DETECTRON2_DATASETS" in str(error)


def test_first_images_of_a_coco_file(tmp_path):
    """By id, whatever the file's order; the others' objects do not come along."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9} for i in (5, 3, 8)],
        "annotations": [
            {"id": i, "image_id": i, "bbox": [0, 0, i, i], "category_id": 1, "iscrowd": 0,
             "area": 1.0, "segmentation": [[0, 0, 1, 0, 1, 1]]} for i in (3, 5, 8)
        ],
        "categories": [{"id": 1, "name": "person"}],
    }  # fmt: skip
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    kept = MetadataCatalog.get("coco_2014_val").as_dict()
    MetadataCatalog.remove("coco_2014_val")
    try:
        records = load_first_images(str(path), "images", number=2)
        records_of_style = load_coco_style(str(path), "images", "coco_style_of_a_test")
    finally:
        MetadataCatalog.pop("coco_2014_val", None)
        MetadataCatalog.get("coco_2014_val").set(**kept)
    assert [record["image_id"] for record in records] == [3, 5]
    assert [record["annotations"][0]["bbox"][2] for record in records] == [3, 5]
    assert len(records_of_style) == 3


def test_difficult_objects_of_voc(tmp_path):
    for folder, name, text in (
        ("ImageSets/Main", "test.txt", "000001\n"), ("Annotations", "000001.xml", VOC_XML),
    ):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text(text)
    (record,) = load_voc(str(tmp_path), "test", keep_difficult=True)
    assert (record["height"], record["width"]) == (40, 50) and record["image_id"] == "000001"
    assert [item["bbox"] for item in record["annotations"]] == [[0, 1, 50, 20], [10, 20, 30, 40]]
    assert [item["category_id"] for item in record["annotations"]] == [7, 11]
    (record,) = load_voc(str(tmp_path), "test", keep_difficult=False)
    assert [item["difficult"] for item in record["annotations"]] == [0]
    with pytest.raises(FileNotFoundError, match="missing: .*train.txt"):
        load_voc(str(tmp_path), "train", keep_difficult=True)


def test_masks_of_sbd(tmp_path):
    """Two objects; a third that is listed but has no pixel is left out."""
    labels = np.zeros((20, 30), np.uint8)
    labels[2:10, 3:13], labels[5:10, 8:20] = 1, 2
    (tmp_path / "inst").mkdir()
    for image_id in ("2008_000001", "2008_000002"):
        instances = {"Segmentation": labels, "Categories": np.array([[15], [8], [1]])}
        savemat(tmp_path / "inst" / f"{image_id}.mat", {"GTinst": instances})
    (tmp_path / "train.txt").write_text("2008_000001\n")
    (tmp_path / "val.txt").write_text("2008_000002\n")
    records = load_sbd(str(tmp_path), "trainval")
    assert [record["image_id"] for record in records] == ["2008_000001", "2008_000002"]
    assert [record["image_id"] for record in load_sbd(str(tmp_path), "val")] == ["2008_000002"]
    first, second = records[0]["annotations"]
    assert first["category_id"] == 14 and second["category_id"] == 7
    assert first["area"] == 8 * 10 - 5 * 5 and second["area"] == 60
    assert second["bbox"] == [8, 5, 12, 5] and second["bbox_mode"] == BoxMode.XYWH_ABS
    DatasetCatalog.register("sbd_of_a_test", lambda: records)
    try:
        ground_truth = load_ground_truth("sbd_of_a_test", with_masks=True)
    finally:
        DatasetCatalog.remove("sbd_of_a_test")
    (masks, _) = ground_truth.masks_by_image()
    assert len(masks) == 2 and ground_truth.areas.tolist() == [55, 60, 55, 60]
