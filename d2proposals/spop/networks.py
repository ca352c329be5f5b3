"""The networks of SPOP: one that says where objects are and how large, and those that box them.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Sec. III-A, III-B, Fig. 3 and 5.

Shape shorthand in this module:

    N: number of images in the batch
    H, W: height and width of the images, in pixels
    Hm, Wm: height and width of the output maps, in cells; cell (i, j) is centred on pixel
        (8 * i, 8 * j)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.modeling import Backbone
from torch import nn

# The paper's new layers learn ten times as fast as the pre-trained ones (Sec. IV-A).
NEW_LAYER_LR_FACTOR = 10.0


class Confidence(NamedTuple):
    """Two-way class scores of each cell.

    Attributes:
        objectness: (N, 2, Hm, Wm), background and foreground.
        size: (N, 2, Hm, Wm), small and large object; None without scale-awareness.
    """

    objectness: torch.Tensor
    size: torch.Tensor | None


class ConfidenceNetwork(nn.Module):
    """A trunk and two branches of two 3x3 convolutions each (Fig. 5)."""

    def __init__(
        self,
        trunk: Backbone,
        *,
        hidden_channels: int = 1024,
        has_size_branch: bool = True,
        new_layer_lr_factor: float = NEW_LAYER_LR_FACTOR,
    ):
        """
        Args:
            trunk: with one output map, cell (i, j) of it centred on pixel (stride * i, stride * j),
                and ``receptive_field``, the side of the square of pixels that a cell sees.
            hidden_channels: of each branch's first convolution.
            has_size_branch: whether there is a large/small branch beside the objectness branch.
            new_layer_lr_factor: on the learning rate of the branches.

        Raises:
            ValueError: a value is not allowed.
        """
        super().__init__()
        if hidden_channels < 1:
            raise ValueError(f"MODEL.SPOP.HEAD_CHANNELS must be at least 1, got {hidden_channels}.")
        self.trunk = trunk
        channels, self.stride = _shape(trunk)
        # The trunk's, and a cell on each side for each of a branch's two convolutions.
        self.receptive_field = trunk.receptive_field + 4 * self.stride
        self.objectness = _branch(channels, hidden_channels, new_layer_lr_factor)
        self.size = (
            _branch(channels, hidden_channels, new_layer_lr_factor) if has_size_branch else None
        )

    def forward(self, x: torch.Tensor) -> Confidence:
        """
        Args:
            x: (N, 3, H, W) images normalised for the trunk, without padding.
        """
        (features,) = self.trunk(x).values()
        size = None if self.size is None else _logits(self.size, features)
        return Confidence(_logits(self.objectness, features), size)


class LocalizationNetwork(nn.Module):
    """A trunk and a convolution that predicts each cell's offsets to the sides of its object.

    The paper's last layer, an element-wise sum with the map of the cells' own coordinates (Fig. 3),
    has no weights; so absolute coordinates are what is trained.
    """

    def __init__(
        self,
        trunk: Backbone,
        *,
        normalizer: float = 513.0,
        new_layer_lr_factor: float = NEW_LAYER_LR_FACTOR,
    ):
        """
        Args:
            trunk: with one output map.
            normalizer: pixels per unit of the coordinates.
            new_layer_lr_factor: on the learning rate of the convolution.

        Raises:
            ValueError: a value is not allowed.
        """
        super().__init__()
        self.trunk = trunk
        channels, self.stride = _shape(trunk)
        self.normalizer = normalizer
        # The paper gives no kernel; DeepLab's last convolution, in whose place it is, has 1x1.
        self.offset = nn.Conv2d(channels, 4, kernel_size=1)
        _init_new_layers(self.offset, new_layer_lr_factor)

    def offsets(self, x: torch.Tensor) -> torch.Tensor:
        """The second last layer: offsets from each cell to its object's sides.

        Args:
            x: (N, 3, H, W) images normalised for the trunk, without padding.

        Returns:
            Tensor: (N, 4, Hm, Wm) as x_min, y_min, x_max, y_max, in units of ``normalizer`` pixels.
        """
        (features,) = self.trunk(x).values()
        return _in_full_precision(self.offset, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (N, 3, H, W) images normalised for the trunk, without padding.

        Returns:
            Tensor: (N, 4, Hm, Wm) boxes XYXY of each cell's object, in units of ``normalizer``
            pixels of ``x``.
        """
        offsets = self.offsets(x)
        return offsets + coordinate_map(
            tuple(offsets.shape[-2:]), self.stride, self.normalizer, offsets.device
        )


def coordinate_map(
    map_size: tuple[int, int], stride: int, normalizer: float, device: torch.device | None = None
) -> torch.Tensor:
    """The spatial coordinate map of Fig. 3: where each cell is.

    Unlike the paper, which divides by the width and height of the image, coordinates are divided by
    one fixed number on both axes, the side of the training images: a convolution does not know the
    size of its image, so what it has learnt to predict is pixels / 513, also for images of other
    sizes (the paper tests at the images' own and twice that).

    Args:
        map_size: (Hm, Wm).
        stride: pixels per cell.
        normalizer: pixels per unit.
        device: of the result.

    Returns:
        Tensor: (4, Hm, Wm) as x, y, x, y: (8 * j, 8 * i, 8 * j, 8 * i) / normalizer.
    """
    y, x = (torch.arange(n, device=device) * (stride / normalizer) for n in map_size)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y, x, y])


def _branch(in_channels: int, hidden_channels: int, lr_factor: float) -> nn.Sequential:
    """One branch of the confidence network: 3x3 convolution, ReLU, 3x3 convolution to two maps."""
    branch = nn.Sequential(
        nn.Conv2d(in_channels, hidden_channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden_channels, 2, 3, padding=1),
    )
    _init_new_layers(branch, lr_factor)
    return branch


def _logits(branch: nn.Sequential, features: torch.Tensor) -> torch.Tensor:
    """A branch's (N, 2, Hm, Wm) logits of the trunk's features."""
    return _in_full_precision(branch[-1], branch[:-1](features))


def _in_full_precision(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Run a last layer as its weights are, not in the half precision of autocast.

    That has too few digits for coordinates, and for telling the scores of thousands of cells apart.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype)).float()


def _init_new_layers(module: nn.Module, lr_factor: float) -> None:
    """Weights N(0, 0.01), biases 0, and the factor on the learning rate (Sec. IV-A)."""
    if not lr_factor > 0:
        raise ValueError(f"MODEL.SPOP.NEW_LAYER_LR_FACTOR must be positive, got {lr_factor}.")
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    # Read by the optimizer (engine/optimizer.py).
    module.lr_factor = lr_factor


def _shape(trunk: Backbone) -> tuple[int, int]:
    """Channels and stride of a trunk's one output map."""
    shapes = trunk.output_shape()
    assert len(shapes) == 1, f"a trunk of SPOP has one output map, not {list(shapes)}"
    (shape,) = shapes.values()
    return shape.channels, shape.stride
