"""Several files of proposals side by side: a table, CSV rows and overlaid curves.

A run is what ``Measurement`` holds of one file, under a name; its measures may be of boxes or of
masks.
"""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from tabulate import tabulate

from ..files.atomic_files import atomic_write
from ..files.figure_file import write_figure
from .measurement import Measurement
from .recall import CURVE_SINGLE_IOUS
from .report import COLOURS, LINE_STYLES

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Names of runs longer than this are cut in the middle, in pictures and tables.
_MAX_NAME_LENGTH = 32
_SIZES = (("s", "small"), ("m", "medium"), ("l", "large"))


def compare_table(runs: Mapping[str, Mapping[str, float]]) -> str:
    """A row per measure, a column per run, in percent; "-" where there is no ground truth."""
    names = list(dict.fromkeys(name for metrics in runs.values() for name in metrics))
    rows = [[name, *(metrics.get(name) for metrics in runs.values())] for name in names]
    return tabulate(
        rows,
        ["measure", *map(short_name, runs)],
        tablefmt="pipe",
        floatfmt=".2f",
        colalign=["left", *["right"] * len(runs)],
        missingval="-",
    )


def write_csv(path: str | os.PathLike, rows: Sequence[tuple[str, str, str, float]]) -> None:
    """Write (run, task, measure, percent) rows with a header, atomically."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "task", "measure", "percent"])
        writer.writerows((*row[:3], f"{row[3]:.6f}") for row in rows)


def short_name(name: str) -> str:
    """A run's name, cut in the middle if it is long."""
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    half = (_MAX_NAME_LENGTH - 3) // 2
    return f"{name[:half]}...{name[-half:]}"


def plot_comparison(
    path: str | os.PathLike, runs: Mapping[str, Measurement], limits: Sequence[int], title: str
) -> None:
    """Draw the curves and diagnostics of all runs into one picture of ten panels.

    A run has its colour and its marker in all panels; line styles tell numbers of proposals.

    Args:
        path: of the PNG file, written atomically.
        runs: by name.
        limits: numbers of proposals k; one and two of them are shown where there is no axis of k.
        title: of the picture.
    """
    figure = Figure(figsize=(25, 9.2), layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    panels = figure.subplots(2, 5)
    few, many = _shown_limits(limits)
    _draw_over_number(
        panels[0, 0], runs, "ar_by_num_proposals", "all",
        "AR by number of proposals", "average recall (%)",
    )  # fmt: skip
    _draw_by_iou(panels[0, 1], runs, sorted({few, many}))
    for panel, iou in zip(panels[0, 2:], CURVE_SINGLE_IOUS, strict=True):
        _draw_over_number(
            panel, runs, "recall_by_num_proposals", str(iou),
            f"Recall at IoU {iou} by number", "recall (%)",
        )  # fmt: skip
    _draw_by_size(panels[1, 0], runs, few)
    _draw_over_number(
        panels[1, 1], runs, "abo_by_num_proposals", "ABO", "ABO by number of proposals", "ABO (%)"
    )
    _draw_best_overlap(panels[1, 2], runs, many)
    _draw_histogram(panels[1, 3], runs)
    _draw_aspect_ratios(panels[1, 4], runs)
    handles = [
        Line2D([], [], color=_colour(index), marker=_MARKERS[index % len(_MARKERS)], label=name)
        for index, name in enumerate(map(short_name, runs))
    ]
    # A label that begins with "_" would be left out otherwise.
    legend = figure.legend(
        handles, [handle.get_label() for handle in handles], loc="outside lower center",
        ncols=min(len(runs), 4), frameon=False, fontsize=11,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_figure(path, figure)


# Names of what is drawn over the number of proposals.
_PRECISIONS = {"AP": "average precision (%)", "AP50": "average precision at IoU .5 (%)"}


def read_precision_by_number(
    paths: Sequence[str | os.PathLike], measure: str = "AP"
) -> dict[str, dict[int, float]]:
    """AP in percent by number of proposals, of the runs in files of tools/plot_detector_ap.py.

    Args:
        paths: of the files.
        measure: "AP" or "AP50".

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when a file is something else, or two have one name.
    """
    runs = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing.")
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            name = content["name"]
            curve = {int(k): float(v[measure]) for k, v in content["ap_by_limit"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} was not written by tools/plot_detector_ap.py.") from error
        if name in runs:
            raise ValueError(
                f"Two runs are called '{name}': {path} is the second; name them by --name."
            )
        runs[name] = curve
    return runs


def plot_precision_by_number(
    path: str | os.PathLike,
    runs: Mapping[str, Mapping[int, float]],
    title: str,
    measure: str = "AP",
) -> None:
    """Draw a detector's average precision against the number of proposals of an image.

    Args:
        path: of the PNG file, written atomically.
        runs: AP in percent by number of proposals, by name of the run.
        title: of the picture.
        measure: "AP", mean over IoU, or "AP50", at IoU .5.
    """
    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(runs.items()):
        numbers = sorted(curve)
        # A label that begins with "_" would be left out of the legend.
        label = short_name(name).lstrip("_") or "run"
        axes.plot(numbers, [curve[k] for k in numbers], label=label, **_style(index))
    _numbers_on_log_axis(axes)
    axes.set_ylim(bottom=0)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    _finish(axes, title, "proposals per image", _PRECISIONS[measure])
    write_figure(path, figure)


def _shown_limits(limits: Sequence[int]) -> tuple[int, int]:
    """100 and 1,000, or the nearest there are."""
    return tuple(min(limits, key=lambda k: abs(np.log(k / wanted))) for wanted in (100, 1000))


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _style(index: int) -> dict:
    return {
        "color": _colour(index),
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _finish(axes: Axes, title: str, horizontal: str, vertical: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _numbers_on_log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_over_number(
    axes: Axes, runs: Mapping[str, Measurement], curve: str, line: str, title: str, unit: str
) -> None:
    """Draw one line of a curve over the number of proposals, of each run.

    Args:
        axes: to draw into.
        runs: by name.
        curve: name among a run's curves.
        line: name of the line, which is None without ground truth.
        title: of the axes.
        unit: what the line is of.
    """
    for index, run in enumerate(runs.values()):
        lines = run.curves[curve]
        if lines[line] is not None:
            axes.plot(lines["num_proposals"], lines[line], **_style(index))
    _numbers_on_log_axis(axes)
    axes.set_ylim(0, 102)
    _finish(axes, title, "proposals per image", unit)


def _draw_by_iou(axes: Axes, runs: Mapping[str, Measurement], limits: Sequence[int]) -> None:
    for index, run in enumerate(runs.values()):
        curve = run.curves["recall_by_iou"]
        for limit, line in zip(limits, LINE_STYLES, strict=False):
            if curve[str(limit)] is not None:
                style = {**_style(index), "marker": None, "linestyle": line}
                axes.plot(curve["iou"], curve[str(limit)], **style)
    axes.set(xlim=(0.5, 1), ylim=(0, 102))
    handles = [
        Line2D([], [], color="0.3", linestyle=line, label=f"{limit} proposals")
        for limit, line in zip(limits, LINE_STYLES, strict=False)
    ]
    axes.legend(handles=handles, loc="best", fontsize=9)
    _finish(axes, "Recall by IoU", "IoU", "recall (%)")


def _draw_by_size(axes: Axes, runs: Mapping[str, Measurement], limit: int) -> None:
    """Bars side by side; a size without ground truth has none."""
    width = 0.8 / len(runs)
    for index, run in enumerate(runs.values()):
        values = [run.metrics.get(f"AR{suffix}@{limit}", np.nan) for suffix, _ in _SIZES]
        place = np.arange(3) + (index - (len(runs) - 1) / 2) * width
        bars = axes.bar(place, values, width * 0.92, color=_colour(index))
        if len(runs) <= 4:
            labels = ["" if np.isnan(value) else f"{value:.0f}" for value in values]
            axes.bar_label(bars, labels, fontsize=8, padding=1)
    axes.set_xticks(np.arange(3), [name for _, name in _SIZES])
    axes.set_ylim(0, 102)
    _finish(axes, f"AR@{limit} by size", "objects (area up to 32², to 96², above)",
            "average recall (%)")  # fmt: skip


def _draw_best_overlap(axes: Axes, runs: Mapping[str, Measurement], limit: int) -> None:
    for index, run in enumerate(runs.values()):
        content = run.diagnostics["abo_by_side"]
        edges = np.array(content["edges"])
        # The open bins at both ends lie half an octave beyond them.
        middle = np.concatenate([[edges[0] / 2**0.25], edges * 2**0.25])
        values = np.array([np.nan if v is None else v for v in content[str(limit)]], float)
        shown = ~np.isnan(values)
        axes.plot(middle[shown], values[shown], **_style(index))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, 102)
    _finish(axes, f"ABO@{limit} by size", "square root of the object's area (pixels)", "ABO (%)")


def _draw_histogram(axes: Axes, runs: Mapping[str, Measurement]) -> None:
    """Shares instead of counts: files differ in their numbers of proposals."""
    limits = []
    for index, run in enumerate(runs.values()):
        content = run.diagnostics["proposal_iou"]
        limits = [key for key in content if key != "edges"]
        for limit, line in zip(limits, LINE_STYLES, strict=False):
            counts = np.array(content[limit], float)
            if counts.sum():
                axes.stairs(
                    100 * counts / counts.sum(), content["edges"], color=_colour(index),
                    linestyle=line, linewidth=1.6,
                )  # fmt: skip
    handles = [
        Line2D([], [], color="0.3", linestyle=line, label=f"best {limit} of each image")
        for limit, line in zip(limits, LINE_STYLES, strict=False)
    ]
    axes.legend(handles=handles, loc="upper right", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    _finish(axes, "IoU of proposals with the nearest object", "IoU", "proposals (%)")


def _draw_aspect_ratios(axes: Axes, runs: Mapping[str, Measurement]) -> None:
    """SC-RPN's Fig. 8: proposals above an IoU, by the aspect ratio of their object."""
    limits, thresholds = [], []
    for index, run in enumerate(runs.values()):
        content = run.diagnostics["aspect_ratio"]
        edges = np.array(content["edges"])
        middle = np.concatenate([[edges[0] / 2**0.5], edges * 2**0.5])
        limits = list(content["high_quality_proposals"])
        counts = content["high_quality_proposals"][limits[-1]]
        thresholds = list(counts)
        for name, line in zip(thresholds, LINE_STYLES, strict=False):
            axes.plot(middle, counts[name], linestyle=line, **_style(index))
    axes.set_xscale("log", base=2)
    axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    handles = [
        Line2D([], [], color="0.3", linestyle=line, label=f"IoU above .{name[-2:-1]}")
        for name, line in zip(thresholds, LINE_STYLES, strict=False)
    ]
    axes.legend(handles=handles, loc="best", fontsize=9)
    _finish(axes, f"Best {limits[-1]} of each image, by their object", "its width / height",
            "proposals")  # fmt: skip
