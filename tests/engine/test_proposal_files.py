"""Tests of the check of precomputed proposals, and of what the mapper makes of them."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, build
from detectron2.utils.file_io import PathManager

import train_net
from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import check_proposal_files, proposal_files
from tests.common import CONFIGS, make_cfg
from tests.engine.proposal_files import (
    NUM_PROPOSALS,
    override_files,
    proposals_of,
    write_pickle,
)
from tests.engine.tiny_coco import make_args

CONFIG = str(CONFIGS / "shapes" / "fast_rcnn_precomputed.yaml")


@pytest.fixture
def files(tiny_coco, tmp_path):
    """Right files of both datasets, by name."""
    names = ("tiny_train", "tiny_val")
    return {
        name: write_pickle(tmp_path / f"{name.removeprefix('tiny_')}.pkl", proposals_of(name))
        for name in names
    }


def configuration(files, *overrides):
    paths = override_files(files["tiny_train"], files["tiny_val"])
    return make_cfg("shapes/fast_rcnn_precomputed.yaml", *paths, *overrides)


def error_of(cfg, **arguments):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        check_proposal_files(cfg, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def warnings_in(caplog):
    records = [x for x in caplog.records if x.name == "d2proposals.engine.proposal_files"]
    return [x.getMessage() for x in records if x.levelname == "WARNING"]


def rewrite(path, change):
    content = pickle.loads(path.read_bytes())
    change(content)
    write_pickle(path, content)


def to_xywh(content):
    for boxes_i in content["boxes"]:
        boxes_i[:, 2:] -= boxes_i[:, :2]


def scale_by(factor):
    def scale(content):
        for boxes_i in content["boxes"]:
            boxes_i *= factor

    return scale


def to_relative(content):
    for boxes_i in content["boxes"]:
        boxes_i /= (80, 64, 80, 64)


def set_one(key, index, value):
    def change(content):
        content[key][1][index] = value

    return change


def replace(key, value):
    def change(content):
        content[key][1] = value(content[key][1]) if callable(value) else value

    return change


def drop_image(content):
    for key in ("ids", "boxes", "objectness_logits"):
        del content[key][2]


def renumber(content):
    content["ids"] = [f"other {image_id}" for image_id in content["ids"]]


def list_twice(content):
    for key in ("ids", "boxes", "objectness_logits"):
        content[key].append(content[key][0])


def test_right_files_are_read_once_each(files, monkeypatch, caplog):
    opened = []
    load = proposal_files.load_pickle
    monkeypatch.setattr(
        proposal_files, "load_pickle", lambda path: opened.append(path) or load(path)
    )
    check_proposal_files(configuration(files))
    assert opened == [str(files["tiny_train"]), str(files["tiny_val"])]
    opened.clear()
    check_proposal_files(configuration(files), train=False)
    assert opened == [str(files["tiny_val"])]
    opened.clear()
    # The two splits have the same ids; one file may serve both.
    check_proposal_files(configuration({**files, "tiny_val": files["tiny_train"]}))
    assert opened == [str(files["tiny_train"])]
    assert warnings_in(caplog) == []


def test_one_of_several_processes_reads(files, monkeypatch):
    monkeypatch.setattr(PathManager, "get_local_path", None)
    monkeypatch.setattr(proposal_files.comm, "is_main_process", lambda: False)
    for found in (False, True):
        monkeypatch.setattr(proposal_files.comm, "all_gather", lambda own, x=found: [x, own])
        if not found:
            check_proposal_files(configuration(files))
        else:
            assert "the first process says why" in error_of(configuration(files))


def test_without_precomputed_proposals_nothing_is_read(files, monkeypatch):
    monkeypatch.setattr(PathManager, "get_local_path", None)
    monkeypatch.setattr(DatasetCatalog, "get", None)
    check_proposal_files(make_cfg("shapes/rpn_only.yaml"))
    check_proposal_files(make_cfg("faster_rcnn_rpn.yaml"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ("MODEL.LOAD_PROPOSALS", False),
            ("'PrecomputedProposals' needs MODEL.LOAD_PROPOSALS True", "PROPOSAL_FILES_TRAIN"),
        ),
        (
            ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"),
            ("MODEL.LOAD_PROPOSALS is True", "generator 'RPN'", "'PrecomputedProposals'"),
        ),
        (("MODEL.META_ARCHITECTURE", "ProposalNetwork"), ("to 'GeneralizedRCNN'",)),
        (("TEST.AUG.ENABLED", True), ("TEST.AUG.ENABLED must be False",)),
        (
            ("DATASETS.PROPOSAL_FILES_TEST", ()),
            ("DATASETS.PROPOSAL_FILES_TEST has 0 files", "1 datasets ('tiny_val',)"),
        ),
        (
            ("DATASETS.PROPOSAL_FILES_TRAIN", ("a.pkl", "b.pkl")),
            ("DATASETS.PROPOSAL_FILES_TRAIN has 2 files", "one file per dataset"),
        ),
    ],
)
def test_keys_that_contradict_each_other(files, overrides, parts):
    line = error_of(configuration(files, *overrides))
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (drop_image, ("lacks 1 of 4 images of tiny_val: 3.", "tools/export_proposals.py")),
        (
            renumber,
            ("lacks 4 of 4 images", "1, 2, 3, 4", "another dataset or split?"),
        ),
        (list_twice, ("lists an image more than once",)),
        (to_xywh, ("XYXY", "--box-mode xywh")),
        (scale_by(1.5), ("outside of their image", "in pixels of the original image")),
        (scale_by(-1), ("negative side",)),
        (to_relative, ("relative to the image's size",)),
        (set_one("boxes", (3, 2), np.nan), ("1 of 160", "not finite", "Images: 2")),
        (set_one("boxes", (3, 2), np.inf), ("1 of 160", "not finite", "Images: 2")),
        (set_one("objectness_logits", 0, np.nan), ("not finite", "--drop-unusable")),
        (replace("boxes", np.zeros((NUM_PROPOSALS, 5), np.float32)), ("(40, 5), not (R, 4)",)),
        (replace("boxes", lambda x: x[:-1]), ("image 2 has 39 boxes but 40 objectness",)),
        (replace("boxes", lambda x: x.astype(int)), ("int64 (40, 4) among its boxes",)),
        (replace("boxes", lambda x: x.tolist()), ("a list among its boxes", "--to detectron2")),
        (
            replace("objectness_logits", lambda x: x[:, None]),
            ("float32 (40, 1) among its objectness logits", "(R,)"),
        ),
        (lambda x: x.pop("boxes"), ("not a proposal file: it lacks boxes", "--to detectron2")),
    ],
)
def test_wrong_content(files, change, parts):
    path = files["tiny_val"]
    rewrite(path, change)
    line = error_of(configuration(files))
    assert line.startswith(f"DATASETS.PROPOSAL_FILES_TEST: {path}"), line
    assert all(part in line for part in parts), line
    assert error_of(configuration(files), train=False) == line


class Bomb:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_files_that_are_not_pickles_of_arrays(files, tmp_path):
    path, cfg = files["tiny_train"], configuration(files)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"{path} is truncated, damaged" in error_of(cfg)
    path.write_bytes(b"")
    assert f"{path} is truncated, damaged" in error_of(cfg)
    write_pickle(path, {**pickle.loads(content), "extra": Bomb(tmp_path / "exploded")})
    line = error_of(cfg)
    assert "could run code" in line and line.startswith("DATASETS.PROPOSAL_FILES_TRAIN: ")
    assert not (tmp_path / "exploded").exists()
    path.unlink()
    line = error_of(cfg)
    assert f"{path} is missing" in line and "--datasets tiny_train" in line
    # Before an evaluation alone, the training's file is of no interest.
    check_proposal_files(cfg, train=False)


def test_a_few_odd_boxes_are_only_a_warning(files, caplog):
    # One box outside, one negative, an image without proposals and one with a box in its corner
    # alone: Detectron2 lives with these.
    def change(content):
        content["boxes"][0][5] = (10, 10, 500, 20)
        content["boxes"][1][5] = (30, 10, 20, 20)
        content["boxes"][2] = np.zeros((0, 4), np.float32)
        content["objectness_logits"][2] = np.zeros(0, np.float32)
        content["boxes"][3] = np.array([[0, 0, 1.5, 1.5]], np.float32)
        content["objectness_logits"][3] = np.zeros(1, np.float32)
        content["ids"][3] = str(content["ids"][3])

    rewrite(files["tiny_train"], change)
    check_proposal_files(configuration(files))
    warnings = warnings_in(caplog)
    assert all(x.startswith("DATASETS.PROPOSAL_FILES_TRAIN: ") for x in warnings)
    parts = ["have no proposals", "negative side", "outside", "within 2 pixels"]
    for part, warning in zip(parts, warnings, strict=True):
        assert part in warning


ODD_BOXES = {
    "outside": (10, 10, 500, 20),
    "negative side": (30, 10, 20, 20),
}


@pytest.mark.parametrize("name", ODD_BOXES)
@pytest.mark.parametrize("num_odd", [4, 10])
def test_how_many_odd_boxes_are_too_many(files, name, num_odd, caplog):
    content = proposals_of("tiny_train", 98)
    for boxes_i in content["boxes"]:
        assert len(boxes_i) == 100
        boxes_i[20 : 20 + num_odd] = ODD_BOXES[name]
        boxes_i[20 : 20 + num_odd, 1] += np.arange(num_odd) / 10  # no two alike
    write_pickle(files["tiny_train"], content)
    cfg = configuration(files)
    if num_odd == 10:
        assert name in error_of(cfg)
        return
    check_proposal_files(cfg)
    (warning,) = warnings_in(caplog)
    assert name in warning


def test_images_of_another_dataset_are_named(files, caplog):
    """Those of a larger split pass for a smaller one's where both number their images from 1."""

    def change(content):
        content["ids"].append(99)
        content["boxes"].append(content["boxes"][0])
        content["objectness_logits"].append(content["objectness_logits"][0])

    rewrite(files["tiny_train"], change)
    check_proposal_files(configuration(files))
    (warning,) = warnings_in(caplog)
    assert "1 of 5 images do not belong to the dataset" in warning


def test_another_order_is_nothing_to_speak_of(files, caplog):
    def change(content):
        content["boxes"][1] = content["boxes"][1][::-1]
        content["objectness_logits"][1] = content["objectness_logits"][1][::-1]

    rewrite(files["tiny_train"], change)
    check_proposal_files(configuration(files))
    assert warnings_in(caplog) == []


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_no_proposals_at_all(files):
    def empty(content):
        content["boxes"] = [np.zeros((0, 4), np.float32) for _ in content["ids"]]
        content["objectness_logits"] = [np.zeros(0, np.float32) for _ in content["ids"]]

    rewrite(files["tiny_train"], empty)
    check_proposal_files(configuration(files))


def test_files_of_the_first_detectron_are_taken_as_detectron2_takes_them(files):
    def rename(content):
        content["indexes"] = content.pop("ids")
        content["scores"] = content.pop("objectness_logits")
        del content["bbox_mode"]

    rewrite(files["tiny_train"], rename)
    check_proposal_files(configuration(files))
    build.load_proposals_into_dataset(DatasetCatalog.get("tiny_train"), str(files["tiny_train"]))


@pytest.mark.parametrize("eval_only", [False, True])
def test_the_job_ends_with_one_line_before_it_starts(
    files, tmp_path, capsys, monkeypatch, eval_only
):
    monkeypatch.setattr(train_net, "Trainer", None)  # whatever is built, is built later
    rewrite(files["tiny_val"], drop_image)
    paths = override_files(files["tiny_train"], files["tiny_val"])
    args = make_args(
        *paths, "OUTPUT_DIR", tmp_path / "out", eval_only=eval_only, config_file=CONFIG
    )
    with pytest.raises(SystemExit) as stop:
        train_net.main(args)
    assert str(stop.value).startswith("Error: DATASETS.PROPOSAL_FILES_TEST: ")
    assert "lacks 1 of 4 images" in str(stop.value) and "\n" not in str(stop.value)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err


RESIZES = {
    "shortest edge": ("INPUT.MIN_SIZE_TRAIN", (96, 160)),
    "warp": ("INPUT.WARP_SIZE", (100, 60)),
    "object scale": ("INPUT.DY_TRAIN_SCALE.ENABLED", True),
}


@pytest.mark.parametrize("resize", RESIZES.values(), ids=RESIZES)
def test_proposals_of_a_training_image_land_on_its_objects(files, resize):
    cfg = configuration(files, "INPUT.FORMAT", "RGB", *resize)
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN = 30
    mapper = ProposalDatasetMapper(cfg, True)
    records = DatasetCatalog.get("tiny_train")
    # An object that the transforms leave empty takes no proposal with it.
    records[0]["annotations"].append({**records[0]["annotations"][0], "bbox": [5, 5, 0, 9]})
    records = build.load_proposals_into_dataset(records, str(files["tiny_train"]))
    seen_flips = set()
    for record in records * 4:
        mapped = mapper(record)
        proposals, image = mapped["proposals"], mapped["image"].float().mean(dim=0)
        assert proposals.image_size == tuple(image.shape) != (64, 80)
        assert len(proposals) == 30 and len(mapped["instances"]) == 2
        assert (proposals.objectness_logits.diff() < 0).all()
        boxes = proposals.proposal_boxes.tensor
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= image.shape[1]).all()
        # The first two are the objects, which are brighter than anything else. The resize blurs
        # their edges.
        for box in boxes[:2]:
            x1, y1, x2, y2 = box.round().int().tolist()
            margin = max(x2 - x1, y2 - y1) // 8
            assert image[y1 + margin : y2 - margin, x1 + margin : x2 - margin].min() > 140
            assert image[y1:y2, x1:x2].mean() > 170
            around = image[max(y1 - margin, 0) : y2 + margin, max(x1 - margin, 0) : x2 + margin]
            assert around.mean() < image[y1:y2, x1:x2].mean() - 10
        # The first object is in the left half of the image.
        seen_flips.add(bool(boxes[0, 0] > image.shape[1] / 2 - 1))
        np.testing.assert_allclose(boxes[:2], mapped["instances"].gt_boxes.tensor, atol=1e-3)
    assert seen_flips == {False, True}


def test_the_test_s_proposals_are_as_many_as_its_key_says(files):
    cfg = configuration(files, "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", 7)
    records = build.load_proposals_into_dataset(
        DatasetCatalog.get("tiny_val"), str(files["tiny_val"])
    )
    mapped = ProposalDatasetMapper(cfg, False)(records[1])
    scale = mapped["image"].shape[1] / 64
    expected = pickle.loads(Path(files["tiny_val"]).read_bytes())["boxes"][1][:7] * scale
    np.testing.assert_allclose(mapped["proposals"].proposal_boxes.tensor, expected, atol=0.5)
