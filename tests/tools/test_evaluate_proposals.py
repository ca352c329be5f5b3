"""Tests of the command that measures files of proposals, and of the one that converts them."""

import csv
import io
import json
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.files.annotation_file import VOC_CATEGORIES, register_annotation_file
from d2proposals.files.conversion import read_proposals, write_proposals
from d2proposals.files.proposal_set import ProposalSet
from tests.common import ROOT
from tests.files.test_conversion import random_masks
from tests.tools.proposal_commands import (
    CONVERT,
    SIZE,
    evaluate,
    load_tool,
    perfect,
    stop_line,
)


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


def test_a_detector_that_found_nothing_has_no_recall(gt, tmp_path):
    path = tmp_path / "instances_predictions.pth"
    torch.save([{"image_id": image_id, "instances": []} for image_id in (1, 2, 3)], path)
    _, err = evaluate("--gt", gt, "--proposals", path, "--output", tmp_path / "results")
    assert "[empty-images]" in err
    assert measured(tmp_path / "results", path.name)["AR@100"] == 0


def test_the_smallest_probabilities_keep_their_order(gt, tmp_path):
    """As logits they would all be the same."""
    path, converted = tmp_path / "results.json", tmp_path / "converted.pkl"
    path.write_text(
        json.dumps(
            [
                {"image_id": image_id, "bbox": box, "score": score}
                for image_id in (1, 2, 3)
                for box, score in [([30, 1, 4, 4], 1e-20), ([2, 3, 10, 10], 1e-15)]
            ]
        )
    )
    with redirect_stdout(io.StringIO()):
        CONVERT["main"]([str(path), str(converted), "--to", "detectron2"])
    evaluate("--gt", gt, "--proposals", path, converted, "--limits", 1, "--output", tmp_path)
    assert measured(tmp_path, path.name)["AR@1"] == 50
    assert measured(tmp_path, converted.name)["AR@1"] == 50


def test_files_of_one_name_are_told_apart(gt, perfect_file, tmp_path):
    for folder in ("a", "b"):
        write_proposals(tmp_path / folder / "box_proposals.pkl", perfect(False), "detectron2")
    paths = [tmp_path / folder / "box_proposals.pkl" for folder in "ab"]
    out, _ = evaluate("--gt", gt, "--proposals", *paths, "--kind", "box")
    assert re.search(r"\| +box_proposals.pkl \| +b/box_proposals.pkl \|", out)


def test_converting_names_images_of_another_dataset(gt, perfect_file, tmp_path):
    content = json.loads(Path(gt).read_text())
    content["images"] = [image for image in content["images"] if image["id"] != 2]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    arguments = [perfect_file, tmp_path / "out.pkl", "--to", "detectron2", "--gt", other]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        CONVERT["main"]([str(x) for x in arguments])
    assert "[unknown-images] 1 of its images do not belong to the dataset (2)" in err.getvalue()


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
        assert ("no boxes but those around the masks" in err.getvalue()) == (format_name == "sam")
        assert "[unknown-images]" not in err.getvalue()
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


def documented_commands():
    """(tool, arguments) of README and the toolbox's page, for the tools that need no model."""
    names = "evaluate_proposals|convert_proposals|visualize_proposals"
    found = set()
    for page in ("README.md", "docs/toolbox.md"):
        text = (ROOT / page).read_text()
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
