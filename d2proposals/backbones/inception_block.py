"""The inception block of BN-Inception, with masks for the padding of a batch.

Sergey Ioffe and Christian Szegedy. "Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift." ICML 2015. arXiv:1502.03167.

Shape shorthand:
    N: number of images in the batch.
    C, H, W: channels, height and width of a map.

Naming convention:
    conv_3x3_reduce, conv_pool_proj, ...: a block's convolutions, as in the public weights.
    valid: (N, 1, H, W), 1 on an image's own cells and 0 on the cells of the batch's padding.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d
from torch import Tensor, nn

from .masked_norm import MaskedBatchNorm, MaskedGroupNorm, build_norm


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


def scale_width(width: int, factor: float) -> int:
    """``width * factor`` rounded to a multiple of 8, at least 8; 0 stays 0."""
    return max(8, 8 * int(width * factor / 8 + 0.5)) if width > 0 else 0


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
            norm: One of ``masked_norm.NORMS``.
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
        x = self._convolve(x)
        if isinstance(self.norm, (MaskedBatchNorm, MaskedGroupNorm)):
            x = self.norm(x, valid)
        elif self.norm is not None:
            x = self.norm(x)
        # Before the activation, in place: a product behind it would keep both its sides for the
        # gradient. Zero stays zero.
        return self.activation(x if valid is None else x.mul_(valid.to(x.dtype)))

    def _convolve(self, x: Tensor) -> Tensor:
        """The convolution alone: (N, C, H, W) -> (N, out_channels, H', W')."""
        return self._conv_forward(x, self.weight, self.bias)


class AverageConvNormReLU(ConvNormReLU):
    """Average of 3x3 cells (zeros outside count), 1x1 convolution, normalisation, ReLU.

    Both are linear, so the convolution goes first, and the average has fewer channels to go over.
    The bias comes last: averaged with the zeros outside, it would shrink at the border.
    """

    def _convolve(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self._conv_forward(x, self.weight, None), 3, stride=1, padding=1)
        return x if self.bias is None else x + self.bias[:, None, None]


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
            norm: One of ``masked_norm.NORMS``, after every convolution.
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
            # The public network's average counts the border's zeros, so that masked padding is
            # like a border.
            projection = AverageConvNormReLU if pool == "avg" else ConvNormReLU
            self.conv_pool_proj = projection(in_channels, widths.conv_pool_proj, 1, norm=norm)

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
        if self.stride == 2:
            # Zeros of the padding never exceed a value of the image, which is not negative.
            pooled = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
            branches.append(pooled if out_valid is None else pooled * out_valid.to(x.dtype))
        else:
            pooled = x if self.pool == "avg" else self._max_pool(x, valid)
            branches.append(self.conv_pool_proj(pooled, valid))
        return torch.cat(branches, dim=1)

    def _max_pool(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Maximum of the valid ones of 3x3 cells at stride 1: (N, C, H, W) -> (N, C, H, W)."""
        if valid is None:
            return F.max_pool2d(x, 3, stride=1, padding=1)
        # A max pool's border is -inf. Cells whose whole window is padding get zero afterwards.
        outside = valid == 0
        pooled = F.max_pool2d(x.masked_fill(outside, -math.inf), 3, stride=1, padding=1)
        return pooled.masked_fill(outside, 0.0)
