"""Tests of the command that measures files of proposals, and of the one that converts them."""

import csv
import io
import json
import os
import pickle
import pickletools
import random
import re
import runpy
import shlex
import signal
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from d2proposals.engine import bad_input_in_one_line
from d2proposals.evaluation.ground_truth import encode_segmentation, load_ground_truth
from d2proposals.evaluation.proposal_runs import read_run
from d2proposals.files.annotation_file import VOC_CATEGORIES, register_annotation_file
from d2proposals.files.conversion import FORMATS, read_proposals, write_proposals
from d2proposals.files.proposal_set import ProposalSet
from tests.files.test_conversion import random_masks

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZE = (40, 50)
NUM_MUTANTS = 2000


def load_tool(name):
    return runpy.run_path(str(TOOLS / f"{name}.py"))


EVALUATE = load_tool("evaluate_proposals")
CONVERT = load_tool("convert_proposals")


def evaluate(*arguments):
    """Standard output and error of the command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        EVALUATE["main"]([str(x) for x in arguments])
    return out.getvalue(), err.getvalue()


def stop_line(*arguments, main=EVALUATE["main"]):
    with pytest.raises(SystemExit) as stop, redirect_stderr(io.StringIO()):
        main([str(x) for x in arguments])
    line = str(stop.value)
    assert line.startswith("Error: ") and "\n" not in line
    return line


@pytest.fixture
def gt(tmp_path):
    """Three images with a small square and a large one each, of two categories."""
    boxes = [[2, 3, 10, 10], [20, 5, 25, 30]]
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for i in (1, 2, 3)
        ],
        "annotations": [
            {"id": 10 * i + j, "image_id": i, "bbox": box, "category_id": (3, 9)[j],
             "segmentation": [[box[0], box[1], box[0] + box[2], box[1], box[0] + box[2],
                               box[1] + box[3], box[0], box[1] + box[3]]]}
            for i in (1, 2, 3) for j, box in enumerate(boxes)
        ],
        "categories": categories,
    }  # fmt: skip
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(content))
    return path


def perfect(with_masks=True):
    """All objects, the small one first, and a stray box in the first image."""
    boxes = np.array([[2, 3, 12, 13], [20, 5, 45, 35]], np.float32)
    masks = [
        encode_segmentation([[x1, y1, x2, y1, x2, y2, x1, y2]], SIZE, 0)
        for x1, y1, x2, y2 in boxes.tolist()
    ]
    scores = np.array([2.0, 1.0])
    return ProposalSet("d2proposals", [1, 2, 3], [boxes] * 3, [scores] * 3,
                       [masks] * 3 if with_masks else None, True)  # fmt: skip


@pytest.fixture
def perfect_file(tmp_path):
    path = tmp_path / "perfect.json"
    write_proposals(path, perfect(), "d2proposals")
    return path


def measured(folder, run, task="box_proposals", subset="all"):
    content = json.loads((folder / "results.json").read_text())
    return content["runs"][run][task]["metrics_in_percent"][subset]


def test_several_files_side_by_side(gt, perfect_file, tmp_path):
    other = tmp_path / "worse.pkl"
    worse = perfect(with_masks=False)
    worse.boxes = [boxes_i[1:] for boxes_i in worse.boxes]
    worse.scores = [scores_i[1:] for scores_i in worse.scores]
    write_proposals(other, worse, "detectron2")
    folder = tmp_path / "results"
    out, err = evaluate("--gt", gt, "--proposals", perfect_file, f"one={other}",
                        "--limits", 1, 100, "--output", folder)  # fmt: skip
    assert "warning" not in err and "perfect.json: d2proposals, 6 proposals" in err
    assert re.search(r"^\| measure +\| +perfect.json \| +one \|$", out, re.MULTILINE)
    assert "Boxes, in percent (6 all, 6 small, 0 medium, 0 large objects)" in out
    assert "Masks, in percent" in out
    metrics = measured(folder, "perfect.json")
    assert metrics["AR@1"] == 50 and metrics["AR@100"] == 100 and metrics["ARs@100"] == 100
    assert "ARl@100" not in metrics
    assert measured(folder, "one")["AR@100"] == 50
    assert measured(folder, "perfect.json", "mask_proposals")["AR@100"] == 100
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert {"run": "one", "task": "box_all", "measure": "AR@100", "percent": "50.000000"} in rows
    content = json.loads((folder / "results.json").read_text())
    assert "mask_proposals" not in content["runs"]["one"]
    for kind in ("box", "mask"):
        with Image.open(folder / f"{kind}_curves.png") as picture:
            assert picture.format == "PNG" and min(picture.size) > 800
    assert sorted(x.name for x in folder.iterdir()) == [
        "box_curves.png", "mask_curves.png", "results.csv", "results.json",
    ]  # fmt: skip


def test_unseen_categories(gt, tmp_path):
    """Of two proposals the first is on the seen object: it leaves the budget of one."""
    path = tmp_path / "a.json"
    write_proposals(path, perfect(), "d2proposals")
    folder = tmp_path / "results"
    out, _ = evaluate("--gt", gt, "--proposals", path, "--limits", 1, 2, "--unseen", "dog",
                      "--output", folder)  # fmt: skip
    assert "Boxes of unseen categories, proposals on seen objects outside of the budget" in out
    for task in ("box_proposals", "mask_proposals"):
        assert measured(folder, "a.json", task)["AR@1"] == 50
        assert measured(folder, "a.json", task, "seen")["AR@1"] == 100
        assert measured(folder, "a.json", task, "unseen")["AR@1"] == 0
        assert measured(folder, "a.json", task, "unseen")["AR@2"] == 100
        assert measured(folder, "a.json", task, "unseen_budget")["AR@1"] == 100
    reverse, _ = evaluate("--gt", gt, "--proposals", path, "--limits", 1, 2, "--seen", "cat")
    assert reverse == out.split("\n\n" + str(folder))[0] + "\n"
    line = stop_line("--gt", gt, "--proposals", path, "--unseen", "bird")
    assert "no category 'bird'; it has cat, dog" in line
    line = stop_line("--gt", gt, "--proposals", path, "--unseen", "dog", "cat")
    assert "all of the dataset's objects are of unseen categories" in line
    line = stop_line("--gt", gt, "--proposals", path, "--seen", "voc")
    assert "'voc' needs COCO's categories; 'airplane'" in line


def spoiled(name):
    """Perfect proposals with one thing wrong; where the format matters, in that format."""
    proposals, format_name = perfect(with_masks=False), "d2proposals"
    boxes = [boxes_i.copy() for boxes_i in proposals.boxes]
    scores = [scores_i.copy() for scores_i in proposals.scores]
    ids = list(proposals.image_ids)
    if name == "not-finite":
        boxes[0][0, 1], format_name = np.nan, "detectron2"
    elif name == "negative-side":
        boxes[0][0] = boxes[0][0][[2, 3, 0, 1]]
    elif name == "outside":
        boxes[1][1] *= 3
    elif name == "relative":
        boxes = [boxes_i / 50 for boxes_i in boxes]
    elif name == "unknown-images":
        ids, boxes, scores = [*ids, 77], [*boxes, boxes[0]], [*scores, scores[0]]
    elif name == "missing-images":
        del ids[0], boxes[0], scores[0]
    elif name == "empty-images":
        boxes[2], scores[2] = boxes[2][:0], scores[2][:0]
    elif name == "unsorted-scores":
        scores[0] = scores[0][::-1]
    elif name == "duplicate-proposals":
        boxes[0][1] = boxes[0][0]
    elif name == "small-extent":
        corner = np.random.default_rng(0).uniform(0, 12, (120, 2))
        tiny = np.concatenate([corner, corner + 8], axis=1).astype(np.float32)
        boxes, scores = [tiny] * 3, [np.linspace(2, 1, 120)] * 3
    elif name == "xywh-boxes":
        boxes = [np.array([[20, 20, 5, 5], [30, 10, 6, 20]], np.float32)] * 3
    return ProposalSet("d2proposals", ids, boxes, scores, None, True), format_name


def write_spoiled(name, path):
    entries = [
        {"image_id": i, "category_id": 1, "bbox": [2, 3, 10, 10], "score": 0.5} for i in (1, 2, 3)
    ]
    if name == "category-ids":
        entries[0]["category_id"] = 17
    elif name == "missing-scores":
        del entries[0]["score"]
    elif name == "xyxy-boxes":
        entries = [{**entry, "bbox": [20, 30, 45, 35]} for entry in entries]
    elif name == "mask-size":
        mask = random_masks(1, (80, 100))[0]
        rle = {"size": mask["size"], "counts": mask["counts"].decode()}
        entries = [{**entry, "segmentation": rle} for entry in entries]
    elif name == "duplicate-images":
        own = {"image_id": 1, "boxes": [[2, 3, 12, 13]], "objectness_logits": [1]}
        others = [{**own, "image_id": i} for i in (2, 3)]
        again = {**own, "boxes": [[5, 5, 9, 9]]}
        entries = {"format": "d2proposals", "version": 1, "proposals": [own, *others, again]}
    else:
        proposals, format_name = spoiled(name)
        return write_proposals(path, proposals, format_name)
    path.write_text(json.dumps(entries))


FAULTS = (
    "category-ids", "xywh-boxes", "xyxy-boxes", "outside", "relative", "small-extent", "mask-size",
    "unsorted-scores", "missing-scores", "not-finite", "negative-side", "unknown-images",
    "missing-images", "duplicate-images", "duplicate-proposals", "empty-images",
)  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_and_strict_fails(gt, tmp_path, name):
    path = tmp_path / "file"
    write_spoiled(name, path)
    _, err = evaluate("--gt", gt, "--proposals", path)
    named = {line.split("[")[1].split("]")[0] for line in err.splitlines() if "warning" in line}
    # Some come with another one that says the same.
    together = {
        **{"xyxy-boxes": {"outside"}, "xywh-boxes": {"negative-side"}},
        "small-extent": {"one-shape"},
    }
    assert named == {name} | together.get(name, set())
    assert name in stop_line("--gt", gt, "--proposals", path, "--strict")


def test_strict_passes_what_is_right(gt, perfect_file):
    out, err = evaluate("--gt", gt, "--proposals", perfect_file, "--strict")
    assert "AR@1000" in out and "warning" not in err


def spoil_annotations(name, content):
    """Spoil two annotations of the first image, or all of them."""
    first, second = content["annotations"][:2]
    if name == "gt-negative-side":
        first["bbox"][2] = -10
    elif name == "gt-category":
        first["category_id"] = 77
    elif name == "gt-bad-mask":
        first["segmentation"] = [[2, 3, 12, 13]]
    elif name == "gt-some-masks":
        del first["segmentation"]
    elif name == "gt-area":
        first["area"], second["area"] = 100, 0
    elif name == "gt-flag":
        first["iscrowd"] = "0"
    elif name == "gt-text":
        content["images"][0]["height"] = str(SIZE[0])
    elif name == "gt-xyxy-boxes":
        for item in content["annotations"]:
            item["bbox"] = [30, 20, 45, 35]
    elif name == "gt-relative":
        for item in content["annotations"]:
            item["bbox"] = [0.1, 0.1, 0.5, 0.5]
    elif name == "gt-outside":
        second["bbox"] = [20, 5, 60, 30]
    elif name == "gt-unknown-images":
        content["annotations"].append({**second, "id": 99, "image_id": 88})


@pytest.mark.parametrize(
    ("name", "num_objects"),
    [("gt-negative-side", 5), ("gt-category", 6), ("gt-bad-mask", 6), ("gt-some-masks", 6),
     ("gt-area", 6), ("gt-flag", 6), ("gt-text", 6), ("gt-xyxy-boxes", 6), ("gt-relative", 6),
     ("gt-outside", 6), ("gt-unknown-images", 6)],
)  # fmt: skip
def test_faults_of_annotations_are_named(gt, perfect_file, coco_name, name, num_objects):
    content = json.loads(gt.read_text())
    spoil_annotations(name, content)
    gt.write_text(json.dumps(content))
    # As a file and as a dataset that Detectron2 registered, in turn: they are read alike.
    is_dataset = name in ("gt-negative-side", "gt-category", "gt-bad-mask", "gt-text", "gt-area")
    source = ("--dataset", coco_name) if is_dataset else ("--gt", gt)
    out, err = evaluate(*source, "--proposals", perfect_file)
    named = re.findall(r"^warning: annotations: \[([a-z-]+)\]", err, re.MULTILINE)
    together = {"gt-xyxy-boxes": ["gt-outside"], "gt-bad-mask": ["gt-some-masks"]}
    assert named == [name, *together.get(name, [])]
    assert f"Boxes, in percent ({num_objects} all" in out
    num_masks = num_objects - (name in ("gt-bad-mask", "gt-some-masks"))
    assert f"Masks, in percent ({num_masks} all" in out
    line = stop_line(*source, "--proposals", perfect_file, "--strict")
    assert "--strict" in line and f"annotations: {', '.join(sorted(named))}" in line


@pytest.fixture
def coco_name(gt, tmp_path):
    """The file, registered as Detectron2 does."""
    name = f"registered {tmp_path.name}"
    register_coco_instances(name, {}, str(gt), str(tmp_path))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_categories_that_tell_nothing_are_errors_where_they_matter(gt, perfect_file):
    content = json.loads(gt.read_text())
    arguments = ("--gt", gt, "--proposals", perfect_file, "--unseen")
    content["annotations"][0]["category_id"] = 0
    gt.write_text(json.dumps(content))
    assert "1 of the dataset's objects have no category" in stop_line(*arguments, "dog")
    content["annotations"][0]["category_id"] = 3
    content["categories"].append({"id": 0, "name": "dog"})
    renamed = gt.with_name("renamed.json")
    renamed.write_text(json.dumps(content))
    arguments = ("--gt", renamed, "--proposals", perfect_file, "--limits", 1, "--unseen")
    assert "called 'dog'" in stop_line(*arguments, "dog")
    assert "AR@1" in evaluate(*arguments, "2")[0]


def test_difficult_objects(gt, perfect_file, tmp_path):
    content = json.loads(gt.read_text())
    content["annotations"][0]["difficult"] = 1
    gt.write_text(json.dumps(content))
    folder = tmp_path / "results"
    out, err = evaluate("--gt", gt, "--proposals", perfect_file, "--strict", "--output", folder)
    assert "1 objects are difficult; they count" in err and "(6 all" in out
    assert json.loads((folder / "results.json").read_text())["num_difficult"] == 1
    out, err = evaluate("--gt", gt, "--proposals", perfect_file, "--leave-out-difficult")
    assert "1 objects are difficult; they are left out" in err and "(5 all" in out


def test_rows_before_columns(gt, tmp_path):
    """The images are wider than high; right boxes have no such fault."""
    proposals = perfect(with_masks=False)
    wide = np.array([[2, 3, 12, 13], [20, 5, 45, 35], [1, 1, 49, 30]], np.float32)
    swapped = tmp_path / "swapped.pkl"
    scores = [np.array([3.0, 2.0, 1.0])] * 3
    content = ProposalSet("d2proposals", proposals.image_ids, [wide[:, [1, 0, 3, 2]]] * 3, scores)
    write_proposals(swapped, content, "detectron2")
    _, err = evaluate("--gt", gt, "--proposals", swapped, "--kind", "box")
    assert "[yxyx-boxes] 6 of 9 boxes end outside" in err and "--box-mode yxyx" in err
    folder = tmp_path / "results"
    mended = ("--box-mode", "yxyx", "--strict", "--output", folder)
    evaluate("--gt", gt, "--proposals", swapped, "--kind", "box", *mended)
    assert measured(folder, "swapped.pkl")["AR@100"] == 100


def test_ids_of_more_than_64_bits(gt, tmp_path):
    path = tmp_path / "huge.json"
    path.write_text(json.dumps([{"image_id": 10**20, "bbox": [1, 2, 3, 4], "score": 1}]))
    line = stop_line("--gt", gt, "--proposals", path)
    assert "the image_id 100000000000000000000 has more than 64 bits" in line


def test_only_crowd(gt, perfect_file):
    content = json.loads(gt.read_text())
    for item in content["annotations"]:
        item["iscrowd"] = 1
    gt.write_text(json.dumps(content))
    line = stop_line("--gt", gt, "--proposals", perfect_file)
    assert line.endswith("what it has is 6 crowd regions (iscrowd), which do not count")


def test_box_mode_mends(gt, tmp_path):
    path = tmp_path / "file.json"
    entries = [{"image_id": i, "bbox": [20, 5, 45, 35], "score": 0.5} for i in (1, 2, 3)]
    path.write_text(json.dumps(entries))
    folder = tmp_path / "results"
    evaluate("--gt", gt, "--proposals", path, "--box-mode", "xyxy", "--strict", "--output", folder)
    assert measured(folder, "file.json")["AR@100"] == 50


def test_registered_dataset(perfect_file, gt):
    name = register_annotation_file(gt)
    assert "AR@100" in evaluate("--dataset", name, "--proposals", perfect_file, "--kind", "box")[0]
    line = stop_line("--dataset", "coco_2017_vla", "--proposals", perfect_file)
    assert "Unknown dataset 'coco_2017_vla'" in line


def test_wrong_arguments(gt, perfect_file, tmp_path):
    assert "no proposal file at" in stop_line("--gt", gt, "--proposals", tmp_path / "none")
    assert "no annotation file at" in stop_line("--gt", tmp_path / "x", "--proposals", perfect_file)
    assert "limits" in stop_line("--gt", gt, "--proposals", perfect_file, "--limits", 0)
    line = stop_line("--gt", gt, "--proposals", f"a={perfect_file}", f"a={gt}")
    assert "two files of proposals have the name 'a'" in line
    boxes = tmp_path / "boxes.pkl"
    write_proposals(boxes, perfect(with_masks=False), "detectron2")
    line = stop_line("--gt", gt, "--proposals", boxes, "--kind", "mask")
    assert "--kind mask, but no file has masks" in line
    content = json.loads(gt.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(content))
    line = stop_line("--gt", bare, "--proposals", perfect_file, "--kind", "mask")
    assert "--kind mask, but the dataset has no masks" in line
    content["annotations"] = []
    bare = tmp_path / "empty.json"
    bare.write_text(json.dumps(content))
    assert "no objects to measure" in stop_line("--gt", bare, "--proposals", perfect_file)


def test_files_of_one_name_are_told_apart(gt, perfect_file, tmp_path):
    for folder in ("a", "b"):
        write_proposals(tmp_path / folder / "box_proposals.pkl", perfect(False), "detectron2")
    paths = [tmp_path / folder / "box_proposals.pkl" for folder in "ab"]
    out, _ = evaluate("--gt", gt, "--proposals", *paths, "--kind", "box")
    assert re.search(r"\| +box_proposals.pkl \| +b/box_proposals.pkl \|", out)


def test_converting(gt, perfect_file, tmp_path):
    path, before = perfect_file, "d2proposals"
    for number, format_name in enumerate(("sam", "coco", "d2proposals", "mmdet3", "mmdet2",
                                          "detectron2")):  # fmt: skip
        target = tmp_path / f"{number}_{format_name}"
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            CONVERT["main"]([str(path), str(target), "--to", format_name, "--gt", str(gt)])
        expected = f"6 proposals of 3 images, {before} -> {format_name}"
        assert expected in out.getvalue()
        assert ("no masks; boxes only" in err.getvalue()) == (format_name == "mmdet3")
        path, before = target, format_name
    np.testing.assert_array_equal(read_proposals(path).boxes[2], perfect().boxes[2])
    path = tmp_path / "0_sam"
    arguments = [path, tmp_path / "top.json", "--to", "coco", "--gt", gt, "--top", 1]
    with redirect_stdout(io.StringIO()):
        CONVERT["main"]([str(x) for x in arguments])
    assert len(json.loads((tmp_path / "top.json").read_text())) == 3
    line = stop_line(perfect_file, tmp_path / "x", "--to", "mmdet2", main=CONVERT["main"])
    assert "name it (--dataset or --gt)" in line
    nan = tmp_path / "nan.pkl"
    write_proposals(nan, *spoiled("not-finite"))
    line = stop_line(nan, tmp_path / "x", "--to", "coco", main=CONVERT["main"])
    assert "--drop-unusable" in line
    with redirect_stdout(io.StringIO()) as out:
        CONVERT["main"]([str(nan), str(tmp_path / "x"), "--to", "coco", "--drop-unusable"])
    assert "5 proposals of 3 images" in out.getvalue()


@contextmanager
def time_limit(seconds):
    """A hang becomes an error."""

    def stop(*_):
        raise TimeoutError(f"not done within {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_all(path, gt_name):
    """All that the command does with a file, without its printing: a result or one line."""
    try:
        with bad_input_in_one_line():
            ground_truth = load_ground_truth(gt_name, with_masks=True)
            run = read_run(str(path), ground_truth)
            for kind in ("box", "mask") if run.has_masks else ("box",):
                result = EVALUATE["measure_run"](run, ground_truth, (1, 10), {1}, kind, "")
                assert all(np.isfinite(x) for x in result.metrics.values())
    except SystemExit as stop:
        line = str(stop)
        assert line.startswith("Error: ") and "\n" not in line and len(line) < 1500, line
        return line
    return run.faults


def swap_types(content, generator):
    """A JSON value with one of its parts replaced by something of another type."""
    parts = []

    def walk(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            parts.append((value, key))
            if isinstance(item, (dict, list)):
                walk(item)

    walk(content)
    value, key = generator.choice(parts)
    odd = [None, True, -1, 1e400, 10**30, "x", [], {}, [[]], float("nan"), {"counts": 1}, "\ud800"]
    value[key] = generator.choice(odd)
    return json.dumps(content).encode()


def mutate(data, is_json, generator):
    """One mutant of a file's content."""
    kind = generator.choice(("cut", "flip", "splice", "types" if is_json else "flip"))
    if kind == "cut":
        return data[: generator.randrange(len(data))]
    if kind == "types":
        return swap_types(json.loads(data), generator)
    data = bytearray(data)
    if kind == "flip":
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    else:
        start, length = generator.randrange(len(data)), generator.randrange(40)
        other = generator.randrange(len(data))
        data[start : start + length] = data[other : other + generator.randrange(40)]
    return bytes(data)


@pytest.mark.parametrize("format_name", FORMATS)
def test_mutated_files_end_in_a_message_or_a_warning(gt, tmp_path, format_name):
    """Never a traceback, a hang or a crash."""
    gt_name = register_annotation_file(gt)
    images = load_ground_truth(gt_name).images
    with_masks = format_name in ("coco", "sam", "d2proposals")
    whole = tmp_path / "whole"
    write_proposals(whole, perfect(with_masks), format_name, images)
    files = sorted(whole.iterdir()) if whole.is_dir() else [whole]
    originals = [file.read_bytes() for file in files]
    if format_name in ("detectron2", "mmdet2", "mmdet3"):
        # Old protocols have instructions of their own.
        originals += [pickle.dumps(pickle.loads(originals[0]), protocol) for protocol in range(3)]
    generator = random.Random(format_name)
    mutant = tmp_path / "2.json"
    num_errors = 0
    with time_limit(240):
        for _ in range(NUM_MUTANTS // len(FORMATS) + 1):
            mutant.write_bytes(mutate(generator.choice(originals), with_masks, generator) or b" ")
            num_errors += isinstance(run_all(mutant, gt_name), str)
    # Some mutants only change a number; most do not pass.
    assert NUM_MUTANTS // len(FORMATS) * 0.3 < num_errors


def test_a_file_without_ids_is_named(gt, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"boxes": [], "objectness_logits": []}))
    assert "lacks ids" in run_all(path, register_annotation_file(gt))


def bomb(depth=60):
    """A pickle of a tuple whose hash takes 2^depth steps, as a key."""
    doubled = b"".join(pickle.BINPUT + b"\x01" + pickle.BINGET + b"\x01" + pickle.TUPLE2
                       for _ in range(depth))  # fmt: skip
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + b"K\x01" + doubled + b"K\x01" + b"s."


class Runs:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def hostile(folder):
    name = b"cdetectron2.structures.boxes\nBoxMode\n"
    yield pickle.dumps({"ids": [Runs(folder)], "boxes": [], "objectness_logits": []})
    yield pickle.dumps([Runs(folder)], 0)
    yield b"\x80\x02cos\nmkdir\n(V" + folder.encode() + b"\ntR."
    yield b"\x80\x02cbuiltins\neval\n(V__import__('os').mkdir('" + folder.encode() + b"')\ntR."
    yield b"\x80\x02" + name + b"}(V__call__\nNtb."  # attributes of the stand-in itself
    yield b"\x80\x02cnumpy\ndtype\nN}(V__init__\nNu\x86b."
    yield b"\x80\x02]r\xff\xff\xff\x7f."  # a memo of two thousand million entries
    yield b"\x80\x02]" + b"r\xff\xff\xff\xff."
    yield bomb()
    yield bomb().replace(b"s.", b"\x85\x91.")  # in a frozenset
    yield b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x."  # bytes of an exabyte
    yield b"\x80\x04\x95" + b"\xff" * 8 + b"."
    yield b"\x80\x02cnumpy\ndtype\n(VO\ntR."
    yield b"\x80\x02P5\n."
    yield b"\x80\x02\x82\x05."
    yield b"(" * 100_000 + b"t" * 100_000 + b"."
    yield b"\x80\x02\x8b\xff\xff\xff\x7f1."


def test_hostile_pickles_run_nothing(gt, tmp_path):
    folder = tmp_path / "made"
    gt_name = register_annotation_file(gt)
    path = tmp_path / "a.pkl"
    with time_limit(60):
        for data in hostile(str(folder)):
            path.write_bytes(data)
            line = run_all(path, gt_name)
            assert isinstance(line, str), pickletools.genops(data)
            assert not folder.exists()
    # The reader itself is as it was.
    write_proposals(path, perfect(False), "detectron2")
    assert run_all(path, gt_name) == []


def documented_commands():
    """(tool, arguments) of README and the toolbox's page, for the tools that need no model."""
    names = "evaluate_proposals|convert_proposals|visualize_proposals"
    found = set()
    for page in ("README.md", "docs/toolbox.md"):
        text = (TOOLS.parent / page).read_text()
        found.update(re.findall(rf"^    python tools/({names}).py (.*)$", text, re.MULTILINE))
    return sorted((tool, line) for tool, line in found if "--config-file" not in line)


@pytest.fixture
def documented_files(gt, tmp_path, monkeypatch):
    """The files that the page's commands name; yields the name of a dataset for --dataset."""
    monkeypatch.chdir(tmp_path)
    content = json.loads(gt.read_text())
    others = [name for name in VOC_CATEGORIES if name not in ("cat", "dog")]
    content["categories"] += [{"id": 100 + i, "name": name} for i, name in enumerate(others)]
    content["categories"].append({"id": 200, "name": "kite"})
    for annotation in content["annotations"]:
        if annotation["category_id"] == 9:
            annotation["category_id"] = 200
    Path("images").mkdir()
    for image in content["images"]:
        for folder in (".", "images"):
            Image.new("RGB", SIZE[::-1], (90, 120, 90)).save(Path(folder, image["file_name"]))
    Path("annotations.json").write_text(json.dumps(content))
    name = register_annotation_file("annotations.json")
    images = load_ground_truth(name).images
    for path, format_name in (
        ("box_proposals.pkl", "detectron2"), ("a.json", "d2proposals"), ("b.pkl", "detectron2"),
        ("results.json", "coco"), ("sam_output", "sam"),
    ):  # fmt: skip
        write_proposals(path, perfect(), format_name, images)
    return name


@pytest.mark.parametrize(("tool", "line"), documented_commands())
def test_documented_commands_run(documented_files, capsys, tool, line):
    arguments = shlex.split(line)
    if "--dataset" in arguments:
        arguments[arguments.index("--dataset") + 1] = documented_files
    load_tool(tool)["main"](arguments)
    captured = capsys.readouterr()
    assert "warning" not in captured.err.replace("warning: the format", "")
    if tool == "evaluate_proposals":
        assert "| AR@1000 " in captured.out and ("OLN" in captured.out) == ("--seen" in arguments)
    for option in ("--output", "--gallery"):
        if option in arguments:
            target = arguments[arguments.index(option) + 1]
            assert Path(target).exists() and target in captured.out


def test_there_are_documented_commands():
    assert {tool for tool, _ in documented_commands()} == {
        "evaluate_proposals", "convert_proposals", "visualize_proposals",
    }  # fmt: skip
