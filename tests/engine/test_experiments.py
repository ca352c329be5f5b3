"""Tests of d2proposals.engine.experiments, engine.result_pages and tools/run_table.py."""

import json
import sys

import pytest
import torch
import yaml
from torch import nn

from d2proposals.data.coco_files import register_coco_files
from d2proposals.engine import experiments
from d2proposals.engine.experiments import Run, read_table, result_file, run_overrides
from d2proposals.engine.result_pages import (
    fill_page,
    format_results,
    mean_and_spread,
    read_results,
    write_page,
)
from tests.common import ROOT, forgotten_datasets, run_tool
from tests.engine.tiny_coco import write_tiny_coco

CONFIG = "configs/shapes/rpn_only.yaml"


def write_table(path, rows, **content):
    path.write_text(yaml.safe_dump({"rows": rows, **content}))
    return path


def row(name="rpn", **content):
    return {"name": name, "label": name.upper(), "config": CONFIG, **content}


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


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("rows: 3", "has no list 'rows'"),
        ("rows: [{name: a, label: b}]", "lacks config"),
        ("rows: [{name: a, label: b, config: c, seed: 1}]", "row a: unknown seed"),
        ("rows: [{name: a, label: b, config: c, overrides: [KEY]}]", "'overrides' of row a"),
        ("rows: [{name: a, label: b, config: c, seeds: [1, 1]}]", "have the name a-1"),
        ("rows: []\ntrain: output", "unknown train"),
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
    table = write_table(tmp_path / "t.yaml", [row(overrides=overrides)])
    folder = tmp_path / "runs"
    opts = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", 2, "DATASETS.COCO_FILES", files]
    command = ["--table", table, "--folder", folder]
    with forgotten_datasets() as names:
        names += ["mine_train", "mine_val"]
        register_coco_files(files)
        run_tool("run_table", *command, *opts)
    result = json.loads((tmp_path / "t" / "rpn-1.json").read_text())
    assert result["config"] == CONFIG and result["seed"] == 1
    # Nothing of this machine is in it.
    assert result["overrides"] == [*overrides, "SOLVER.IMS_PER_BATCH", "2"]
    assert str(tmp_path) not in json.dumps(result)
    training = result["training"]
    assert (training["iterations"], training["images_seen"]) == (2, 4)
    assert training["datasets"] == ["mine_train"] and training["device"].startswith("CPU")
    assert result["commit"] == ((folder / "t" / "rpn-1" / "commit.txt").read_text() or None)
    assert 0 <= result["metrics"]["box_proposals"]["AR@100"] <= 100
    # Finished: neither trained nor measured again.
    monkeypatch.setattr(experiments.subprocess, "run", None)
    run_tool("run_table", *command, *opts)
    run_tool("run_table", *command, "--list")
    assert capsys.readouterr().out.endswith("rpn-1: finished\n")


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
    assert (tmp_path / "t" / "rpn-1" / "commit.txt").read_text() == "abc1234"
    (tmp_path / "t" / "rpn-1" / "model_final.pth").touch()
    experiments.train(run, tmp_path)
    assert len(commands) == 1


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


def result(seed=1, recall=20.0, **metrics):
    return {
        **{"label": "RPN", "seed": seed, "commit": "abc1234", "config": "configs/a.yaml"},
        "training": {"iterations": 10000, "seconds_per_iteration": 0.5, "peak_memory_mb": None},
        "metrics": {"box_proposals": {"AR@100": recall}, **metrics},
    }


def test_cells_of_a_table():
    results = {"rpn": [result(1, 20.0), result(2, 22.0, bbox={"AP": 3.14})]}
    columns = ["AR@100", "AR@7", "AP=bbox/AP", "iterations", "s/step", "MB", "seeds", "commit"]
    header, _, line = format_results(results, [*columns, "file=config"]).splitlines()
    assert header == "|  | AR@100 | AR@7 | AP | iterations | s/step | MB | seeds | commit | file |"
    # Sample standard deviation of 20 and 22.
    assert line == "| RPN | 21.0 ± 1.4 |  | 3.1 | 10,000 | 0.500 |  | 2 | abc1234 | `a.yaml` |"
    assert mean_and_spread([None, 1.25]) == "1.2"


def test_a_page_s_tables_are_written_anew(tmp_path):
    table = write_table(tmp_path / "t.yaml", [row(), row("zip")])
    (run, _) = read_table(table)
    experiments.write_result(table, run, result())
    assert list(read_results(table)) == ["rpn"]
    page = tmp_path / "page.md"
    mark = "<!-- results of t.yaml: AR@100 -->\n"
    page.write_text(f"before\n{mark}old\nolder\n<!-- end of results -->\nafter {mark}")
    assert write_page(page, tmp_path) == 1
    expected = "|  | AR@100 |\n| --- | ---: |\n| RPN | 20.0 |\n"
    assert page.read_text() == f"before\n{mark}{expected}<!-- end of results -->\nafter {mark}"
    assert fill_page(page.read_text(), tmp_path) == page.read_text()
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no line"):
        write_page(page, tmp_path)


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda page: page.name
)
def test_the_pages_say_what_the_result_files_say(page):
    text = page.read_text(encoding="utf-8")
    assert fill_page(text, ROOT) == text
