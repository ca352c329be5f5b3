"""Tests of tables of experiments: their runs and tools/run_table.py."""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from torch import nn

from d2proposals.data.coco_files import register_coco_files
from d2proposals.engine import experiments
from d2proposals.engine.experiment_tables import Run, is_untrained, read_table, result_file
from d2proposals.engine.experiments import lacking_trainings, run_overrides, trained_folder
from d2proposals.engine.job import fit_to_device
from d2proposals.engine.labelled_images import labelled_test_images
from d2proposals.engine.result_pages import format_rows, read_rows
from d2proposals.engine.trained_model import load_trained_model
from d2proposals.evaluation.fixed_grid import evaluate_fixed_grid
from d2proposals.spop.localization_error import measure_localization
from tests.common import ROOT, forgotten_datasets, make_cfg, run_tool
from tests.engine.experiment_results import CONFIG, result, row, write_table
from tests.engine.tiny_coco import write_tiny_coco
from tools import run_table

PRECOMPUTED = "configs/shapes/fast_rcnn_precomputed.yaml"
A = "{name: a, label: a, config: c}"
OF_A = "{name: b, label: b, config: c, proposals_of: a}"


def test_runs_of_a_table(tmp_path):
    table = write_table(
        tmp_path / "t.yaml",
        [row(seeds=[1, 2], overrides=["A", 3]), row("zip")],
        overrides=["A", 1, "B", "x"],
    )
    first, second, third = read_table(table)
    assert (first.name, second.name, third.name) == ("rpn-1", "rpn-2", "zip-1")
    assert second == Run("t", "rpn", "RPN", CONFIG, ("A", 1, "B", "x", "A", 3), 2)
    assert result_file(table, second) == tmp_path / "t" / "rpn-2.json"
    # Later ones hold: the row's above the table's, the user's above both, the folder above all.
    assert run_overrides(second, "out", ["C", 4]) == [
        *("A", "1", "B", "x", "A", "3", "SEED", "2", "C", "4", "OUTPUT_DIR", "out/t/rpn-2")
    ]


def test_a_row_with_the_weights_of_another(tmp_path, monkeypatch):
    rows = [{"name": "less", "label": "L", "weights_of": "full", "overrides": ["A", 2]}]
    rows += [row("full", seeds=[1, 2], overrides=["A", 1], base=None), row("other", base="less")]
    # With settings that were found for one of the networks.
    rows += [{"name": "tuned", "label": "T", "weights_of": "full", "seeds": [2], "base": None}]
    runs = read_table(write_table(tmp_path / "t.yaml", rows, overrides=["B", 3]))
    names = ["less-1", "less-2", "full-1", "full-2", "other-1", "tuned-2"]
    assert [run.name for run in runs] == names and runs[-1].trained_name == "full-2"
    assert [run.base for run in runs] == [None, None, None, None, "less", None]
    less = runs[1]
    # Its own overrides come last; the rest is the other row's, those of all rows once.
    assert less.overrides == ("B", 3, "A", 1, "A", 2) and less.num_trained_overrides == 4
    assert (less.config, less.weights_of, less.trained_name) == (CONFIG, "full", "full-2")
    assert trained_folder(less, "out") == trained_folder(runs[3], "out") == Path("out/t/full-2")
    # It has a folder of its own, but no training.
    assert run_overrides(less, "out")[-1] == "out/t/less-2"
    monkeypatch.setattr(experiments.subprocess, "run", None)
    experiments.train(less, tmp_path)
    with pytest.raises(FileNotFoundError, match="full-2/model_final.pth, .* train full-2"):
        experiments.measure(less, tmp_path)


def of_proposals(name="fast", other="rpn", **content):
    return row(name, config=PRECOMPUTED, proposals_of=other, **content)


def test_a_row_on_the_proposals_of_another(tmp_path):
    few = {"name": "few", "label": "F", "weights_of": "fast", "overrides": ["C", 4]}
    rows = [few, of_proposals(seeds=[2], overrides=["A", 2]), of_proposals("all")]
    rows += [row("rpn", seeds=[1, 2], overrides=["A", 1])]
    runs = {
        x.name: x for x in read_table(write_table(tmp_path / "t.yaml", rows, overrides=["B", 3]))
    }
    # Without seeds of its own, it has the other row's.
    assert list(runs) == ["few-2", "fast-2", "all-1", "all-2", "rpn-1", "rpn-2"]
    fast = runs["fast-2"]
    assert (fast.config, fast.overrides) == (PRECOMPUTED, ("B", 3, "A", 2))
    assert fast.trained_name == "fast-2" and runs["all-1"].proposals_of == runs["rpn-1"]
    # What has its weights has its proposals.
    assert fast.proposals_of == runs["few-2"].proposals_of == runs["rpn-2"]
    assert runs["rpn-2"].overrides == ("B", 3, "A", 1) and runs["rpn-2"].proposals_of is None


@pytest.fixture
def commands(monkeypatch):
    """What is run instead of being run; an export writes its files."""
    started = []

    def run(command, stdout, stderr):
        started.append(command[1:])
        if "--output" in command:
            names = command[command.index("--datasets") + 1 : command.index("--output")]
            for name in names:
                Path(command[command.index("--output") + 1], f"{name}.pkl").touch()
        return experiments.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(experiments.subprocess, "run", run)
    monkeypatch.setattr(experiments, "_commit", lambda: None)
    monkeypatch.chdir(ROOT)
    return started


def test_proposals_are_exported_where_they_are_missing(tmp_path, commands):
    sets = ["DATASETS.TRAIN", "('d2p_shapes_train_300','d2p_shapes_val')"]
    few = {"name": "few", "label": "F", "weights_of": "fast"}
    few["overrides"] = ["DATASETS.TEST", "('d2p_shapes_train',)"]
    rows = [row(overrides=["MODEL.RPN.NMS_THRESH", 0.5]), of_proposals(overrides=sets), few]
    rpn, fast, few = read_table(write_table(tmp_path / "t.yaml", rows))
    with pytest.raises(FileNotFoundError, match="fast-1 needs .* is missing: train rpn-1"):
        experiments.train(fast, tmp_path)
    assert not commands and not (tmp_path / "t" / "fast-1").exists()
    weights = trained_folder(rpn, tmp_path) / "model_final.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    folder = weights.parent / "proposals"
    folder.mkdir()
    (folder / "d2p_shapes_val.pkl").touch()
    experiments.train(fast, tmp_path, ["MODEL.DEVICE", "cpu"])
    export, training = commands
    # With the other row's configuration and overrides, and what the user says of the machine.
    assert export == [
        *("tools/export_proposals.py", "--config-file", CONFIG),
        *("--datasets", "d2p_shapes_train_300", "--output", str(folder)),
        *("MODEL.RPN.NMS_THRESH", "0.5", "SEED", "1", "MODEL.DEVICE", "cpu"),
        *("OUTPUT_DIR", str(weights.parent), "MODEL.WEIGHTS", str(weights)),
    ]
    train, test = (str(folder / f"d2p_shapes_{name}.pkl") for name in ("train_300", "val"))
    assert training[:3] == ["train_net.py", "--config-file", PRECOMPUTED]
    keys = dict(zip(training[4::2], training[5::2], strict=True))
    assert keys["MODEL.LOAD_PROPOSALS"] == "True"
    assert keys["DATASETS.PROPOSAL_FILES_TRAIN"] == str((train, test))
    # There is no test during the training.
    assert keys["DATASETS.TEST"] == keys["DATASETS.PROPOSAL_FILES_TEST"] == "()"
    measured = experiments.proposal_overrides(fast, tmp_path, parts=["TEST"])
    assert measured[2:] == ["DATASETS.PROPOSAL_FILES_TEST", str((test,))]
    assert len(commands) == 2
    # Trained anew since then: other weights have other proposals.
    later = (folder / "d2p_shapes_val.pkl").stat().st_mtime + 1
    os.utime(weights, (later, later))
    experiments.proposal_overrides(fast, tmp_path, parts=["TEST"])
    assert commands.pop()[:5] == [*export[:4], "d2p_shapes_val"]
    # Datasets of its own, proposals of the row that its weights learned from.
    experiments.proposal_overrides(few, tmp_path, parts=["TEST"])
    assert commands[2][:5] == [*export[:4], "d2p_shapes_train"]
    assert experiments.proposal_overrides(rpn, tmp_path) == []


def test_a_row_of_no_iterations_is_the_untrained_network(tmp_path, monkeypatch):
    (run,) = read_table(write_table(tmp_path / "t.yaml", [row(overrides=["SOLVER.MAX_ITER", 0])]))
    monkeypatch.setattr(experiments.subprocess, "run", None)
    experiments.train(run, tmp_path)
    weights = []

    def measured(cfg, model):
        weights.append([x.clone() for x in model.proposal_generator.parameters()])
        return {"box_proposals": {"AR@100": 1.0}}

    monkeypatch.setattr(experiments, "check_datasets", lambda names: None)
    monkeypatch.setattr(experiments.Trainer, "test", measured)
    results = [experiments.measure(run, tmp_path, ["MODEL.DEVICE", "cpu"]) for _ in range(2)]
    assert results[0]["training"]["iterations"] == 0 and results[0]["training"]["hours"] is None
    # Test-time augmentation, where a row has it, is measured beside.
    monkeypatch.setattr(
        experiments.Trainer, "test_with_TTA", lambda cfg, model: {"box_proposals_TTA": {"AR@1": 2}}
    )
    opts = ["MODEL.DEVICE", "cpu", "TEST.AUG.ENABLED", True]
    metrics = experiments.measure(run, tmp_path, opts)["metrics"]
    assert metrics == {"box_proposals": {"AR@100": 1.0}, "box_proposals_TTA": {"AR@1": 2}}
    # Random, and the same each time: as the seed says.
    assert all(torch.equal(a, b) for a, b in zip(*weights[:2], strict=True))


def test_a_row_of_the_fixed_grid_has_no_network(tmp_path, monkeypatch, capsys):
    grid = {"name": "grid", "label": "30 boxes", "fixed_grid": 30}
    table = write_table(
        tmp_path / "t.yaml", [grid], overrides=["DATASETS.TEST", "('d2p_shapes_val',)"]
    )
    (run,) = read_table(table)
    assert (run.fixed_grid, run.config, run.seed) == (30, "", 1) and is_untrained(run)
    monkeypatch.setattr(experiments.subprocess, "run", None)
    run_table.main(["--table", str(table), "--folder", str(tmp_path)])
    assert "training" not in capsys.readouterr().out
    (row_,) = read_rows(table).values()
    written = row_.results[1]
    expected = evaluate_fixed_grid("d2p_shapes_val", num_boxes=30)["box_proposals"]
    recall = written["metrics"]["box_proposals"]["AR@100"]
    assert recall == pytest.approx(expected["AR@100"], abs=0.01) and recall > 0
    # Measured as the others are, and as its user says.
    main = ["--table", str(table), "--folder", str(tmp_path), "--again"]
    run_table.main([*main, "TEST.PROPOSALS.LIMITS", "(7,)"])
    assert "AR@7" in read_rows(table)["grid"].results[1]["metrics"]["box_proposals"]
    with pytest.raises(SystemExit, match="grid-1: a row is measured on one dataset, .* has 2"):
        run_table.main([*main, "DATASETS.TEST", "('d2p_shapes_val','d2p_shapes_train')"])
    columns = ["AR@100", "iterations", "batch", "config", "data", "hours", "s/image", "commit"]
    line = format_rows({"grid": row_}, columns).splitlines()[-1]
    assert line == f"| 30 boxes | {expected['AR@100']:.1f} |  |  |  |  |  |  |  |"


def test_a_row_of_a_network_s_own_measures(tmp_path, monkeypatch):
    overrides = ["DATASETS.TEST", "('d2p_shapes_val',)", "MODEL.DEVICE", "cpu"]
    overrides += ["INPUT.WARP_SIZE", "(64, 64)"]
    rows = [{**row("spop", overrides=overrides), "config": "configs/shapes/spop_rpn_only.yaml"}]
    rows += [
        {"name": "e", "label": "E", "weights_of": "spop", "measures": "localization_errors"},
        {"name": "f", "label": "F", "weights_of": "spop"},
    ]
    spop, errors, proposals = read_table(write_table(tmp_path / "t.yaml", rows))
    assert [run.measures for run in (spop, errors, proposals)] == [None, errors.measures, None]
    monkeypatch.setattr(experiments.Trainer, "test", lambda cfg, model: {"box_proposals": {}})
    cfg = experiments._load_config(spop, run_overrides(spop, tmp_path))
    fit_to_device(cfg)
    cfg.MODEL.WEIGHTS = ""
    seed_all_rng(3)
    model = load_trained_model(cfg)
    trained = trained_folder(spop, tmp_path)
    trained.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, trained / "model_final.pth")
    assert experiments.measure(proposals, tmp_path)["metrics"] == {"box_proposals": {}}
    measured = experiments.measure(errors, tmp_path)
    assert measured["test"]["seconds_per_image"] is None and measured["weights_of"] == "spop"
    expected = measure_localization(model, labelled_test_images(cfg)).metrics()
    assert measured["metrics"].keys() == expected.keys() and len(expected) == 6
    task = expected["small_size_on_small"]
    assert task["cells"] > 0 and measured["metrics"]["small_size_on_small"] == pytest.approx(
        task, abs=0.01
    )


def test_overrides_that_several_rows_have(tmp_path):
    (tmp_path / "t.yaml").write_text(
        "rows:\n"
        "  - {name: a, label: a, config: c, overrides: [&set [A, 1, B, 2], C, [3, 4]]}\n"
        "  - {name: b, label: b, config: c, overrides: [D, 5, *set]}\n"
    )
    first, second = read_table(tmp_path / "t.yaml")
    # A list in the place of a value is a value.
    assert first.overrides == ("A", 1, "B", 2, "C", [3, 4])
    assert second.overrides == ("D", 5, "A", 1, "B", 2)


def test_rows_that_train_come_first(tmp_path, monkeypatch):
    rows = [{"name": "y", "label": "y", "weights_of": "w"}, of_proposals("w", "x"), row("x")]
    rows += [row("z")]
    table = write_table(tmp_path / "t.yaml", rows)
    names = []

    def started(command):
        names.append(command[command.index("--rows") + 1])
        return experiments.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(experiments.subprocess, "run", started)
    run_tool("run_table", "--table", table, "--folder", tmp_path)
    assert names == ["x-1", "z-1", "w-1", "y-1"]


def test_what_rows_need_is_trained_first(tmp_path, monkeypatch):
    rows = [{"name": "y", "label": "y", "weights_of": "w"}, of_proposals("w", "x"), row("x")]
    rows += [row("z")]
    table = write_table(tmp_path / "t.yaml", rows)
    of = {run.row: run for run in read_table(table)}
    # As in a clone: x and w have results, and were trained elsewhere.
    for name in "xwz":
        experiments.write_result(table, of[name], result())
    seen = []
    monkeypatch.setattr(run_table, "train", lambda run, *rest: seen.append(("train", run.name)))
    monkeypatch.setattr(run_table, "measure", lambda run, *rest: seen.append(("measure", run.name)))
    monkeypatch.setattr(run_table, "write_result", lambda table, run, content: table)
    main = ["--table", str(table), "--folder", str(tmp_path)]
    run_table.main(main)
    assert seen == [("train", "x-1"), ("train", "w-1"), ("measure", "y-1")]

    stages = {}
    monkeypatch.setattr(
        run_table,
        "in_own_process",
        lambda args, run, stage: stages.update({run.name: stage}) or 0,
    )
    run_table.main([*main, "--again", "--rows", "y", "z"])
    expected = [("x-1", "train"), ("z-1", "all"), ("w-1", "train"), ("y-1", "all")]
    assert list(stages.items()) == expected

    # What is there is not trained again.
    (trained_folder(of["w"], tmp_path) / "model_final.pth").parent.mkdir(parents=True)
    (trained_folder(of["w"], tmp_path) / "model_final.pth").touch()
    proposals = trained_folder(of["x"], tmp_path) / "proposals"
    assert [x.name for x in lacking_trainings([of["y"]], list(of.values()), tmp_path)] == ["x-1"]
    proposals.mkdir(parents=True)
    assert [x.name for x in lacking_trainings([of["y"]], list(of.values()), tmp_path)] == ["x-1"]
    (proposals / "d2p_shapes_val.pkl").touch()
    assert lacking_trainings([of["y"]], list(of.values()), tmp_path) == []
    # Nor is anything in a process that has one run to do, whose need failed,
    seen.clear()
    run_table.main([*main[:2], "--folder", "nowhere", "--rows", "y", "--alone"])
    assert seen == [("measure", "y-1")]
    # and where only a measurement is wanted.
    seen.clear()
    run_table.main([*main[:2], "--folder", "nowhere", "--rows", "y", "--stage", "measure"])
    assert seen == [("measure", "y-1")]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("rows: 3", "has no list 'rows'"),
        ("rows: [{name: a, label: b}]", "lacks config"),
        ("rows: [{name: a, label: b, config: c, seed: 1}]", "row a: unknown seed"),
        ("rows: [{name: a, label: b, config: c, overrides: [KEY]}]", "'overrides' of row a"),
        ("rows: [{name: a, label: b, config: c, seeds: [1, 1]}]", "row a has a seed twice"),
        ("rows: [{name: a, label: b, config: c, seeds: 2}]", "'seeds' of row a is not a list"),
        (f"rows: [{A}, {A}]", "several rows have the name a"),
        (
            f"rows: [{A}, {{name: b, label: b, weights_of: c}}]",
            "'weights_of' of row b: there is no row c",
        ),
        (
            f"rows: [{A}, {{name: b, label: b, weights_of: a, config: c}}]",
            "row b: unknown config beside weights_of",
        ),
        (
            f"rows: [{A}, {{name: b, label: b, weights_of: a}}, {{name: d, label: d, "
            "weights_of: b}]",
            "row d has weights of b, untrained",
        ),
        ("rows: [{name: a, label: b, proposals_of: a}]", "lacks config"),
        (f"rows: [{OF_A}]", "'proposals_of' of row b: there is no row a"),
        (
            f"rows: [{A}, {{name: b, label: b, weights_of: a, proposals_of: a}}]",
            "row b: unknown proposals_of beside weights_of",
        ),
        (
            f"rows: [{A}, {OF_A}, {{name: d, label: d, config: c, proposals_of: b}}]",
            "row d has proposals of b, which has proposals_of itself",
        ),
        (
            f"rows: [{{name: a, label: a, weights_of: d}}, {OF_A}, "
            "{name: d, label: d, config: c}]",
            "row b has proposals of a, which has weights_of itself",
        ),
        (
            f"rows: [{OF_A}, {{name: a, label: a, config: c, overrides: [SOLVER.MAX_ITER, 0]}}]",
            "row b has proposals of a, untrained",
        ),
        (
            f"rows: [{A}, {{name: b, label: b, config: c, proposals_of: a, seeds: [1, 2, 3]}}]",
            "row b has seeds that a lacks: 2, 3",
        ),
        ("rows: [{name: a, label: b, config: c, base: c}]", "'base' of row a: there is no row c"),
        ("rows: [{name: a, label: b, config: c, paper: 3}]", "'paper' of row a"),
        ("rows: []\ntrain: output", "unknown train"),
        ("rows: [{name: a, label: b, fixed_grid: yes}]", "'fixed_grid' of row a is not a number"),
        (
            "rows: [{name: a, label: b, fixed_grid: 9, seeds: [1]}]",
            "row a: unknown seeds beside fixed_grid",
        ),
        (
            f"rows: [{{name: a, label: a, fixed_grid: 9}}, {OF_A}]",
            "row b has proposals of a, which has fixed_grid itself",
        ),
        (
            "rows: [{name: a, label: a, fixed_grid: 9}, {name: b, label: b, weights_of: a}]",
            "row b has weights of a, untrained",
        ),
        (
            f"rows: [{A}, {{name: b, label: b, weights_of: a, seeds: [1, 2]}}]",
            "row b has seeds that a lacks: 2",
        ),
        (
            f"rows: [{A}, {{name: b, label: b, weights_of: a, measures: errors}}]",
            "'measures' of row b is errors, not one of localization_errors",
        ),
        (
            "rows: [{name: a, label: b, config: c, measures: localization_errors}]",
            "row a: unknown measures",
        ),
        (
            f"rows: [{A.replace('}', ', seeds: [1, 2]}')}, {{name: a-2, label: b, config: c}}]",
            "a-2 is the name of a row and of another one's run",
        ),
        ("rows: [", "is not YAML"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path, content, line):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(ValueError, match=line):
        read_table(tmp_path / "t.yaml")
    with pytest.raises(FileNotFoundError, match="none.yaml is missing"):
        read_table(tmp_path / "none.yaml")


@pytest.mark.slow
def test_train_and_measure_a_run(tmp_path, monkeypatch, capsys):
    write_tiny_coco(tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    coco = tmp_path / "coco"
    files = [
        [name, str(coco / "annotations" / f"instances_{split}.json"), str(coco / split)]
        for name, split in (("mine_train", "train2017"), ("mine_val", "val2017"))
    ]
    overrides = ["DATASETS.TRAIN", "('mine_train',)", "DATASETS.TEST", "('mine_val',)"]
    overrides += ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "INPUT.MIN_SIZE_TEST", 64]
    few = {"name": "few", "label": "FEW", "weights_of": "rpn"}
    few["overrides"] = ["MODEL.RPN.POST_NMS_TOPK_TEST", 1]
    rows = [row(overrides=overrides), few, of_proposals(overrides=overrides)]
    table = write_table(tmp_path / "t.yaml", rows)
    folder = tmp_path / "runs"
    opts = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", 2, "DATASETS.COCO_FILES", files]
    command = ["--table", table, "--folder", folder]
    with forgotten_datasets() as names:
        names += ["mine_train", "mine_val"]
        register_coco_files(files)
        # All here, one after the other; several rows at once have a process each.
        for name in ("rpn", "few", "fast"):
            run_tool("run_table", "--rows", name, *command, *opts)
    result = json.loads((tmp_path / "t" / "rpn-1.json").read_text())
    assert result["config"] == CONFIG and result["seed"] == 1
    # Nothing of this machine is in it.
    assert result["overrides"] == [*overrides, "SOLVER.IMS_PER_BATCH", "2"]
    assert str(tmp_path) not in json.dumps(result)
    training = result["training"]
    assert (training["iterations"], training["images_seen"]) == (2, 4)
    assert training["datasets"] == ["mine_train"] and training["device"].startswith("CPU")
    # What the training had, whatever measures it.
    (folder / "t" / "rpn-1" / "device.txt").write_text("some GPU")
    assert experiments.training_facts(make_cfg(CONFIG.removeprefix("configs/")),
                                      folder / "t" / "rpn-1")["device"] == "some GPU"  # fmt: skip
    (folder / "t" / "rpn-1" / "device.txt").write_text(training["device"])
    # Of the whole process, in MB, as its log says.
    log = (folder / "t" / "rpn-1" / "log.txt").read_text()
    assert f"max_mem: {training['peak_memory_mb']}M" in log
    assert result["commit"] == ((folder / "t" / "rpn-1" / "commit.txt").read_text() or None)
    recall = result["metrics"]["box_proposals"]["AR@100"]
    assert 0 <= recall <= 100
    shared = json.loads((tmp_path / "t" / "few-1.json").read_text())
    assert shared["training"] == training and shared["weights_of"] == "rpn"
    # One box an image, and the best of the trained network.
    assert (
        shared["metrics"]["box_proposals"]["AR@100"] == result["metrics"]["box_proposals"]["AR@1"]
    )
    assert not (folder / "t" / "few-1" / "model_final.pth").exists()
    fast = json.loads((tmp_path / "t" / "fast-1.json").read_text())
    assert (fast["proposals_of"], fast["config"]) == ("rpn", PRECOMPUTED)
    assert fast["overrides"] == result["overrides"] and str(tmp_path) not in json.dumps(fast)
    # The best proposal of each image is the other network's.
    recalls = fast["metrics"]["box_proposals"], result["metrics"]["box_proposals"]
    assert recalls[0]["AR@1"] == recalls[1]["AR@1"] and "bbox" in fast["metrics"]
    # Finished: neither trained nor measured again.
    monkeypatch.setattr(experiments.subprocess, "run", None)
    run_tool("run_table", *command, *opts)
    run_tool("run_table", *command, "--list")
    assert capsys.readouterr().out.endswith("few-1: finished\nfast-1: finished\n")
    # Unless it is asked for.
    (tmp_path / "t" / "few-1.json").write_text("{}")
    run_tool("run_table", "--rows", "few", "--again", *command, *opts)
    again = json.loads((tmp_path / "t" / "few-1.json").read_text())
    assert again["metrics"] == shared["metrics"]


def test_again_runs_what_has_a_result(tmp_path, monkeypatch):
    table = write_table(tmp_path / "t.yaml", [row(), row("zip")])
    for run in read_table(table):
        experiments.write_result(table, run, result())
    names = []

    def note(command, **settings):
        names.append(command[command.index("--rows") + 1])
        assert "--again" in command
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", note)
    run_tool("run_table", "--table", table)
    assert names == []
    run_tool("run_table", "--again", "--table", table)
    assert names == ["rpn-1", "zip-1"]


def test_a_training_goes_on_and_a_failure_has_its_line(tmp_path, monkeypatch):
    (run,) = read_table(write_table(tmp_path / "t.yaml", [row()]))
    commands = []

    def failing(command, stdout, stderr):
        commands.append(command)
        stdout.write("some\nError: no such key\n")
        return experiments.subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(experiments.subprocess, "run", failing)
    monkeypatch.setattr(experiments, "_commit", lambda: "abc1234")
    with pytest.raises(ValueError, match="rpn-1: Error: no such key"):
        experiments.train(run, tmp_path)
    assert commands[0][:5] == [sys.executable, "train_net.py", "--config-file", CONFIG, "--resume"]
    folder = tmp_path / "t" / "rpn-1"
    assert (folder / "commit.txt").read_text() == "abc1234"
    # The commit is that of the first iteration: a later one without a checkpoint to go on from.
    for commit, begun in (("def5678", "def5678"), ("9999999", "def5678")):
        monkeypatch.setattr(experiments, "_commit", lambda commit=commit: commit)
        with pytest.raises(ValueError, match="no such key"):
            experiments.train(run, tmp_path)
        assert (folder / "commit.txt").read_text() == begun
        (folder / "last_checkpoint").touch()
    (folder / "model_final.pth").touch()
    experiments.train(run, tmp_path)
    assert len(commands) == 3


def test_a_training_with_other_settings_is_no_row_s(tmp_path, commands, monkeypatch):
    """Whose table was edited since: its figures would stand beside iterations it never had."""
    few = {"name": "few", "label": "F", "weights_of": "rpn"}
    few["overrides"] = ["MODEL.RPN.NMS_THRESH", 0.5]

    def read(*overrides):
        rows = [row(overrides=["SOLVER.MAX_ITER", 9, *overrides]), few]
        return read_table(write_table(tmp_path / "t.yaml", rows))

    run, test_alone = read()
    opts = ["SOLVER.BASE_LR", 0.5, "MODEL.DEVICE", "cpu"]
    experiments.train(run, tmp_path, opts)
    folder = trained_folder(run, tmp_path)
    # The machine's own may differ, and what is of the test.
    same = [*opts[:2], "MODEL.RPN.POST_NMS_TOPK_TEST", 7, "TEST.PROPOSALS.LIMITS", "(1,)"]
    for file in ("last_checkpoint", "model_final.pth"):
        (folder / file).touch()
        experiments.train(run, tmp_path, same)
        with pytest.raises(ValueError, match=r"rpn-1: .*rpn-1 has .*: SOLVER.BASE_LR is 0.5, not"):
            experiments.train(run, tmp_path)
    assert len(commands) == 2
    measure = functools.partial(experiments._check_settings, trained=folder, is_measured=True)
    measure(test_alone, opts=opts)
    measure(run, opts=[*opts, "MODEL.RPN.NMS_THRESH", 0.9])
    edited, few_edited = read("MODEL.RPN.IOU_THRESHOLDS", [0.2, 0.8])
    key = "MODEL.RPN.IOU_THRESHOLDS is .0.3, 0.7., not .0.2, 0.8.. Remove"
    for call, message in (
        (lambda: experiments.measure(test_alone, tmp_path), "SOLVER.BASE_LR is 0.5"),
        (lambda: experiments.train(edited, tmp_path, opts), key),
        (lambda: experiments.measure(edited, tmp_path, opts), key),
        (lambda: experiments.measure(few_edited, tmp_path, opts), key),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    # Of another start, wherever that is, though not of the machine's own weights.
    start = functools.partial(experiments.train, run, tmp_path)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is nothing, not b.pth"):
        start([*opts, "MODEL.WEIGHTS", "a/b.pth"])
    start([*opts, "MODEL.TORCHVISION.WEIGHTS", "a/b.pth"])
    # Of another row's proposals, of an edited configuration, and of a version without a key.
    other = dataclasses.replace(run, proposals_of=edited)
    with pytest.raises(ValueError, match="proposals_of is nothing, not rpn-1"):
        experiments.train(other, tmp_path, opts)
    settings = json.loads((folder / "settings.json").read_text())
    for changed in ({"SOLVER.GAMMA": "0.7"}, {"SOLVER.GONE": "1"}):
        (folder / "settings.json").write_text(json.dumps({**settings, **changed}))
        if "SOLVER.GAMMA" in changed:
            with pytest.raises(ValueError, match="SOLVER.GAMMA is 0.7, not 0.1"):
                experiments.train(run, tmp_path, opts)
        else:
            experiments.train(run, tmp_path, opts)
    # Of other commands, which write no settings.
    (folder / "settings.json").unlink()
    experiments.train(edited, tmp_path)


def test_unknown_rows_are_one_line(tmp_path, capsys):
    table = write_table(tmp_path / "t.yaml", [row()])
    with pytest.raises(SystemExit):
        run_tool("run_table", "--table", table, "--rows", "zap", "--list")
    assert "has no row zap; it has ['rpn', 'rpn-1']" in capsys.readouterr().err


def test_images_are_timed_after_the_first_ones():
    model = nn.Identity()
    with experiments.timed_images(model) as times:
        for _ in range(7):
            model(torch.zeros(1))
    model(torch.zeros(1))
    assert len(times) == 2 and min(times) >= 0


def test_commands_are_found_from_any_folder(tmp_path, commands, monkeypatch):
    (run,) = read_table(write_table(tmp_path / "t.yaml", [row(config=str(ROOT / CONFIG))]))
    monkeypatch.chdir(tmp_path)
    experiments.train(run, tmp_path / "runs")
    assert commands[0][0] == str(ROOT / "train_net.py")
