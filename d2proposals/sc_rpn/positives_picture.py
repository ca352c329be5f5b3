"""A picture of SC-RPN's positives per object while its initial proposals improve (Sec. III-B).

Size-aware dynamic sampling keeps the number stable ("phenomenon 2"); with a fixed IoU threshold
it grows with the proposals' quality. Both are in the training log, see
:func:`~d2proposals.sc_rpn.stage_sampling.sample_statistics`.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..files.figure_file import write_figure
from ..files.training_log import read_training_log

COUNT, IOU = "scrpn/num_pos_refined_per_object", "scrpn/init_iou_of_pos"
# Colour-blind-safe (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def read_positives(folder: str) -> np.ndarray:
    """Read a run's log.

    Args:
        folder: OUTPUT_DIR of a training of SCRPN.

    Returns:
        (K, 3) of K log entries: iteration, positives per object of the second stage, and the mean
        IoU of their initial proposals with their objects.

    Raises:
        FileNotFoundError: the folder has no log.
        ValueError: the log has no entry of SCRPN.
    """
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: name the OUTPUT_DIR of a training.")
    rows = [
        (entry["iteration"], entry[COUNT], entry[IOU])
        for entry in read_training_log(path)
        if COUNT in entry and IOU in entry
    ]
    if not rows:
        raise ValueError(f"{path} has no entry {COUNT}: is it of a training of SCRPN?")
    return np.array(rows)


def write_positives_picture(output: str, runs: dict[str, np.ndarray]) -> None:
    """Draw one curve per run: positives per object, and the IoU of their initial proposals.

    Args:
        output: image file to write.
        runs: :func:`read_positives`'s arrays by the run's name.
    """
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2)
    for (name, values), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot(values[:, 0], values[:, column], color=colour, label=name)
    axes[0].set_title("positives per object", fontsize=11)
    axes[0].set_ylim(bottom=0)
    axes[1].set_title("IoU of their initial proposals", fontsize=11)
    axes[1].set_ylim(0, 1)
    for axis in axes:
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    write_figure(output, figure)
