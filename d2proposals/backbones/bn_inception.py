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
    conv_3x3_reduce, conv_pool_proj, ...: a block's convolutions, as in the public weights.
    valid: (N, 1, H, W), 1 on an image's own cells and 0 on the cells of the batch's padding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..proposals.image_extent import recover_image_sizes, valid_cells

NORMS = ("", "FrozenBN", "BN", "SyncBN", "GN")

# Channels of the three convolutions before the first block.
_STEM_WIDTHS = (64, 64, 192)


class BranchWidths(NamedTuple):
    """Channels of a block's convolutions; 0 for one that the block does not have."""

    conv_1x1: int
    conv_3x3_reduce: int
    conv_3x3: int
    conv_double_3x3_reduce: int
    conv_double_3x3: int  # both 3x3 convolutions of the double branch
    conv_pool_proj: int

    def scaled(self, factor: float) -> "BranchWidths":
        """The same branches with ``factor`` times the channels (see :func:`scale_width`)."""
        return BranchWidths(*(scale_width(width, factor) for width in self))


class BlockSpec(NamedTuple):
    """Branch widths, stride and kind of pooling of one block."""

    widths: BranchWidths
    stride: int = 1
    pool: str = "avg"


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


def scale_width(width: int, factor: float) -> int:
    """``width * factor`` rounded to a multiple of 8, at least 8; 0 stays 0."""
    return max(8, 8 * int(width * factor / 8 + 0.5)) if width > 0 else 0


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics can leave out the padding of a batch."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise ``x``.

        Args:
            x: (N, C, H, W).
            valid: (N, 1, H, W), 1 on the cells that count; every cell counts without it.

        Returns:
            (N, C, H, W). With ``valid``, each image's own cells are what they would be were the
            image alone; the others are not to be used.
        """
        if valid is None:
            return super().forward(x)
        # In single precision under autocast, as PyTorch's own group normalisation. Few passes over
        # the map, which is what the time goes into: two sums, and one multiplication and addition.
        x_float = x.float()
        num_images, channels = x.shape[:2]
        inside = (x_float * valid.float()).view(num_images, self.num_groups, -1)
        count = valid.float().sum(dim=(1, 2, 3))[:, None] * (channels // self.num_groups)
        count = count.clamp(min=1)
        mean = inside.sum(dim=2) / count  # (N, groups)
        variance = inside.square().sum(dim=2) / count - mean.square()
        # Rounding may take the difference of two nearly equal numbers below zero.
        inverse_std = torch.rsqrt(variance.clamp(min=0) + self.eps)
        per_group = (num_images, self.num_groups, channels // self.num_groups)
        scale = (inverse_std[..., None] * self.weight.view(per_group[1:])).view(num_images, -1)
        shift = self.bias - mean[..., None].expand(per_group).reshape(num_images, -1) * scale
        return torch.addcmul(shift[..., None, None], x_float, scale[..., None, None]).to(x.dtype)


def build_norm(norm: str, channels: int) -> nn.Module | None:
    """Build a normalisation layer by its name in Detectron2.

    "GN" differs from Detectron2's, which always makes 32 groups and so allows neither 24 nor 48
    channels: here there are 32 groups where that leaves at least 4 channels in each, else the
    largest smaller power of two that divides the channels. Groups of one channel would erase what
    the channel's mean says.

    Args:
        norm: One of :data:`NORMS`; "" for none.
        channels: Channels of the map.

    Raises:
        ValueError: ``norm`` is unknown.
    """
    if norm not in NORMS:
        raise ValueError(f"Unknown normalisation {norm!r} for BN-Inception; use one of {NORMS}.")
    if norm != "GN":
        return get_norm(norm, channels)
    num_groups = math.gcd(32, channels)
    while num_groups > 1 and channels // num_groups < 4:
        num_groups //= 2
    return MaskedGroupNorm(num_groups, channels)


class ConvNormReLU(Conv2d):
    """Convolution that keeps the size (at stride 1), normalisation, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, norm: str
    ) -> None:
        """Build the layer, with He initialisation over the layer's inputs.

        Over the outputs, Detectron2's habit, each 1x1 convolution to few channels would enlarge
        its input by their ratio, and without trained normalisation a deep network explodes.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            kernel_size: Side of the kernel, odd.
            stride: Stride of the convolution.
            norm: One of :data:`NORMS`.
        """
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            # The public weights have a bias as well as a normalisation. It is kept where the
            # normalisation is fixed; a trainable one would take its effect away again.
            bias=norm in ("", "FrozenBN"),
            norm=build_norm(norm, out_channels),
            activation=F.relu_,
        )
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (N, C, H, W); zero in the padding where ``valid`` is given.
            valid: (N, 1, H', W') of 0 and 1, the cells of the **output** inside the images.

        Returns:
            (N, out_channels, H', W'); zero outside ``valid`` where that is given.
        """
        if valid is None:
            return super().forward(x)
        if isinstance(self.norm, MaskedGroupNorm):
            x = self.activation(self.norm(self._conv_forward(x, self.weight, self.bias), valid))
        else:
            x = super().forward(x)
        return x * valid.to(x.dtype)


class InceptionBlock(CNNBlockBase):
    """One inception block: up to four branches, concatenated.

    1x1; 1x1 - 3x3; 1x1 - 3x3 - 3x3; 3x3 pooling - 1x1. At stride 2 the first branch and the last
    branch's 1x1 convolution are missing, and the last convolution of the two others has stride 2.
    """

    def __init__(
        self,
        in_channels: int,
        widths: BranchWidths,
        *,
        stride: int = 1,
        pool: str = "avg",
        norm: str = "FrozenBN",
    ) -> None:
        """Build the block.

        Args:
            in_channels: Channels of the input.
            widths: Channels of the convolutions. ``conv_1x1`` and ``conv_pool_proj`` are positive
                at stride 1 and 0 at stride 2.
            stride: 1 or 2.
            pool: "avg" or "max"; "max" at stride 2.
            norm: One of :data:`NORMS`, after every convolution.
        """
        assert stride in (1, 2), f"stride must be 1 or 2, got {stride}"
        assert pool in ("avg", "max"), f'pool must be "avg" or "max", got {pool!r}'
        has_ends = widths.conv_1x1 > 0 and widths.conv_pool_proj > 0
        assert has_ends if stride == 1 else pool == "max" and not any((widths[0], widths[-1])), (
            f"widths {widths} and pool {pool!r} do not fit stride {stride}"
        )
        pooled_channels = widths.conv_pool_proj if stride == 1 else in_channels
        super().__init__(
            in_channels,
            widths.conv_1x1 + widths.conv_3x3 + widths.conv_double_3x3 + pooled_channels,
            stride,
        )
        self.pool = pool
        self.conv_3x3_reduce = ConvNormReLU(in_channels, widths.conv_3x3_reduce, 1, norm=norm)
        self.conv_3x3 = ConvNormReLU(
            widths.conv_3x3_reduce, widths.conv_3x3, 3, stride=stride, norm=norm
        )
        self.conv_double_3x3_reduce = ConvNormReLU(
            in_channels, widths.conv_double_3x3_reduce, 1, norm=norm
        )
        self.conv_double_3x3_1 = ConvNormReLU(
            widths.conv_double_3x3_reduce, widths.conv_double_3x3, 3, norm=norm
        )
        self.conv_double_3x3_2 = ConvNormReLU(
            widths.conv_double_3x3, widths.conv_double_3x3, 3, stride=stride, norm=norm
        )
        if stride == 1:
            self.conv_1x1 = ConvNormReLU(in_channels, widths.conv_1x1, 1, norm=norm)
            self.conv_pool_proj = ConvNormReLU(in_channels, widths.conv_pool_proj, 1, norm=norm)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, out_valid: Tensor | None = None
    ) -> Tensor:
        """Apply the block.

        Args:
            x: (N, in_channels, H, W). At stride 2, not negative, and H and W are even: convolution
                and pooling would give different sizes otherwise.
            valid: (N, 1, H, W) of any dtype, 1 on each image's own cells and 0 on padding at its
                right and bottom. With it, the result on an image's own cells is that of the image
                alone (whose borders the convolutions and the average pool fill with zeros, too)
                and the result on padding is zero; what ``x`` holds on padding has no effect.
            out_valid: (N, 1, H / 2, W / 2), the same for the result; needed beside ``valid`` at
                stride 2.

        Returns:
            (N, out_channels, H / stride, W / stride).
        """
        if valid is not None:
            valid = valid.to(x.dtype)
            x = x * valid
        if self.stride == 1:
            out_valid = valid
        else:
            assert x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0, (
                f"a block of stride 2 needs even sides, got a map of {tuple(x.shape[2:])}"
            )
            assert (valid is None) == (out_valid is None), "valid and out_valid go together"
        branches = [self.conv_1x1(x, valid)] if self.stride == 1 else []
        branches.append(self.conv_3x3(self.conv_3x3_reduce(x, valid), out_valid))
        double = self.conv_double_3x3_1(self.conv_double_3x3_reduce(x, valid), valid)
        branches.append(self.conv_double_3x3_2(double, out_valid))
        pooled = self._pool(x, valid)
        if self.stride == 1:
            branches.append(self.conv_pool_proj(pooled, valid))
        else:
            branches.append(pooled if out_valid is None else pooled * out_valid.to(x.dtype))
        return torch.cat(branches, dim=1)

    def _pool(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Pool 3x3 cells at the block's stride; (N, C, H, W) -> (N, C, H / stride, W / stride)."""
        if self.stride == 2:
            # Zeros of the padding never exceed a value of the image, which is not negative.
            return F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        if self.pool == "avg":
            # The public network counts the border's zeros, so masked padding is like a border.
            return F.avg_pool2d(x, 3, stride=1, padding=1)
        if valid is None:
            return F.max_pool2d(x, 3, stride=1, padding=1)
        # A max pool's border is -inf. Cells whose whole window is padding get zero afterwards.
        outside = valid == 0
        pooled = F.max_pool2d(x.masked_fill(outside, -math.inf), 3, stride=1, padding=1)
        return pooled.masked_fill(outside, 0.0)


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
            norm: One of :data:`NORMS`. The convolutions have a bias with "FrozenBN" (as the public
                weights) and "", none otherwise.
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
            norm: One of :data:`NORMS`.

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
