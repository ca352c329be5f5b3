"""Any backbone as the trunk of a network that looks at crops of one size.

Shape shorthand in this module:

    P: number of crops
    S: side of the square crops, in pixels
    C, m: channels and side of the backbone's map of a crop
"""

from __future__ import annotations

import torch
from detectron2.modeling import Backbone
from torch import nn


class CropTrunk(nn.Module):
    """A backbone's map and two fully connected layers on all of its cells, as AlexNet ends.

    Attributes:
        input_size: S.
        out_channels: numbers per crop in the output.
    """

    def __init__(
        self, backbone: Backbone, *, input_size: int, out_channels: int, dropout: float
    ) -> None:
        """
        Args:
            backbone: with one map.
            input_size: S.
            out_channels: of both layers.
            dropout: probability before each of them.

        Raises:
            ValueError: the backbone has several maps.
        """
        super().__init__()
        shapes = backbone.output_shape()
        if len(shapes) != 1:
            raise ValueError(
                f"The trunk of a network on crops gives one map, {type(backbone).__name__} gives "
                f"{list(shapes)}: name one in MODEL.TORCHVISION.OUT_FEATURES (or MODEL.VGG's)."
            )
        self.backbone = backbone
        self.input_size = input_size
        self.out_channels = out_channels
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(self._map_numbers(), out_channels),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(out_channels, out_channels),
            nn.ReLU(inplace=True),
        )
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        self.backbone.to(memory_format=torch.channels_last)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """
        Args:
            crops: (P, 3, S, S), normalised for the backbone.

        Returns:
            Tensor: (P, out_channels), not negative.
        """
        size = (self.input_size, self.input_size)
        assert crops.shape[-2:] == size, f"expected crops of {size}, got {tuple(crops.shape)}"
        (maps,) = self.backbone(crops.contiguous(memory_format=torch.channels_last)).values()
        return self.classifier(maps.flatten(1))

    @torch.no_grad()
    def _map_numbers(self) -> int:
        """C * m * m, measured: layers differ in how they round."""
        was_training = self.backbone.training
        crop = torch.zeros(1, 3, self.input_size, self.input_size)
        (maps,) = self.backbone.eval()(crop).values()
        self.backbone.train(was_training)
        return maps[0].numel()
