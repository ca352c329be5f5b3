"""A sheet of pictures: several images with titles beside and below each other, in one file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

# Perceptually uniform, and readable with colour blindness and in grey.
COLOUR_MAP = "viridis"
DOTS_PER_INCH = 120
# In inches.
_TITLE_HEIGHT = 0.35
_BAR_WIDTH = 0.8
_MAX_ASPECT = 1.5


def image_rows(
    images: Sequence[np.ndarray],
    columns: int,
    what: str,
    cell_width: float = 3.6,
    bar: bool = False,
) -> tuple[Figure, np.ndarray]:
    """A figure with a row for each image, as high as the image's shape asks for.

    Args:
        images: (H, W, ...) arrays.
        columns: cells of a row.
        what: the sheet shows, for the error.
        cell_width: in inches.
        bar: leave room for the colour bar of :func:`add_colour_bar`.

    Returns:
        Figure: without ticks and frames.
        (len(images), columns) of its axes.

    Raises:
        ValueError: without images.
    """
    if not images:
        raise ValueError(f"a sheet of {what} needs at least one image")
    # A very tall image is made smaller instead of its row taller.
    row_heights = [
        _TITLE_HEIGHT + cell_width * min(image.shape[0] / image.shape[1], _MAX_ASPECT)
        for image in images
    ]
    figure = Figure(
        figsize=(cell_width * columns + _BAR_WIDTH * bar, sum(row_heights) + 0.2),
        dpi=DOTS_PER_INCH,
        layout="constrained",
    )
    grid = figure.subplots(len(images), columns, squeeze=False, height_ratios=row_heights)
    for axes in grid.flat:
        axes.set_axis_off()
        # The titles of a row stand at one height, whatever the cells' shapes.
        axes.set_anchor("N")
    return figure, grid


def title_cell(axes: Axes, title: str, size: float = 11, max_length: int | None = None) -> None:
    """Write a title above a cell as it stands; of a long one the end.

    Args:
        axes: of the cell.
        title: text, in which nothing is mathematics.
        size: of its letters in points.
        max_length: characters that fit.
    """
    axes.set_title(shorten(title, max_length), fontsize=size, parse_math=False)


def shorten(text: str, max_length: int | None) -> str:
    """A text of at most ``max_length`` characters: its end, which tells files apart."""
    if max_length is None or len(text) <= max_length:
        return text
    return "..." + text[3 - max_length :]


def add_colour_bar(figure: Figure, grid: np.ndarray, label: str) -> Colorbar:
    """Add a bar of :data:`COLOUR_MAP` from 0 to 1 at the right of a sheet, and return it."""
    return figure.colorbar(
        ScalarMappable(Normalize(0, 1), COLOUR_MAP),
        ax=grid,
        fraction=0.02,
        pad=0.01,
        aspect=30,
        label=label,
    )
