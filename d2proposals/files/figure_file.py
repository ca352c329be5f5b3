"""Figures of matplotlib as files that are either complete or absent."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .atomic_files import atomic_write

logger = logging.getLogger(__name__)


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


@contextmanager
def beside_numbers(path: str | os.PathLike) -> Iterator[None]:
    """Draw a picture that stands beside numbers: where that fails, a warning says so, and the job
    goes on with its numbers.

    Args:
        path: of the picture, named in the warning.
    """
    try:
        yield
    # Whatever it is: fonts, a full disk, values that cannot be drawn.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning(f"{os.fspath(path)} is not drawn ({reason[:300]}); the numbers are there")
