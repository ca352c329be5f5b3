"""How large a dataset's objects are, counted by object and by pixel (Fig. 2 and 4).

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Sec. I and III-B, Fig. 2 and 4.

Shape shorthand in this module:

    M: number of objects of the dataset
    B: number of bins of the area
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ..files.figure_file import write_figure


class SizeDistribution(NamedTuple):
    """Objects of a dataset by their areas.

    Attributes:
        edges: (B,) lower edges of the bins, in pixels of the original image; the last has no upper
            one.
        objects: (B,) share of the objects, in [0, 1] (Fig. 2).
        pixels: (B,) share of the objects' pixels (Fig. 4).
        num_objects: M.
        small_objects: share of the objects that are smaller than the boundary.
        small_pixels: share of the pixels in them.
        boundary: the least area of a large object, in pixels.
    """

    edges: np.ndarray
    objects: np.ndarray
    pixels: np.ndarray
    num_objects: int
    small_objects: float
    small_pixels: float
    boundary: float


def size_distribution(
    areas: np.ndarray, *, boundary: float = 2000.0, bin_width: float = 2000.0, num_bins: int = 40
) -> SizeDistribution:
    """Count objects and their pixels by area.

    Args:
        areas: (M,) of the objects, in pixels of the original image.
        boundary: the least area of a large object (MODEL.SPOP.LARGE_AREA).
        bin_width: of all bins but the last, in pixels.
        num_bins: B.

    Raises:
        ValueError: there are no objects.
    """
    areas = np.asarray(areas, dtype=np.float64)
    if areas.sum() <= 0:
        raise ValueError("the dataset has no objects, or none has an area: nothing to count")
    edges = bin_width * np.arange(num_bins)
    index = np.minimum((areas // bin_width).astype(int), num_bins - 1)
    is_small = areas < boundary
    return SizeDistribution(
        edges=edges,
        objects=np.bincount(index, minlength=num_bins) / len(areas),
        pixels=np.bincount(index, areas, minlength=num_bins) / areas.sum(),
        num_objects=len(areas),
        small_objects=float(is_small.mean()),
        small_pixels=float(areas[is_small].sum() / areas.sum()),
        boundary=boundary,
    )


def write_size_picture(path: str | os.PathLike, distribution: SizeDistribution, name: str) -> None:
    """Draw both distributions, atomically.

    Args:
        path: of the image file.
        distribution: of the dataset.
        name: of the dataset.
    """
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    edges = distribution.edges
    width = edges[1] - edges[0] if len(edges) > 1 else distribution.boundary
    panels = (
        ("objects", distribution.objects, distribution.small_objects),
        ("pixels in objects", distribution.pixels, distribution.small_pixels),
    )
    for axes, (of_what, shares, small) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.bar(edges, 100 * shares, width=width, align="edge", edgecolor="white", linewidth=0.5)
        axes.axvline(distribution.boundary, color="black", linestyle="--")
        axes.set_xlabel(f"area of the object, pixels (last bar: from {edges[-1]:,.0f} on)")
        axes.set_ylabel(f"% of {of_what}")
        axes.set_title(
            f"{name}: {100 * small:.1f} % of {of_what} below {distribution.boundary:,.0f}",
            fontsize=11,
        )
    write_figure(path, figure)
