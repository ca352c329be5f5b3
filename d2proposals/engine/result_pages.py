"""Tables of pages, written from the result files of experiments (engine/experiment_tables.py).

A page has, where a table goes,

    <!-- results of docs/results/photos_coco.yaml: AR@10 AR@100 box/AP=bbox/AP iterations -->
    ...
    <!-- end of results -->

and what is between the two lines is written anew. A column is "task/measure" or, of the task
"box_proposals", the measure alone; "title=" before it names the column otherwise. "paper/" before
it is the paper's figure of that name in the table's file; "Δ" before either is its difference to
the row's base, with its sign; "base" is the label of that row. Other columns are those of
``FACTS``. Of several seeds a cell has the mean and the standard deviation, of differences those
seed by seed. The word "missing" among the columns has a line below the table that names the rows
and seeds without a result; "only:zip*" and "without:zip*" choose rows by their names, where there
are several by any of them. "task:NAME" has a line for each row and task named so, whose columns are
measures of it, without a task's name. "seed:1" shows the results of that seed alone.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ..files.atomic_files import atomic_write
from .experiment_tables import read_table, result_file

_BEGIN = "<!-- results of "
_MARK = re.compile(
    rf"(?P<begin>{_BEGIN}(?P<table>\S+): (?P<columns>[^>]*?) -->\n)"
    # Not beyond the beginning of another one, where this one's end is missing.
    rf"(?:(?!{_BEGIN}).)*?(?P<end><!-- end of results -->)",
    re.DOTALL,
)

_CHOICES = ("only:", "without:")
_TASK = "task:"
_SEED = "seed:"

# Columns of how a row was made: what to read of a result, and how many decimals.
FACTS: dict[str, tuple[Callable[[dict[str, Any]], Any], int]] = {
    "iterations": (lambda result: result["training"]["iterations"], 0),
    "batch": (lambda result: result["training"]["images_per_batch"], 0),
    "seeds": (lambda result: result["seed"], 0),
    "s/step": (lambda result: result["training"]["seconds_per_iteration"], 3),
    "hours": (lambda result: result["training"]["hours"], 2),
    "MB": (lambda result: result["training"]["peak_memory_mb"], 0),
    "s/image": (lambda result: result["test"]["seconds_per_image"], 2),
    "device": (lambda result: result["training"]["device"], 0),
    "commit": (lambda result: result["commit"], 0),
    "config": (
        lambda result: result["config"] and f"`{result['config'].removeprefix('configs/')}`",
        0,
    ),
    "row": (lambda result: f"`{result['row']}`", 0),
    "data": (lambda result: ", ".join(result["training"]["datasets"]), 0),
}


@dataclass
class Row:
    """A row of a table and the results that there are.

    Attributes:
        label: in pages.
        base: name of the row that it is compared with; None for none.
        paper: figures of the paper by their measure's name.
        results: contents of result files, by seed.
        missing_seeds: those of the table without a result.
    """

    label: str
    base: str | None = None
    paper: dict[str, float] = field(default_factory=dict)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    missing_seeds: list[int] = field(default_factory=list)


def read_rows(table: str | os.PathLike) -> dict[str, Row]:
    """The rows of a table by name and in its order, also those without a result.

    Args:
        table: path of the YAML file.
    """
    rows: dict[str, Row] = {}
    for run in read_table(table):
        row = rows.setdefault(run.row, Row(run.label, run.base, run.paper))
        path = result_file(table, run)
        if path.is_file():
            row.results[run.seed] = json.loads(path.read_text(encoding="utf-8"))
        else:
            row.missing_seeds.append(run.seed)
    return rows


def format_rows(rows: dict[str, Row], columns: Iterable[str]) -> str:
    """A Markdown table with a line for each row that has a result to show; "" of none.

    Args:
        rows: of :func:`read_rows`.
        columns: see the head of this module.
    """
    words, shown = _words_and_shown(columns)
    rows = _of_seeds(rows, words)
    chosen = [row for name, row in rows.items() if _is_chosen(name, words)]
    header = ["", *(title for title, _ in shown)]
    lines = [header, ["---", *("---:" for _ in shown)]]
    for row, task in product((row for row in chosen if row.results), _tasks(words)):
        names = [_of_task(column, task) for _, column in shown]
        cells = [_cell(rows, row, name) for name in names]
        # A method without masks has no place in a table of masks, nor one without a task's networks
        # in the task's line.
        figures = [cell for cell, name in zip(cells, names, strict=True) if not _is_fact(name)]
        if any(figures) or (any(cells) and not figures):
            label = f"{row.label}: {task.replace('_', ' ')}" if task else row.label
            lines.append([label, *cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) if len(lines) > 2 else ""
    missing = [_label_of_missing(row) for row in chosen if row.missing_seeds or not row.results]
    if "missing" in words and missing:
        text += ("\n" if text else "") + f"Not trained yet: {'; '.join(missing)}.\n"
    return text


def _words_and_shown(columns: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The words that say which rows there are, and the title and name of each other column."""
    columns = list(columns)
    begins = (*_CHOICES, _TASK, _SEED)
    words = [word for word in columns if word == "missing" or word.startswith(begins)]
    titled = (column.rpartition("=") for column in columns if column not in words)
    return words, [(title or column, column) for title, _, column in titled]


def _of_seeds(rows: dict[str, Row], words: Iterable[str]) -> dict[str, Row]:
    """The rows with the results of the seeds that words name alone; of all without such a word."""
    seeds = {int(word.removeprefix(_SEED)) for word in words if word.startswith(_SEED)}
    if not seeds:
        return rows
    return {
        name: replace(
            row,
            results={seed: result for seed, result in row.results.items() if seed in seeds},
            missing_seeds=[seed for seed in row.missing_seeds if seed in seeds],
        )
        for name, row in rows.items()
    }


def _tasks(words: Iterable[str]) -> list[str]:
    """The tasks that a row has a line for each of; "" for a line of all that its columns name."""
    return [word.removeprefix(_TASK) for word in words if word.startswith(_TASK)] or [""]


def _of_task(column: str, task: str) -> str:
    """The column of a task's measure, without a task's name in ``column``."""
    if not task or _is_fact(column):
        return column
    measure = column.removeprefix("Δ").removeprefix("paper/")
    return f"{column.removesuffix(measure)}{task}/{measure}"


def _is_fact(column: str) -> bool:
    """Whether a column is of how a row was made, rather than what it measures."""
    return column in FACTS or column in ("seeds", "base")


def _label_of_missing(row: Row) -> str:
    """A row's label, with the seeds where others have a result."""
    if not row.results:
        return row.label
    seeds = ", ".join(map(str, row.missing_seeds))
    return f"{row.label} (seed{'s' if len(row.missing_seeds) > 1 else ''} {seeds})"


def _is_chosen(name: str, words: Iterable[str]) -> bool:
    """Whether a table with these words among its columns has the row of this name."""
    only, without = (
        [fnmatchcase(name, word.removeprefix(x)) for word in words if word.startswith(x)]
        for x in _CHOICES
    )
    return (any(only) or not only) and not any(without)


def _cell(rows: dict[str, Row], row: Row, column: str) -> str:
    if column == "seeds":
        return str(len(row.results))
    if column == "base":
        return rows[row.base].label if row.base else ""
    if column in FACTS:
        return _fact(row, column)
    if not column.startswith("Δ"):
        return mean_and_spread(_figures(row, column).values())
    measure = column.removeprefix("Δ")
    own = _figures(row, measure)
    other = _figures(rows[row.base], measure) if row.base else {}
    both = (seed for seed in own if seed in other)
    return mean_and_spread((own[seed] - other[seed] for seed in both), sign="+")


def _fact(row: Row, column: str) -> str:
    read, decimals = FACTS[column]
    values = [value for value in map(read, row.results.values()) if value is not None]
    if not values:
        return ""
    if isinstance(values[0], str):
        return ", ".join(dict.fromkeys(values))
    return f"{statistics.fmean(values):,.{decimals}f}"


def _figures(row: Row, column: str) -> dict[int, float]:
    """What is known of a measure, by seed; the paper's has the seed 0."""
    if column.startswith("paper/"):
        measure = column.removeprefix("paper/")
        return {0: row.paper[measure]} if measure in row.paper else {}
    known = {seed: _measures(result, column) for seed, result in row.results.items()}
    measure = column.rpartition("/")[2]
    figures = {seed: measures.get(measure) for seed, measures in known.items()}
    return {seed: value for seed, value in figures.items() if value is not None}


def _measures(result: dict[str, Any], column: str) -> dict[str, float | None]:
    """Those of the column's task."""
    return result["metrics"].get(column.rpartition("/")[0] or "box_proposals", {})


def _check_columns(rows: dict[str, Row], columns: Iterable[str], page: str, table: str) -> None:
    """Refuse a column that would stay empty whatever its rows were: most likely it is misspelt."""
    results = [result for row in rows.values() for result in row.results.values()]
    if not results:
        return
    words, shown = _words_and_shown(columns)
    for column in (column for _, column in shown if not _is_fact(column)):
        is_known = False
        # Neither the paper nor each network has every task's.
        for name in (_of_task(column, task).removeprefix("Δ") for task in _tasks(words)):
            of_paper = name.removeprefix("paper/")
            if of_paper != name:
                is_known |= any(of_paper in row.paper for row in rows.values())
            else:
                measure = name.rpartition("/")[2]
                is_known |= any(measure in _measures(item, name) for item in results)
        if not is_known:
            raise ValueError(
                f"{page}: no result of {table} has the column {column!r}, and it is none of "
                f"{', '.join(['seeds', 'base', *FACTS])}"
            )


def mean_and_spread(values: Iterable[float], sign: Literal["", "+"] = "") -> str:
    """A cell: "21.3", of several runs "21.3 ± 0.4" (standard deviation), "" of none.

    Args:
        values: of the runs.
        sign: "+" to write a sign before positive means too.
    """
    known = list(values)
    if not known:
        return ""
    mean = f"{statistics.fmean(known):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(known):.1f}" if len(known) > 1 else mean


def fill_page(text: str, root: str | os.PathLike, name: str = "the page") -> str:
    """A page's text with its tables written anew.

    Args:
        text: of the page.
        root: folder that the paths of tables start from.
        name: of the page, for errors.

    Raises:
        FileNotFoundError, ValueError: in one line, when a table is missing or is none, or has
            results, none of which knows a column.
    """

    def fill(match: re.Match[str]) -> str:
        rows = read_rows(Path(root) / match["table"])
        columns = match["columns"].split()
        _check_columns(rows, columns, name, match["table"])
        return match["begin"] + format_rows(rows, columns) + match["end"]

    return _MARK.sub(fill, text)


def write_pages(paths: Sequence[str | os.PathLike], root: str | os.PathLike) -> dict[str, int]:
    """Write the tables of pages anew.

    Args:
        paths: of Markdown files. Those without a place for a table stay as they are.
        root: folder that the paths of tables start from.

    Returns:
        how many tables each page has that has some, by its path.

    Raises:
        FileNotFoundError, ValueError: in one line, as :func:`fill_page`; also when a page is
            missing or is no text, when no page has a place for a table, and when one has no end.
            No page is written then.
    """
    texts = {str(path): _read_page(path) for path in paths}
    numbers = {path: len(_MARK.findall(text)) for path, text in texts.items()}
    for path, text in texts.items():
        if text.count(_BEGIN) > numbers[path]:
            raise ValueError(
                f"{path}: {text.count(_BEGIN)} lines '{_BEGIN}TABLE: COLUMN ... -->', of which "
                f"{numbers[path]} are followed by '<!-- end of results -->': end each table."
            )
    if not any(numbers.values()):
        raise ValueError(
            f"{', '.join(numbers)} has no line '<!-- results of TABLE: COLUMN ... -->'."
        )
    numbers = {path: number for path, number in numbers.items() if number}
    filled = {path: fill_page(texts[path], root, path) for path in numbers}
    for path, text in filled.items():
        with atomic_write(path) as file:
            file.write(text)
    return numbers


def _read_page(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the page {path} cannot be read: {error}") from error
