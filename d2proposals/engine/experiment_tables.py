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
        seeds: [1]                    # of those of the row "rpn", which are the default
      - name: spop_errors             # measures of the network by itself in the place of those of
        label: errors of SPOP         # its proposals (evaluation/model_measures.py)
        weights_of: spop
        measures: localization_errors
      - name: fast_rcnn_rpn           # a detector that trains on the proposals of the row "rpn",
        label: Fast R-CNN on RPN's    # those of the same seed
        config: configs/photos/fast_rcnn_mobilenet_v2.yaml
        proposals_of: rpn
        seeds: [1]                    # among those of the row "rpn", which are the default
      - name: grid                    # no network: so many boxes on a grid, the same for every
        label: 100 fixed boxes        # image (evaluation/fixed_grid.py)
        fixed_grid: 100

A list in the place of a KEY stands for what is in it, so that an anchor of YAML may name overrides
that several rows have.

The result of a run is a small JSON file in the folder beside the table that has its name without
the suffix. A run that has one is finished, and a training that broke off goes on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.model_measures import MODEL_MEASURES


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Attributes:
        table: name of the table.
        row: name of the row.
        label: of the row, for pages.
        config: path of the configuration file; "" for the fixed grid.
        overrides: KEY, VALUE, ... of the table and the row.
        seed: ``SEED`` of the training.
        weights_of: name of the row, with the same seed, whose weights it is measured with; None if
            it is trained.
        base: name of the row that it is compared with; None for none.
        paper: figures of the paper by their measure's name.
        proposals_of: the run, of the same seed, whose network's proposals it trains and is measured
            on; None for none.
        num_trained_overrides: how many of the overrides, from the first, its weights are trained
            with; None for all.
        fixed_grid: number of boxes of the baseline that it is, without a configuration and
            training; None for a network.
        measures: name in ``MODEL_MEASURES`` of what is measured in the place of proposals; None for
            proposals.
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
    proposals_of: Run | None = None
    num_trained_overrides: int | None = None
    fixed_grid: int | None = None
    measures: str | None = None

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
    for row in rows.values():
        _check_references(row, path, rows)
    runs = [run for row in rows.values() for run in _runs_of_row(row, path, shared, rows)]
    if both := {run.name for run in runs} & set(rows):
        raise ValueError(f"{path}: {both.pop()} is the name of a row and of another one's run.")
    return runs


def _check_row(row: Any, path: Path) -> None:
    """That a row has the keys that it needs and no others."""
    row_keys = set(row if isinstance(row, dict) else ())
    if empty := [key for key in sorted(row_keys - {"base"}) if row[key] is None]:
        raise ValueError(f"{path}: the row {row} has nothing for {', '.join(empty)}.")
    source = next((key for key in ("weights_of", "fixed_grid") if key in row_keys), "config")
    if missing := {"name", "label", source} - row_keys:
        raise ValueError(f"{path}: the row {row} lacks {', '.join(sorted(missing))}.")
    known = {"name", "label", source, "overrides", "base", "paper"}
    of_source = {"config": {"seeds", "proposals_of"}, "weights_of": {"seeds", "measures"}}
    known |= of_source.get(source, set())
    if unknown := row_keys - known:
        raise ValueError(
            f"{path}: row {row['name']}: unknown {', '.join(sorted(unknown))}"
            f"{f' beside {source}' if source != 'config' else ''}."
        )
    seeds = row.get("seeds", [1])
    if not isinstance(seeds, list) or not seeds or not all(type(x) is int for x in seeds):
        raise ValueError(f"{path}: 'seeds' of row {row['name']} is not a list of numbers.")
    num_boxes = row.get("fixed_grid", 100)
    if not isinstance(num_boxes, int) or num_boxes < 3:
        raise ValueError(f"{path}: 'fixed_grid' of row {row['name']} is not a number from 3.")
    if row.get("measures") not in [None, *(name for name, _ in MODEL_MEASURES)]:
        raise ValueError(
            f"{path}: 'measures' of row {row['name']} is {row['measures']}, not one of "
            f"{', '.join(name for name, _ in MODEL_MEASURES)}."
        )
    paper = row.get("paper", {})
    if not isinstance(paper, dict) or not all(isinstance(x, int | float) for x in paper.values()):
        raise ValueError(f"{path}: 'paper' of row {row['name']} is not {{MEASURE: FIGURE, ...}}.")


def _check_references(row: dict[str, Any], path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """That the rows which a row names are there, and have what it takes of them."""
    name = row["name"]
    for key in ("base", "weights_of", "proposals_of"):
        if row.get(key) is not None and row[key] not in rows:
            raise ValueError(f"{path}: '{key}' of row {name}: there is no row {row[key]}.")
    if "weights_of" in row and {"weights_of", "fixed_grid"} & set(rows[row["weights_of"]]):
        raise ValueError(f"{path}: row {name} has weights of {row['weights_of']}, untrained.")
    if "proposals_of" in row:
        others = {"weights_of", "proposals_of", "fixed_grid"} & set(rows[row["proposals_of"]])
        if others:
            raise ValueError(
                f"{path}: row {name} has proposals of {row['proposals_of']}, which has "
                f"{others.pop()} itself."
            )


def _runs_of_row(
    row: dict[str, Any], path: Path, shared: Sequence[Any], rows: dict[str, dict[str, Any]]
) -> list[Run]:
    """The runs of a row, one for each seed.

    Args:
        row: checked, as are those that it names.
        path: of the table.
        shared: overrides of all rows.
        rows: all rows of the table, by name.
    """
    name, overrides = row["name"], _overrides(row, path, f"row {row['name']}")
    trained, num_trained = row, None
    if "weights_of" in row:
        trained = rows[row["weights_of"]]
        of_trained = _overrides(trained, path, f"row {trained['name']}")
        overrides, num_trained = [*of_trained, *overrides], len(shared) + len(of_trained)
    proposing: dict[int, Run] = {}
    if "proposals_of" in trained:
        of_row = _runs_of_row(rows[trained["proposals_of"]], path, shared, rows)
        proposing = {run.seed: run for run in of_row}
        if any(map(is_untrained, of_row)):
            raise ValueError(f"{path}: row {name} has proposals of {of_row[0].row}, untrained.")
    trained_seeds = trained.get("seeds", list(proposing) or [1])
    seeds = row.get("seeds", trained_seeds)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: row {name} has a seed twice.")
    if unknown := set(seeds) - set(trained_seeds):
        raise ValueError(
            f"{path}: row {name} has seeds that {trained['name']} lacks: "
            f"{', '.join(map(str, sorted(unknown)))}."
        )
    if proposing and (unknown := set(seeds) - set(proposing)):
        raise ValueError(
            f"{path}: row {name} has seeds that {trained['proposals_of']} lacks: "
            f"{', '.join(map(str, sorted(unknown)))}."
        )
    return [
        Run(
            table=path.stem,
            row=name,
            label=row["label"],
            config=trained.get("config", ""),
            overrides=(*shared, *overrides),
            seed=seed,
            weights_of=row.get("weights_of"),
            base=row["base"],
            paper=row.get("paper", {}),
            proposals_of=proposing.get(seed),
            num_trained_overrides=num_trained,
            fixed_grid=row.get("fixed_grid"),
            measures=row.get("measures"),
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


def is_untrained(run: Run, opts: Sequence[Any] = ()) -> bool:
    """Whether a run has no training: the fixed grid, or its network as a training of no iterations
    leaves it.

    Args:
        run: of a table.
        opts: the user's KEY VALUE overrides.
    """
    overrides = [*run.overrides, *opts]
    last = dict(zip(overrides[::2], overrides[1::2], strict=True))
    return run.fixed_grid is not None or str(last.get("SOLVER.MAX_ITER")) == "0"


def result_file(table: str | os.PathLike, run: Run) -> Path:
    """Where the result of a run is or will be."""
    return Path(table).with_suffix("") / f"{run.name}.json"
