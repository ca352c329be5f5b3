"""Figures of matplotlib as files that are either complete or absent."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .atomic_files import atomic_write


def write_figure(path: str | os.PathLike, figure: Figure) -> None:
    """Write a figure atomically, in its own resolution.

    Args:
        path: its suffix tells the format where matplotlib knows it; any other file is PNG.
        figure: made without pyplot, which would keep it and look for a display.
    """
    canvas = FigureCanvasAgg(figure)
    suffix = Path(path).suffix.removeprefix(".").lower()
    known = suffix in canvas.get_supported_filetypes()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=suffix if known else "png", dpi=figure.dpi)
