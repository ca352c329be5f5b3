"""The deformable convolution that aligns features with the initial proposals of SC-RPN.

Source: W. Zou, Z. Zhang, Y. Peng, C. Xiang, S. Tian and L. Zhang, "SC-RPN: A Strong Correlation
Learning Framework for Region Proposal", IEEE Transactions on Image Processing 30, 2021,
Sec. III and III-C (point alignment), after J. Dai et al., "Deformable Convolutional Networks",
ICCV 2017.

torchvision's operator is the reference. On a CPU it takes most of a generator's time, so there
is a second sampler with the same values and gradients: each sampled value is a weighted sum of
four rows of the feature table, which is what `torch.nn.functional.embedding_bag` computes.

Shape shorthand in this module:

    N: number of images in the batch
    R: number of cells of one image, sum of Hi * Wi over the feature maps
    C, D: input and output channels
    Hi, Wi: height and width of a feature map
    T: number of kernel taps (9)
    P: number of output positions (N * Hi * Wi), or those of one block
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d

KERNEL_SIZE = 3
NUM_TAPS = KERNEL_SIZE**2
SAMPLERS = ("auto", "torchvision", "gather")
# Output positions whose sampled features are in memory at once: with 256 channels and 9 taps,
# 1,024 positions are 9 MB. Larger blocks spend their time on fresh memory pages, smaller ones make
# the matrix product slower.
_POSITIONS_PER_BLOCK = 1024


def kernel_grid(device: torch.device | None = None) -> torch.Tensor:
    """Taps of a 3x3 kernel, (9, 2) as (y, x) in cells around the centre, row by row."""
    steps = torch.arange(KERNEL_SIZE, dtype=torch.float32, device=device) - KERNEL_SIZE // 2
    # Not cartesian_prod, which ONNX does not have.
    return torch.stack([steps.repeat_interleave(KERNEL_SIZE), steps.repeat(KERNEL_SIZE)], dim=1)


def gather_deform_conv2d(
    x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Deformable 3x3 convolution of stride 1 and padding 1 by gathering rows of a table.

    Equal to ``torchvision.ops.deform_conv2d(x, offset, weight, padding=1)`` in value and
    gradient. Memory stays bounded by one block of positions; in training the sampled features
    are computed a second time in the backward pass instead of being kept.

    Args:
        x: (N, C, Hi, Wi) float32.
        offset: (N, 2 * 9, Hi, Wi) float32 as (dy, dx) per tap, in cells.
        weight: (D, C, 3, 3). Its type is that of the product and of the result; points are
            sampled in float32, whose digits the bilinear weights need on a large map.

    Returns:
        Tensor: (N, D, Hi, Wi), channels last in memory.
    """
    num_images, _, height, width = x.shape
    offset = offset.permute(0, 2, 3, 1).flatten(0, 2)  # (N, 18, Hi, Wi) -> (P, 18)
    positions = torch.arange(len(offset), device=x.device)
    output = gather_deform_conv2d_at([x], offset, weight, positions)
    output = output.view(num_images, height, width, -1)
    return output.permute(0, 3, 1, 2)  # (N, Hi, Wi, D) -> (N, D, Hi, Wi)


def gather_deform_conv2d_at(
    maps: list[torch.Tensor], offset: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """:func:`gather_deform_conv2d` at some output positions alone, of several feature maps at once.

    Args:
        maps: one (N, C, Hi, Wi) float32 per feature map.
        offset: (P, 2 * 9) float32 as (dy, dx) per tap, in cells.
        weight: (D, C, 3, 3), see :func:`gather_deform_conv2d`.
        positions: (P,) int64 in [0, N * R), the cells of one image after the other, and of an
            image those of one feature map after the other.

    Returns:
        Tensor: (P, D).
    """
    if len(positions) == 0:
        return weight.new_zeros(0, len(weight))
    # Contiguous rows, for N = 1 too, where reshape() alone would return a ten times slower view.
    rows = [x.flatten(2).transpose(1, 2) for x in maps]  # (N, Hi * Wi, C)
    table = (torch.cat(rows, dim=1) if len(rows) > 1 else rows[0].contiguous()).flatten(0, 1)
    matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)  # (D, 9*C), taps before channels
    offset = offset.reshape(-1, NUM_TAPS, 2)
    map_sizes = [tuple(x.shape[-2:]) for x in maps]
    rows, weights = _bilinear_corners(offset, positions, map_sizes)  # (P, 9, 4) each
    rows, weights = (t.split(_POSITIONS_PER_BLOCK) for t in (rows, weights))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (table, offset, weight)):
        return torch.cat(
            [
                checkpoint(
                    _convolve_block,
                    *(table, rows_i, weights_i, matrix),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for rows_i, weights_i in zip(rows, weights, strict=True)
            ]
        )
    output = matrix.new_empty(len(offset), len(weight))
    blocks = zip(rows, weights, output.split(_POSITIONS_PER_BLOCK), strict=True)
    for rows_i, weights_i, output_i in blocks:
        output_i.copy_(_convolve_block(table, rows_i, weights_i, matrix))
    return output


def _convolve_block(
    table: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    matrix: torch.Tensor,
) -> torch.Tensor:
    """Output (P, D) of one block of positions from its corners (P, 9, 4)."""
    sampled = F.embedding_bag(
        rows.flatten(0, 1), table, mode="sum", per_sample_weights=weights.flatten(0, 1)
    )  # (P*9, C)
    return product(sampled.view(len(rows), -1).to(matrix.dtype), matrix)


def product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Rows (P, K) times the transpose of a matrix (D, K): (P, D).

    On a CPU it is written as a 1x1 convolution, whose dilation changes nothing but that PyTorch
    has oneDNN compute it: with AVX-512 on an AMD processor in half the time of MKL's product.
    """
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows @ matrix.t()
    # Views of this very form, channels last, are what it takes without a copy.
    as_map = rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)  # (1, K, P, 1)
    output = F.conv2d(as_map, matrix[:, :, None, None], dilation=2)  # (1, D, P, 1)
    return output.permute(0, 2, 3, 1).reshape(len(rows), -1)


def _bilinear_corners(
    offset: torch.Tensor, positions: torch.Tensor, map_sizes: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the table around each sampled point, and their bilinear weights.

    A corner outside the map has weight zero, as in torchvision.

    Args:
        offset: (P, 9, 2) as (dy, dx) per tap, in cells.
        positions: (P,), see :func:`gather_deform_conv2d_at`.
        map_sizes: (Hi, Wi) of each feature map.

    Returns:
        Tensor: (P, 9, 4) int64 rows of the table.
        Tensor: (P, 9, 4) weights, differentiable with respect to ``offset``.
    """
    size, start, cell = _map_of(positions, map_sizes)
    width = size[..., 1]
    origin = torch.stack([torch.div(cell, width, rounding_mode="floor"), cell % width], dim=1)
    point = offset + (kernel_grid(offset.device) + origin[:, None])  # (P, 9, 2)
    low = point.detach().floor()
    fraction = point - low
    size = size.view(-1, 1, 2)  # (P, 1, 2), or (1, 1, 2) of a single map
    low_inside = (low >= 0) & (low < size)
    high_inside = (low >= -1) & (low < size - 1)
    weight = torch.stack([(1 - fraction) * low_inside, fraction * high_inside], dim=-1)
    weights = weight[:, :, 0, :, None] * weight[:, :, 1, None, :]  # (P, 9, y corner, x corner)
    low = low.long()
    corner = torch.stack([low, low + 1], dim=-1).clamp_(min=0)  # (P, 9, yx, low and high)
    y, x = torch.minimum(corner, size[..., None] - 1).unbind(dim=2)  # (P, 9, 2)
    rows = (y * width.view(-1, 1, 1))[..., :, None] + x[..., None, :]  # (P, 9, 2, 2)
    rows = rows + start[:, None, None, None]
    return rows.flatten(-2), weights.flatten(-2)


def _map_of(
    positions: torch.Tensor, map_sizes: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where positions (P,) lie, see :func:`gather_deform_conv2d_at`.

    Returns:
        Tensor: (P, 2) int64 height and width of the feature map; (2,) of a single one.
        Tensor: (P,) the first position of that map of that image.
        Tensor: (P,) the cell in the map.
    """
    sizes = torch.tensor(map_sizes, device=positions.device)  # (L, 2)
    numbers = [height * width for height, width in map_sizes]
    location = positions % sum(numbers)
    if len(map_sizes) == 1:
        return sizes[0], positions - location, location
    ends = torch.tensor(list(accumulate(numbers)), device=positions.device)
    level = torch.bucketize(location, ends, right=True)
    cell = location - (ends - sizes.prod(dim=1))[level]
    return sizes[level], positions - cell, cell


class AlignedConv(nn.Module):
    """A 3x3 convolution without bias whose taps can be moved at each position.

    Both feature maps of SC-RPN's second stage (classification and regression) look at the same
    points. One module with twice the output channels therefore samples them once for both.
    """

    def __init__(self, *, in_channels: int, out_channels: int, sampler: str = "auto"):
        """
        Args:
            in_channels: C.
            out_channels: D.
            sampler: "torchvision": `torchvision.ops.deform_conv2d`; "gather":
                :func:`gather_deform_conv2d`; "auto": gather on a CPU, torchvision elsewhere.
                A trace always has torchvision's, whose work does not depend on an image's size.

        Raises:
            ValueError: unknown sampler.
        """
        super().__init__()
        if sampler not in SAMPLERS:
            raise ValueError(
                f"unknown MODEL.SCRPN.DEFORM_SAMPLER {sampler!r}, choose one of {SAMPLERS}"
            )
        self.sampler = sampler
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, KERNEL_SIZE, KERNEL_SIZE))
        nn.init.normal_(self.weight, std=0.01)

    def uses_gather(self) -> bool:
        """Whether maps are convolved by :func:`gather_deform_conv2d` now."""
        if torch.jit.is_tracing():
            return False
        return self.sampler == "gather" or (
            self.sampler == "auto" and self.weight.device.type == "cpu"
        )

    def forward(self, x: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            x: (N, C, Hi, Wi).
            offset: (N, 18, Hi, Wi) as (dy, dx) per tap in cells, taps row by row; None for the
                plain convolution.

        Returns:
            Tensor: (N, D, Hi, Wi).
        """
        if offset is None:
            return F.conv2d(x, self.weight, padding=KERNEL_SIZE // 2)
        use_gather = self.uses_gather()
        weight = self._product_weight(x.device.type) if use_gather else self.weight.float()
        with torch.autocast(device_type=x.device.type, enabled=False):
            if use_gather:
                return gather_deform_conv2d(x.float(), offset.float(), weight)
            # Samples and multiplies at once, so all of it has the digits that sampling needs.
            return deform_conv2d(x.float(), offset.float(), weight, padding=KERNEL_SIZE // 2)

    def forward_at(
        self,
        maps: list[torch.Tensor],
        offset: torch.Tensor | None,
        positions: torch.Tensor,
        outputs: slice = slice(None),
    ) -> torch.Tensor:
        """:meth:`forward` at some positions of some feature maps alone, whatever the sampler.

        Args:
            maps: one (N, C, Hi, Wi) per feature map.
            offset: (P, 18) as (dy, dx) per tap in cells, taps row by row; None for the plain
                convolution.
            positions: (P,) int64 in [0, N * R), the cells of one image after the other, and of an
                image those of one feature map after the other.
            outputs: those of the output channels that are wanted.

        Returns:
            Tensor: (P, D).
        """
        device = maps[0].device
        if offset is None:
            offset = maps[0].new_zeros(len(positions), 2 * NUM_TAPS)
        weight = self._product_weight(device.type)[outputs]
        with torch.autocast(device_type=device.type, enabled=False):
            maps = [x.float() for x in maps]
            return gather_deform_conv2d_at(maps, offset.float(), weight, positions)

    def _product_weight(self, device_type: str) -> torch.Tensor:
        """The weight in the type that products have now: autocast's, or float32."""
        if torch.is_autocast_enabled(device_type):
            return self.weight.to(torch.get_autocast_dtype(device_type))
        return self.weight.float()
