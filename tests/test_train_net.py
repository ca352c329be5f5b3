"""Tests of train_net.py: jobs from start to end, and what bad input is answered with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_net
from tests.common import CONFIGS
from tests.engine.tiny_coco import (
    CONFIG,
    make_args,
    write_tiny_coco,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = ("DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)")


def stop_line(capsys, args):
    """Run ``main``; return the line it stops with, after checking that there is no traceback."""
    with pytest.raises(SystemExit) as stop:
        train_net.main(args)
    line = str(stop.value)
    assert line.startswith("Error: ") and "\n" not in line
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return line


def test_setup_gives_a_frozen_configuration(tmp_path):
    cfg = train_net.setup(make_args("OUTPUT_DIR", tmp_path))
    assert cfg.is_frozen() and cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.slow
def test_train_then_evaluate(tiny_coco, tmp_path):
    out = tmp_path / "out"
    common = (*TINY, "OUTPUT_DIR", out, "TEST.AUG.ENABLED", True)
    train_net.main(make_args(*common))
    weights = ("MODEL.WEIGHTS", out / "model_final.pth")
    results = train_net.main(make_args(*common, *weights, eval_only=True))
    assert set(results) == {"box_proposals", "box_proposals_TTA"}
    # The same by --resume, which finds the last checkpoint; and what training measured at its end.
    resumed = train_net.main(make_args(*common, eval_only=True, resume=True))
    assert resumed == results
    measured = json.loads((out / "metrics.json").read_text().splitlines()[-1])
    assert measured["box_proposals/AR@100"] == pytest.approx(results["box_proposals"]["AR@100"])
    # The results are verified where the configuration says what to expect.
    recall = results["box_proposals"]["AR@100"]
    for expected, passes in [(recall, True), (recall + 5, False)]:
        opts = ("TEST.EXPECTED_RESULTS", f"[['box_proposals', 'AR@100', {expected}, 0.5]]")
        args = make_args(*common, *weights, *opts, eval_only=True)
        if passes:
            train_net.main(args)
            continue
        with pytest.raises(SystemExit) as stop:
            train_net.main(args)
        assert stop.value.code == 1


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("DATASETS.TRAIN", "('coco_2017_trian',)"), "Unknown dataset 'coco_2017_trian'"),
        (("MODEL.PROPOSAL_GENERATOR.NAME", "ZAP"), "Unknown MODEL.PROPOSAL_GENERATOR.NAME 'ZAP'"),
        (("SOLVER.MAX_ITERS", "3"), "Did you mean SOLVER.MAX_ITER"),
        (("MODEL.WEIGHTS", "gone.pth"), "Checkpoint gone.pth is missing"),
        (("--eval-only", "DATASETS.TEST", "()"), "DATASETS.TEST is empty: name what --eval-only"),
        (
            ("SOLVER.BASE_LR", "1e30", "SOLVER.MAX_ITER", "5"),
            "Lower the learning rate (SOLVER",
        ),
    ],
)
def test_bad_option(tiny_coco, tmp_path, capsys, opts, message):
    settings = {"eval_only": opts[0] == "--eval-only"}
    opts = opts[settings["eval_only"] :]
    args = make_args(*TINY, "OUTPUT_DIR", tmp_path / "out", *opts, **settings)
    assert message in stop_line(capsys, args)


def test_a_lazy_configuration_has_a_command_of_its_own(capsys):
    args = make_args()
    args.config_file = str(CONFIGS / "lazy" / "sc_rpn_only.py")
    assert "is a lazy configuration, which tools/train_lazy.py" in stop_line(capsys, args)


@pytest.mark.parametrize("eval_only", [False, True])
def test_missing_dataset(tiny_coco, tmp_path, capsys, eval_only):
    file = tiny_coco / "annotations" / "instances_val2017.json"
    file.unlink()
    args = make_args(*TINY, "OUTPUT_DIR", tmp_path / "out", eval_only=eval_only)
    line = stop_line(capsys, args)
    assert str(file) in line and "configs/shapes/ need no download" in line


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_image(tiny_coco, tmp_path, capsys, num_workers):
    for file in (tiny_coco / "train2017").iterdir():
        file.write_bytes(file.read_bytes()[:400])
    args = make_args(*TINY, "OUTPUT_DIR", tmp_path / "out", "DATALOADER.NUM_WORKERS", num_workers)
    assert ".jpg cannot be read (" in stop_line(capsys, args)


def test_masks_absent(tiny_coco, tmp_path, capsys):
    file = tiny_coco / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    file.write_text(json.dumps(content))
    args = make_args(*TINY, "OUTPUT_DIR", tmp_path / "out", "INPUT.USE_INSTANCE_MASK", True)
    assert "have no mask ('segmentation'), which INPUT.USE_INSTANCE_MASK" in stop_line(capsys, args)


def test_truncated_checkpoint(tiny_coco, tmp_path, capsys):
    out = tmp_path / "out"
    args = make_args(*TINY, "OUTPUT_DIR", out, "DATASETS.TEST", "()", resume=True)
    train_net.main(args)
    checkpoint = out / "model_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    line = stop_line(capsys, args)
    assert f"Checkpoint {checkpoint} (1000 bytes) cannot be read" in line
    assert str(out / "last_checkpoint") in line


def run_command(tmp_path, *arguments):
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(tmp_path / "datasets"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    coco = ("DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "('coco_2017_val',)")
    size = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.MAX_ITER", "2")
    command = [sys.executable, "train_net.py", "--config-file", CONFIG, *arguments, *coco, *size]
    return subprocess.run(
        [*command, "SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", str(tmp_path / "out")],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 600},
    )


@pytest.mark.slow
def test_two_processes_on_the_cpu(tmp_path):
    write_tiny_coco(tmp_path / "datasets", num_images=5)
    done = run_command(tmp_path, "--num-gpus", "2", "--dist-url", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "World size: 2" in done.stdout
    assert done.stdout.count("copypaste: Task: box_proposals") == 1
    assert (tmp_path / "out" / "model_final.pth").is_file()
    # The images of both processes are evaluated: 5 in all.
    results = (tmp_path / "out" / "inference" / "proposal_results.json").read_text()
    assert json.loads(results)["num_images"] == 5
    # One process reads what two have written.
    done = run_command(tmp_path, "--eval-only", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "AR@100" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_command_ends_with_one_line(tmp_path, num_processes):
    done = run_command(tmp_path, "--num-gpus", str(num_processes), "--dist-url", "auto")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith("Error: ")]
    assert 1 <= len(lines) <= num_processes
    missing = tmp_path / "datasets" / "coco" / "annotations" / "instances_train2017.json"
    assert f"Dataset 'coco_2017_train' needs {missing}, which is missing." in lines[0]
