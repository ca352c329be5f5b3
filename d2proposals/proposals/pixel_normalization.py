"""From the pixels of the meta-architecture to those that a generator's own trunk was made for.

A Detectron2 model normalises its images once, for its backbone: channels in INPUT.FORMAT, minus
MODEL.PIXEL_MEAN, divided by MODEL.PIXEL_STD. A generator that brings a trunk of its own, trained
on pixels of another kind, converts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import nn


class PixelNormalization(nn.Module):
    """Maps pixels normalised for the model to pixels normalised for a trunk.

    Both are ``(x - mean) / std`` of x in [0, 255], in channel orders of their own.
    """

    def __init__(
        self,
        *,
        model_format: str,
        model_mean: Sequence[float],
        model_std: Sequence[float],
        trunk_format: str,
        trunk_mean: Sequence[float],
        trunk_std: Sequence[float],
    ):
        """
        Args:
            model_format: channel order of the input, "RGB" or "BGR" (INPUT.FORMAT).
            model_mean: MODEL.PIXEL_MEAN, in the input's order.
            model_std: MODEL.PIXEL_STD, in the input's order.
            trunk_format: channel order of the output.
            trunk_mean: in the output's order, of values in [0, 255].
            trunk_std: in the output's order.

        Raises:
            ValueError: another format, or not three means and deviations.
        """
        super().__init__()
        for name in (model_format, trunk_format):
            if name not in ("RGB", "BGR"):
                raise ValueError(
                    f"Images must be in format 'RGB' or 'BGR', got '{name}': set INPUT.FORMAT and "
                    "the generator's FORMAT to one of them."
                )
        for values in (model_mean, model_std, trunk_mean, trunk_std):
            if len(values) != 3:
                raise ValueError(f"Pixel means and deviations have 3 numbers each, got {values}.")
        self.flips_channels = model_format != trunk_format
        self.model_is_rgb = model_format == "RGB"
        mean = torch.tensor(model_mean, dtype=torch.float64)
        std = torch.tensor(model_std, dtype=torch.float64)
        divisor = torch.tensor(trunk_std, dtype=torch.float64)
        scale = std.flip(0) if self.flips_channels else std
        shift = mean.flip(0) if self.flips_channels else mean
        shift = shift - torch.tensor(trunk_mean, dtype=torch.float64)
        self._register("scale", scale / divisor)
        self._register("shift", shift / divisor)
        self._register("model_mean", mean)
        self._register("model_std", std)
        # Without any difference the images are passed on untouched.
        self.is_identity = (
            not self.flips_channels
            and tuple(model_mean) == tuple(trunk_mean)
            and tuple(model_std) == tuple(trunk_std)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, trunk: CfgNode) -> PixelNormalization:
        """From the pixels of a model to those of a trunk.

        Args:
            cfg: of the model: ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD``.
            trunk: a node with ``FORMAT``, ``PIXEL_MEAN`` and ``PIXEL_STD``.
        """
        return cls(
            model_format=cfg.INPUT.FORMAT,
            model_mean=cfg.MODEL.PIXEL_MEAN,
            model_std=cfg.MODEL.PIXEL_STD,
            trunk_format=trunk.FORMAT,
            trunk_mean=trunk.PIXEL_MEAN,
            trunk_std=trunk.PIXEL_STD,
        )

    def _register(self, name: str, values: torch.Tensor) -> None:
        self.register_buffer(name, values.float().view(3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixels: (..., 3, H, W) normalised for the model. Its zeros (the mean colour of the
                model) become that colour under the trunk's normalisation.

        Returns:
            Tensor: (..., 3, H, W) normalised for the trunk.
        """
        if self.is_identity:
            return pixels
        if self.flips_channels:
            pixels = pixels.flip(-3)
        return pixels * self.scale + self.shift

    def to_model(self, color: Sequence[float]) -> torch.Tensor:
        """A colour as the model's pixels have it.

        Args:
            color: three numbers in [0, 255], in the trunk's channel order.

        Returns:
            Tensor: (3, 1, 1), normalised for the model.
        """
        pixel = self.model_mean.new_tensor(list(color)).view(3, 1, 1)
        return (
            (pixel.flip(0) if self.flips_channels else pixel) - self.model_mean
        ) / self.model_std

    def to_rgb(self, pixels: torch.Tensor) -> torch.Tensor:
        """The image as it was read, for methods that need no network (superpixels, pictures).

        Args:
            pixels: (..., 3, H, W) normalised for the model.

        Returns:
            Tensor: (..., 3, H, W) uint8, RGB.
        """
        pixels = pixels * self.model_std + self.model_mean
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
        return pixels if self.model_is_rgb else pixels.flip(-3)
