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
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..evaluation.evaluator import ProposalEvaluator
from ..evaluation.fixed_grid import evaluate_fixed_grid
from ..evaluation.model_measures import MODEL_MEASURES
from ..files.atomic_files import write_json
from ..files.training_log import read_training_log
from .experiment_tables import Run, is_untrained, result_file
from .forward_hooks import around_forward
from .job import check_config, check_datasets, fit_to_device, load_config
from .labelled_images import labelled_test_images
from .proposal_files import check_proposal_files
from .trained_model import load_trained_model
from .trainer import Trainer

_PROJECT = Path(__file__).resolve().parents[2]

# The first images wait for memory and caches.
_WARM_UP_IMAGES = 5
# In a run's folder: the commit that its training began with.
_COMMIT_FILE = "commit.txt"
# Beside it: what it trains on, and the values that its training began with.
_DEVICE_FILE = "device.txt"
_SETTINGS_FILE = "settings.json"
_OF_THE_MACHINE = (
    "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "DATASETS.COCO_FILES", "MODEL.TORCHVISION.WEIGHTS",
)  # fmt: skip
# What keys of a training alone begin with.
_OF_A_TRAINING = ("SOLVER.", "DATASETS.TRAIN", "DATASETS.CATEGORIES", "SEED")
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


def proposal_overrides(
    run: Run,
    folder: str | os.PathLike,
    opts: Sequence[Any] = (),
    parts: Sequence[str] = ("TRAIN", "TEST"),
) -> list[str]:
    """The KEY VALUE overrides of a run on another one's proposals, whose files are then there.

    They are in the folder of the other run's training. What is missing there, or older than its
    weights, is exported with that run's configuration and weights (tools/export_proposals.py); what
    the command prints goes to ``export.txt`` beside the files.

    Args:
        run: of a table.
        folder: below which runs train.
        opts: the user's KEY VALUE overrides.
        parts: of which datasets: of ``DATASETS.TRAIN``, ``DATASETS.TEST``, or both.

    Returns:
        [] for a run without ``proposals_of``.

    Raises:
        FileNotFoundError: proposals are to be exported of a run that is not trained.
        ValueError: the export failed; has its last line.
    """
    if not run.proposals_of:
        return []
    proposals = _proposal_folder(run, folder)
    weights = trained_folder(run.proposals_of, folder) / "model_final.pth"
    cfg = _load_config(run, run_overrides(run, folder, opts))
    names = {part: list(cfg.DATASETS[part]) for part in parts}
    files = {name: proposals / f"{name}.pkl" for name in chain(*names.values())}
    # A file that is there is complete: the command writes it in one step.
    trained_at = weights.stat().st_mtime if weights.is_file() else 0.0
    if missing := [
        name
        for name, file in files.items()
        if not file.is_file() or file.stat().st_mtime < trained_at
    ]:
        _export_proposals(run, folder, opts, missing, proposals)
    overrides = ["MODEL.LOAD_PROPOSALS", "True"]
    for part in parts:
        paths = tuple(str(files[name]) for name in names[part])
        overrides += [f"DATASETS.PROPOSAL_FILES_{part}", str(paths)]
    return overrides


def _proposal_folder(run: Run, folder: str | os.PathLike) -> Path:
    """Where the proposals are or will be that a run is trained and measured on."""
    return trained_folder(run.proposals_of, folder) / "proposals"


def _find_command(path: str) -> str:
    """The command, of the project's folder where it is not in this one."""
    return path if os.path.isfile(path) else str(_PROJECT / path)


def _export_proposals(
    run: Run, folder: str | os.PathLike, opts: Sequence[Any], names: list[str], output: Path
) -> None:
    """Write the proposals of the network that a run takes them of, for some datasets, to a folder.

    Raises:
        FileNotFoundError, ValueError: as :func:`proposal_overrides`.
    """
    proposing = run.proposals_of
    weights = trained_folder(proposing, folder) / "model_final.pth"
    if not weights.is_file():
        raise FileNotFoundError(
            f"{run.name} needs proposals of {weights}, which is missing: train {proposing.name} "
            "(--again where it has a result)."
        )
    command = [_find_command("tools/export_proposals.py"), "--config-file", proposing.config]
    command += ["--datasets", *names, "--output", str(output)]
    command += [*run_overrides(proposing, folder, opts), "MODEL.WEIGHTS", str(weights)]
    _run_logged(command, output / "export.txt", f"{run.name}: proposals of {proposing.name}")


def check_measurable(run: Run, folder: str | os.PathLike, opts: Sequence[Any] = ()) -> None:
    """Check, before a training, that a run has one dataset to be measured on.

    Args:
        run: of a table.
        folder: below which runs train.
        opts: the user's KEY VALUE overrides.

    Raises:
        ValueError: it has none or several.
    """
    _check_one_test(run, _load_config(run, run_overrides(run, folder, opts)))


def _check_one_test(run: Run, cfg: CfgNode) -> None:
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"{run.name}: a row is measured on one dataset, DATASETS.TEST has "
            f"{len(cfg.DATASETS.TEST)}: name one, and make a row for each other."
        )


def train(
    run: Run, folder: str | os.PathLike, opts: Sequence[Any] = (), train_net: str = "train_net.py"
) -> None:
    """Train a run with ``train_net.py`` until its last checkpoint is there; goes on after a stop.

    What the command prints goes to ``train.txt`` in the run's folder. A run with the weights of
    another row has no training, nor has one of no iterations. The proposals of one on those of
    another row are exported first.

    Args:
        run: of a table.
        folder: below which runs train.
        opts: the user's KEY VALUE overrides.
        train_net: path of the command, in the folder of the project where it is not in this one.

    Raises:
        FileNotFoundError: it is on the proposals of a run that is not trained.
        ValueError: the training or export failed; has its last line. Or its folder has a training
            with other settings.
    """
    if run.weights_of or is_untrained(run, opts):
        return
    overrides = run_overrides(run, folder, opts)
    cfg = _load_config(run, overrides)
    output = Path(overrides[-1])
    is_trained = (output / "model_final.pth").is_file()
    # A training that broke off before its first checkpoint begins again.
    is_begun = (output / _COMMIT_FILE).is_file() and (output / "last_checkpoint").is_file()
    if is_trained or is_begun:
        _check_settings(run, output, opts)
    if is_trained:
        return
    on_proposals = proposal_overrides(run, folder, opts)
    output.mkdir(parents=True, exist_ok=True)
    if not is_begun:
        write_json(output / _SETTINGS_FILE, _settings(run, opts))
        (output / _COMMIT_FILE).write_text(_commit() or "", encoding="utf-8")
    fit_to_device(cfg)
    (output / _DEVICE_FILE).write_text(device_name(cfg.MODEL.DEVICE), encoding="utf-8")
    command = [
        _find_command(train_net),
        "--config-file",
        run.config,
        "--resume",
        *overrides,
        *on_proposals,
    ]
    # Measured afterwards, once.
    command += ["DATASETS.TEST", "()", "DATASETS.PROPOSAL_FILES_TEST", "()"]
    _run_logged(command, output / "train.txt", run.name)


def lacking_trainings(
    runs: Sequence[Run], all_runs: Sequence[Run], folder: str | os.PathLike
) -> list[Run]:
    """The runs that others need trained, and that are neither trained nor among them.

    Args:
        runs: to be finished.
        all_runs: of their table.
        folder: below which runs train.

    Returns:
        those whose weights others are measured with, or whose proposals they are trained on, each
        once, those on proposals of others last. Proposals that are there need no training.
    """
    chosen = {run.name for run in runs}
    needed = {run.trained_name for run in runs}
    for run in runs:
        if run.proposals_of and not any(_proposal_folder(run, folder).glob("*.pkl")):
            needed.add(run.proposals_of.name)
    lacking = [
        run
        for run in all_runs
        if run.name in needed - chosen
        and not is_untrained(run)
        and not (trained_folder(run, folder) / "model_final.pth").is_file()
    ]
    return sorted(lacking, key=lambda run: run.proposals_of is not None)


def _settings(run: Run, opts: Sequence[Any]) -> dict[str, str]:
    """What a run's weights are trained with: the configuration's values by key, and the name of the
    run whose proposals they are trained on. Without what belongs to the machine or to the test."""
    # Of a row with another one's weights, the other one's.
    overrides = run.overrides[: run.num_trained_overrides]
    cfg = _load_config(run, [str(x) for x in (*overrides, "SEED", run.seed, *opts)])
    # Of weights that it starts from their name counts, wherever the machine has them.
    leaves = (
        (key, os.path.basename(value) if key.endswith(".WEIGHTS") else value)
        for key, value in _leaves(cfg)
    )
    values = {
        key: value
        for key, value in leaves
        if key not in (*_OF_THE_MACHINE, "OUTPUT_DIR")
        and os.sep not in value
        and not key.startswith("TEST.")
        and "_TEST" not in key
        and key != "DATASETS.TEST"
    }
    return {**values, "proposals_of": run.proposals_of.name if run.proposals_of else ""}


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)


def _check_settings(
    run: Run, trained: Path, opts: Sequence[Any], is_measured: bool = False
) -> None:
    """Check that a training is the one which a run of the table as it is now would have.

    Args:
        run: of a table.
        trained: folder of the training.
        opts: the user's KEY VALUE overrides.
        is_measured: these are for the test; only keys of a training must be those of the training.

    Raises:
        ValueError: in one line, when it began with other settings.
    """
    file = trained / _SETTINGS_FILE
    # Trainings of other commands have none.
    if not file.is_file():
        return
    before, now = json.loads(file.read_text(encoding="utf-8")), _settings(run, opts)
    given = {str(key) for key in opts[::2]} if is_measured else set()
    free = {key for key in given if not key.startswith(_OF_A_TRAINING)}
    # Keys that a later version has or has no more say nothing.
    changed = [
        key for key in before if key not in free and before[key] != now.get(key, before[key])
    ]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{run.name}: {trained} has a training with other settings: {key} is "
            f"{before[key] or 'nothing'}, not {now[key] or 'nothing'}"
            f"{f', and {len(changed) - 1} more' if len(changed) > 1 else ''}. Remove it or take "
            "another --folder to train anew; overrides for the test alone go with --stage measure."
        )


def _run_logged(command: Sequence[str], log: Path, name: str) -> None:
    """Run a command of Python, its output added to a log.

    Raises:
        ValueError: it failed; has the name and the last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        text = log.read_text(encoding="utf-8", errors="replace").strip()
        raise ValueError(f"{name}: {text.splitlines()[-1] if text else 'no output'}")


def measure(run: Run, folder: str | os.PathLike, opts: Sequence[Any] = ()) -> dict[str, Any]:
    """Evaluate a trained run on ``DATASETS.TEST``.

    Args:
        run: of a table, trained.
        folder: below which runs train.
        opts: the user's KEY VALUE overrides.

    Returns:
        The content of its result file: what was run, how the training went, all measures.

    Raises:
        FileNotFoundError: it is not trained, or the run is not whose proposals it has.
        ValueError: the export of these proposals failed; has its last line. Or the training had
            other settings.
    """
    trained = trained_folder(run, folder)
    weights = trained / "model_final.pth"
    untrained = is_untrained(run, opts)
    if not untrained and not weights.is_file():
        raise FileNotFoundError(
            f"{run.name} is measured with {weights}, which is missing: train {run.trained_name} "
            "(--again where it has a result)."
        )
    if not untrained:
        _check_settings(run, trained, opts, is_measured=True)
    overrides = run_overrides(run, folder, opts)
    overrides += proposal_overrides(run, folder, opts, parts=["TEST"])
    cfg = _load_config(run, overrides)
    _check_one_test(run, cfg)
    fit_to_device(cfg)
    if not untrained:
        cfg.MODEL.WEIGHTS = str(weights)
    check_datasets(cfg.DATASETS.TEST)
    training, times = training_facts(cfg, trained), []
    if run.fixed_grid:
        arguments = ProposalEvaluator.from_config(cfg, cfg.DATASETS.TEST[0], distributed=False)
        metrics = evaluate_fixed_grid(num_boxes=run.fixed_grid, **arguments)
        training = {key: [] if key == "datasets" else None for key in training}
    else:
        check_config(cfg)
        check_proposal_files(cfg, train=False)
        # Random weights are those that a training of this seed begins with.
        seed_all_rng(cfg.SEED)
        model = load_trained_model(cfg)
        if run.measures:
            metrics = MODEL_MEASURES.get(run.measures)(model, labelled_test_images(cfg))
        else:
            with timed_images(model) as times:
                metrics = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED and not run.measures:
            metrics.update(Trainer.test_with_TTA(cfg, model))
    return {
        "table": run.table,
        "row": run.row,
        "label": run.label,
        "seed": run.seed,
        "weights_of": run.weights_of,
        "proposals_of": run.proposals_of.row if run.proposals_of else None,
        "config": run.config or None,
        "overrides": [*run.overrides, *_of_the_experiment(opts)],
        "commit": _text_of(trained / _COMMIT_FILE),
        "training": training,
        "test": {
            "datasets": list(cfg.DATASETS.TEST),
            "device": device_name(cfg.MODEL.DEVICE),
            "seconds_per_image": _median(times),
        },
        "metrics": _finite(metrics),
    }


def _load_config(run: Run, overrides: list[str]) -> CfgNode:
    return load_config(Namespace(config_file=run.config, opts=overrides))


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
        of all of them, device, and its peak memory in MB: on the CPU that of the process. What is
        not known is None.
    """
    metrics = output / "metrics.json"
    records = read_training_log(metrics) if metrics.is_file() else []
    step = _median([record["time"] for record in records if "time" in record])
    log = output / "log.txt"
    memory = (
        _MEMORY.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    )
    iterations, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
    return {
        "datasets": list(cfg.DATASETS.TRAIN),
        "iterations": iterations,
        "images_per_batch": batch,
        "images_seen": iterations * batch,
        "seconds_per_iteration": step,
        "hours": None if step is None else step * iterations / 3600,
        "device": _text_of(output / _DEVICE_FILE),
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
    pairs = zip(opts[::2], opts[1::2], strict=True)
    kept = [pair for pair in pairs if pair[0] not in _OF_THE_MACHINE and os.sep not in str(pair[1])]
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


def _text_of(file: Path) -> str | None:
    """What a file says of a training; None where it is not known."""
    return (file.read_text(encoding="utf-8") or None) if file.is_file() else None
