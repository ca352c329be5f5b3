"""Tests of detectors' results in pickles, of tensors in them, and of files of torch.save."""

import gzip
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from d2proposals.files.conversion import read_proposals
from d2proposals.files.proposal_set import DatasetImages
from d2proposals.files.safe_pickle import load_pickle, load_with_tensors, to_plain

IMAGES = DatasetImages([7, 8], ["val/a.jpg", "val/b.jpg"], [(4, 6)] * 2)
BITMAP = np.zeros((4, 6), bool)
BITMAP[1:3, 1:4] = True
MASK = mask_util.encode(np.asfortranarray(BITMAP, np.uint8))
ROWS = np.array([[1, 1, 4, 3, 0.5], [0, 0, 2, 2, 0.25]], np.float32)


def dump(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def save(path, content, is_archive=True):
    torch.save(content, path, _use_new_zipfile_serialization=is_archive)
    return path


def mmdet3_results(as_array, with_masks=False):
    """Two images in the other order than the dataset's, and ids that count from 0."""
    found = {
        "bboxes": as_array(ROWS[:, :4]),
        "scores": as_array(ROWS[:, 4]),
        "labels": as_array(np.array([3, 3])),
    }
    if with_masks:
        found["masks"] = [MASK, MASK]
    nothing = {name: as_array(np.zeros((0, 4) if name == "bboxes" else 0)) for name in found}
    return [
        {"img_id": 0, "img_path": "data/val/b.jpg", "ori_shape": (4, 6), "pred_instances": found},
        {
            "img_id": 1,
            "img_path": "data/val/a.jpg",
            "ori_shape": (4, 6),
            "pred_instances": nothing,
        },
    ]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["arrays", "tensors"])
def test_mmdetection_3_results(tmp_path, as_array, protocol):
    path = dump(tmp_path / "out.pkl", mmdet3_results(as_array), protocol)
    result = read_proposals(path, IMAGES)
    assert result.format == "mmdet3" and result.image_ids == [8, 7] and result.faults == []
    np.testing.assert_array_equal(result.boxes[0], ROWS[:, :4])
    assert result.scores[0].tolist() == [0.5, 0.25] and len(result.boxes[1]) == 0
    assert read_proposals(path).image_ids == [0, 1]


def test_mmdetection_3_results_with_masks_and_classes(tmp_path):
    content = mmdet3_results(np.asarray, with_masks=True)
    content[1]["pred_instances"]["masks"] = []
    content[0]["pred_instances"]["labels"] = np.array([3, 4])
    result = read_proposals(dump(tmp_path / "out.pkl", content), IMAGES)
    assert result.masks == [[MASK, MASK], []]
    assert [fault.name for fault in result.faults] == ["category-ids"]
    content[0]["pred_instances"]["masks"] = torch.as_tensor(BITMAP)[None]
    with pytest.raises(ValueError, match="image 8 has 2 boxes but 1 masks"):
        read_proposals(dump(tmp_path / "out.pkl", content), IMAGES)
    del content[0]["pred_instances"]["masks"]
    with pytest.raises(ValueError, match="image 8 has no masks, but others do"):
        read_proposals(dump(tmp_path / "out.pkl", content), IMAGES)


@pytest.mark.parametrize("masks", [[[MASK], [MASK]], ([[MASK], [MASK]], [[0.1], [0.2]])])
def test_mmdetection_2_results_with_masks(tmp_path, masks):
    """A tuple of boxes and masks by class; Mask Scoring R-CNN's masks have scores of their own."""
    content = [([ROWS[:1], ROWS[1:]], masks), ([ROWS[:0], ROWS[:0]], [[], []])]
    result = read_proposals(dump(tmp_path / "out.pkl", content), IMAGES)
    assert result.format == "mmdet2" and result.image_ids == [7, 8]
    assert result.masks == [[MASK, MASK], []]
    np.testing.assert_array_equal(result.boxes[0], ROWS[:, :4])
    assert [fault.name for fault in result.faults] == ["category-ids"]


@pytest.mark.parametrize("is_archive", [True, False])
def test_detectron2_predictions(tmp_path, is_archive):
    rle = {"size": [4, 6], "counts": MASK["counts"].decode()}
    entry = {"image_id": 8, "category_id": 2, "bbox": [1, 1, 3, 2], "score": 0.5}
    content = [{"image_id": 8, "instances": [{**entry, "segmentation": rle}]},
               {"image_id": 7, "instances": []}]  # fmt: skip
    result = read_proposals(save(tmp_path / "instances_predictions.pth", content, is_archive))
    assert result.format == "coco" and result.image_ids == [8, 7]
    assert result.boxes[0].tolist() == [[1, 1, 4, 3]] and result.masks == [[MASK], []]
    content = [{"image_id": image_id, "instances": []} for image_id in (8, 7)]
    result = read_proposals(save(tmp_path / "instances_predictions.pth", content, is_archive))
    assert result.image_ids == [8, 7] and [x.shape for x in result.boxes] == [(0, 4)] * 2
    assert [x.shape for x in result.scores] == [(0,)] * 2 and result.masks is None
    proposals = Instances((4, 6))
    proposals.proposal_boxes = Boxes(torch.as_tensor(ROWS[:, :4]))
    proposals.objectness_logits = torch.tensor([2.0, -1.0])
    content = [{"image_id": 7, "proposals": proposals}]
    result = read_proposals(save(tmp_path / "instances_predictions.pth", content, is_archive))
    assert result.format == "detectron2" and result.scores_are_logits
    np.testing.assert_array_equal(result.boxes[0], ROWS[:, :4])
    assert result.scores[0].tolist() == [2, -1]


def test_results_of_coco_in_a_pickle(tmp_path):
    entries = [
        {"image_id": np.int64(8), "bbox": np.array([1, 1, 3, 2.0]), "score": np.float32(0.5),
         "segmentation": MASK},
        {"image_id": 8.0, "bbox": (1, 1, 3, 2), "score": 0.25, "segmentation": BITMAP},
    ]  # fmt: skip
    entries[1]["bbox"] = [1, 1, 3, 2]
    result = read_proposals(dump(tmp_path / "coco.pkl", entries))
    assert result.format == "coco" and result.image_ids == [8]
    assert result.boxes[0].tolist() == [[1, 1, 4, 3]] * 2 and result.masks == [[MASK, MASK]]
    entries = [{"segmentation": BITMAP, "predicted_iou": np.float64(0.5), "area": 6}]
    result = read_proposals(dump(tmp_path / "b.pkl", entries), IMAGES)
    assert result.format == "sam" and result.image_ids == [8] and result.masks == [[MASK]]
    with pytest.raises(ValueError, match="dictionaries of an unknown kind.* has a, b"):
        read_proposals(dump(tmp_path / "b.pkl", [{"a": 1, "b": 2}]), IMAGES)


def test_files_without_scores_and_with_whole_floats_as_ids(tmp_path):
    content = {"indexes": [7.0, 8], "boxes": [ROWS[:, :4], ROWS[:1, :4]], "scores": [None, None]}
    result = read_proposals(dump(tmp_path / "a.pkl", content))
    assert result.image_ids == [7, 8] and [x.tolist() for x in result.scores] == [[0, 0], [0]]
    assert result.faults[0].message.startswith("3 of 3 proposals have no score")


def test_lines_of_json_and_gzip(tmp_path):
    entries = [{"image_id": image_id, "bbox": [1, 1, 3, 2], "score": 0.5} for image_id in (8, 7)]
    lines = "\n".join(map(json.dumps, entries)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    assert read_proposals(tmp_path / "a.jsonl").image_ids == [8, 7]
    for name, content in [
        ("a.json.gz", json.dumps(entries).encode()),
        ("a.jsonl.gz", lines.encode()),
        ("a.pkl.gz", pickle.dumps(mmdet3_results(torch.as_tensor))),
        ("a.pth.gz", save(tmp_path / "a.pth", mmdet3_results(np.asarray)).read_bytes()),
    ]:
        (tmp_path / name).write_bytes(gzip.compress(content))
        assert read_proposals(tmp_path / name, IMAGES).image_ids == [8, 7], name
    whole = (tmp_path / "a.pkl.gz").read_bytes()
    for damaged in (whole[:-20], whole[:30] + b"xx" + whole[32:]):
        (tmp_path / "a.pkl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="a.pkl.gz is truncated or damaged gzip"):
            read_proposals(tmp_path / "a.pkl.gz")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(ValueError, match="a JSON value on each line, but these are no COCO"):
        read_proposals(tmp_path / "a.jsonl")


def test_tensors_of_all_kinds_are_read_as_torch_has_them():
    """Views, types and shared storages, in a pickle and in both files of torch.save."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "view": base[1:3, ::2],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "long": base.long(),
        "bool": base > 3,
        "byte": base.byte(),
        "number": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base),
    }
    files = [io.BytesIO(pickle.dumps(tensors, protocol)) for protocol in (2, 4, 5)]
    for is_archive in (True, False):
        files.append(io.BytesIO())
        torch.save(tensors, files[-1], _use_new_zipfile_serialization=is_archive)
    for file in files:
        file.seek(0)
        content = load_with_tensors(file, "a.pth")
        assert content.keys() == tensors.keys()
        for name, tensor in tensors.items():
            expected = tensor.detach()
            expected = expected.float() if name == "bfloat16" else expected
            found = to_plain(content[name])
            assert found.dtype == expected.numpy().dtype and found.shape == expected.shape, name
            np.testing.assert_array_equal(found, expected.numpy())


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("never",)


@pytest.mark.parametrize("is_archive", [True, False])
def test_files_of_torch_run_no_code(tmp_path, monkeypatch, is_archive):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.pth", [{"image_id": 7, "instances": [_Runs()]}], is_archive)
    with pytest.raises(ValueError, match="it contains the name posix.mkdir"):
        read_proposals("a.pth")
    assert not (tmp_path / "never").exists()


def test_hostile_and_cut_off_tensors(tmp_path):
    repeated = torch.zeros(1).expand(1 << 30)
    content = mmdet3_results(torch.as_tensor)
    content[0]["pred_instances"]["bboxes"] = repeated
    with pytest.raises(ValueError, match="a tensor of more numbers than its storage has"):
        read_proposals(dump(tmp_path / "a.pkl", content))
    whole = save(tmp_path / "a.pth", mmdet3_results(torch.as_tensor), False).read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="a.pth is truncated, damaged"):
        read_proposals(tmp_path / "a.pth")
    whole = save(tmp_path / "a.pth", mmdet3_results(torch.as_tensor)).read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="a.pth is truncated"):
        read_proposals(tmp_path / "a.pth")
    # What Detectron2 itself unpickles for training must have no tensors.
    with pytest.raises(ValueError, match="the name torch._utils._rebuild_tensor_v2"):
        load_pickle(dump(tmp_path / "a.pkl", mmdet3_results(torch.as_tensor)))


def write_npz(path):
    np.savez(path, boxes=ROWS)
    os.replace(f"{path}.npz", path)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("results/a.json", "[]")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_npz, "an archive of NumPy .*write COCO results"),
        (lambda path: np.save(open(path, "wb"), ROWS), "one array of NumPy"),
        (lambda path: path.write_text("image_id,x1,y1,x2,y2\n1,0,0,1,1\n"), "a table of text"),
        (lambda path: path.write_text("7\t0\t1\n"), "a table of text"),
        (lambda path: path.write_text("0 0.5 0.5 0.2 0.2\n"), "perhaps YOLO's labels"),
        (lambda path: path.write_text("<annotation>\n</annotation>"), "PASCAL VOC"),
        (lambda path: path.write_bytes(b"MATLAB 5.0 MAT-file, Platform"), "a file of MATLAB"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)), "an HDF5 file"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), "an image"),
        (lambda path: path.write_bytes(b"BZh91AY&SY" + bytes(50)), "compressed by bzip2"),
        (write_zip, "a ZIP archive, but not one of torch.save"),
    ],
)
def test_what_is_not_read_is_named_and_never_called_damaged(tmp_path, write, message):
    path = tmp_path / "proposals"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        read_proposals(path, IMAGES)
    line = str(error.value)
    assert "damaged" not in line and "\n" not in line and str(path) in line


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["7/0.png", "7/metadata.csv"], "Segment-Anything's masks as PNG .*--convert-to-rle"),
        (["a.txt", "b.txt"], "a folder of text files"),
        (["a.jpg"], "without JSON files"),
        ([], "without JSON files"),
    ],
)
def test_folders_that_are_not_read_are_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        read_proposals(tmp_path)
