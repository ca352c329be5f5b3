"""Tables of pages, written from the result files of experiments (engine/experiments.py).

A page has, where a table goes,

    <!-- results of docs/results/photos_coco.yaml: AR@10 AR@100 box/AP=bbox/AP iterations -->
    ...
    <!-- end of results -->

and what is between the two lines is written anew. A column is "task/measure" or, of the task
"box_proposals", the measure alone; "title=" before it names the column otherwise. Other columns are
those of ``FACTS``. Of several seeds a cell has the mean and the standard deviation.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..files.atomic_files import atomic_write
from .experiments import read_table, result_file

_MARK = re.compile(
    r"(?P<begin><!-- results of (?P<table>\S+): (?P<columns>[^>]*?) -->\n)"
    r".*?(?P<end><!-- end of results -->)",
    re.DOTALL,
)

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
    "config": (lambda result: f"`{result['config'].removeprefix('configs/')}`", 0),
}


def read_results(table: str | os.PathLike) -> dict[str, list[dict[str, Any]]]:
    """The results that there are, by row and in the table's order.

    Args:
        table: path of the YAML file.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for run in read_table(table):
        path = result_file(table, run)
        if path.is_file():
            results.setdefault(run.row, []).append(json.loads(path.read_text(encoding="utf-8")))
    return results


def format_results(results: dict[str, list[dict[str, Any]]], columns: Iterable[str]) -> str:
    """A Markdown table with a line for each row that has a result.

    Args:
        results: of :func:`read_results`.
        columns: see the head of this module.
    """
    pairs = [(title or column, column) for title, _, column in (c.rpartition("=") for c in columns)]
    header = ["", *(title for title, _ in pairs)]
    lines = [header, ["---", *("---:" for _ in pairs)]]
    for runs in results.values():
        lines.append([runs[0]["label"], *(_cell(runs, column) for _, column in pairs)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(runs: list[dict[str, Any]], column: str) -> str:
    if column == "seeds":
        return str(len(runs))
    if column in FACTS:
        read, decimals = FACTS[column]
        values = [value for value in map(read, runs) if value is not None]
        if not values:
            return ""
        if isinstance(values[0], str):
            return ", ".join(dict.fromkeys(values))
        return f"{statistics.fmean(values):,.{decimals}f}"
    task, _, measure = column.rpartition("/")
    return mean_and_spread(
        run["metrics"].get(task or "box_proposals", {}).get(measure) for run in runs
    )


def mean_and_spread(values: Iterable[float | None]) -> str:
    """A cell: "21.3", of several runs "21.3 ± 0.4" (standard deviation), "" of none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):.1f}"
    return f"{mean} ± {statistics.stdev(known):.1f}" if len(known) > 1 else mean


def fill_page(text: str, root: str | os.PathLike) -> str:
    """A page's text with its tables written anew.

    Args:
        text: of the page.
        root: folder that the paths of tables start from.

    Raises:
        FileNotFoundError, ValueError: a table is missing or is none.
    """

    def fill(match: re.Match[str]) -> str:
        results = read_results(Path(root) / match["table"])
        return match["begin"] + format_results(results, match["columns"].split()) + match["end"]

    return _MARK.sub(fill, text)


def write_page(path: str | os.PathLike, root: str | os.PathLike) -> int:
    """Write the tables of a page anew; returns how many it has.

    Args:
        path: of the Markdown file.
        root: folder that the paths of tables start from.

    Raises:
        ValueError: the page has no place for a table.
    """
    text = Path(path).read_text(encoding="utf-8")
    number = len(_MARK.findall(text))
    if not number:
        raise ValueError(f"{path} has no line '<!-- results of TABLE: COLUMN ... -->'.")
    with atomic_write(path) as file:
        file.write(fill_page(text, root))
    return number
