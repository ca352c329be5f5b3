"""The results of a proposal evaluation as a table, as JSON content and as a picture."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from ..files.figure_file import write_figure
from .recall import (
    AREA_RANGES,
    CURVE_IOU_THRESHOLDS,
    CURVE_SINGLE_IOUS,
    DETAIL_IOU_THRESHOLDS,
    Matches,
    average_recall,
    recall_at_iou,
)

AREA_NAMES = dict(zip(AREA_RANGES, ("all", "small", "medium", "large"), strict=True))
# Okabe and Ito's colours, told apart under all common forms of colour blindness.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":")


def format_table(metrics: Mapping[str, float], limits: Sequence[int]) -> str:
    """The measures as a table, one row per number of proposals, in percent.

    "-" marks a measure without ground truth.
    """
    names = [f"AR{suffix}" for suffix in AREA_RANGES] + ["AR-cont", "ABO", "MABO"]
    names += [f"Recall-IoU{percent}" for percent in DETAIL_IOU_THRESHOLDS]
    rows = [[limit, *(metrics.get(f"{name}@{limit}") for name in names)] for limit in limits]
    table = _tabulate(rows, ["proposals", *names])
    auc = [f"AUC{suffix}" for suffix in AREA_RANGES]
    return table + "\n" + _tabulate([[metrics.get(name) for name in auc]], auc)


def _tabulate(rows: list[list], headers: list[str]) -> str:
    alignment = ["right"] * len(headers)
    return tabulate(
        rows, headers, tablefmt="pipe", floatfmt=".2f", colalign=alignment, missingval="-"
    )


def recall_curves(matches: Matches, limits: Sequence[int]) -> dict:
    """Curves in percent, for JSON.

    Returns:
        ``ar_by_num_proposals``: "num_proposals" (K values) and AR for each area's name, None
        without ground truth. ``recall_by_num_proposals``: "num_proposals" and recall at IoU "0.5",
        "0.7" (SPOP, Fig. 8) and "0.8" (ZIP, Fig. 7). ``abo_by_num_proposals``: "num_proposals" and
        "ABO" (SPOP, Fig. 12). ``recall_by_iou``: "iou" and, for each limit as text, recall. Recall
        and ABO are None throughout where the dataset has no ground truth.
    """
    ar = {
        AREA_NAMES[suffix]: [100 * value for value in row] if in_range.any() else None
        for suffix, row, in_range in zip(
            AREA_RANGES, average_recall(matches).tolist(), matches.in_range, strict=True
        )
    }
    recall_by_iou = {}
    for limit in limits:
        matched_iou = matches.matched_iou[0, :, matches.column(limit)]
        recall_by_iou[str(limit)] = (
            (100 * recall_at_iou(matched_iou, CURVE_IOU_THRESHOLDS)).tolist()
            if len(matched_iou)
            else None
        )
    at_iou, best_overlap = dict.fromkeys(map(str, CURVE_SINGLE_IOUS)), None
    if len(matches.matched_iou[0]):
        thresholds = np.array(CURVE_SINGLE_IOUS, np.float32)
        recall = [recall_at_iou(column, thresholds) for column in matches.matched_iou[0].T]
        at_iou = dict(zip(at_iou, (100 * np.transpose(recall)).tolist(), strict=True))
        best_overlap = (100 * matches.best_iou.mean(axis=0, dtype=np.float64)).tolist()
    return {
        "ar_by_num_proposals": {"num_proposals": list(matches.num_proposals), **ar},
        "recall_by_num_proposals": {"num_proposals": list(matches.num_proposals), **at_iou},
        "abo_by_num_proposals": {"num_proposals": list(matches.num_proposals), "ABO": best_overlap},
        "recall_by_iou": {"iou": (np.arange(50, 101) / 100).tolist(), **recall_by_iou},
    }


def plot_curves(path: str | os.PathLike, curves: dict, title: str) -> None:
    """Draw AR, recall and ABO over the number of proposals, and recall over IoU.

    Args:
        path: of the PNG file, written atomically.
        curves: of ``recall_curves``.
        title: of the picture.
    """
    # A layout that measures its texts would draw everything twice.
    margins = {"left": 0.03, "right": 0.99, "bottom": 0.12, "top": 0.9, "wspace": 0.17}
    figure = Figure(figsize=(21, 4.5))
    figure.suptitle(title)
    left, middle, overlap, right = figure.subplots(1, 4, gridspec_kw=margins)
    by_number = dict(curves["ar_by_num_proposals"])
    _draw(left, by_number.pop("num_proposals"), by_number, "objects")
    left.set(xscale="log", xlabel="number of proposals", ylabel="average recall (%)")
    at_iou = dict(curves["recall_by_num_proposals"])
    _draw(middle, at_iou.pop("num_proposals"), at_iou, "IoU")
    middle.set(xscale="log", xlabel="number of proposals", ylabel="recall (%)")
    best = dict(curves["abo_by_num_proposals"])
    _draw(overlap, best.pop("num_proposals"), {"all": best["ABO"]}, "objects")
    overlap.set(xscale="log", xlabel="number of proposals", ylabel="average best overlap (%)")
    by_iou = dict(curves["recall_by_iou"])
    _draw(right, by_iou.pop("iou"), by_iou, "proposals")
    right.set(xlabel="IoU", ylabel="recall (%)", xlim=(0.5, 1))
    write_figure(path, figure)


def _draw(axes, horizontal: list[float], lines: dict[str, list | None], legend: str) -> None:
    """Draw lines by name into ``axes``, each told by colour and by style."""
    for index, (name, vertical) in enumerate(lines.items()):
        if vertical is not None:
            axes.plot(
                horizontal,
                vertical,
                label=name,
                color=COLOURS[index % len(COLOURS)],
                linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            )
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(title=legend)
