"""Tests of reading, recognising, converting and writing proposals in all formats."""

import json
import pickle
import sys
import tracemalloc
import types

import numpy as np
import pytest
from pycocotools import mask as mask_util

from d2proposals.files.conversion import (
    FORMATS,
    drop_proposals,
    merge_images,
    read_proposals,
    reinterpret_boxes,
    write_proposals,
)
from d2proposals.files.precomputed_format import read_proposal_file
from d2proposals.files.proposal_set import DatasetImages, ProposalSet
from d2proposals.files.run_length_encodings import check_encodings, make_encodings

SIZE = (40, 50)
IMAGES = DatasetImages([7, 8, 9], ["val/a.jpg", "val/b.jpg", "val/c.jpg"], [SIZE] * 3)
WITHOUT_MASKS = ("detectron2", "mmdet2", "mmdet3")


def random_masks(number, size=SIZE, seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.random((number, 5, 5)) > 0.6
    coarse[:, 2, 2] = True
    bitmaps = np.repeat(np.repeat(coarse, size[0] // 5, 1), size[1] // 5, 2)
    return mask_util.encode(np.asfortranarray(bitmaps.transpose(1, 2, 0), np.uint8))


def make_set(with_masks=True, logits=True):
    """Three images, the second without proposals."""
    generator = np.random.default_rng(1)
    numbers = (4, 0, 3)
    masks = [random_masks(n, seed=n) if n else [] for n in numbers]
    boxes = [np.asarray(mask_util.toBbox(m) if m else np.zeros((0, 4)), np.float32) for m in masks]
    for boxes_i in boxes:
        boxes_i[:, 2:] += boxes_i[:, :2]
        boxes_i += generator.random(boxes_i.shape).astype(np.float32) * 0 if with_masks else 0.37
    scores = [np.sort(generator.normal(size=n) * 4)[::-1] for n in numbers]
    scores = [s.astype(np.float32).astype(np.float64) for s in scores]
    if not logits:
        scores = [1 / (1 + np.exp(-s)) for s in scores]
    return ProposalSet(
        "d2proposals", [7, 8, 9], boxes, scores, masks if with_masks else None, logits
    )


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_round_trips_between_all_formats(tmp_path, first, second):
    """There and on: boxes and masks to the bit, scores to float32, empty images kept."""
    original = make_set()
    write_proposals(tmp_path / "first", original, first, IMAGES)
    between = merge_images(read_proposals(tmp_path / "first", IMAGES), IMAGES)
    assert between.format == first and between.faults == []
    if second == "sam" and first in WITHOUT_MASKS:
        with pytest.raises(ValueError, match="sam holds masks, and these proposals have boxes"):
            write_proposals(tmp_path / "second", between, second, IMAGES)
        return
    write_proposals(tmp_path / "second", between, second, IMAGES)
    result = merge_images(read_proposals(tmp_path / "second", IMAGES), IMAGES)
    assert result.format == second and result.image_ids == [7, 8, 9]
    for index in range(3):
        np.testing.assert_array_equal(result.boxes[index], original.boxes[index])
        expected = original.scores[index]
        np.testing.assert_allclose(result.logits()[index], expected, rtol=2e-4, atol=1e-5)
    if first in WITHOUT_MASKS or second in WITHOUT_MASKS:
        assert result.masks is None
    else:
        assert result.masks == original.masks


@pytest.mark.parametrize("format_name", ["detectron2", "d2proposals", "coco", "mmdet3"])
def test_without_a_dataset(tmp_path, format_name):
    original = make_set(with_masks=False)
    write_proposals(tmp_path / "file", original, format_name)
    result = read_proposals(tmp_path / "file")
    # COCO's results have no entry for an empty image; mmdetection's have names.
    kept = [0, 2] if format_name == "coco" else [0, 1, 2]
    ids = [original.image_ids[index] for index in kept]
    assert result.image_ids == ([str(x) for x in ids] if format_name == "mmdet3" else ids)
    for boxes_i, index in zip(result.boxes, kept, strict=True):
        np.testing.assert_array_equal(boxes_i, original.boxes[index])


def test_detectron2s_own_reader_takes_what_is_written(tmp_path):
    write_proposals(tmp_path / "a.pkl", make_set(), "detectron2")
    assert read_proposal_file(tmp_path / "a.pkl").image_ids == [7, 8, 9]
    # What mmdetection's LoadProposals looks up.
    write_proposals(tmp_path / "b.pkl", make_set(), "mmdet3", IMAGES)
    content = pickle.loads((tmp_path / "b.pkl").read_bytes())
    assert list(content) == ["val/a.jpg", "val/b.jpg", "val/c.jpg"]
    assert content["val/a.jpg"]["bboxes"].shape == (4, 4)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_mmdetections_own_class(tmp_path, protocol, monkeypatch):
    """``InstanceData`` as mmengine 0.10 has it: private sets of names beside the fields."""
    module = types.ModuleType("mmengine.structures.instance_data")
    InstanceData = type("InstanceData", (), {"__module__": module.__name__})
    module.InstanceData = InstanceData
    for name in ("mmengine", "mmengine.structures", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    data = InstanceData()
    data._metainfo_fields, data._data_fields = set(), {"bboxes", "scores"}
    data.bboxes = np.array([[1, 2, 3, 4]], np.float32)
    data.scores = np.array([0.25], np.float32)
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps({"data/val/b.jpg": data}, protocol))
    result = read_proposals(path, IMAGES)
    assert result.format == "mmdet3" and result.image_ids == [8]
    assert result.boxes[0].tolist() == [[1, 2, 3, 4]] and result.scores[0].tolist() == [0.25]
    assert read_proposals(path).image_ids == ["data/val/b.jpg"]


def test_mmdetection_2_by_category_and_without_scores(tmp_path):
    row = np.array([[1, 2, 3, 4, 0.5]], np.float32)
    path = tmp_path / "proposals.pkl"
    content = [[row, np.zeros((0, 5), np.float32)], [row * 2, row], [row[:0], row[:0]]]
    path.write_bytes(pickle.dumps(content, 2))
    result = read_proposals(path, IMAGES)
    assert [len(x) for x in result.boxes] == [1, 2, 0]
    assert [fault.name for fault in result.faults] == ["category-ids"]
    path.write_bytes(pickle.dumps([row[:, :4], row[:0, :4], row[:, :4]], 2))
    assert [fault.name for fault in read_proposals(path, IMAGES).faults] == ["missing-scores"]
    with pytest.raises(ValueError, match="images have no ids, only the dataset's order"):
        read_proposals(path)
    path.write_bytes(pickle.dumps([row] * 2, 2))
    with pytest.raises(ValueError, match="it has 2 images without ids, the dataset has 3"):
        read_proposals(path, IMAGES)


def test_mmdetection_2_has_the_order_of_the_annotation_file(tmp_path):
    """Detectron2 has sorted the file's images."""
    images = DatasetImages([7, 8, 9], [""] * 3, [SIZE] * 3, ids_in_file=[9, "7", 8])
    original = make_set(with_masks=False)
    path = tmp_path / "proposals.pkl"
    write_proposals(path, original, "mmdet2", images)
    assert [len(rows) for rows in pickle.loads(path.read_bytes())] == [3, 4, 0]
    result = read_proposals(path, images)
    assert result.image_ids == [9, 7, 8]
    for boxes_i, index in zip(result.boxes, (2, 0, 1), strict=True):
        np.testing.assert_array_equal(boxes_i, original.boxes[index])
    images.ids_in_file = [7, 8, 5, 9]
    assert read_proposals(path, images).image_ids == [7, 8, 9]
    images.ids_in_file = ["of", "another", "file"]
    assert read_proposals(path, images).image_ids == [7, 8, 9]
    images.ids_in_file = [9, 7, 8, 5]
    with pytest.raises(ValueError, match="some images of its annotation file in another order"):
        read_proposals(path, images)
    with pytest.raises(ValueError, match="some images of its annotation file in another order"):
        write_proposals(path, original, "mmdet2", images)


def test_results_of_coco(tmp_path):
    """Entries in any order; boxes of masks; categories ignored and named."""
    mask = random_masks(1)[0]
    rle = {"size": mask["size"], "counts": mask["counts"].decode()}
    entries = [
        {"image_id": 8, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "segmentation": rle},
        {"image_id": 7, "category_id": 3, "score": 0.25, "segmentation": rle},
        {"image_id": 8, "category_id": 3, "score": 0.75, "segmentation": rle},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    result = read_proposals(path)
    assert result.image_ids == [8, 7] and result.format == "coco"
    assert result.boxes[0][0].tolist() == [1, 2, 4, 6]
    x, y, w, h = mask_util.toBbox(mask)
    assert result.boxes[1].tolist() == [[x, y, x + w, y + h]]
    assert result.scores[0].tolist() == [0.5, 0.75] and result.masks[0] == [mask, mask]
    assert [fault.name for fault in result.faults] == ["category-ids"]
    uncompressed = {"size": [2, 3], "counts": [1, 2, 3]}
    path.write_text(json.dumps([{"image_id": "a", "score": 1, "segmentation": uncompressed}]))
    decoded = mask_util.decode(read_proposals(path).masks[0][0])
    assert decoded.T.tolist() == [[0, 1], [1, 0], [0, 0]]


def test_automatic_masks_of_segment_anything(tmp_path):
    masks = random_masks(2)
    entries = [
        {
            "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
            "bbox": [0, 0, 1, 1],
            "predicted_iou": score,
            "stability_score": 0.9,
        }
        for mask, score in zip(masks, (0.5, 1.02), strict=True)
    ]
    folder = tmp_path / "sam"
    folder.mkdir()
    (folder / "b.json").write_text(json.dumps(entries))
    (folder / "c.json").write_text("[]")
    result = read_proposals(folder, IMAGES)
    assert result.format == "sam" and result.image_ids == [8, 9]
    assert result.scores[0].tolist() == [0.5, 1.02] and result.masks == [masks, []]
    # The masks' boxes, not those of the file.
    x, y, w, h = mask_util.toBbox(masks[0])
    assert result.boxes[0][0].tolist() == [x, y, x + w, y + h]
    assert read_proposals(folder / "b.json").image_ids == ["b"]
    # The list is empty where nothing was found, be the image known or not.
    (folder / "d.json").write_text("[]")
    result = read_proposals(folder)
    assert result.image_ids == ["b", "c", "d"] and result.masks == [masks, [], []]
    assert [boxes_i.shape for boxes_i in result.boxes] == [(2, 4), (0, 4), (0, 4)]
    assert read_proposals(folder, IMAGES).image_ids == [8, 9, "d"]
    (folder / "d.json").write_text(json.dumps([{"image_id": 1, "bbox": [1, 2, 3, 4]}]))
    with pytest.raises(ValueError, match="d.json in a folder of Segment-Anything's files is not"):
        read_proposals(folder)
    (folder / "d.json").unlink()
    sa1b = {"image": {"file_name": "c.jpg", "image_id": 3}, "annotations": entries}
    (tmp_path / "sa_3.json").write_text(json.dumps(sa1b))
    assert read_proposals(tmp_path / "sa_3.json", IMAGES).image_ids == [9]
    del entries[0]["predicted_iou"], entries[1]["predicted_iou"], entries[1]["stability_score"]
    (folder / "b.json").write_text(json.dumps(entries))
    result = read_proposals(folder, IMAGES)
    assert result.scores[0].tolist() == [0.9, 0] and result.faults[0].name == "missing-scores"


def test_file_names_that_tell_nothing():
    images = DatasetImages([1, 2, 3], ["x/a.jpg", "y/a.jpg", ""], [None] * 3)
    assert images.find("data/x/a.jpg") == 1 and images.find("y\\a.jpg") == 2
    assert images.find("a.jpg") is None and images.find("b") is None and images.find("") is None


def test_scores_between_logits_and_probabilities():
    logits = make_set(with_masks=False)
    extreme = ProposalSet("d2proposals", [1], [np.zeros((3, 4), np.float32)],
                          [np.array([800.0, 0, -800])], scores_are_logits=True)  # fmt: skip
    assert extreme.probabilities()[0].tolist() == [1, 0.5, 0]
    back = ProposalSet("coco", [1], extreme.boxes, extreme.probabilities())
    assert np.isfinite(back.logits()[0]).all() and back.logits()[0][1] == 0
    unknown = ProposalSet("sam", [1], extreme.boxes, [np.array([1.02, 0.5, 0.1])])
    assert unknown.logits()[0].tolist() == [1.02, 0.5, 0.1]
    assert logits.logits() is logits.scores


def test_merging_dropping_and_reinterpreting():
    boxes = [np.array([[1, 2, 3, 4], [5, 6, 4, 9]], np.float32), np.ones((1, 4), np.float32)]
    proposals = ProposalSet("mmdet3", [8, "8"], boxes, [np.array([0.1, 0.9]), np.array([0.5])])
    merged = merge_images(proposals, IMAGES)
    assert merged.image_ids == [7, 8, 9] and merged.scores[1].tolist() == [0.9, 0.5, 0.1]
    assert merged.boxes[1][0].tolist() == [5, 6, 4, 9] and merged.boxes[0].shape == (0, 4)
    dropped = drop_proposals(merged, 1, unusable=True)
    assert dropped.scores[1].tolist() == [0.5]
    reinterpret_boxes(proposals, "xyxy")
    assert proposals.boxes[0][0].tolist() == [1, 2, 3, 4]
    reinterpret_boxes(proposals, "xywh")
    assert proposals.boxes[0][0].tolist() == [1, 2, 4, 6]
    coco = ProposalSet("coco", [1], [np.array([[1, 2, 4, 6]], np.float32)], [np.zeros(1)])
    reinterpret_boxes(coco, "xyxy")
    assert coco.boxes[0][0].tolist() == [1, 2, 3, 4]


def test_writers_refuse_what_they_cannot_hold(tmp_path):
    path = tmp_path / "out"
    nan = make_set(with_masks=False)
    nan.boxes[0][0, 0] = np.nan
    for format_name in ("coco", "d2proposals"):
        with pytest.raises(ValueError, match="image 7 has a box or a score that is not finite"):
            write_proposals(path, nan, format_name)
    with pytest.raises(ValueError, match="there is no format 'coc'; known: detectron2, coco"):
        write_proposals(path, nan, "coc")
    with pytest.raises(ValueError, match="mmdet2 is in the dataset's order; name it"):
        write_proposals(path, make_set(), "mmdet2")
    frames = [f"video{k}/frames/1.jpg" for k in (1, 2)] + ["frames/2.jpg"]
    images = DatasetImages([7, 8, 9], frames, [SIZE] * 3)
    with pytest.raises(ValueError, match="several images have the same: frames/1.jpg$"):
        write_proposals(path, make_set(), "mmdet3", images)
    other = make_set()
    other.image_ids[0] = "x"
    with pytest.raises(ValueError, match="1 images are not in the dataset.*: x"):
        write_proposals(path, other, "mmdet2", IMAGES)
    other.image_ids[0] = 9
    with pytest.raises(ValueError, match="an image id occurs more than once"):
        write_proposals(path, other, "coco")
    path.write_text("here")
    with pytest.raises(ValueError, match="out exists; give the name of a new folder"):
        write_proposals(path, make_set(), "sam", IMAGES)
    with pytest.raises(OSError, match="out cannot be written"):
        write_proposals(path / "of", make_set(), "sam", IMAGES)
    assert path.read_text() == "here" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [(1, 1), (40, 50), (300, 7)])
def test_encodings_of_pycocotools_pass(size):
    generator = np.random.default_rng(0)
    bitmaps = generator.random((*size, 20)) > generator.random(20)
    bitmaps[..., 0], bitmaps[..., 1] = False, True
    encodings = mask_util.encode(np.asfortranarray(bitmaps, np.uint8))
    check_encodings(encodings)
    assert make_encodings([m["counts"].decode() for m in encodings], [size] * 20) == encodings
    lists = [np.diff(np.flatnonzero(np.diff(np.r_[2, b.T.ravel(), 2]))).tolist()
             for b in bitmaps.transpose(2, 0, 1)]  # fmt: skip
    starts_set = bitmaps[0, 0]
    lists = [[0, *runs] if starts else runs for runs, starts in zip(lists, starts_set, strict=True)]
    assert make_encodings(lists, [size] * 20) == encodings


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("", "not of pycocotools' form"),
        ("é", "must be text or a list"),
        ("4 ", "not of pycocotools' form"),
        ("4P", "cut off"),
        ("P" * 9 + "0", "more than 32 bits"),
        ("5", "fill 5 pixels instead of its 2 x 2"),
        ("O", "negative length"),
        ([1, 2], "do not fill"),
        ([-1, 5], "lengths of runs"),
        ([4.0], "lengths of runs"),
        (None, "must be text or a list"),
    ],
)
def test_encodings_that_pycocotools_must_not_see(counts, message):
    with pytest.raises(ValueError, match=message):
        make_encodings([counts], [(2, 2)])
    with pytest.raises(ValueError, match=message):
        make_encodings(["4", counts, "4"], [(2, 2)] * 3)


def test_many_encodings_are_checked_in_little_memory():
    """Three megabytes of them, of which the last is wrong; at once, they would take 300."""
    bitmap = np.random.default_rng(0).random((100, 100)) > 0.5
    mask = mask_util.encode(np.asfortranarray(bitmap, np.uint8))
    encodings = [mask] * (3_000_000 // len(mask["counts"]))
    check_encodings(encodings)
    tracemalloc.start()
    with pytest.raises(ValueError, match="fill 10000 pixels instead of its 100 x 101"):
        check_encodings([*encodings, {**mask, "size": [100, 101]}])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30_000_000
    check_encodings([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [], "annotations": []}, "looks like a file of annotations"),
        (
            {
                "images": [{"id": 1}],
                "annotations": [
                    {"image_id": 1, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3, 4, 5, 6]]}
                ] * 2,
                "categories": [],
            },
            "looks like a file of annotations",
        ),
        ({"results": [{"image_id": 1, "bbox": [1, 2, 3]}]}, "bbox of entry 0 must be four"),
        ({"a": 1}, "none of the known formats"),
        ([1, 2], "none of the known formats"),
        ([{"image_id": 1, "bbox": [1, 2, 3], "score": 1}], "bbox of entry 0 must be four numbers"),
        ([{"image_id": 1, "bbox": [1, 2, 3, "4"]}], "bbox of entry 0 must be four numbers"),
        ([{"image_id": 1, "bbox": [1, 2, 3, 4], "score": "high"}], "score of entry 0 must"),
        ([{"image_id": [1], "bbox": [1, 2, 3, 4]}], "image_id is an integer or text, not list"),
        ([{"image_id": 1, "segmentation": [[1, 2, 3, 4]]}], "no run-length encoding"),
        ([{"image_id": 1, "segmentation": {"size": [2], "counts": "4"}}], "size of a mask"),
        ([{"image_id": 1, "segmentation": {"size": [2, 2], "counts": "5"}}], "fill 5 pixels"),
        ([{"image_id": 1, "bbox": [1, 2, 3, 4]}, 5], "1 of 2 items of the list are no results"),
        (
            [{"image_id": 1, "category_id": 1, "score": 0.5}],
            "a result has neither 'bbox' nor 'segmentation'",
        ),
        ([{"segmentation": {"size": [2, 2], "counts": "4"}, "predicted_iou": "a"}], "not a number"),
        ([{"segmentation": [[True]], "predicted_iou": 1}], "--convert-to-rle"),
        ({"format": "d2proposals", "version": 2}, "of version 2, not 1"),
        ({"format": "d2proposals", "version": 1}, "must be a list with an object per image"),
        (
            {"format": "d2proposals", "version": 1, "proposals": [{"image_id": 1, "boxes": [[1]]}]},
            "image 1 needs 'boxes', rows of four numbers",
        ),
        (
            {"format": "d2proposals", "version": 1,
             "proposals": [{"image_id": 1, "boxes": [], "objectness_logits": [1]}]},
            "as many numbers as logits as boxes",
        ),
    ],
)  # fmt: skip
def test_wrong_json_is_named(tmp_path, content, message):
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        read_proposals(path)
    assert "\n" not in str(error.value) and "proposals.json" in str(error.value)


def test_missing_empty_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no proposal file at"):
        read_proposals(tmp_path / "none")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty is empty"):
        read_proposals(tmp_path / "empty")
    with pytest.raises(ValueError, match="folder without JSON files"):
        read_proposals(tmp_path)
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested without end|truncated or damaged"):
        read_proposals(tmp_path / "deep")
    (tmp_path / "number.pkl").write_bytes(pickle.dumps(5))
    with pytest.raises(ValueError, match="it holds a int; known formats"):
        read_proposals(tmp_path / "number.pkl")
