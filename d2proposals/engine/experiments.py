"""Tables of experiments: rows that are configurations with overrides, trained and measured.

A table is a YAML file:

    overrides: [KEY, VALUE, ...]      # of all rows
    rows:
      - name: rpn                     # of its files
        label: RPN                    # in pages
        config: configs/photos/rpn_mobilenet_v2.yaml
        overrides: [KEY, VALUE, ...]
        seeds: [1, 2, 3]              # one run for each
                                      # (SOLVER.MAX_ITER 0 is the network untrained)
        paper: {AR@100: 57.1}         # the paper's figures, for pages
        base: ROW                     # what pages compare with: by default the row above
      - name: rpn_few                 # the row "rpn" with other settings in the test alone:
        label: RPN, few               # its configuration, overrides, seeds and weights
        weights_of: rpn
        overrides: [KEY, VALUE, ...]

A list in the place of a KEY stands for what is in it, so that an anchor of YAML may name overrides
that several rows have.

The result of a run is a small JSON file in the folder beside the table that has its name without
the suffix. A run that has one is finished, and a training that broke off goes on.
"""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..files.atomic_files import write_json
from .forward_hooks import around_forward
from .job import check_config, check_datasets, fit_to_device, load_config
from .trained_model import load_trained_model
from .trainer import Trainer

# The first images wait for memory and caches.
_WARM_UP_IMAGES = 5
# In a run's folder: the commit that its training began with.
_COMMIT_FILE = "commit.txt"
_MEMORY = re.compile(r"max_mem: (\d+)M")


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Attributes:
        table: name of the table.
        row: name of the row.
        label: of the row, for pages.
        config: path of the configuration file.
        overrides: KEY, VALUE, ... of the table and the row.
        seed: ``SEED`` of the training.
        weights_of: name of the row, with the same seed, whose weights it is measured with; None if
            it is trained.
        base: name of the row that it is compared with; None for none.
        paper: figures of the paper by their measure's name.
    """

    table: str
    row: str
    label: str
    config: str
    overrides: tuple[Any, ...] = field(default=())
    seed: int = 1
    weights_of: str | None = None
    base: str | None = None
    paper: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the run's files and folder."""
        return f"{self.row}-{self.seed}"

    @property
    def trained_name(self) -> str:
        """Name of the run whose training made its weights."""
        return f"{self.weights_of or self.row}-{self.seed}"


def read_table(path: str | os.PathLike) -> list[Run]:
    """The runs of a table, in its order.

    Args:
        path: of the YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a table; names the row and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The table {path} is missing.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{path} has no list 'rows'.")
    if unknown := set(content) - {"overrides", "rows"}:
        raise ValueError(f"{path}: unknown {', '.join(sorted(unknown))}.")
    shared = _overrides(content, path, "the table")
    rows: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        _check_row(row, path)
        if row["name"] in rows:
            raise ValueError(f"{path}: several rows have the name {row['name']}.")
        # Pages compare with the row above where a row does not say otherwise.
        rows[row["name"]] = {"base": next(reversed(rows), None), **row}
    return [run for row in rows.values() for run in _runs_of_row(row, path, shared, rows)]


def _check_row(row: Any, path: Path) -> None:
    """That a row has the keys that it needs and no others."""
    row_keys = set(row if isinstance(row, dict) else ())
    source = "weights_of" if "weights_of" in row_keys else "config"
    if missing := {"name", "label", source} - row_keys:
        raise ValueError(f"{path}: the row {row} lacks {', '.join(sorted(missing))}.")
    known = {"name", "label", source, "overrides", "base", "paper"}
    known |= {"seeds"} if source == "config" else set()
    if unknown := row_keys - known:
        raise ValueError(
            f"{path}: row {row['name']}: unknown {', '.join(sorted(unknown))}"
            f"{' beside weights_of' if source == 'weights_of' else ''}."
        )
    paper = row.get("paper", {})
    if not isinstance(paper, dict) or not all(isinstance(x, int | float) for x in paper.values()):
        raise ValueError(f"{path}: 'paper' of row {row['name']} is not {{MEASURE: FIGURE, ...}}.")


def _runs_of_row(
    row: dict[str, Any], path: Path, shared: Sequence[Any], rows: dict[str, dict[str, Any]]
) -> list[Run]:
    """The runs of a row, one for each seed.

    Args:
        row: checked.
        path: of the table.
        shared: overrides of all rows.
        rows: all rows of the table, by name.
    """
    name, overrides = row["name"], _overrides(row, path, f"row {row['name']}")
    for key in ("base", "weights_of"):
        if row.get(key) is not None and row[key] not in rows:
            raise ValueError(f"{path}: '{key}' of row {name}: there is no row {row[key]}.")
    trained = row
    if "weights_of" in row:
        trained = rows[row["weights_of"]]
        if "weights_of" in trained:
            raise ValueError(f"{path}: row {name} has weights of {trained['name']}, untrained.")
        of_trained = _overrides(trained, path, f"row {trained['name']}")
        overrides = [*of_trained, *overrides]
    seeds = trained.get("seeds", [1])
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: row {name} has a seed twice.")
    return [
        Run(
            table=path.stem,
            row=name,
            label=row["label"],
            config=trained["config"],
            overrides=(*shared, *overrides),
            seed=seed,
            weights_of=row.get("weights_of"),
            base=row["base"],
            paper=row.get("paper", {}),
        )
        for seed in seeds
    ]


def _overrides(node: dict[str, Any], path: Path, where: str) -> list[Any]:
    """KEY, VALUE, ... of a table or row; lists in the place of a KEY are opened."""
    overrides = node.get("overrides", [])
    is_list = isinstance(overrides, list)
    opened: list[Any] = []
    for item in overrides if is_list else []:
        is_set = isinstance(item, list) and len(opened) % 2 == 0
        opened.extend(item if is_set else [item])
    if not is_list or len(opened) % 2:
        raise ValueError(f"{path}: 'overrides' of {where} is not a list KEY, VALUE, ...")
    return opened


def result_file(table: str | os.PathLike, run: Run) -> Path:
    """Where the result of a run is or will be."""
    return Path(table).with_suffix("") / f"{run.name}.json"


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
