"""Runs of tables of experiments (engine/experiment_tables.py), trained and measured."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..files.atomic_files import write_json
from .experiment_tables import Run, result_file
from .forward_hooks import around_forward
from .job import check_config, check_datasets, fit_to_device, load_config
from .trained_model import load_trained_model
from .trainer import Trainer

# The first images wait for memory and caches.
_WARM_UP_IMAGES = 5
# In a run's folder: the commit that its training began with.
_COMMIT_FILE = "commit.txt"
_MEMORY = re.compile(r"max_mem: (\d+)M")


def run_overrides(run: Run, folder: str | os.PathLike, opts: Sequence[Any] = ()) -> list[str]:
    """The KEY VALUE overrides of a run, as ``train_net.py`` takes them.

    Args:
        run: of a table.
        folder: below which runs train.
        opts: the user's own, which go above the table's.
    """
    output = os.path.join(folder, run.table, run.name)
    overrides = (*run.overrides, "SEED", run.seed, *opts, "OUTPUT_DIR", output)
    return [str(value) for value in overrides]


def trained_folder(run: Run, folder: str | os.PathLike) -> Path:
    """Where the training is or will be that makes a run's weights.

    Args:
        run: of a table.
        folder: below which runs train.
    """
    return Path(folder) / run.table / run.trained_name


def train(
    run: Run, folder: str | os.PathLike, opts: Sequence[Any] = (), train_net: str = "train_net.py"
) -> None:
    """Train a run with ``train_net.py`` until its last checkpoint is there; goes on after a stop.

    What the command prints goes to ``train.txt`` in the run's folder. A run with the weights of
    another row has no training, nor has one of no iterations.

    Args:
        run: of a table.
        folder: below which runs train.
        opts: the user's KEY VALUE overrides.
        train_net: path of the command.

    Raises:
        ValueError: the training failed; has its last line.
    """
    overrides = run_overrides(run, folder, opts)
    output = Path(overrides[-1])
    is_trained = (output / "model_final.pth").is_file()
    if run.weights_of or is_trained or is_untrained(run, folder, opts):
        return
    output.mkdir(parents=True, exist_ok=True)
    if not (output / _COMMIT_FILE).is_file():
        (output / _COMMIT_FILE).write_text(_commit() or "", encoding="utf-8")
    command = [sys.executable, train_net, "--config-file", run.config, "--resume"]
    # Measured afterwards, once.
    command += [*overrides, "DATASETS.TEST", "()"]
    with open(output / "train.txt", "a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        text = (output / "train.txt").read_text(encoding="utf-8", errors="replace").strip()
        raise ValueError(f"{run.name}: {text.splitlines()[-1] if text else 'no output'}")


def is_untrained(run: Run, folder: str | os.PathLike, opts: Sequence[Any] = ()) -> bool:
    """Whether a run is its network as a training begins with it: of no iterations.

    Args:
        run: of a table.
        folder: below which runs train.
        opts: the user's KEY VALUE overrides.
    """
    overrides = run_overrides(run, folder, opts)
    last = dict(zip(overrides[::2], overrides[1::2], strict=True))
    return last.get("SOLVER.MAX_ITER") == "0"


def measure(run: Run, folder: str | os.PathLike, opts: Sequence[Any] = ()) -> dict[str, Any]:
    """Evaluate a trained run on ``DATASETS.TEST``.

    Args:
        run: of a table, trained.
        folder: below which runs train.
        opts: the user's KEY VALUE overrides.

    Returns:
        The content of its result file: what was run, how the training went, all measures.

    Raises:
        FileNotFoundError: it is not trained.
    """
    trained = trained_folder(run, folder)
    weights = trained / "model_final.pth"
    untrained = is_untrained(run, folder, opts)
    if not untrained and not weights.is_file():
        raise FileNotFoundError(
            f"{run.name} is measured with {weights}, which is missing: train {run.trained_name}."
        )
    overrides = run_overrides(run, folder, opts)
    cfg = load_config(Namespace(config_file=run.config, opts=overrides))
    fit_to_device(cfg)
    if not untrained:
        cfg.MODEL.WEIGHTS = str(weights)
    check_config(cfg)
    check_datasets(cfg.DATASETS.TEST)
    # Random weights are those that a training of this seed begins with.
    seed_all_rng(cfg.SEED)
    model = load_trained_model(cfg)
    with timed_images(model) as times:
        metrics = Trainer.test(cfg, model)
    return {
        "table": run.table,
        "row": run.row,
        "label": run.label,
        "seed": run.seed,
        "weights_of": run.weights_of,
        "config": run.config,
        "overrides": [*run.overrides, *_of_the_experiment(opts)],
        "commit": _training_commit(trained),
        "training": training_facts(cfg, trained),
        "test": {
            "datasets": list(cfg.DATASETS.TEST),
            "device": device_name(cfg.MODEL.DEVICE),
            "seconds_per_image": _median(times),
        },
        "metrics": _finite(metrics),
    }


@contextmanager
def timed_images(model: nn.Module) -> Iterator[list[float]]:
    """Within this context, seconds of each call of a model, after a few of warm-up."""
    times: list[float] = []
    started: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def note() -> None:
        if len(started) > _WARM_UP_IMAGES:
            times.append(now() - started[-1])

    with around_forward(model, lambda: started.append(now()), note):
        yield times


def training_facts(cfg: CfgNode, output: Path) -> dict[str, Any]:
    """What a finished training tells of itself in its folder.

    Args:
        cfg: of the training.
        output: its ``OUTPUT_DIR``.

    Returns:
        iterations, images per batch, training images seen, median seconds of an iteration, hours
        of all of them, device, and its peak memory in MB (None on the CPU).
    """
    records = []
    if (output / "metrics.json").is_file():
        lines = (output / "metrics.json").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    step = _median([record["time"] for record in records if "time" in record])
    log = output / "log.txt"
    memory = _MEMORY.findall(log.read_text(encoding="utf-8")) if log.is_file() else []
    iterations, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
    return {
        "datasets": list(cfg.DATASETS.TRAIN),
        "iterations": iterations,
        "images_per_batch": batch,
        "images_seen": iterations * batch,
        "seconds_per_iteration": step,
        "hours": None if step is None else step * iterations / 3600,
        "device": device_name(cfg.MODEL.DEVICE),
        "peak_memory_mb": max(map(int, memory), default=None),
    }


def device_name(device: str) -> str:
    """A device as people name it: "CPU, 1 thread", "NVIDIA H100 80GB HBM3"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def write_result(table: str | os.PathLike, run: Run, result: dict[str, Any]) -> Path:
    """Write the result of a run beside its table; returns the file."""
    path = result_file(table, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return path


def _of_the_experiment(opts: Sequence[Any]) -> list[Any]:
    """The user's overrides without what belongs to the machine: the device, workers and paths."""
    machine = ("MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "DATASETS.COCO_FILES")
    machine += ("MODEL.TORCHVISION.WEIGHTS",)
    pairs = zip(opts[::2], opts[1::2], strict=True)
    kept = [pair for pair in pairs if pair[0] not in machine and os.sep not in str(pair[1])]
    return [value for pair in kept for value in pair]


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 4) if values else None


def _finite(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Measures to a hundredth; what is not a number, as the AR of no objects, is left out."""
    return {
        task: {
            name: round(float(value), 2)
            for name, value in values.items()
            if math.isfinite(float(value))
        }
        for task, values in metrics.items()
    }


def _commit() -> str | None:
    """The commit of the source tree, with "+" where files were changed; None outside of one."""
    source = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(source), "describe", "--always", "--dirty=+", "--abbrev=7"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _training_commit(folder: Path) -> str | None:
    """The commit that a run's training began with; None where it is not known."""
    file = folder / _COMMIT_FILE
    return (file.read_text(encoding="utf-8") or None) if file.is_file() else None
