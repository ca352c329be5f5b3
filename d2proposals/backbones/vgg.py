"""VGG's convolutional layers as a Detectron2 backbone.

Source: K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015 (arXiv:1409.1556), Table 1. Layers have the names that they have in
torchvision ("features.0", ...), so that its weights fit; the pooling after the last stage and the
classifier are left out.

Shape shorthand in this module:

    N: number of images in the batch
    H, W: height and width of the images, in pixels
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from ..proposals.image_extent import valid_cells
from .inception_block import ConvNormReLU
from .masked_norm import MaskedBatchNorm, build_norm

# Channels of the 3x3 convolutions of each stage; 2x2 max pooling stands between the stages.
VGG_A = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG_D = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)

# A normalisation over the whole map (GN) would make a cell depend on the far end of the image.
_NORMS = ("", "BN", "SyncBN", "FrozenBN")


class VGG(Backbone):
    """Stages of 3x3 convolutions with ReLU, 2x2 max pooling between them.

    The map of stage k is that after its last ReLU, at stride 2^(k-1): "stage5" of VGG-A has 512
    channels and stride 16.

    Attributes:
        stride: pixels per cell of the last stage's map.
        takes_image_sizes: ``forward`` can keep the padding of a batch out of the maps.
        convolutions: index in ``features`` of each convolution, "conv5_3" being the third one of
            the fifth stage.
        context: how far beyond its own ``stride`` x ``stride`` pixels a cell of the last stage
            sees, in pixels, rounded up to a multiple of ``stride``: 64 for VGG-A.
    """

    takes_image_sizes = True

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        stages: Sequence[Sequence[int]] = VGG_A,
        width_factor: float = 1.0,
        norm: str = "",
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ) -> None:
        """
        Args:
            in_channels: of the images.
            stages: channels of the convolutions of each stage.
            width_factor: on every number of channels.
            norm: "" (VGG), or "BN", "SyncBN", "FrozenBN" after each convolution, under the names
                of torchvision's vgg11_bn.
            out_features: maps to return, such as ["stage4", "stage5"]; the last stage by default.
            freeze_at: the first so many stages are not trained.

        Raises:
            ValueError: a stage without layers, an unknown map or normalisation.
        """
        super().__init__()
        if not stages or any(len(stage) == 0 for stage in stages):
            raise ValueError(f"MODEL.VGG.STAGES needs at least one layer a stage, got {stages}.")
        if norm not in _NORMS:
            raise ValueError(f"MODEL.VGG.NORM must be one of {_NORMS}, got '{norm}'.")
        names = [f"stage{k}" for k in range(1, len(stages) + 1)]
        out_features = names[-1:] if out_features is None else list(out_features)
        if not out_features or not set(out_features) <= set(names):
            raise ValueError(f"MODEL.VGG.OUT_FEATURES must be of {names}, got {out_features}.")
        # torchvision's order: convolution, normalisation, ReLU; pooling opens a stage.
        layers: list[nn.Module] = []
        self._stage_ends: dict[int, str] = {}
        self.convolutions: dict[str, int] = {}
        self._out_shapes: dict[str, ShapeSpec] = {}
        channels, reach = in_channels, 0
        for k, stage in enumerate(stages):
            if k > 0:
                layers.append(nn.MaxPool2d(2))
            for i, width in enumerate(stage):
                width = max(round(width * width_factor), 1)
                self.convolutions[f"conv{k + 1}_{i + 1}"] = len(layers)
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if norm:
                    layers.append(build_norm(norm, width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
                reach += 2**k
            self._stage_ends[len(layers) - 1] = names[k]
            self._out_shapes[names[k]] = ShapeSpec(channels=channels, stride=2**k)
        self.features = nn.Sequential(*layers)
        self.stride = 2 ** (len(stages) - 1)
        self.context = -(-reach // self.stride) * self.stride
        self._out_features = out_features
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.VGG
        return {
            "in_channels": input_shape.channels,
            "stages": node.STAGES,
            "width_factor": node.WIDTH_FACTOR,
            "norm": node.NORM,
            "out_features": node.OUT_FEATURES,
            "freeze_at": node.FREEZE_AT,
        }

    def freeze(self, freeze_at: int) -> VGG:
        """Stop training the first ``freeze_at`` stages; returns itself."""
        for end, name in self._stage_ends.items():
            if int(name.removeprefix("stage")) > freeze_at:
                break
            for index in range(end + 1):
                for parameter in self.features[index].parameters():
                    parameter.requires_grad = False
                self.features[index] = FrozenBatchNorm2d.convert_frozen_batchnorm(
                    self.features[index]
                )
        return self

    def forward(
        self, x: torch.Tensor, image_sizes: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            x: (N, in_channels, H, W), both sides at least ``stride``.
            image_sizes: (N, 2) (height, width) of the images inside ``x``, pixels. With them every
                convolution sees zeros beyond an image's end, as it does at the batch's, so that an
                image has the same maps alone and in a padded batch (for H, W multiples of
                ``stride``). Batch statistics are those of the images' own cells.

        Returns:
            dict: the maps of ``out_features``, (N, C, H // 2^(k-1), W // 2^(k-1)) of stage k.
        """
        outputs = {}
        stride, valid = 1, None
        for index, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):
                stride, valid = 2 * stride, None
            elif image_sizes is not None and valid is None:  # the first layer of a stage
                valid = valid_cells(image_sizes, x.shape[-2:], stride, x.dtype)
            if valid is not None and isinstance(layer, nn.ReLU):
                # In place: a product behind it would keep both its sides for the gradient.
                x = x.mul_(valid)
            x = layer(x, valid) if isinstance(layer, MaskedBatchNorm) else layer(x)
            name = self._stage_ends.get(index)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    @property
    def level_blocks(self) -> dict[str, list[str]]:
        """Names of each stage's convolutions, first to last, by the stage's map."""
        levels: dict[str, list[str]] = {name: [] for name in self._out_shapes}
        for name in self.convolutions:
            levels[f"stage{name.removeprefix('conv').split('_')[0]}"].append(name)
        return levels

    def mirror_block(self, name: str, in_channels: int, norm: str) -> ConvNormReLU:
        """Build a new convolution like ``name`` for another input (ZIP, Sec. 3.1).

        Args:
            name: such as "conv5_3".
            in_channels: of the new convolution's input.
            norm: normalisation behind it, "" for none.
        """
        width = self.features[self.convolutions[name]].out_channels
        return ConvNormReLU(in_channels, width, 3, norm=norm)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each map of ``out_features``."""
        return {name: self._out_shapes[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG:
    """Build :class:`VGG` for MODEL.BACKBONE.NAME or a generator's trunk "build_vgg_backbone"."""
    return VGG(cfg, input_shape)
