"""Tests of the command that exports a generator's proposals, and of training on its files."""

import contextlib
import io
import json
import os
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, build
from detectron2.modeling import StandardROIHeads, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

import train_net
from d2proposals.engine import launch_processes
from d2proposals.evaluation import export
from d2proposals.evaluation.export import ProposalExporter, proposal_network_of, select_proposals
from d2proposals.evaluation.proposal_checks import ImageProposals
from d2proposals.files import precomputed_format
from d2proposals.files.precomputed_format import read_proposal_file
from tests.common import CONFIGS, make_cfg
from tests.engine.tiny_coco import (
    SMALL,
    loggers_as_before,
    make_args,
    registered,
    write_tiny_coco,
)

ROOT = CONFIGS.parent
EXPORT = runpy.run_path(str(ROOT / "tools" / "export_proposals.py"))
EVALUATE = runpy.run_path(str(ROOT / "tools" / "evaluate_proposals.py"))
TINY = ("DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)")
SIZE = (64, 80)


@pytest.fixture
def tiny_coco(tmp_path):
    """As the engine's, with an image without annotations and one with a crowd region alone."""
    coco = write_tiny_coco(tmp_path / "datasets") / "coco"
    for file in (coco / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["annotations"] = [
            item
            for item in content["annotations"]
            if item["image_id"] != 1 and (item["image_id"] != 4 or item["iscrowd"])
        ]
        file.write_text(json.dumps(content))
    with loggers_as_before(), registered(coco):
        yield coco


def checkpoint(path, config, *overrides):
    """A file with random weights of a configuration's model."""
    torch.manual_seed(0)
    model = build_model(make_cfg(config, *SMALL, *overrides))
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture
def weights(tiny_coco, tmp_path):
    return checkpoint(tmp_path / "rpn.pth", "shapes/rpn_only.yaml")


def export_files(folder, weights, *arguments, config="shapes/rpn_only.yaml"):
    """Standard output of the command."""
    options = [x for x in arguments if not isinstance(x, tuple)]
    opts = [str(y) for x in arguments if isinstance(x, tuple) for y in x]
    command = ["--config-file", str(CONFIGS / config), "--output", str(folder), *options]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        EXPORT["main"]([*command, *SMALL, *TINY, "MODEL.WEIGHTS", str(weights), *opts])
    return out.getvalue()


def stop_line(*arguments, **named):
    with pytest.raises(SystemExit) as stop:
        export_files(*arguments, **named)
    line = str(stop.value)
    assert line.startswith("Error: ") and "\n" not in line
    return line


def test_fast_rcnn_trains_and_evaluates_on_exported_files(weights, tmp_path):
    printed = export_files(tmp_path / "files", weights)
    paths = {name: tmp_path / "files" / f"{name}.pkl" for name in ("tiny_train", "tiny_val")}
    lines = printed.splitlines()[-5:]
    overrides = []
    for (name, path), part, line, keys in zip(
        paths.items(), ("TRAIN", "TEST"), lines[:2], lines[3:], strict=True
    ):
        file = read_proposal_file(path)
        # All images, also those that Detectron2 leaves out of a training.
        assert file.image_ids == [1, 2, 3, 4]
        mean = np.mean([len(boxes_i) for boxes_i in file.boxes])
        assert line == f"{name}: 4 images, {mean:.1f} proposals each: {path}" and mean > 10
        for boxes_i, logits_i in zip(file.boxes, file.objectness_logits, strict=True):
            assert (np.diff(logits_i) < 0).all() and np.isfinite(boxes_i).all()
            assert (boxes_i >= 0).all() and (boxes_i <= (80, 64, 80, 64)).all()
            assert (boxes_i[:, 2:] > boxes_i[:, :2]).all()
            assert len(np.unique(boxes_i, axis=0)) == len(boxes_i)
        (record, *_) = build.load_proposals_into_dataset(DatasetCatalog.get(name), str(path))
        np.testing.assert_array_equal(record["proposal_boxes"], file.boxes[0])
        overrides.append(shlex.split(keys))
        assert overrides[-1][::2] == [f"DATASETS.{part}", f"DATASETS.PROPOSAL_FILES_{part}"]
    config = str(CONFIGS / "shapes" / "fast_rcnn_precomputed.yaml")
    opts = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.BASE_LR", 1e-5)
    common = (*overrides[0], *overrides[1], *opts, "OUTPUT_DIR", tmp_path / "out")
    train_net.main(make_args(*common, config_file=config))
    rows = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    measured = {name: x for row in rows for name, x in json.loads(row).items()}
    assert np.isfinite([measured["loss_cls"], measured["loss_box_reg"]]).all()
    trained = ("MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth")
    results = train_net.main(make_args(*common, *trained, config_file=config, eval_only=True))
    assert results["bbox"]["AP"] == pytest.approx(measured["bbox/AP"])
    detections = tmp_path / "out" / "inference" / "coco_instances_results.json"
    assert {x["image_id"] for x in json.loads(detections.read_text())} == {1, 2, 3, 4}


def test_other_datasets_of_the_configuration_may_be_missing(weights, tmp_path):
    names = ("--datasets", "tiny_train", "--num-gpus", "1", ("DATASETS.TEST", "('coco_2014_val',)"))
    assert "tiny_train: 4 images" in export_files(tmp_path, weights, *names)


def test_a_dataset_that_detectron2_cannot_read_is_exported(tiny_coco, weights, tmp_path):
    file = tiny_coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["ignore"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(AssertionError):
        DatasetCatalog.get("tiny_val")
    assert "tiny_val: 4 images" in export_files(
        tmp_path, weights, "--datasets", "tiny_val", "--num-gpus", "1"
    )


def test_recall_of_the_file_is_that_of_the_generator(weights, tmp_path):
    export_files(tmp_path, weights, "--datasets", "tiny_val", "--num-gpus", "1")
    assert not (tmp_path / "tiny_train.pkl").exists()
    opts = ("TEST.PROPOSALS.LIMITS", "(10, 100, 1000)", "OUTPUT_DIR", tmp_path / "out")
    args = make_args(*TINY, *opts, "MODEL.WEIGHTS", weights, eval_only=True)
    expected = train_net.main(args)["box_proposals"]
    files = ["--proposals", f"exported={tmp_path / 'tiny_val.pkl'}"]
    limits = ["--limits", "10", "100", "1000"]
    EVALUATE["main"](["--dataset", "tiny_val", *files, *limits, "--output", str(tmp_path)])
    content = json.loads((tmp_path / "results.json").read_text())["runs"]["exported"]
    measured = content["box_proposals"]["metrics_in_percent"]["all"]
    assert measured == pytest.approx(expected, abs=1e-6) and measured["AR@1000"] > 0
    assert set(content["faults"]) <= {"empty-images"}


def test_a_detector_s_generator_without_its_heads(tiny_coco, tmp_path, monkeypatch):
    config = "shapes/faster_rcnn_rpn.yaml"
    weights = checkpoint(tmp_path / "detector.pth", config)
    monkeypatch.setattr(StandardROIHeads, "forward", None)
    export_files(tmp_path / "detector", weights, config=config)
    # A proposal network takes its part of the checkpoint.
    network = ("MODEL.META_ARCHITECTURE", "ProposalNetwork")
    export_files(tmp_path / "network", weights, network, config=config)
    for name in ("tiny_train", "tiny_val"):
        contents = [(tmp_path / x / f"{name}.pkl").read_bytes() for x in ("detector", "network")]
        assert contents[0] == contents[1]


def test_the_proposal_network_in_a_model():
    model = build_model(make_cfg("shapes/faster_rcnn_rpn.yaml", *SMALL))
    for training in (True, False):
        network = proposal_network_of(model.train(training))
        assert network.proposal_generator is model.proposal_generator
        assert network.training is training and proposal_network_of(network) is network


def test_top_and_augmentation(weights, tmp_path):
    files = {}
    # The augmentation's scales come from the original image, whatever the test's own size.
    augmented = ["--augment", ("INPUT.MIN_SIZE_TEST", 32)]
    for name, options in {"plain": [], "top": ["--top", "7"], "augmented": augmented}.items():
        export_files(tmp_path / name, weights, *options)
        files[name] = read_proposal_file(tmp_path / name / "tiny_train.pkl")
    for index, boxes_i in enumerate(files["top"].boxes):
        np.testing.assert_array_equal(boxes_i, files["plain"].boxes[index][:7])
        logits_i = files["plain"].objectness_logits[index][:7]
        np.testing.assert_array_equal(files["top"].objectness_logits[index], logits_i)
    # The two scales of TEST.AUG, each resized from the original image, merged.
    cfg = make_cfg("shapes/rpn_only.yaml", *SMALL, "MODEL.WEIGHTS", str(weights))
    cfg.INPUT.MIN_SIZE_TEST = 0
    model = EXPORT["load_trained_model"](cfg)
    with torch.no_grad():
        loader = EXPORT["Trainer"].build_test_loader(cfg, "tiny_train")
        outputs = EXPORT["ProposalNetworkWithTTA"](cfg, model)(next(iter(loader)))
    expected = outputs[0]["proposals"]
    np.testing.assert_allclose(files["augmented"].boxes[0], expected.proposal_boxes.tensor)
    assert len(expected) != len(files["plain"].boxes[0])


def test_other_datasets_may_have_either_part(tiny_coco):
    cfg = make_cfg(None, "DATASETS.TRAIN", ("a", "b"), "DATASETS.TEST", ("c",))
    lines = EXPORT["overrides"](cfg, {"b": "b.pkl", "a": "a.pkl", "d": "d.pkl"})
    assert [line.strip() for line in lines] == [
        """DATASETS.TRAIN "('a', 'b')" DATASETS.PROPOSAL_FILES_TRAIN "('a.pkl', 'b.pkl')\"""",
        """DATASETS.TRAIN "('d',)" DATASETS.PROPOSAL_FILES_TRAIN "('d.pkl',)\"""",
        """DATASETS.TEST "('d',)" DATASETS.PROPOSAL_FILES_TEST "('d.pkl',)\"""",
    ]


def image_proposals(rows):
    """Of rows x1, y1, x2, y2, logit."""
    rows = np.array(rows, np.float32).reshape(-1, 5)
    return ImageProposals(rows[:, :4], rows[:, 4], SIZE)


def selected(rows, top=None):
    result = select_proposals(image_proposals(rows), top)
    assert result.boxes.dtype == result.objectness_logits.dtype == np.float32
    assert result.boxes.shape == (len(result.objectness_logits), 4)
    return np.column_stack([result.boxes, result.objectness_logits]).tolist()


def test_duplicates_go_before_the_top_is_taken():
    a, b, c = [1, 1, 9, 9], [2, 2, 8, 8], [2, 2, 8, 8.5]
    rows = [[*a, 5], [*b, 4], [*a, 3], [*b, 2], [*c, 1], [*a, 0]]
    assert selected(rows) == [[*a, 5], [*b, 4], [*c, 1]]
    assert selected(rows, 3) == [[*a, 5], [*b, 4], [*c, 1]]
    assert selected(rows, 2) == [[*a, 5], [*b, 4]]
    # Boxes that clipping makes equal are duplicates, too; zeros are equal whatever their sign.
    rows = [[-3, 0, 9, 70, 2], [0, -0.0, 9, 64, 1], [-0.0, -9, 9, 99, 0]]
    assert selected(rows) == [[0, 0, 9, 64, 2]]


def test_what_cannot_be_trained_on_is_left_out():
    nan, inf = np.nan, np.inf
    rows = [[0, 0, inf, 5, 9], [0, nan, 5, 5, 8], [1, 1, 2, 2, 7], [3, 3, 3, 9, 6],
            [5, 9, 7, 8, 5], [81, 2, 90, 9, 4], [70, 60, 99, 99, 3], [1, 1, 5, 5, -inf],
            [1, 1, 6, 6, nan]]  # fmt: skip
    assert selected(rows) == [[1, 1, 2, 2, 7], [70, 60, 80, 64, 3]]
    assert selected([]) == [] and selected([[9, 9, 9, 9, 1]], 5) == []


def test_detectron2_keeps_the_order_of_equal_scores():
    rows = [[0, 0, 5, 1 + x, score] for x, score in enumerate([2] * 20 + [-1] * 20)]
    result = select_proposals(image_proposals(rows))
    assert np.abs(result.objectness_logits - image_proposals(rows).objectness_logits).max() < 1e-5
    order = result.objectness_logits.argsort()[::-1]  # detectron2.data.build
    assert order.tolist() == list(range(40))


def brute_force(rows, top):
    kept = []
    for row in rows:
        if row[:4] not in [x[:4] for x in kept]:
            kept.append(row)
    return kept[:top]


def test_duplicates_by_brute_force():
    rng = np.random.default_rng(0)
    for top in (1, 5, 40, None):
        corners = rng.integers(0, 3, (60, 2, 2))
        corners.sort(axis=1)
        corners[:, 1] += 1
        logits = np.linspace(3, -3, 60, dtype=np.float32)[:, None]
        rows = np.concatenate([corners.reshape(-1, 4), logits], axis=1).astype(np.float32)
        assert selected(rows, top) == brute_force(rows.tolist(), top)


def output(*rows):
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    boxes, logits = Boxes(rows[:, :4]), rows[:, 4]
    return {"proposals": Instances(SIZE, proposal_boxes=boxes, objectness_logits=logits)}


def test_an_interrupted_write_leaves_the_old_file(tiny_coco, tmp_path, monkeypatch):
    path = tmp_path / "files" / "tiny_val.pkl"
    exporter = ProposalExporter("tiny_val", path, distributed=False)
    # Unsorted; the last two images were not seen.
    exporter.process(
        [{"image_id": 2}, {"image_id": 1}], [output([1, 1, 5, 5, 0], [2, 2, 7, 7, 3]), output()]
    )
    assert exporter.evaluate() == {"images": 4, "proposals": 0.5}
    ids, boxes, logits = read_proposal_file(path)
    assert ids == [1, 2, 3, 4]
    assert boxes[1].tolist() == [[2, 2, 7, 7], [1, 1, 5, 5]] and logits[1].tolist() == [3, 0]
    for index in (0, 2, 3):
        assert boxes[index].shape == (0, 4) and logits[index].shape == (0,)
    assert {x.dtype for x in (*boxes, *logits)} == {np.dtype(np.float32)}
    content = path.read_bytes()

    def interrupted(writer):
        raise KeyboardInterrupt

    exporter.reset()
    exporter.process([{"image_id": 3}], [output([1, 1, 5, 5, 0])])
    # All is written but the end.
    monkeypatch.setattr(precomputed_format._PickleWriter, "end_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exporter.evaluate()
    assert path.read_bytes() == content and os.listdir(path.parent) == [path.name]


def export_in_processes(folder):
    """Run in each of two processes: each sees two images, both see the image 2."""
    with registered(folder / "datasets" / "coco"):
        exporter = ProposalExporter("tiny_val", folder / "tiny_val.pkl")
        for image_id in (1, 2) if comm.is_main_process() else (4, 2):
            exporter.process([{"image_id": image_id}], [output([0, 0, 9, 9 + image_id, 1])])
        written = exporter.evaluate()
    assert written == ({"images": 4, "proposals": 0.75} if comm.is_main_process() else {})


@pytest.mark.slow
def test_several_processes_write_one_file(tmp_path):
    write_tiny_coco(tmp_path / "datasets")
    launch_processes(export_in_processes, tmp_path, 2, dist_url="auto")
    ids, boxes, _ = read_proposal_file(tmp_path / "tiny_val.pkl")
    assert ids == [1, 2, 3, 4]
    ends = [boxes_i[:, 3].tolist() for boxes_i in boxes]
    assert ends == [[10], [11], [], [13]]


def test_models_without_a_generator_of_their_own(tiny_coco, tmp_path):
    config = "shapes/fast_rcnn_precomputed.yaml"
    line = stop_line(tmp_path, checkpoint(tmp_path / "x.pth", config), config=config)
    assert "this GeneralizedRCNN has precomputed proposals" in line
    with pytest.raises(ValueError, match="this Linear has no generator"):
        proposal_network_of(torch.nn.Linear(1, 1))


def test_bad_arguments(weights, tmp_path, capsys):
    assert "Unknown dataset 'tiny_vla'" in stop_line(
        tmp_path, weights, "--datasets", "tiny_vla", "--top", "3"
    )
    for options in (["--top", "0"], ["--output", str(weights)]):
        with pytest.raises(SystemExit) as stop:
            export_files(tmp_path, weights, *options)
        assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--top must be at least 1, not 0" in error and "is a file" in error
    with pytest.raises(ValueError, match="at least 1 proposal"):
        ProposalExporter("tiny_val", tmp_path / "x.pkl", top=0)


@pytest.mark.parametrize(
    ("ids", "message"), [((1, "1"), "occurs more than once"), ((1, None), "has no 'image_id'")]
)
def test_datasets_whose_images_cannot_be_told_apart(tiny_coco, monkeypatch, ids, message):
    records = [{"image_id": x} if x else {} for x in ids]
    monkeypatch.setattr(export.DatasetCatalog, "get", lambda name: records)
    with pytest.raises(ValueError, match=message):
        ProposalExporter("tiny_val", Path("x.pkl"))
