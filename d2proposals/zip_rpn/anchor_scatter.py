"""The picture of object sizes and anchors by level, as in ZIP's Fig. 5.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.3, Fig. 5: width and
height of the boxes, natural logarithms, in three clusters by the anchors' level.

Shape shorthand in this module:

    M: number of objects of a dataset
    L: number of levels
    A: anchors of a cell of one level
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode
from matplotlib.figure import Figure

from ..files.figure_file import write_figure

# Okabe and Ito's colours, told apart under all common forms of colour blindness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_NAMES = {3: ("small", "medium", "large")}


def object_sizes(
    records: Sequence[dict[str, Any]], shortest_side: int, longest_side: int
) -> np.ndarray:
    """Widths and heights of a dataset's objects as the network sees them; crowd is left out.

    Args:
        records: in Detectron2's format, with "height" and "width".
        shortest_side: to which an image's shorter side is resized, in pixels; 0 for no resize.
        longest_side: bound on its longer side.

    Returns:
        (M, 2), positive, pixels of the network input.
    """
    sizes = []
    for record in records:
        height, width = record["height"], record["width"]
        scale_x = scale_y = 1.0
        if shortest_side:
            new_height, new_width = ResizeShortestEdge.get_output_shape(
                height, width, shortest_side, longest_side
            )
            scale_x, scale_y = new_width / width, new_height / height
        for x in record.get("annotations", []):
            if x.get("iscrowd", 0) == 0:
                box = BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS)
                sizes.append(((box[2] - box[0]) * scale_x, (box[3] - box[1]) * scale_y))
    sizes = np.array(sizes, dtype=np.float64).reshape(-1, 2)
    return sizes[(sizes > 0).all(axis=1)]


def best_levels(sizes: np.ndarray, anchor_sizes: Sequence[np.ndarray]) -> np.ndarray:
    """The level that has the anchor of the highest IoU with each object, both about one centre.

    Args:
        sizes: (M, 2) width and height.
        anchor_sizes: of each level, (A, 2).

    Returns:
        (M,) int64, 0 to L - 1.
    """
    anchors = np.concatenate(list(anchor_sizes))  # (L * A, 2)
    level = np.repeat(np.arange(len(anchor_sizes)), [len(a) for a in anchor_sizes])
    inside = np.minimum(sizes[:, None], anchors[None]).prod(axis=2)  # (M, L * A)
    union = sizes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - inside
    return level[(inside / union).argmax(axis=1)]


def write_anchor_picture(
    path: str | os.PathLike, sizes: np.ndarray, anchor_sizes: Sequence[np.ndarray], title: str
) -> None:
    """Draw objects as dots in their level's colour, and anchors as crosses.

    Args:
        path: image file to write.
        sizes: (M, 2) width and height of objects.
        anchor_sizes: of each level, (A, 2).
        title: of the picture.
    """
    levels = best_levels(sizes, anchor_sizes)
    names = _NAMES.get(len(anchor_sizes), [f"level {i + 1}" for i in range(len(anchor_sizes))])
    figure = Figure(figsize=(6.4, 5.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for level, (anchors, name) in enumerate(zip(anchor_sizes, names, strict=True)):
        colour = _COLOURS[level % len(_COLOURS)]
        width, height = np.log(sizes[levels == level]).T
        axes.scatter(
            width,
            height,
            s=5,
            alpha=0.35,
            color=colour,
            linewidths=0,
            label=f"{name}: {len(width)}",
        )
        axes.scatter(*np.log(anchors).T, s=70, marker="+", color="black", linewidths=2.6)
        axes.scatter(*np.log(anchors).T, s=50, marker="+", color=colour, linewidths=1.4)
    axes.set(xlabel="logarithm of the width", ylabel="logarithm of the height", title=title)
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(alpha=0.3)
    axes.legend(title="objects (+: anchors)", markerscale=2)
    write_figure(path, figure)
