"""Pictures of the masks that DeepMask predicts at every window of a row (Fig. 2).

Source: DeepMask, Sec. 3.3: "output of segmentation model applied densely to a full image with a 16
pixel stride (at a single scale at the central horizontal image region)".

Shape shorthand in this module:

    Hs, Ws: height and width of the scaled image, in pixels
    S: side of a window, in pixels
    K: number of windows in a picture
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..files.figure_file import write_figure
from ..pictures.sheet import image_rows, title_cell
from .dense_inference import network_canvas, predict_row_of_windows
from .generator import DeepMask

# Of Okabe and Ito's colours; and how much of it there is on a mask's pixels.
MASK_COLOUR = (230, 159, 0)
_OPACITY = 0.6
_COLUMNS = 8
_GAP = 8
_MAX_NAME_LENGTH = 40


class DensePicture(NamedTuple):
    """One image, and the masks of a row of its windows at one scale.

    Attributes:
        name: of the image, in the picture's title.
        image: (Hs, Ws, 3) uint8 RGB.
        centres: (K, 2) x, y of the windows' centres, pixels of this image.
        windows: (K, S, S, 3) uint8 RGB, what each window shows, its mask in colour.
    """

    name: str
    image: np.ndarray
    centres: np.ndarray
    windows: np.ndarray


@torch.no_grad()
def make_dense_picture(
    model: nn.Module, network_input: torch.Tensor, name: str, scale: float, num_windows: int
) -> DensePicture:
    """Run a model's network on the middle row of windows of an image.

    Args:
        model: Detectron2's ``ProposalNetwork`` or ``GeneralizedRCNN`` in evaluation, with DeepMask.
        network_input: (3, H, W) before normalisation, as a dataset mapper returns it.
        name: of the image.
        scale: factor on the image.
        num_windows: windows to draw at most, evenly spread over the row.

    Raises:
        ValueError: the model has another generator; numbers that make no sense.
    """
    generator = getattr(model, "proposal_generator", None)
    if not isinstance(generator, DeepMask):
        raise ValueError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {type(generator).__name__}; this needs 'DeepMask'."
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"the scale (--scale) must be a positive factor, got {scale}")
    if num_windows < 1:
        raise ValueError(f"the number of windows must be at least 1, got {num_windows}")
    network, pixels = generator.network, generator.pixel_normalization
    image = (network_input.to(model.pixel_mean.device) - model.pixel_mean) / model.pixel_std
    stride, side = network.stride, network.patch_size
    canvas = network_canvas(network, pixels, image, scale, shown=True)
    height, width = canvas.image_size
    row = height // 2 // stride
    windows = predict_row_of_windows(network, pixels, image, scale, row)
    masks = network.mask_head.in_window(windows.mask_logits, side)
    masks = masks > math.log(generator.mask_thresh / (1 - generator.mask_thresh))
    number = (canvas.size[1] - side) // stride + 1
    columns = np.unique(np.linspace(0, number - 1, min(num_windows, number)).round().astype(int))
    strip = pixels.to_rgb(canvas.rows(row * stride, row * stride + side)).permute(1, 2, 0)
    shown = torch.stack([strip[:, k * stride : k * stride + side] for k in columns.tolist()])
    colour = torch.tensor(MASK_COLOUR, device=shown.device)
    tinted = (shown * (1 - _OPACITY) + colour * _OPACITY).round().to(torch.uint8)
    shown = torch.where(masks[columns][..., None], tinted, shown)
    whole = pixels.to_rgb(canvas.rows(canvas.before, canvas.before + height))
    whole = whole[:, :, canvas.before : canvas.before + width]
    return DensePicture(
        name=name,
        image=whole.permute(1, 2, 0).cpu().numpy(),
        centres=np.stack([columns * stride, np.full(len(columns), row * stride)], axis=1),
        windows=shown.cpu().numpy(),
    )


def write_sheet(path: str | os.PathLike, pictures: Sequence[DensePicture]) -> None:
    """Write a row per image as one PNG, atomically: the image, and its windows from left to right.

    Args:
        path: of the PNG file.
        pictures: at least one.

    Raises:
        ValueError: without pictures.
    """
    mosaics = [_mosaic(x.windows) for x in pictures]
    shapes = [
        max(x.image, mosaic, key=lambda array: array.shape[0] / array.shape[1])
        for x, mosaic in zip(pictures, mosaics, strict=True)
    ]
    figure, grid = image_rows(shapes, 2, "masks at every window", cell_width=7.0)
    for axes, picture, mosaic in zip(grid, pictures, mosaics, strict=True):
        axes[0].imshow(picture.image)
        axes[0].plot(*picture.centres.T, ".", color="white", markeredgecolor="black")
        axes[0].set_xlim(-0.5, picture.image.shape[1] - 0.5)
        axes[0].set_ylim(picture.image.shape[0] - 0.5, -0.5)
        title_cell(axes[0], picture.name, max_length=_MAX_NAME_LENGTH)
        axes[1].imshow(mosaic)
        title_cell(axes[1], "masks of the windows around these pixels, in reading order")
    write_figure(path, figure)


def _mosaic(windows: np.ndarray) -> np.ndarray:
    """(rows, columns, 3) uint8: K windows beside and below each other, on white."""
    side, rows = windows.shape[1], -(-len(windows) // _COLUMNS)
    step = side + _GAP
    columns = min(len(windows), _COLUMNS)
    mosaic = np.full((rows * step - _GAP, columns * step - _GAP, 3), 255, np.uint8)
    for number, window in enumerate(windows):
        y, x = (step * k for k in divmod(number, _COLUMNS))
        mosaic[y : y + side, x : x + side] = window
    return mosaic
