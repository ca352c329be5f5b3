"""Zoom out-and-in network: ZIP's backbone, over BN-Inception or any network with three levels.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.1-3.2, Fig. 3.

Shape shorthand in this module:

    N: number of images in the batch
    m: level, 1 (stride 8), 2 (stride 16) or 3 (stride 32)
    Cm: channels of the zoom-out map of level m (BN-Inception: 320, 608, 1024)
    Hm, Wm: size of the maps of level m

Naming convention:

    F1, F2, F3 (``zoom_out``): maps of the bottom-up network.
    H1, H2 (``zoom_in``): maps of the path back to high resolution, as many channels as F1, F2.
    X (``concatenated``), Y (``attended``): maps before and after the attention, Eq. 2.
    valid: (N, 1, Hm, Wm) of 0 and 1, the cells that lie inside the image. Everything here gives
        an image the same maps alone and in a padded batch, as far as the bottom-up network does.
"""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from ..backbones.inception_block import ConvNormReLU
from ..proposals.image_extent import recover_image_sizes, resize_valid, valid_cells
from .map_attention import build_map_attention

# Under this name the network returns the (N, 2) image sizes that it saw, beside its maps.
IMAGE_SIZES = "zoom_image_sizes"


class ResidualMirrorBlock(nn.Module):
    """What stands in for a mirrored inception block over other bottom-up networks (ResNet)."""

    def __init__(self, channels: int, *, norm: str):
        """
        Args:
            channels: of the input and the output.
            norm: normalisation by Detectron2's names, "" for none.
        """
        super().__init__()
        self.out_channels = channels
        self.conv1 = ConvNormReLU(channels, channels, 3, norm=norm)
        self.conv2 = ConvNormReLU(channels, channels, 3, norm=norm)

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Two 3x3 convolutions beside an identity: (N, C, Hm, Wm) -> the same, not negative."""
        return x + self.conv2(self.conv1(x * valid, valid), valid)


class ZoomNetwork(Backbone):
    """F from the bottom-up network, H from its mirror image, merged under map attention.

    Outputs: ``zoom1`` (stride 8), ``zoom2`` (stride 16), ``zoom3`` (stride 32), and the image
    sizes as recovered from the batch under ``IMAGE_SIZES``, for generators to check.
    """

    @configurable
    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        zoom_in: bool = True,
        mirror_depths: Sequence[int] = (2, 4, 2),
        norm: str = "FrozenBN",
        attention_type: str = "channel",
        num_sources: int = 2,
        attention_activation: str = "none",
        attention_reduction: int = 16,
        out_channels: int = 0,
    ):
        """
        Args:
            bottom_up: the zoom-out network. If it has ``mirror_block(name, in_channels, norm)``
                and ``level_blocks`` (BN-Inception, VGG), its own blocks are mirrored, otherwise
                residual blocks take their place. If ``takes_image_sizes`` (VGG), it is told where
                the images of a padded batch end.
            in_features: names of F1, F2, F3 among its outputs; each half the size of the last.
            zoom_in: False leaves the bottom-up maps alone (Table 1 a-c, e).
            mirror_depths: number of mirrored blocks on levels 3, 2, 1.
            norm: normalisation of the zoom-in path.
            attention_type: "channel", "spatial", "excitation" or "none".
            num_sources: lambda of Eq. 8, 2 or 4.
            attention_activation: "none", "sigmoid" or "relu".
            attention_reduction: of the "excitation" type.
            out_channels: of each output, by a 1x1 convolution of its own; 0 for the maps as they
                are.

        Raises:
            ValueError: the bottom-up network has no such maps or their strides do not double, or
                the settings contradict each other.
        """
        super().__init__()
        shapes = _level_shapes(bottom_up, in_features)
        _check_settings(zoom_in, mirror_depths, attention_type, num_sources)
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        self.strides = [shape.stride for shape in shapes]
        self.num_sources = num_sources
        channels = [shape.channels for shape in shapes]
        self.zoom_in_path = None
        # Channels of X: level 3 is not merged, "F3 alone are suitable enough" (Sec. 3.1).
        merged_channels = channels
        if zoom_in:
            self.zoom_in_path = ZoomInPath(bottom_up, self.in_features, mirror_depths, norm)
            merged_channels = [num_sources * channels[0], num_sources * channels[1], channels[2]]
            if num_sources == 4:
                self.source_projections = _build_source_projections(channels)
        # Level 3 has no MAD unit; of the variants, only the excitation acts on F3 too.
        num_attended = 0 if attention_type == "none" else 3 if attention_type == "excitation" else 2
        self.attentions = nn.ModuleList(
            build_map_attention(
                attention_type,
                top_channels=channels[2],
                channels=merged_channels[level],
                activation=attention_activation,
                reduction=attention_reduction,
            )
            for level in range(num_attended)
        )
        self.projections = nn.ModuleList(
            ConvNormReLU(width, out_channels, 1, norm=norm)
            for width in (merged_channels if out_channels else [])
        )
        out_widths = [out_channels] * 3 if out_channels else merged_channels
        self._out_features = ["zoom1", "zoom2", "zoom3"]
        self._out_feature_channels = dict(zip(self._out_features, out_widths, strict=True))
        self._out_feature_strides = dict(zip(self._out_features, self.strides, strict=True))

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        node = cfg.MODEL.ZOOM_NETWORK
        return {
            "bottom_up": BACKBONE_REGISTRY.get(node.BOTTOM_UP)(cfg, input_shape),
            "in_features": node.IN_FEATURES,
            "zoom_in": node.ZOOM_IN,
            "mirror_depths": node.MIRROR_DEPTHS,
            "norm": node.NORM,
            "attention_type": node.MAD.TYPE,
            "num_sources": node.MAD.LAMBDA,
            "attention_activation": node.MAD.ACTIVATION,
            "attention_reduction": node.MAD.REDUCTION,
            "out_channels": node.OUT_CHANNELS,
        }

    @property
    def size_divisibility(self) -> int:
        """Every level is exactly half the last one only for multiples of the largest stride."""
        return max(self.bottom_up.size_divisibility, self.strides[2])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: (N, 3, H, W) normalised images, padded with zeros at the right and the bottom.

        Returns:
            dict: "zoom1", "zoom2", "zoom3" -> (N, channels, Hm, Wm), zero in the padding; and
            ``IMAGE_SIZES`` -> (N, 2) int64 (height, width) of the images in the batch.
        """
        image_sizes = recover_image_sizes(x)
        maps = self.zoom_maps(self.zoom_out(x, image_sizes), image_sizes)
        attended = maps["attended"]
        if self.projections:
            attended = [
                projection(y, valid_cells(image_sizes, y.shape[-2:], stride, y.dtype))
                for projection, y, stride in zip(
                    self.projections, attended, self.strides, strict=True
                )
            ]
        outputs = dict(zip(self._out_features, attended, strict=True))
        outputs[IMAGE_SIZES] = image_sizes
        return outputs

    def zoom_out(self, x: torch.Tensor, image_sizes: torch.Tensor) -> list[torch.Tensor]:
        """The maps of the bottom-up network that are zoomed, F1, F2, F3, each (N, Cm, Hm, Wm).

        Args:
            x: (N, 3, H, W) as in :meth:`forward`.
            image_sizes: (N, 2) (height, width) in pixels of the network input.
        """
        is_told = getattr(self.bottom_up, "takes_image_sizes", False)
        features = self.bottom_up(x, image_sizes) if is_told else self.bottom_up(x)
        return [features[name] for name in self.in_features]

    def zoom_maps(
        self, zoom_out: Sequence[torch.Tensor], image_sizes: torch.Tensor
    ) -> dict[str, list[torch.Tensor]]:
        """Every map of Fig. 3 from those of the bottom-up network.

        Args:
            zoom_out: F1, F2, F3, each (N, Cm, Hm, Wm).
            image_sizes: (N, 2) (height, width) in pixels of the network input.

        Returns:
            dict: lists by level - "zoom_out" (F), "zoom_in" (H; levels 1 and 2), "concatenated"
            (X) and "attended" (Y; F3 itself on level 3) - all zero in the padding.
        """
        valid = [
            valid_cells(image_sizes, f.shape[-2:], stride, f.dtype)
            for f, stride in zip(zoom_out, self.strides, strict=True)
        ]
        zoom_out = [f * v for f, v in zip(zoom_out, valid, strict=True)]
        if self.zoom_in_path is None:
            return {"zoom_out": zoom_out, "zoom_in": [], "concatenated": [], "attended": zoom_out}
        zoom_in = self.zoom_in_path(zoom_out[2], valid)
        concatenated = [
            torch.cat([zoom_out[level], zoom_in[level], *self._sources(level, zoom_out, valid)], 1)
            for level in (0, 1)
        ]
        attended = [*concatenated, zoom_out[2]]
        for level, attention in enumerate(self.attentions):
            attended[level] = attention(attended[level], valid[level], zoom_out[2], valid[2])
        return {
            "zoom_out": zoom_out,
            "zoom_in": zoom_in,
            "concatenated": concatenated,
            "attended": attended,
        }

    def _sources(
        self, level: int, zoom_out: Sequence[torch.Tensor], valid: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The sources beside F and H on a level: none, or (lambda = 4) the other zoom-out maps."""
        if self.num_sources == 2:
            return []
        return [
            resize_valid(projection(zoom_out[other]), valid[other], valid[level])
            for other, projection in zip(
                _other_levels(level), self.source_projections[level], strict=True
            )
        ]


class ZoomInPath(nn.Module):
    """The mirror image of the zoom-out network: blocks, bilinear up-sampling, 1x1 convolutions.

    H2 is the map after the up-sampling to level 2 ("the up-sampling inceptional layer icp4e'"), H1
    the map after all blocks of level 1 ("the output maps at layer icp3'"), Sec. 3.1.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        mirror_depths: Sequence[int],
        norm: str,
    ):
        """Arguments as in :class:`ZoomNetwork`."""
        super().__init__()
        shapes = bottom_up.output_shape()
        c1, c2, c3 = (shapes[name].channels for name in in_features)
        f1, f2, f3 = in_features
        self.level3 = _mirror_blocks(bottom_up, f3, mirror_depths[0], c3, norm)
        self.upsample2 = ConvNormReLU(_out_channels(self.level3, c3), c2, 1, norm=norm)
        self.level2 = _mirror_blocks(bottom_up, f2, mirror_depths[1], c2, norm)
        self.upsample1 = ConvNormReLU(_out_channels(self.level2, c2), c1, 1, norm=norm)
        self.level1 = _mirror_blocks(bottom_up, f1, mirror_depths[2], c1, norm)
        # The block 3a has 256 channels, but H1 must have as many as F1 (Eq. 1: 2C channels in X).
        # Unlike the paper, which does not say how, a 1x1 convolution brings them to 320.
        width = _out_channels(self.level1, c1)
        self.project = None if width == c1 else ConvNormReLU(width, c1, 1, norm=norm)

    def forward(self, top: torch.Tensor, valid: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            top: (N, C3, H3, W3), F3.
            valid: of levels 1, 2, 3.

        Returns:
            list: H1 (N, C1, H1, W1) and H2 (N, C2, H2, W2), zero in the padding.
        """
        x = _apply(self.level3, top, valid[2])
        h2 = self.upsample2(resize_valid(x, valid[2], valid[1]), valid[1])
        x = _apply(self.level2, h2, valid[1])
        x = self.upsample1(resize_valid(x, valid[1], valid[0]), valid[0])
        h1 = _apply(self.level1, x, valid[0])
        if self.project is not None:
            h1 = self.project(h1, valid[0])
        return [h1, h2]


def _apply(blocks: nn.ModuleDict, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    for block in blocks.values():
        x = block(x, valid)
    return x


def _out_channels(blocks: nn.ModuleDict, in_channels: int) -> int:
    """Channels after a chain of blocks."""
    return list(blocks.values())[-1].out_channels if len(blocks) else in_channels


def _mirror_blocks(
    bottom_up: Backbone, feature: str, depth: int, channels: int, norm: str
) -> nn.ModuleDict:
    """The first ``depth`` mirrored blocks of a level, in the order in which they are applied.

    Args:
        bottom_up: the zoom-out network.
        feature: name of the level's output, e.g. "inception_5b".
        depth: how many blocks.
        channels: of their input.
        norm: normalisation.
    """
    blocks = nn.ModuleDict()
    if not hasattr(bottom_up, "mirror_block"):
        for i in range(depth):
            blocks[f"mirror_{feature}_{i}"] = ResidualMirrorBlock(channels, norm=norm)
        return blocks
    names = list(reversed(bottom_up.level_blocks[feature]))
    if depth > len(names):
        raise ValueError(
            f"MODEL.ZOOM_NETWORK.MIRROR_DEPTHS asks for {depth} mirrored blocks on the level of "
            f"'{feature}', which has {len(names)}: {names}"
        )
    for name in names[:depth]:
        block = bottom_up.mirror_block(name, channels, norm)
        blocks[f"mirror_{name.removeprefix('inception_')}"] = block
        channels = block.out_channels
    return blocks


def _other_levels(level: int) -> list[int]:
    """The two levels beside ``level``, of 0, 1, 2."""
    return [other for other in range(3) if other != level]


def _build_source_projections(channels: Sequence[int]) -> nn.ModuleList:
    """1x1 convolutions of the lambda = 4 extension (Eq. 8): ``[level][i]`` for level 0 and 1.

    The paper leaves the further sources open ("could be various and manually designed"); here
    they are the zoom-out maps of the two other levels, brought to the level's C channels.
    """
    return nn.ModuleList(
        nn.ModuleList(
            ConvNormReLU(channels[other], channels[level], 1, norm="")
            for other in _other_levels(level)
        )
        for level in (0, 1)
    )


def _level_shapes(bottom_up: Backbone, in_features: Sequence[str]) -> list[ShapeSpec]:
    """Shapes of F1, F2, F3; ValueError unless there are three whose strides double."""
    shapes = bottom_up.output_shape()
    missing = [name for name in in_features if name not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.ZOOM_NETWORK.IN_FEATURES has {missing}, which the bottom-up network "
            f"{type(bottom_up).__name__} does not return; it returns {sorted(shapes)}"
        )
    strides = [shapes[name].stride for name in in_features]
    if len(strides) != 3 or strides != [strides[0], 2 * strides[0], 4 * strides[0]]:
        raise ValueError(
            "MODEL.ZOOM_NETWORK.IN_FEATURES must name three maps, each half the size of the one "
            f"before; {list(in_features)} have strides {strides}"
        )
    return [shapes[name] for name in in_features]


def _check_settings(
    zoom_in: bool, mirror_depths: Sequence[int], attention_type: str, num_sources: int
) -> None:
    """ValueError for settings that contradict each other."""
    if num_sources not in (2, 4):
        raise ValueError(f"MODEL.ZOOM_NETWORK.MAD.LAMBDA must be 2 or 4, got {num_sources}")
    if len(mirror_depths) != 3 or min(mirror_depths) < 0:
        raise ValueError(
            "MODEL.ZOOM_NETWORK.MIRROR_DEPTHS must be three numbers of blocks (levels 3, 2, 1), "
            f"got {tuple(mirror_depths)}"
        )
    if not zoom_in and num_sources != 2:
        raise ValueError(
            "MODEL.ZOOM_NETWORK.ZOOM_IN False merges no maps: leave MODEL.ZOOM_NETWORK.MAD.LAMBDA "
            f"at 2, it is {num_sources}"
        )
    if not zoom_in and attention_type != "none":
        raise ValueError(
            "MODEL.ZOOM_NETWORK.ZOOM_IN False leaves no second stream of maps to attend: set "
            f"MODEL.ZOOM_NETWORK.MAD.TYPE to 'none', it is '{attention_type}'"
        )


@BACKBONE_REGISTRY.register()
def build_zoom_network_backbone(cfg, input_shape: ShapeSpec) -> ZoomNetwork:
    """The zoom network of ``cfg.MODEL.ZOOM_NETWORK`` for Detectron2's registry."""
    return ZoomNetwork(cfg, input_shape)
