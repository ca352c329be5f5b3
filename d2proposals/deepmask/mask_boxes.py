"""Boxes around predicted masks.

Shape shorthand in this module:

    K: number of masks, of one image
    s: side of a predicted mask, in cells
    S: side of the mask at the patch's own pixels
"""

import math
from collections.abc import Callable

import torch

# Pixels that are thresholded at a time: 32 MiB as float32.
_CHUNK_PIXELS = 2**23


def boxes_of_masks(
    logits: torch.Tensor,
    frames: torch.Tensor,
    threshold: float,
    enlarge: Callable[[torch.Tensor], torch.Tensor],
    keep_enlarged: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes enclosing what of masks is inside the image (DeepMask, Sec. 4).

    Unlike the paper, which does not mention masks that are empty or reach beyond the image: the
    part outside has no say in a box, and a mask without pixels inside has none and is dropped.

    Args:
        logits: (K, s, s).
        frames: (K, 4) XYXY of the masks, in [0, 1] of the image; may reach beyond it.
        threshold: probability above which a pixel belongs to a mask.
        enlarge: (k, s, s) -> (k, S, S).
        keep_enlarged: whether the enlarged masks are returned instead of ``logits``.

    Returns:
        Tensor: (K, 4) XYXY, in [0, 1] of the image: the outer edges of the outermost pixels. A mask
        without pixels in the image has a box of NaN.
        Tensor: (K, s, s) ``logits``, or (K, S, S) of their type.
    """
    boxes, enlarged = [frames[:0]], []
    limit = math.log(threshold / (1 - threshold))
    side = enlarge(logits[:1]).shape[-1] if len(logits) else 1
    chunk = max(_CHUNK_PIXELS // side**2, 1)
    for logits_i, frames_i in zip(logits.split(chunk), frames.split(chunk), strict=True):
        masks = enlarge(logits_i).to(logits)  # of half precision under autocast
        if keep_enlarged:
            enlarged.append(masks)
        boxes.append(_boxes(masks > limit, frames_i))
    return torch.cat(boxes), torch.cat(enlarged) if enlarged else logits


def _boxes(masks: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """(k, 4) boxes of binary masks (k, S, S)."""
    side = masks.shape[-1]
    cell = (frames[:, 2:] - frames[:, :2]) / side  # (k, 2) x, y
    step = torch.arange(side + 1, device=frames.device, dtype=frames.dtype)
    edges = frames[:, :2, None] + cell[..., None] * step  # (k, 2, S + 1)
    center = (edges[..., :-1] + edges[..., 1:]) / 2
    inside = (center >= 0) & (center < 1)  # (k, 2, S)
    columns = (masks & inside[:, 1, :, None]).any(dim=1) & inside[:, 0]
    rows = (masks & inside[:, 0, None, :]).any(dim=2) & inside[:, 1]
    occupied = torch.stack([columns, rows], dim=1)  # (k, 2, S)
    low = edges[..., :-1].masked_fill(~occupied, math.inf).amin(dim=-1)
    high = edges[..., 1:].masked_fill(~occupied, -math.inf).amax(dim=-1)
    boxes = torch.cat([low, high], dim=1)
    return boxes.masked_fill(~occupied.any(dim=2).all(dim=1, keepdim=True), math.nan)
