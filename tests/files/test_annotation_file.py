"""Tests of the reader of COCO-style files: what is mended, left out and counted, and the errors."""

import json

import numpy as np
import pytest
from pycocotools import mask as mask_util

from d2proposals.files.annotation_faults import KINDS, AnnotationFaults
from d2proposals.files.annotation_file import (
    NoAnnotationFileError,
    find_categories,
    read_annotation_file,
    register_annotation_file,
)
from d2proposals.files.segmentations import encode_segmentation

SQUARE = [10.0, 20.0, 40.0, 20.0, 40.0, 60.0, 10.0, 60.0]
BOX = [10.0, 20.0, 30.0, 40.0]


def image(image_id=1, **extra):
    return {"id": image_id, "file_name": "a/b.jpg", "height": 100, "width": 200, **extra}


def annotation(image_id=1, **extra):
    return {"id": 7, "image_id": image_id, "bbox": BOX, "category_id": 3, **extra}


@pytest.fixture
def read(tmp_path):
    def read(images, annotations=(), categories=({"id": 3, "name": "cat"},), **others):
        path = tmp_path / "annotations.json"
        content = {"images": images, "annotations": list(annotations), **others}
        path.write_text(json.dumps({**content, "categories": list(categories)}))
        return read_annotation_file(str(path), "root")

    return read


def names_of(file):
    return [fault.name for fault in file.faults.to_list()]


def test_a_file_without_faults(read):
    crowd = annotation(id=8, iscrowd=1)
    file = read([image(5), image("x"), image(2)], [annotation(2, difficult=1), crowd | {
        "image_id": "x"}], [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}])  # fmt: skip
    assert names_of(file) == []
    assert [record["image_id"] for record in file.records] == [5, "x", 2]
    assert file.records[0]["file_name"] == "root/a/b.jpg"
    assert (file.records[0]["height"], file.records[0]["width"]) == (100, 200)
    assert file.category_names == ["cat", "dog"] and file.category_ids == [3, 9]
    assert [len(record["annotations"]) for record in file.records] == [0, 1, 1]
    (item,) = file.records[2]["annotations"]
    assert item["bbox"] == BOX and item["category_id"] == 0 and item["iscrowd"] == 0
    assert item["difficult"] == 1 and "area" not in item and "segmentation" not in item


@pytest.mark.parametrize("given", [1, 1.0, "1", "1.0", "001"])
@pytest.mark.parametrize("of_image", [1, 1.0])
def test_ids_that_mean_one_image(read, given, of_image):
    file = read([image(of_image)], [annotation(given)])
    assert file.records[0]["image_id"] == 1 and type(file.records[0]["image_id"]) is int
    assert len(file.records[0]["annotations"]) == 1
    is_mended = type(given) is not int or type(of_image) is not int
    assert names_of(file) == (["gt-text"] if is_mended else [])


@pytest.mark.parametrize("given", [2, "b", None, 1.5, [1], True, float("nan")])
def test_annotations_of_images_that_are_not_there(read, given):
    file = read([image(1)], [annotation(given), annotation()])
    assert len(file.records[0]["annotations"]) == 1
    assert "gt-unknown-images" in names_of(file) and file.faults.count("gt-unknown-images") == 1


def test_huge_ids(read):
    huge = 20210716131415926535
    file = read([image(huge)], [annotation(huge)])
    assert names_of(file) == [] and len(file.records[0]["annotations"]) == 1


@pytest.mark.parametrize(
    ("height", "width", "size", "names"),
    [
        ("100", "200", (100, 200), ["gt-text"]),
        (100.0, 200, (100, 200), ["gt-text"]),
        (0, 200, None, ["gt-image-size"]),
        ("tall", 200, None, ["gt-image-size"]),
        (100.5, 200, None, ["gt-image-size"]),
        (float("nan"), 200, None, ["gt-image-size"]),
        (None, 200, None, ["gt-image-size"]),
    ],
)
def test_sizes(read, height, width, size, names):
    record = read([image(height=height, width=width)]).records[0]
    assert (("height" in record and (record["height"], record["width"])) or None) == size
    assert names_of(read([image(height=height, width=width)])) == names


@pytest.mark.parametrize(
    ("value", "flag", "is_named"),
    [(0, 0, False), (1, 1, False), (True, 1, False), (None, 0, False), (2, 1, False),
     ("0", 0, True), ("1", 1, True), ("false", 0, True), ("True", 1, True), ("", 0, True),
     ("no", 0, True), ([], 0, True), ([1], 1, True)],
)  # fmt: skip
def test_flags(read, value, flag, is_named):
    file = read([image()], [annotation(iscrowd=value, difficult=value)])
    (item,) = file.records[0]["annotations"]
    assert item["iscrowd"] == flag and item.get("difficult", 0) == flag
    assert file.faults.count("gt-flag") == 2 * is_named


@pytest.mark.parametrize(
    ("bbox", "name"),
    [
        ([1, 2, 0, 5], "gt-empty-box"),
        ([1, 2, 5, 0.0], "gt-empty-box"),
        ([1, 2, 5, -1], "gt-negative-side"),
        ([1, float("inf"), 5, 5], "gt-not-finite"),
        ([1, "nan", 5, 5], "gt-not-finite"),
        ([10**400, 2, 5, 5], "gt-not-finite"),
        ([1, 2, 5], "gt-no-box"),
        ([], "gt-no-box"),
        (None, "gt-no-box"),
        ("1 2 3 4", "gt-no-box"),
        ([1, 2, True, 4], "gt-no-box"),
        ([1, 2, "wide", 4], "gt-no-box"),
    ],
)
def test_boxes_that_mean_nothing(read, bbox, name):
    file = read([image(1), image(4)], [annotation(4, bbox=bbox), annotation(4, id=8)])
    assert [item["bbox"] for item in file.records[1]["annotations"]] == [BOX]
    assert names_of(file) == [name]
    message = file.faults.to_list()[0].message
    assert message.startswith("1 annotations ") and "annotation 7 of image 4" in message


def test_boxes_as_text(read):
    file = read([image()], [annotation(bbox=["1", 2, "3.5", "4"])])
    assert file.records[0]["annotations"][0]["bbox"] == [1, 2, 3.5, 4]
    assert names_of(file) == ["gt-text"]


RUNS = {"size": [100, 200], "counts": [1020, *[40, 60] * 29, 40, 16040]}  # the box of SQUARE


@pytest.mark.parametrize("segmentation", [[SQUARE], [SQUARE, [1, 2]], RUNS])
def test_masks_without_box(read, segmentation):
    item = annotation(segmentation=segmentation)
    del item["bbox"]
    file = read([image()], [item])
    assert file.records[0]["annotations"][0]["bbox"] == pytest.approx(BOX)
    assert names_of(file) == ["gt-box-of-mask"]


@pytest.mark.parametrize(
    ("segmentation", "name"),
    [
        ([[1, 2, 3, 4]], "gt-bad-mask"),
        ([[1, 2, 3, 4, 5, 6, 7]], "gt-bad-mask"),
        ([[]], "gt-bad-mask"),
        ([1, 2, 3, 4, 5, 6], "gt-no-mask"),
        ([[1, 2, 3, 4, 5, float("nan")]], "gt-no-mask"),
        ([[1, 2, 3, 4, 5, "x"]], "gt-no-mask"),
        ("polygon", "gt-no-mask"),
        (5, "gt-no-mask"),
        ({"size": [100, 200], "counts": [5, 6]}, "gt-no-mask"),
        ({"size": [10, 20], "counts": [200]}, "gt-no-mask"),
        ({"size": [100, 200], "counts": "a1"}, "gt-no-mask"),
        ({"counts": [20000]}, "gt-no-mask"),
    ],
)
def test_masks_that_are_none_keep_their_box(read, segmentation, name):
    file = read([image()], [annotation(segmentation=segmentation)])
    (item,) = file.records[0]["annotations"]
    assert item["bbox"] == BOX and "segmentation" not in item
    assert names_of(file) == [name]


def test_counts_that_are_the_text_of_bytes(read):
    """Encodings may have a backslash, which such a text doubles."""
    bitmap = np.zeros((100, 200), np.uint8)
    bitmap.ravel(order="K")[np.random.default_rng(0).permutation(20000)[:4000]] = 1
    right = mask_util.encode(np.asfortranarray(bitmap))
    assert b"\\" in right["counts"]
    given = {"size": [100, 200], "counts": str(right["counts"])}
    file = read([image()], [annotation(segmentation=given)])
    assert names_of(file) == ["gt-text"]
    (item,) = file.records[0]["annotations"]
    assert encode_segmentation(item["segmentation"], (100, 200), 1) == right
    for wrong in ("b'\\x'", "b'", "b'zz'", "b''"):
        given["counts"] = wrong
        assert names_of(read([image()], [annotation(segmentation=given)])) == ["gt-no-mask"]


@pytest.mark.parametrize("segmentation", [None, [], {}, ""])
def test_no_mask_is_no_bad_mask(read, segmentation):
    file = read([image()], [annotation(segmentation=segmentation)])
    assert names_of(file) == [] and "segmentation" not in file.records[0]["annotations"][0]


def test_masks_outside_of_the_image(read):
    outside = [[-9, -9, -5, -9, -5, -5]], [[210, 5, 220, 5, 220, 9], [5, 100, 9, 100, 9, 120]]
    inside = [[-9, -9, 5, -9, 5, 5]], [[210, 5, 220, 5, 220, 9], [5, 99, 9, 99, 9, 120]]
    items = [annotation(id=k, segmentation=x) for k, x in enumerate((*outside, *inside))]
    file = read([image()], items)
    assert names_of(file) == ["gt-mask-outside"] and file.faults.count("gt-mask-outside") == 2
    assert all("segmentation" in item for item in file.records[0]["annotations"])


def test_categories(read):
    given = [3, "3", 3.0, 4, "dog", None]
    file = read([image()], [annotation(id=k, category_id=x) for k, x in enumerate(given)])
    found = [item["category_id"] for item in file.records[0]["annotations"]]
    assert found == [0, 0, 0, -1, -1, -1]
    assert file.faults.count("gt-category") == 3 and file.faults.count("gt-text") == 2
    # A file that lists none, or whose annotations have none, is no fault.
    bare = [{k: v for k, v in annotation().items() if k != "category_id"}]
    assert names_of(read([image()], bare)) == []
    file = read([image()], [annotation(category_id=0)], [])
    assert names_of(file) == [] and file.records[0]["annotations"][0]["category_id"] == 0


def test_annotations_of_one_id_count_each(read):
    file = read([image(1), image(2)], [annotation(1), annotation(2), annotation(2, id=0)])
    assert [len(record["annotations"]) for record in file.records] == [1, 2]
    assert names_of(file) == ["gt-same-id"] and file.faults.count("gt-same-id") == 1


def test_annotations_that_are_none(read):
    file = read([image()], [None, "x", [], annotation()])
    assert len(file.records[0]["annotations"]) == 1
    assert names_of(file) == ["gt-no-box"] and file.faults.count("gt-no-box") == 3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([image(0, file_name="a.png"), image(0, file_name="b.png")],
         "the image id 0 is given twice, to 'a.png' and to 'b.png'"),
        ([image(1), image("1")], "the image id 1 is given twice"),
        ([image(1), image(1.0)], "the image id 1 is given twice"),
        ([image(None)], "an image has no 'id' that is a whole number or text"),
        ([image(1.5)], "an image has no 'id'"),
        ([image(True)], "an image has no 'id'"),
        ([image([1])], "an image has no 'id'"),
    ],
)  # fmt: skip
def test_images_without_an_id_of_their_own(read, images, message):
    with pytest.raises(ValueError, match=message) as error:
        read(images)
    assert not isinstance(error.value, NoAnnotationFileError) and "\n" not in str(error.value)


def test_category_ids_given_twice(read):
    same = {"id": 3, "name": "cat"}
    assert read([image()], (), [same, same]).category_names == ["cat"]
    with pytest.raises(ValueError, match="category id 3 is given twice, to 'cat' and to 'dog'"):
        read([image()], (), [same, {"id": 3, "name": "dog"}])


def test_categories_of_one_name_are_told_apart_by_number():
    known = {0: "fish", 1: "fish", 2: "crab"}
    assert find_categories(["crab", "1"], known) == {1, 2}
    with pytest.raises(ValueError, match="2 categories .* called 'fish'; .*: 0 and 1"):
        find_categories(["crab", "fish"], known)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"images": 5}', '{"images": [5]}',
                                     '{"images": [], "annotations": {}}', '{"annotations": []}',
                                     '{"images": [], "annotations": null}'])  # fmt: skip
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "annotations.json"
    path.write_text(content)
    with pytest.raises(NoAnnotationFileError):
        register_annotation_file(path)


def test_images_alone_are_enough(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": [image(3)]}))
    file = read_annotation_file(str(path), "root")
    assert file.records == [
        {"image_id": 3, "file_name": "root/a/b.jpg", "height": 100, "width": 200}
    ]


def test_faults_show_the_first_and_count_all():
    faults = AnnotationFaults()
    assert not faults.need_mending
    faults.add("gt-area", "annotation 5", 0)
    faults.add("gt-area", "annotation 6", -1)
    assert not faults.need_mending
    faults.add("gt-no-box", "annotation 7", "x" * 1000)
    assert faults.need_mending
    no_box, area = faults.to_list()  # in the order of the kinds
    assert no_box.name == "gt-no-box" and len(no_box.message) < 400
    assert area.message.startswith("2 annotations") and area.message.endswith("annotation 5: 0")


def test_kinds_are_documented():
    page = __file__.split("tests")[0] + "docs/toolbox.md"
    with open(page, encoding="utf-8") as file:
        text = file.read()
    others = ("gt-relative", "gt-xyxy-boxes", "gt-outside", "gt-some-masks")
    assert [name for name in (*KINDS, *others) if f"`{name}`" not in text] == []
