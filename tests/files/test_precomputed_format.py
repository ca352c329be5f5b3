"""Tests of the file of precomputed proposals and of atomic writing."""

import json
import os
import pickle
import stat

import numpy as np
import pytest
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import BoxMode

from d2proposals.files.atomic_files import atomic_write, write_json
from d2proposals.files.precomputed_format import read_proposal_file, write_proposal_file

BOXES = np.array([[1, 2, 11, 22], [0, 0, 5, 5]], np.float32)
LOGITS = np.array([2.5, -1], np.float32)
EMPTY = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


def write_pickle(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def test_round_trip_with_an_empty_image(tmp_path):
    path = tmp_path / "folder" / "proposals.pkl"
    write_proposal_file(path, [7, "eight"], [BOXES, EMPTY[0]], [LOGITS, EMPTY[1]])
    ids, boxes, logits = read_proposal_file(path)
    assert ids == [7, "eight"]
    np.testing.assert_array_equal(boxes[0], BOXES)
    np.testing.assert_array_equal(logits[0], LOGITS)
    assert boxes[1].shape == (0, 4) and boxes[1].dtype == np.float32
    assert logits[1].shape == (0,) and logits[1].dtype == np.float32


def test_detectron2_loads_the_file(tmp_path):
    path = tmp_path / "proposals.pkl"
    write_proposal_file(path, [7, 8], [BOXES[::-1], []], [LOGITS[::-1], []])
    records = load_proposals_into_dataset([{"image_id": 8}, {"image_id": 7}], str(path))
    assert records[0]["proposal_boxes"].shape == (0, 4)
    assert records[0]["proposal_objectness_logits"].shape == (0,)
    np.testing.assert_array_equal(records[1]["proposal_boxes"], BOXES)
    assert records[1]["proposal_bbox_mode"] == BoxMode.XYXY_ABS


def test_detectron2_keeps_the_order_of_equal_logits(tmp_path):
    """It sorts by ``argsort()[::-1]``, which reverses them, and cuts the worst off."""
    logits = np.array([0.5, 2, 0.5, 0.5, np.inf, 2, -np.inf, np.nan], np.float32)
    boxes = np.arange(32, dtype=np.float32).reshape(8, 4)
    path = tmp_path / "proposals.pkl"
    write_proposal_file(path, [7, 8], [boxes, boxes[:4]], [logits, np.zeros(4)])
    written, zeros = read_proposal_file(path).objectness_logits
    np.testing.assert_allclose(written, logits, rtol=3e-7)
    assert (-1e-40 < zeros).all() and (zeros <= 0).all()
    records = load_proposals_into_dataset([{"image_id": 8}], str(path))
    np.testing.assert_array_equal(records[0]["proposal_boxes"], boxes[:4])
    write_proposal_file(path, [7], [boxes[:7]], [logits[:7]])
    records = load_proposals_into_dataset([{"image_id": 7}], str(path))
    np.testing.assert_array_equal(records[0]["proposal_boxes"], boxes[[4, 1, 5, 0, 2, 3, 6]])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ">f4", np.int32])
def test_reader_takes_arrays_of_every_protocol_and_type(tmp_path, protocol, dtype):
    content = {
        "ids": np.array([3, 4]),
        "boxes": [np.asfortranarray(BOXES.astype(dtype)), np.zeros((0, 4), dtype)],
        "objectness_logits": [LOGITS.astype(dtype), np.zeros(0, dtype)],
        "bbox_mode": BoxMode.XYXY_ABS,
    }
    ids, boxes, logits = read_proposal_file(write_pickle(tmp_path / "a.pkl", content, protocol))
    assert ids == [3, 4] and type(ids[0]) is int
    np.testing.assert_array_equal(boxes[0], BOXES)
    np.testing.assert_array_equal(logits[0], LOGITS.astype(dtype).astype(np.float32))


class _ByName:
    """Is stored as the attribute of a class, as some versions of Python store enumerations."""

    def __init__(self, cls, name):
        self.reduced = (getattr, (cls, name))

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_reader_takes_a_box_mode_by_name_and_no_other_attribute(tmp_path, protocol):
    content = {"ids": [3], "boxes": [BOXES], "objectness_logits": [LOGITS]}
    by_name = {**content, "bbox_mode": _ByName(BoxMode, "XYXY_ABS")}
    ids, boxes, _ = read_proposal_file(write_pickle(tmp_path / "a.pkl", by_name, protocol))
    assert ids == [3] and np.array_equal(boxes[0], BOXES)
    for cls, name in ((BoxMode, "convert"), (np.ndarray, "tofile"), (BoxMode, "__class__")):
        path = write_pickle(tmp_path / "b.pkl", {**content, "bbox_mode": _ByName(cls, name)})
        with pytest.raises(ValueError, match="an attribute of something other than BoxMode"):
            read_proposal_file(path)


def test_reader_takes_scalars_old_names_and_xywh(tmp_path):
    content = {
        "indexes": [np.int64(3)],
        "boxes": [BOXES],
        "scores": [LOGITS[:, None]],
        "bbox_mode": BoxMode.XYWH_ABS.value,
    }
    ids, boxes, logits = read_proposal_file(write_pickle(tmp_path / "a.pkl", content))
    assert ids == [3]
    np.testing.assert_array_equal(boxes[0], [[1, 2, 12, 24], [0, 0, 5, 5]])
    np.testing.assert_array_equal(logits[0], LOGITS)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no proposal file at .*nothing.pkl"):
        read_proposal_file(tmp_path / "nothing.pkl")


def test_truncated_file_gives_one_line(tmp_path):
    path = tmp_path / "a.pkl"
    write_proposal_file(path, [1], [BOXES], [LOGITS])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a.pkl") as error:
            read_proposal_file(path)
        assert "\n" not in str(error.value)


class RunsCode:
    """Unpickled without care, this makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("key", ["ids", "boxes", "unused"])
def test_hostile_file_does_not_run(tmp_path, key):
    folder = tmp_path / "made"
    content = {"ids": [], "boxes": [], "objectness_logits": [], key: RunsCode(str(folder))}
    with pytest.raises(ValueError, match=r"a\.pkl is not read.*mkdir.*could run code"):
        read_proposal_file(write_pickle(tmp_path / "a.pkl", content))
    assert not folder.exists()


def test_arrays_of_objects_are_lists_and_structures_are_refused(tmp_path):
    of_arrays = np.empty(1, object)
    of_arrays[0] = BOXES
    content = {"ids": np.array([1]), "boxes": of_arrays, "objectness_logits": [LOGITS]}
    np.testing.assert_array_equal(
        read_proposal_file(write_pickle(tmp_path / "a.pkl", content)).boxes[0], BOXES
    )
    content["boxes"] = np.array([[None]])
    with pytest.raises(ValueError, match="an array of objects that is no list of them"):
        read_proposal_file(write_pickle(tmp_path / "a.pkl", content))
    content["boxes"] = [np.array([None])]
    with pytest.raises(ValueError, match="numbers were expected"):
        read_proposal_file(write_pickle(tmp_path / "a.pkl", content))
    structured = np.zeros(1, [("pointer", object)])
    content["boxes"] = [structured]
    with pytest.raises(ValueError, match="an array of the type V8"):
        read_proposal_file(write_pickle(tmp_path / "a.pkl", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is not a proposal file: it holds a list"),
        ({"ids": []}, "it lacks boxes, objectness_logits"),
        ({"ids": [1], "boxes": [], "objectness_logits": []}, "1 ids, 0 arrays of boxes and 0"),
        (
            {"ids": [1], "boxes": [BOXES], "objectness_logits": [LOGITS[:1]]},
            "image 1 has 2 boxes but 1 objectness logits",
        ),
        (
            {"ids": [1, "1"], "boxes": [BOXES] * 2, "objectness_logits": [LOGITS] * 2},
            "occurs more than once",
        ),
        ({"ids": [1], "boxes": [BOXES[:, :3]], "objectness_logits": [LOGITS]}, "is not a proposal"),
        ({"ids": [1], "boxes": [BOXES[0]], "objectness_logits": [LOGITS]}, r"not \(R, 4\)"),
        ({"ids": [1], "boxes": ["text"], "objectness_logits": [LOGITS]}, "numbers were expected"),
        ({"ids": [1.5], "boxes": [BOXES], "objectness_logits": [LOGITS]}, "image id is an integer"),
        ({"ids": 1, "boxes": [BOXES], "objectness_logits": [LOGITS]}, "a list was expected"),
        (
            {"ids": [1], "boxes": [BOXES], "objectness_logits": [LOGITS], "bbox_mode": 99},
            "99 is not a valid BoxMode",
        ),
        (
            {"ids": [1], "boxes": [BOXES], "objectness_logits": [LOGITS], "bbox_mode": 2},
            "is not a proposal file: Relative mode not yet supported",
        ),
    ],
)
def test_wrong_content_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_proposal_file(write_pickle(tmp_path / "a.pkl", content))
    assert "\n" not in str(error.value)


def test_writer_refuses_lists_that_do_not_belong_together(tmp_path):
    with pytest.raises(ValueError, match="2 ids, 1 arrays of boxes"):
        write_proposal_file(tmp_path / "a.pkl", [1, 2], [BOXES], [LOGITS])
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_replaces_and_follows_the_umask(tmp_path):
    path = tmp_path / "new" / "a.txt"
    old_umask = os.umask(0o022)
    try:
        for text in ("one", "two ü"):
            with atomic_write(path) as file:
                file.write(text)
    finally:
        os.umask(old_umask)
    assert path.read_text(encoding="utf-8") == "two ü"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(ValueError, match="modes"), atomic_write(path, "a"):
        pass


def test_json_is_standard(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1.5, None]})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
