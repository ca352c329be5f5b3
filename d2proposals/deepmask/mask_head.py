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

UPSAMPLING = ("bilinear", "bilinear_corners", "trainable", "none")

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
        channels: int | None = 512,
        code_dim: int = 512,
        mask_size: int = 56,
        upsampling: str = "bilinear",
        target_size: int = 0,
    ) -> None:
        """
        Args:
            in_channels: C.
            map_size: m, in cells.
            patch_size: S, in pixels; a multiple of ``mask_size`` for trainable up-sampling.
            channels: of the 1x1 convolution; None without one.
            code_dim: numbers between the two linear layers; 0 for one layer instead of two, the
                full-rank variant ("deepmaskfull").
            mask_size: s, in cells.
            upsampling: from s to S. "bilinear" (the paper's), "trainable" (a transposed
                convolution that begins as bilinear but for the outermost S / 2s pixels, where it
                sees zeros beyond the border and logits begin closer to 0), "none" (masks are learnt
                at s x s, and enlarged bilinearly where they are used) or "bilinear_corners" (the
                outermost logits are at the window's outermost pixels, as in the authors' later
                code, instead of half a cell inside).
            target_size: side of the masks that the branch is trained on; 0 for S, or s without
                up-sampling.

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
            ("MASK_SIZE", mask_size, 2 if upsampling == "bilinear_corners" else 1),
            ("MASK_CHANNELS", 1 if channels is None else channels, 1),
            ("CODE_DIM", code_dim, 0),
            ("TARGET_SIZE", target_size, 0),
        ):
            if size < least:
                raise ValueError(f"MODEL.DEEPMASK.{key} must be at least {least}, got {size}.")
        if target_size and not upsampling.startswith("bilinear"):
            raise ValueError(
                f"MODEL.DEEPMASK.UPSAMPLING '{upsampling}' trains masks of a size of its own: set "
                f"MODEL.DEEPMASK.TARGET_SIZE 0, got {target_size}."
            )
        self.map_size, self.mask_size, self.patch_size = map_size, mask_size, patch_size
        self.upsampling = upsampling
        self.target_size = target_size or (mask_size if upsampling == "none" else patch_size)
        self.conv = None if channels is None else nn.Conv2d(in_channels, channels, 1)
        num_inputs = (in_channels if channels is None else channels) * map_size**2
        self.encode = nn.Linear(num_inputs, code_dim) if code_dim else nn.Identity()
        self.classify = nn.Linear(code_dim or num_inputs, mask_size**2)
        if upsampling == "trainable":
            self.upsample = _bilinear_deconvolution(patch_size, mask_size)

    @property
    def frame_scale(self) -> float:
        """Sides of what the s x s cells cover, relative to the window's.

        Not 1 where the outermost logits, in the middle of their cells, are at the window's corner
        pixels.
        """
        if self.upsampling != "bilinear_corners":
            return 1.0
        pixels_per_cell = (self.patch_size - 1) / (self.mask_size - 1)
        return self.mask_size * pixels_per_cell / self.patch_size

    def embed(self, maps: torch.Tensor) -> torch.Tensor:
        """1x1 convolution and ReLU, if there is one, of patches or of a whole map alike.

        Args:
            maps: (N, C, Hf, Wf).

        Returns:
            Tensor: (N, channels, Hf, Wf).
        """
        return maps if self.conv is None else F.relu(self.conv(maps))

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
        """Logits at as many pixels as the patch has (Sec. 3.4), over what the cells cover.

        Args:
            logits: (P, s, s).

        Returns:
            Tensor: (P, S, S).
        """
        if self.upsampling == "trainable":
            return self.upsample(logits[:, None])[:, 0]
        return _resize(logits, self.patch_size, align_corners=False)

    def in_window(self, logits: torch.Tensor, side: int) -> torch.Tensor:
        """Logits at the pixels of the window, (P, s, s) -> (P, side, side).

        Args:
            logits: of masks.
            side: of the window in pixels: S where the up-sampling was learnt.
        """
        if self.upsampling == "trainable":
            return self.enlarge(logits)
        return _resize(logits, side, align_corners=self.upsampling == "bilinear_corners")


def _resize(logits: torch.Tensor, side: int, align_corners: bool) -> torch.Tensor:
    """(P, s, s) -> (P, side, side), bilinearly."""
    size = (side, side)
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=align_corners)[
        :, 0
    ]


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
