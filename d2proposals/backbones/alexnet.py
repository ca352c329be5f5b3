"""AlexNet without its classifier layer: the trunk of DetectorNet.

Source: A. Krizhevsky, I. Sutskever and G. Hinton, "ImageNet Classification with Deep Convolutional
Neural Networks", NIPS 2012, in the form of A. Krizhevsky, "One weird trick for parallelizing
convolutional neural networks", arXiv 1404.5997, of which torchvision has weights.

Shape shorthand in this module:

    P: number of images
    S: side of the square images, in pixels
"""

from __future__ import annotations

import math

import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn

# (channels, kernel, stride, padding) of the convolutions; "pool" is 3x3 with stride 2. With
# torchvision's order of modules, so that names of weights are equal.
_LAYERS = (
    (64, 11, 4, 2), "pool", (192, 5, 1, 2), "pool", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1),
    "pool",
)  # fmt: skip
# Of both fully connected layers.
HIDDEN_CHANNELS = 4096


class AlexNet(nn.Module):
    """Five convolutions and two fully connected layers, each followed by a ReLU.

    Unlike the paper, which takes the network of 2012: torchvision's version of 2014, without local
    response normalisation and without groups, because its weights are public. At S = 225 as at
    224, the last map has 6x6 cells, so that the weights of the fully connected layers fit.

    Attributes:
        out_channels: numbers per image in the output.
    """

    def __init__(
        self,
        *,
        input_size: int = 225,
        width_factor: float = 1.0,
        norm: str = "",
        dropout: float = 0.5,
    ):
        """
        Args:
            input_size: S.
            width_factor: on every layer's number of channels; 1 is the published network.
            norm: normalisation after each convolution, a name of Detectron2's ``get_norm``; "" for
                none, as published. For training from scratch.
            dropout: probability before each fully connected layer.

        Raises:
            ValueError: the images are too small, or the network is too narrow.
        """
        super().__init__()
        self.features = nn.Sequential()
        channels, side = 3, input_size
        for layer in _LAYERS:
            if layer == "pool":
                self.features.append(nn.MaxPool2d(kernel_size=3, stride=2))
                kernel, stride, padding = 3, 2, 0
            else:
                width, kernel, stride, padding = layer
                width = scaled_channels(width, width_factor)
                self.features.append(_convolution(channels, width, kernel, stride, padding, norm))
                self.features.append(nn.ReLU(inplace=True))
                channels = width
            side = (side + 2 * padding - kernel) // stride + 1
        if side < 1:
            raise ValueError(f"AlexNet needs images of at least 63 pixels, got {input_size}.")
        self.input_size = input_size
        self.out_channels = scaled_channels(HIDDEN_CHANNELS, width_factor)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(channels * side**2, self.out_channels),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(self.out_channels, self.out_channels),
            nn.ReLU(inplace=True),
        )
        for module in self.modules():
            # Keeps the variance through the ReLUs (He et al., 2015): torch's default loses it
            # within seven layers, and training from scratch does not start.
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # In this order of memory the convolutions take a quarter less time on CPUs.
        self.features.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images: (P, 3, S, S); RGB, normalised by torchvision's means and deviations for its
                weights.

        Returns:
            Tensor: (P, out_channels), not negative.
        """
        size = (self.input_size, self.input_size)
        assert images.shape[-2:] == size, f"expected images of {size}, got {tuple(images.shape)}"
        images = images.contiguous(memory_format=torch.channels_last)
        return self.classifier(self.features(images).flatten(1))


def scaled_channels(channels: int, factor: float) -> int:
    """Channels of a layer; at least 8, and a multiple of 8, so that they split into groups."""
    if factor <= 0:
        raise ValueError(f"WIDTH_FACTOR must be positive, got {factor}.")
    return max(8 * round(channels * factor / 8), 8)


def _convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int, padding: int, norm: str
) -> Conv2d:
    """A convolution with its normalisation; a bias unless that has one."""
    layer_norm = (
        nn.GroupNorm(math.gcd(32, out_channels), out_channels)
        if norm == "GN"
        else get_norm(norm, out_channels)
    )
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        bias=norm == "",
        norm=layer_norm,
    )
