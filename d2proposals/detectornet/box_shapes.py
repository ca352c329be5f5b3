"""Aspect ratios of a dataset's boxes, by k-means.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 5.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from scipy.cluster.vq import kmeans2

_ITERATIONS = 100


def dataset_aspect_ratios(records: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Width / height of the objects of a dataset; crowd and boxes without an area do not count.

    Args:
        records: dictionaries of Detectron2's dataset format.

    Returns:
        (R,) float64.
    """
    boxes = np.asarray(
        [
            BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS)
            for record in records
            for x in record.get("annotations", [])
            if not x.get("iscrowd", 0)
        ],
        dtype=np.float64,
    ).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    sides = sides[(sides > 0).all(axis=1)]
    return sides[:, 0] / sides[:, 1]


def cluster_aspect_ratios(aspect_ratios: np.ndarray, number: int) -> np.ndarray:
    """Centres of clusters of aspect ratios.

    Unlike the paper, which does not say what is clustered: the logarithms, so that a box and its
    transpose are treated alike. The clusters begin at quantiles, so that the result depends on
    nothing but the data.

    Args:
        aspect_ratios: (R,) positive.
        number: of clusters.

    Returns:
        (number,) float64, increasing.

    Raises:
        ValueError: there are fewer different ratios than clusters.
    """
    different = len(np.unique(aspect_ratios))
    if not 1 <= number <= different:
        raise ValueError(
            f"Cannot find {number} clusters among {different} different aspect ratios; take a "
            "dataset with more objects, or another --number."
        )
    logs = np.log(np.sort(aspect_ratios))
    start = np.quantile(logs, (np.arange(number) + 0.5) / number)
    if len(np.unique(start)) < number:  # many equal ratios: quantiles of the different ones
        start = np.quantile(np.unique(logs), (np.arange(number) + 0.5) / number)
    centers, _ = kmeans2(logs, start, iter=_ITERATIONS, minit="matrix", missing="raise")
    return np.exp(np.sort(centers))
