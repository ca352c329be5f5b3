"""Masks of proposals: small patches of logits, each with the part of the image that it covers.

A thousand bitmaps of an image's size would take a gigabyte. A patch of a few thousand logits and
its frame say the same, and they stay true when the image is resized, because frames are relative
to the image: ``detector_postprocess`` and ``Instances`` need to know nothing of them. The field of
``Instances`` is called ``proposal_masks``; Detectron2 does something of its own with one called
``pred_masks``.

Shape shorthand in this module:

    N: number of masks, all of one image
    h, w: height and width of a patch, in cells
    H, W: height and width of the image, in pixels
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as mask_util

# Pixels that are resampled at a time: 8 MiB as float32, with temporaries of the same size. Four
# times as many are slower on a CPU, whose cache they leave.
_CHUNK_PIXELS = 2**21
# A certain pixel may have an infinite logit, which bilinear weights of 0 would turn into NaN.
_MAX_LOGIT = 1e4


class ProposalMasks:
    """N masks of an image as patches of logits and their frames.

    It can stand in a field of ``Instances``: it has a length, is indexed like ``BitMasks`` (by an
    integer, a slice, a bool or an index tensor; the result is always a ``ProposalMasks``), moves
    to a device and concatenates.

    Attributes:
        patches: (N, h, w) logits; the cells divide the frame evenly, and the value of a cell is
            that at its centre.
        frames: (N, 4) float32 XYXY, in [0, 1] of the image's width and height. A frame may reach
            outside of the image; outside of a frame there is no mask.
        threshold: probability above which a pixel belongs to the object, unless another one is
            asked for.
    """

    def __init__(self, patches: torch.Tensor, frames: torch.Tensor, threshold: float = 0.5) -> None:
        """
        Args:
            patches: (N, h, w) floating-point logits. For binary patches see ``from_binary``.
            frames: (N, 4) XYXY, relative to the image.
            threshold: in [0, 1), the method's own.
        """
        assert patches.dim() == 3 and patches.is_floating_point(), (patches.shape, patches.dtype)
        assert patches.shape[1] > 0 and patches.shape[2] > 0, patches.shape
        assert frames.shape == (len(patches), 4), (frames.shape, patches.shape)
        self.patches = patches
        self.frames = frames.to(device=patches.device, dtype=torch.float32)
        self.threshold = threshold

    @classmethod
    def from_binary(cls, patches: torch.Tensor, frames: torch.Tensor) -> "ProposalMasks":
        """Masks of binary patches, whose outline runs midway between set and unset cells.

        Args:
            patches: (N, h, w) bool, or numbers that are 0 or 1. Their logits become -1 and 1,
                for the threshold .5.
            frames: (N, 4) XYXY, relative to the image.
        """
        return cls(patches.to(torch.float32) * 2 - 1, frames)

    @property
    def device(self) -> torch.device:
        return self.patches.device

    def to(self, *args: Any, **kwargs: Any) -> "ProposalMasks":
        """As ``Tensor.to``; a dtype applies to the patches alone."""
        return ProposalMasks(self.patches.to(*args, **kwargs), self.frames, self.threshold)

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, item: int | slice | torch.Tensor) -> "ProposalMasks":
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise IndexError(f"mask {item} of {len(self)}")
            item = slice(item % len(self), item % len(self) + 1)
        return ProposalMasks(self.patches[item], self.frames[item], self.threshold)

    def __iter__(self) -> Iterator["ProposalMasks"]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        number, height, width = self.patches.shape
        return f"ProposalMasks({number} patches of {height}x{width}, {self.device})"

    @staticmethod
    def cat(masks: list["ProposalMasks"]) -> "ProposalMasks":
        """Concatenate the masks of several objects, with patches of one size and one threshold."""
        assert masks and all(isinstance(item, ProposalMasks) for item in masks), masks
        thresholds = {item.threshold for item in masks}
        assert len(thresholds) == 1, thresholds
        return ProposalMasks(
            torch.cat([item.patches for item in masks]),
            torch.cat([item.frames for item in masks]),
            masks[0].threshold,
        )

    def paste(
        self, image_height: int, image_width: int, threshold: float | None = None
    ) -> torch.Tensor:
        """Bitmaps of the image's size.

        The logits are resampled bilinearly at the centres of the image's pixels, the outermost
        cells going on to the edge of the frame; then the threshold is applied.

        Args:
            image_height, image_width: H, W, whatever size the image has been resized to.
            threshold: probability in [0, 1) above which a pixel is part of the object; by default
                the masks' own.

        Returns:
            (N, H, W) bool on the masks' device, which is all the memory there is to it but for
            chunks of bounded size.
        """
        bitmaps = torch.zeros(
            len(self), image_height, image_width, dtype=torch.bool, device=self.device
        )
        for piece in self._pieces(image_height, image_width, threshold):
            # Slice by slice: indices of all set pixels would take 24 times the memory of the piece,
            # and seconds.
            rows, columns = piece.bitmaps.shape[1:]
            places = torch.stack([piece.masks, piece.top, piece.left], dim=1).tolist()
            for bitmap, (mask, top, left) in zip(piece.bitmaps, places, strict=True):
                target = bitmaps[mask, top : top + rows, left : left + columns]
                target.copy_(bitmap[: target.shape[0], : target.shape[1]])
        return bitmaps

    def to_rle(
        self, image_height: int, image_width: int, threshold: float | None = None
    ) -> list[dict[str, Any]]:
        """Run-length encodings of what ``paste`` returns, without bitmaps of the image's size.

        Args:
            image_height, image_width, threshold: as in ``paste``.

        Returns:
            N compressed encodings of pycocotools: ``size`` [H, W] and ``counts`` in bytes.
        """
        num_pixels = image_height * image_width
        changes = [np.zeros(0, np.int64)]
        for piece in self._pieces(image_height, image_width, threshold):
            # Along a column the mask changes where it differs from the pixel above; above the
            # first row and below the last there is none.
            padded = torch.nn.functional.pad(piece.bitmaps, (0, 0, 1, 1))
            mask, row, column = (padded[:, 1:] != padded[:, :-1]).nonzero(as_tuple=True)
            position = (piece.left[mask] + column) * image_height + piece.top[mask] + row
            changes.append((piece.masks[mask] * (num_pixels + 1) + position).cpu().numpy())
        keys, counts = np.unique(np.concatenate(changes), return_counts=True)
        # A run that goes on from the foot of a column to the head of the next one changes twice
        # at the same place, which is no change.
        keys = keys[counts == 1]
        mask, position = np.divmod(keys, num_pixels + 1)
        # The last run goes to the end of the image, whether set or not.
        mask, position = mask[position < num_pixels], position[position < num_pixels]
        per_mask = np.split(position, np.searchsorted(mask, np.arange(1, len(self))))
        size = [image_height, image_width]
        runs = [np.diff(ends, prepend=0, append=num_pixels).tolist() for ends in per_mask]
        encoded = [{"size": size, "counts": counts_i} for counts_i in runs[: len(self)]]
        return mask_util.frPyObjects(encoded, *size) if encoded else []

    @torch.no_grad()
    def _pieces(self, height: int, width: int, threshold: float | None) -> Iterator["_Piece"]:
        """The masks' own parts of the image, similar sizes together, at bounded memory."""
        threshold = self.threshold if threshold is None else threshold
        if not 0 <= threshold < 1:
            raise ValueError(f"the threshold of masks must be in [0, 1), not {threshold}")
        if height < 1 or width < 1:
            raise ValueError(f"masks need an image of at least one pixel, not {height} x {width}")
        if len(self) == 0:
            return
        min_logit = math.log(threshold / (1 - threshold)) if threshold > 0 else -math.inf
        scale = self.frames.new_tensor([width, height, width, height])
        frames = self.frames * scale  # (N, 4) pixels
        frames = torch.where(frames.isfinite().all(dim=1, keepdim=True), frames, 0.0)
        limit = scale.long()
        # Frames far outside of the image would not fit an integer.
        nearby = frames.clamp(min=-1, max=float(max(height, width)) + 1)
        begin = nearby[:, :2].floor().long().clamp(min=0).minimum(limit[:2])  # (N, 2) x, y
        end = nearby[:, 2:].ceil().long().minimum(limit[2:])
        # One transfer: the sizes decide the shapes of what follows.
        sides = (end - begin).clamp(min=0).cpu().numpy()
        for masks in _group_by_size(sides):
            chunk_width, chunk_height = sides[masks].max(axis=0).tolist()
            index = torch.from_numpy(masks).to(self.device)
            patches = self.patches[index].float().clamp(-_MAX_LOGIT, _MAX_LOGIT)
            top, left = begin[index, 1], begin[index, 0]
            weights_y, inside_y = _interpolation(
                frames[index][:, [1, 3]], top, chunk_height, height, patches.shape[1]
            )
            rows = weights_y @ patches  # (n, chunk_height, w)
            # A very large image is done in strips of columns.
            strip = max(_CHUNK_PIXELS // (len(masks) * chunk_height), 1)
            for start in range(0, chunk_width, strip):
                strip_left = left + start
                strip_width = min(strip, chunk_width - start)
                weights_x, inside_x = _interpolation(
                    frames[index][:, [0, 2]], strip_left, strip_width, width, patches.shape[2]
                )
                logits = rows @ weights_x.transpose(1, 2)  # (n, chunk_height, strip_width)
                bitmaps = logits > min_logit
                bitmaps &= inside_y[:, :, None] & inside_x[:, None, :]
                yield _Piece(index, top, strip_left, bitmaps)


class _Piece(NamedTuple):
    """The same part of n masks, cut to an equal size; what exceeds a mask's frame is unset.

    Attributes:
        masks: (n,) int64 indices of the masks.
        top, left: (n,) int64, the image's pixel of the first row and column.
        bitmaps: (n, rows, columns) bool.
    """

    masks: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    bitmaps: torch.Tensor


def _group_by_size(sides: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of masks whose common size makes at most ``_CHUNK_PIXELS`` pixels, or of one mask.

    Args:
        sides: (N, 2) int, width and height in pixels; masks without pixels are in no group.
    """
    areas = sides.prod(axis=1)
    order = np.argsort(-areas, kind="stable")[: np.count_nonzero(areas)]
    while len(order):
        common = np.maximum.accumulate(sides[order], axis=0).prod(axis=1)
        fits = common * np.arange(1, len(order) + 1) <= _CHUNK_PIXELS
        number = max(int(np.argmin(fits)) if not fits.all() else len(order), 1)
        yield order[:number]
        order = order[number:]


def _interpolation(
    frames: torch.Tensor, first: torch.Tensor, num_pixels: int, image_side: int, num_cells: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear weights along one axis.

    Args:
        frames: (n, 2) begin and end of the frames, in pixels.
        first: (n,) first pixel of each mask.
        num_pixels: how many pixels from there.
        image_side: pixels of the image along this axis.
        num_cells: cells of a patch along this axis.

    Returns:
        weights (n, num_pixels, num_cells) float32, and (n, num_pixels) bool, whether a pixel's
        centre lies inside the frame and the image.
    """
    pixel = first[:, None] + torch.arange(num_pixels, device=frames.device)  # (n, num_pixels)
    centre = pixel.to(torch.float32) + 0.5
    begin, end = frames[:, :1], frames[:, 1:]
    inside = (centre >= begin) & (centre < end) & (pixel < image_side)
    # Half a cell: the value of a cell is at its centre.
    cell = (centre - begin) / (end - begin).clamp(min=1e-6) * num_cells - 0.5
    cell = cell.clamp(0, num_cells - 1)
    cells = torch.arange(num_cells, device=frames.device, dtype=torch.float32)
    weights = (1 - (cell[:, :, None] - cells).abs()).clamp(min=0)
    return weights, inside
