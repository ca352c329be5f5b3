"""Normalisation whose statistics leave out the padding of a batch.

Detectron2 pads images of unequal sizes with zeros, and a layer's statistics over the padded maps
are other ones than over the images. Unlike the paper, Ioffe and Szegedy's "Batch Normalization"
(ICML 2015, arXiv:1502.03167), which knows no padding, a mask says here which cells count.

Shape shorthand:
    N: number of images in the batch.
    C, H, W: channels, height and width of a map.

Naming convention:
    valid: (N, 1, H, W), 1 on an image's own cells and 0 on the cells of the batch's padding.
"""

import math

import torch
from detectron2.layers import get_norm
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor, nn

NORMS = ("", "FrozenBN", "BN", "SyncBN", "GN")


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
        # the map, which is what the time goes into.
        x_float, valid = x.float(), valid.float()
        num_images, channels = x.shape[:2]
        count = valid.sum(dim=(1, 2, 3))[:, None] * (channels // self.num_groups)
        count = count.clamp(min=1)
        mean = self._sums(x_float * valid) / count  # (N, groups)
        per_group = (num_images, self.num_groups, channels // self.num_groups)
        mean = mean[..., None].expand(per_group).reshape(num_images, -1)  # (N, C)
        # In a second pass: the difference of two sums would lose digits where means are large.
        centred = (x_float - mean[..., None, None]) * valid
        inverse_std = torch.rsqrt(self._sums(centred.square()) / count + self.eps)
        scale = (inverse_std[..., None] * self.weight.view(per_group[1:])).view(num_images, -1)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[..., None, None], x_float, scale[..., None, None]).to(x.dtype)

    def _sums(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in any layout -> (N, groups)."""
        return x.sum(dim=(2, 3)).unflatten(1, (self.num_groups, -1)).sum(dim=2)


class MaskedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics can leave out the padding of a batch.

    In evaluation it is PyTorch's. In training, mean and variance are those of the valid cells: of
    this process ("BN"), or of the joint batch of all processes ("SyncBN"; on CPUs too, where
    PyTorch's own has no training).
    """

    def __init__(self, channels: int, *, is_synchronised: bool = False) -> None:
        """
        Args:
            channels: C.
            is_synchronised: whether the statistics are those of all processes together.
        """
        super().__init__(channels)
        self.is_synchronised = is_synchronised

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, *, is_synchronised: bool = False) -> "MaskedBatchNorm":
        """One with the parameters, statistics and settings of a batch normalisation."""
        masked = cls(norm.num_features, is_synchronised=is_synchronised)
        masked.eps, masked.momentum = norm.eps, norm.momentum
        masked.load_state_dict(norm.state_dict())
        return masked

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise ``x``.

        Args:
            x: (N, C, H, W).
            valid: (N, 1, H, W), 1 on the cells that count; every cell counts without it.

        Returns:
            (N, C, H, W). What stands outside ``valid`` is not to be used.
        """
        is_joint = self.is_synchronised and comm.get_world_size() > 1
        if not self.training or (valid is None and not is_joint):
            return super().forward(x)
        # In single precision under autocast, as PyTorch's own batch normalisation.
        x_float = x.to(torch.promote_types(x.dtype, torch.float32))
        valid = torch.ones_like(x_float[:, :1]) if valid is None else valid.to(x_float)
        sums = torch.cat([(x_float * valid).sum(dim=(0, 2, 3)), valid.sum()[None]])  # (C + 1,)
        sums = _sum_over_processes(sums, is_joint)
        count = sums[-1].clamp(min=1)
        mean = sums[:-1] / count
        # In a second pass: the difference of two sums would lose digits where means are large.
        centred = (x_float - mean[:, None, None]) * valid
        variance = _sum_over_processes(centred.square().sum(dim=(0, 2, 3)), is_joint) / count
        self._track(mean.detach(), variance.detach(), count)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], x_float, scale[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics, in place: (C,) mean and biased variance of the batch."""
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_var.lerp_(unbiased, self.momentum)


def _sum_over_processes(x: Tensor, is_joint: bool) -> Tensor:
    """The sum of all processes' tensors, gradients included; ``x`` itself unless ``is_joint``."""
    return differentiable_all_reduce(x) if is_joint else x


def build_norm(norm: str, channels: int) -> nn.Module | None:
    """Build a normalisation layer by its name in Detectron2.

    "BN", "SyncBN" and "GN" can leave out padding. "GN" differs from Detectron2's, which always
    makes 32 groups and so allows neither 24 nor 48 channels: here there are 32 groups where that
    leaves at least 4 channels in each, else the largest smaller power of two that divides the
    channels. Groups of one channel would erase what the channel's mean says.

    Args:
        norm: One of :data:`NORMS`; "" for none.
        channels: Channels of the map.

    Raises:
        ValueError: ``norm`` is unknown.
    """
    if norm not in NORMS:
        raise ValueError(f"Unknown normalisation {norm!r}; use one of {NORMS}.")
    if norm in ("BN", "SyncBN"):
        return MaskedBatchNorm(channels, is_synchronised=norm == "SyncBN")
    if norm != "GN":
        return get_norm(norm, channels)
    num_groups = math.gcd(32, channels)
    while num_groups > 1 and channels // num_groups < 4:
        num_groups //= 2
    return MaskedGroupNorm(num_groups, channels)
