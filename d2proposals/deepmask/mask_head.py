"""DeepMask's segmentation branch, for patches and for windows of a whole map.

Source: DeepMask, Sec. 3.1 and 3.4.

Shape shorthand in this module:

    P: number of patches or windows
    C: channels of the trunk's map
    m: side of a patch's map, in cells (14)
    s: side of a predicted mask, in cells (56)
    S: side of a patch, in pixels (224)
    Hf, Wf: height and width of a map, in cells
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

UPSAMPLING = ("bilinear", "trainable", "none")

# Windows whose m x m cells are copied side by side at a time, as float32 numbers: 128 MiB.
_CHUNK_NUMBERS = 2**25


class MaskHead(nn.Module):
    """Segmentation branch: 1x1 convolution, then every pixel classifier sees the whole map.

    The classifiers are two linear layers without a non-linearity in between, a low-rank variant
    of one fully connected layer (Sec. 3.1).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        map_size: int,
        patch_size: int,
        channels: int = 512,
        code_dim: int = 512,
        mask_size: int = 56,
        upsampling: str = "bilinear",
    ) -> None:
        """
        Args:
            in_channels: C.
            map_size: m, in cells.
            patch_size: S, in pixels; a multiple of ``mask_size`` for trainable up-sampling.
            channels: of the 1x1 convolution.
            code_dim: numbers between the two linear layers; 0 for one layer instead of two, the
                full-rank variant ("deepmaskfull").
            mask_size: s, in cells.
            upsampling: from s to S. "bilinear" (the paper's), "trainable" (a transposed
                convolution that begins as bilinear but for the outermost S / 2s pixels, where it
                sees zeros beyond the border and logits begin closer to 0) or "none": masks are
                learnt at s x s, and enlarged bilinearly where they are used.

        Raises:
            ValueError: an unknown up-sampling, or one that does not divide; a size that makes no
                sense.
        """
        super().__init__()
        if upsampling not in UPSAMPLING:
            raise ValueError(
                f"MODEL.DEEPMASK.UPSAMPLING must be one of {UPSAMPLING}, got '{upsampling}'."
            )
        for key, size, least in (
            ("MASK_SIZE", mask_size, 1),
            ("MASK_CHANNELS", channels, 1),
            ("CODE_DIM", code_dim, 0),
        ):
            if size < least:
                raise ValueError(f"MODEL.DEEPMASK.{key} must be at least {least}, got {size}.")
        self.map_size, self.mask_size, self.patch_size = map_size, mask_size, patch_size
        self.upsampling = upsampling
        self.conv = nn.Conv2d(in_channels, channels, 1)
        num_inputs = channels * map_size**2
        self.encode = nn.Linear(num_inputs, code_dim) if code_dim else nn.Identity()
        self.classify = nn.Linear(code_dim or num_inputs, mask_size**2)
        if upsampling == "trainable":
            self.upsample = _bilinear_deconvolution(patch_size, mask_size)

    @property
    def target_size(self) -> int:
        """Side of the masks that the branch is trained on: S, or s without up-sampling."""
        return self.mask_size if self.upsampling == "none" else self.patch_size

    def embed(self, maps: torch.Tensor) -> torch.Tensor:
        """1x1 convolution and ReLU, of patches or of a whole map alike.

        Args:
            maps: (N, C, Hf, Wf).

        Returns:
            Tensor: (N, channels, Hf, Wf).
        """
        return F.relu(self.conv(maps))

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        """Logits of masks.

        Args:
            embedded: (P, channels, m, m) from :meth:`embed`.

        Returns:
            Tensor: (P, s, s).
        """
        return self._classify(embedded.permute(0, 2, 3, 1).flatten(1))

    def _classify(self, cells: torch.Tensor) -> torch.Tensor:
        """(P, m * m * channels), cell by cell, -> (P, s, s)."""
        return self.classify(self.encode(cells)).view(-1, self.mask_size, self.mask_size)

    def at_windows(
        self, embedded: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Logits of masks at chosen windows of a whole map.

        Unlike the paper, which computes all windows' masks by convolution, windows are chosen by
        score first: the linear layers at all windows would cost as much as the trunk (the low-rank
        variant) or more (the full-rank one). Windows are copied out in chunks of bounded size.

        Args:
            embedded: (channels, Hf, Wf) from :meth:`embed`.
            rows, columns: (P,) int64, each window's first cell.

        Returns:
            Tensor: (P, s, s).
        """
        channels, _, width = embedded.shape
        table = embedded.permute(1, 2, 0).reshape(-1, channels)  # (Hf * Wf, channels)
        step = torch.arange(self.map_size, device=embedded.device)
        cells = (rows * width + columns)[:, None] + (step[:, None] * width + step).flatten()
        chunk = max(_CHUNK_NUMBERS // (channels * self.map_size**2), 1)
        pieces = [self._classify(table[cells_i].flatten(1)) for cells_i in cells.split(chunk)]
        return torch.cat(pieces)

    def enlarge(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits at the patch's own pixels (Sec. 3.4).

        Args:
            logits: (P, s, s).

        Returns:
            Tensor: (P, S, S).
        """
        if self.upsampling == "trainable":
            return self.upsample(logits[:, None])[:, 0]
        size = (self.patch_size, self.patch_size)
        return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _bilinear_deconvolution(patch_size: int, mask_size: int) -> nn.ConvTranspose2d:
    """A transposed convolution whose weights are those of bilinear interpolation.

    Zeros, not the outermost logits, stand beyond the border.
    """
    factor, rest = divmod(patch_size, mask_size)
    if rest or factor % 2:
        raise ValueError(
            "MODEL.DEEPMASK.UPSAMPLING 'trainable' needs a MODEL.DEEPMASK.PATCH_SIZE that is an "
            f"even multiple of MASK_SIZE, got {patch_size} and {mask_size}."
        )
    layer = nn.ConvTranspose2d(1, 1, 2 * factor, stride=factor, padding=factor // 2)
    position = torch.arange(2 * factor, dtype=torch.float32)
    weight = 1 - (position + 0.5 - factor).abs() / factor
    with torch.no_grad():
        layer.weight.copy_(weight[:, None] * weight)
        layer.bias.zero_()
    return layer
