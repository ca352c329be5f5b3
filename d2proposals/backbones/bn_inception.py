"""BN-Inception, the zoom-out network of ZIP, as a Detectron2 backbone.

Sergey Ioffe and Christian Szegedy. "Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift." ICML 2015. arXiv:1502.03167.

Used by: Hongyang Li, Yu Liu, Wanli Ouyang and Xiaogang Wang. "Zoom Out-and-In Network with Map
Attention Decision for Region Proposal and Object Detection." IJCV 2019. arXiv:1709.04347, Sec. 3.1.

Unlike the paper, whose Fig. 5 (Ioffe and Szegedy) gives 4c and 4d 576 channels, the widths here are
those of the public ImageNet weights (608 channels, the number that ZIP's Sec. 3.1 states too).
Unlike the paper, ZIP's Sec. 3.1, which speaks of nine blocks with max-pooling after 3c and 4e,
there are ten blocks, and 3c and 4e have stride 2 themselves, as in Ioffe and Szegedy's Fig. 5.

Shape shorthand:
    N: number of images in the batch.
    C, H, W: channels, height and width of a map.

Naming convention:
    inception_3a ... inception_5b: the blocks, by stage (3, 4, 5) and place in it.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from ..proposals.image_extent import recover_image_sizes, valid_cells
from .inception_block import BlockSpec, BranchWidths, ConvNormReLU, InceptionBlock, scale_width

# Channels of the three convolutions before the first block.
_STEM_WIDTHS = (64, 64, 192)

_BLOCKS = {
    "inception_3a": BlockSpec(BranchWidths(64, 64, 64, 64, 96, 32)),
    "inception_3b": BlockSpec(BranchWidths(64, 64, 96, 64, 96, 64)),
    "inception_3c": BlockSpec(BranchWidths(0, 128, 160, 64, 96, 0), stride=2, pool="max"),
    "inception_4a": BlockSpec(BranchWidths(224, 64, 96, 96, 128, 128)),
    "inception_4b": BlockSpec(BranchWidths(192, 96, 128, 96, 128, 128)),
    "inception_4c": BlockSpec(BranchWidths(160, 128, 160, 128, 160, 128)),
    "inception_4d": BlockSpec(BranchWidths(96, 128, 192, 160, 192, 128)),
    "inception_4e": BlockSpec(BranchWidths(0, 128, 192, 192, 256, 0), stride=2, pool="max"),
    "inception_5a": BlockSpec(BranchWidths(352, 192, 320, 160, 224, 128)),
    "inception_5b": BlockSpec(BranchWidths(352, 192, 320, 192, 224, 128), pool="max"),
}

# The last block of each level, in the order of EXTRA_BLOCKS: F1, F2 and F3 of ZIP.
_LEVEL_ENDS = ("inception_3b", "inception_4d", "inception_5b")


class BNInception(Backbone):
    """BN-Inception without its classifier.

    Stages as Detectron2 counts them for :meth:`freeze`, and the strides of their outputs:
    1 = conv1 (4, after pooling), 2 = conv2 (8, after pooling), 3 = 3a, 3b (8),
    4 = 3c, 4a-4d (16), 5 = 4e, 5a, 5b (32). Extra blocks belong to the stage they are stacked on.

    Layers after the deepest map asked for are not built.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_features: Sequence[str] = _LEVEL_ENDS,
        width_factor: float = 1.0,
        norm: str = "FrozenBN",
        extra_blocks: Sequence[int] = (0, 0, 0),
        freeze_at: int = 0,
    ) -> None:
        """Build the backbone.

        Args:
            in_channels: Channels of the images.
            out_features: Names of the blocks whose outputs are returned.
            width_factor: Factor on every convolution's channels, positive; each is rounded to a
                multiple of 8.
            norm: One of ``masked_norm.NORMS``. The convolutions have a bias with "FrozenBN" (as the
                public weights) and "", none otherwise.
            extra_blocks: Numbers of blocks of the same branch widths stacked after 3b, 4d and 5b
                (the deeper zoom-out network of ZIP's Table 1 e). The map of that name is then the
                output of the last one.
            freeze_at: Stages to freeze, 0 to 5 (see :meth:`freeze`).

        Raises:
            ValueError: An argument is out of its range.
        """
        super().__init__()
        _check_arguments(out_features, width_factor, extra_blocks)
        self._width_factor = width_factor
        self._norm = norm
        self._out_features = list(out_features)
        self._out_feature_channels: dict[str, int] = {}
        self._out_feature_strides: dict[str, int] = {}
        # The block after which each map is complete; the names of each stage's modules.
        self._last_blocks: dict[str, str] = {}
        self._stages: list[list[str]] = [["conv1_7x7_s2"], ["conv2_3x3_reduce", "conv2_3x3"], []]

        conv1, reduce, conv2 = (scale_width(width, width_factor) for width in _STEM_WIDTHS)
        self.conv1_7x7_s2 = ConvNormReLU(in_channels, conv1, 7, stride=2, norm=norm)
        self.conv2_3x3_reduce = ConvNormReLU(conv1, reduce, 1, norm=norm)
        self.conv2_3x3 = ConvNormReLU(reduce, conv2, 3, norm=norm)
        self._build_blocks(conv2, dict(zip(_LEVEL_ENDS, extra_blocks, strict=True)))
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Read MODEL.BN_INCEPTION and MODEL.BACKBONE.FREEZE_AT."""
        return {
            "in_channels": input_shape.channels,
            "out_features": cfg.MODEL.BN_INCEPTION.OUT_FEATURES,
            "width_factor": cfg.MODEL.BN_INCEPTION.WIDTH_FACTOR,
            "norm": cfg.MODEL.BN_INCEPTION.NORM,
            "extra_blocks": cfg.MODEL.BN_INCEPTION.EXTRA_BLOCKS,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        }

    def _build_blocks(self, channels: int, num_extra: dict[str, int]) -> None:
        """Build the blocks up to the deepest map; ``channels`` come out of the stem."""
        stride = 8
        remaining = set(self._out_features)
        for name, spec in _BLOCKS.items():
            if not remaining:
                break
            stride *= spec.stride
            if spec.stride == 2:
                self._stages.append([])
            extra_names = [f"{name}_extra{i + 1}" for i in range(num_extra.get(name, 0))]
            for block_name in (name, *extra_names):
                block = InceptionBlock(
                    channels,
                    spec.widths.scaled(self._width_factor),
                    stride=spec.stride,
                    pool=spec.pool,
                    norm=self._norm,
                )
                channels = block.out_channels
                self.add_module(block_name, block)
                self._stages[-1].append(block_name)
            self._last_blocks[block_name] = name
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = stride
            remaining.discard(name)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the maps.

        Args:
            x: (N, in_channels, H, W), normalised images, padded with zeros at the right and the
                bottom to multiples of :attr:`size_divisibility`, as Detectron2 does it.

        Returns:
            By name, each (N, C, H / stride, W / stride) with C and stride of ``output_shape()``;
            values are not negative, and zero in the padding. Unlike Detectron2's backbones, it
            gives an image the same maps alone and in a padded batch.
        """
        height, width = x.shape[-2:]
        assert height % self.size_divisibility == 0 and width % self.size_divisibility == 0, (
            f"BN-Inception needs sides that are multiples of {self.size_divisibility}, got "
            f"{height} x {width}; pad the batch with ImageList.from_tensors"
        )
        image_sizes = recover_image_sizes(x)
        valid = {
            stride: valid_cells(image_sizes, (height // stride, width // stride), stride, x.dtype)
            for stride in (2, 4, 8, 16, 32)
            if stride <= self.size_divisibility
        }
        # Max pools see zeros in the padding, which never exceed the image's values.
        x = F.max_pool2d(self.conv1_7x7_s2(x, valid[2]), 3, stride=2, ceil_mode=True) * valid[4]
        x = self.conv2_3x3(self.conv2_3x3_reduce(x, valid[4]), valid[4])
        x = F.max_pool2d(x, 3, stride=2, ceil_mode=True) * valid[8]
        stride = 8
        outputs = {}
        for block_name in (name for stage in self._stages[2:] for name in stage):
            block = getattr(self, block_name)
            x = block(x, valid[stride], valid.get(stride * block.stride))
            stride *= block.stride
            name = self._last_blocks.get(block_name)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def freeze(self, freeze_at: int) -> "BNInception":
        """Make the first stages untrainable and their batch normalisation frozen, in place.

        Args:
            freeze_at: 0: none. 1: conv1. 2: also conv2. 3: also 3a and 3b. 4: also 3c to 4d.
                5: all.

        Returns:
            This backbone.

        Raises:
            ValueError: ``freeze_at`` is not between 0 and 5.
        """
        if not 0 <= freeze_at <= 5:
            raise ValueError(f"MODEL.BACKBONE.FREEZE_AT must be 0 to 5, got {freeze_at}.")
        for name in (name for stage in self._stages[:freeze_at] for name in stage):
            layer = getattr(self, name)
            layer.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(layer)
        return self

    @property
    def size_divisibility(self) -> int:
        """Stride of the deepest map (32 by default).

        At multiples of it every map's side is exactly the image's divided by the map's stride; at
        other sizes the convolutions and the pooling of 3c and 4e disagree.
        """
        return max(self._out_feature_strides[name] for name in self._out_features)

    @property
    def level_blocks(self) -> dict[str, list[str]]:
        """Names of the blocks of stride 1 on each level, first to last, by the level's map.

        Extra blocks are left out: they repeat the level's last one.
        """
        levels: dict[str, list[str]] = {}
        names: list[str] = []
        for name, spec in _BLOCKS.items():
            if spec.stride == 2:
                names = []
                continue
            names.append(name)
            if name in _LEVEL_ENDS:
                levels[name] = names
        return levels

    def mirror_block(self, name: str, in_channels: int, norm: str) -> InceptionBlock:
        """Build a new block like block ``name`` for another input (ZIP, Sec. 3.1).

        Args:
            name: A block of stride 1, such as "inception_5b".
            in_channels: Channels of the new block's input.
            norm: One of ``masked_norm.NORMS``.

        Returns:
            A block of the named block's branch widths and pooling, with its own new weights.

        Raises:
            ValueError: There is no such block of stride 1.
        """
        spec = _BLOCKS.get(name)
        if spec is None or spec.stride != 1:
            known = [key for key, value in _BLOCKS.items() if value.stride == 1]
            raise ValueError(f"No block of stride 1 is called {name!r}; there are {known}.")
        widths = spec.widths.scaled(self._width_factor)
        return InceptionBlock(in_channels, widths, pool=spec.pool, norm=norm)


def _check_arguments(
    out_features: Sequence[str], width_factor: float, extra_blocks: Sequence[int]
) -> None:
    """Raise ValueError unless the values are allowed; see :class:`BNInception`."""
    unknown = [name for name in out_features if name not in _BLOCKS]
    if unknown or not out_features:
        raise ValueError(
            f"MODEL.BN_INCEPTION.OUT_FEATURES must name at least one of {list(_BLOCKS)}, "
            f"got {list(out_features)}."
        )
    if not width_factor > 0:
        raise ValueError(f"MODEL.BN_INCEPTION.WIDTH_FACTOR must be positive, got {width_factor}.")
    if len(extra_blocks) != len(_LEVEL_ENDS) or min(extra_blocks) < 0:
        raise ValueError(
            "MODEL.BN_INCEPTION.EXTRA_BLOCKS must be three numbers of 0 or more "
            f"(after 3b, 4d and 5b), got {tuple(extra_blocks)}."
        )


@BACKBONE_REGISTRY.register()
def build_bn_inception_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> BNInception:
    """Build a :class:`BNInception` from a configuration."""
    return BNInception(cfg, input_shape)
