"""How far each localisation network is off, on large and on small objects (Tables II and III).

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Sec. III-B, Tables II and III.

The paper's "L2 errors of normalized coordinates" are taken for mean squared differences: as
distances, those of Table III would be a third of a pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import ImageList, Instances
from tabulate import tabulate
from torch import nn

from ..evaluation.model_measures import MODEL_MEASURES
from ..proposals.native_size import ImageSizes, given_sizes
from .generator import SPOP
from .pixel_proposals import fuse_coordinates

SIZES = ("large", "small")
COORDINATES = ("x_min", "y_min", "x_max", "y_max")
# Tables of experiments have few decimals.
_UNIT = 1e-4


@dataclass
class LocalizationErrors:
    """Sums over foreground cells, by network and size of object.

    Attributes:
        squared: {(network, size): (4,) float64 sum of squared differences of x_min, y_min, x_max,
            y_max}, x in widths and y in heights of the image that the networks see.
        num_cells: {size: number of cells}.
    """

    squared: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    num_cells: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 0))

    def add(self, network: str, size: str, squared: torch.Tensor) -> None:
        """Add (K, 4) squared differences of K cells."""
        total = squared.double().sum(dim=0).cpu()
        key = (network, size)
        self.squared[key] = self.squared[key] + total if key in self.squared else total

    def means(self) -> dict[tuple[str, str], torch.Tensor]:
        """Mean squared differences, (4,) each; NaN for a size that no cell has."""
        return {
            (network, size): total / self.num_cells[size]
            if self.num_cells[size]
            else total * torch.nan
            for (network, size), total in self.squared.items()
        }

    def metrics(self) -> dict[str, dict[str, float]]:
        """By task NETWORK_on_SIZE, as "small_size_on_large": the means, and that of the four sides
        ("mean"), in ten-thousandths; "cells" is their number."""
        return {
            f"{network}_on_{size}": {
                **dict(zip(COORDINATES, (mean / _UNIT).tolist(), strict=True)),
                "mean": (mean / _UNIT).mean().item(),
                "cells": self.num_cells[size],
            }
            for (network, size), mean in self.means().items()
        }

    def table(self) -> str:
        """The rows of Tables II and III, for all networks and their fusion."""
        rows = [
            [network, f"{size} ({self.num_cells[size]})", *(f"{x:.6f}" for x in mean.tolist())]
            for (network, size), mean in self.means().items()
        ]
        headers = ["network", "objects (cells)", *(f"{name} error" for name in COORDINATES)]
        return tabulate(rows, headers, disable_numparse=True, tablefmt="pipe")


@torch.no_grad()
def add_localization_errors(
    errors: LocalizationErrors,
    generator: SPOP,
    images: ImageList,
    gt_instances: Sequence[Instances],
) -> None:
    """Add the errors of all networks on a batch.

    Args:
        errors: to add to.
        generator: in evaluation.
        images: normalised for the model; as large as in training, to compare with the paper.
        gt_instances: of each image, as in training.
    """
    shown = generator.training_images(images)
    predictions = generator.networks(shown)
    coordinates = dict(predictions.coordinates)
    if predictions.size is not None:
        large, small = (
            coordinates[name].t()[None, :, :, None] for name in ("large_size", "small_size")
        )
        fused = fuse_coordinates(large, small, predictions.size.t()[None, :, :, None])
        coordinates["fused"] = fused[0, :, :, 0].t()
    start = 0
    for gt, map_size, image_size in zip(
        gt_instances, predictions.map_sizes, shown.image_sizes, strict=True
    ):
        targets = generator.labeler(gt, map_size, image_size)
        cells = slice(start, start + len(targets.objectness))
        start = cells.stop
        height, width = image_size
        unit = targets.boxes.new_tensor([width, height, width, height])
        for size, is_size in zip(SIZES, (targets.is_large, targets.is_small), strict=True):
            errors.num_cells[size] += int(is_size.sum())
            for network, predicted in coordinates.items():
                difference = (predicted[cells] - targets.boxes)[is_size]
                squared = (difference * generator.networks.normalizer / unit).square()
                errors.add(network, size, squared)


def measure_localization(model: nn.Module, inputs: Iterable[dict[str, Any]]) -> LocalizationErrors:
    """The errors of all networks on labelled images.

    Args:
        model: in evaluation.
        inputs: images with "instances", as a training maps them, without flips.

    Raises:
        ValueError: as :func:`find_spop`.
    """
    generator, device = find_spop(model), model.pixel_mean.device
    errors = LocalizationErrors()
    for mapped in inputs:
        image = (mapped["image"].to(device) - model.pixel_mean) / model.pixel_std
        images = ImageList.from_tensors([image])
        with given_sizes([ImageSizes.of_input(mapped)]):
            add_localization_errors(errors, generator, images, [mapped["instances"].to(device)])
    return errors


@MODEL_MEASURES.register()
def localization_errors(
    model: nn.Module, inputs: Iterable[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """:meth:`LocalizationErrors.metrics` of :func:`measure_localization`."""
    return measure_localization(model, inputs).metrics()


def find_spop(model: nn.Module) -> SPOP:
    """The generator of a model.

    Raises:
        ValueError: it is another one.
    """
    generator = getattr(model, "proposal_generator", None)
    if not isinstance(generator, SPOP):
        raise ValueError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {type(generator).__name__}; this needs 'SPOP'."
        )
    return generator
