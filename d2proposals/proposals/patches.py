"""Patches cut out of a batch of images and resized, on the batch's device.

Shape shorthand in this module:

    N: number of images in the batch
    P: number of patches
    H, W: height and width of the padded batch, in pixels
    h, w: height and width of a patch, in pixels of the patch
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torchvision.ops import roi_align


def crop_patches(
    images: ImageList,
    boxes: torch.Tensor,
    image_index: torch.Tensor,
    patch_size: tuple[int, int],
    flipped: torch.Tensor | None = None,
    sampling_ratio: int = 0,
) -> torch.Tensor:
    """Cut boxes out of a batch and resize them, aspect ratio ignored.

    Pixels of a patch are averages over the area they cover where a patch is made smaller, and
    bilinear samples where it is made larger (RoIAlign with as many samples per pixel as needed).
    What lies outside an image is zero: the mean colour, if the images are normalised. The other
    images of the batch make no difference to a patch.

    Args:
        images: normalised, padded with zeros at the right and the bottom.
        boxes: (P, 4) XYXY in pixels of the network input, (0, 0) being the corner of the first
            pixel; they may extend beyond the image, or lie outside it.
        image_index: (P,) int64 image of each box.
        patch_size: (h, w).
        flipped: (P,) bool, patches to be mirrored left to right; none by default.
        sampling_ratio: samples per pixel of a patch along each axis; 0 for as many as needed.

    Returns:
        Tensor: (P, C, h, w), of the type of the images; positions are at least float32.
    """
    # RoIAlign needs one type, and beyond 512 the numbers of bfloat16 are 4 pixels apart.
    dtype = torch.promote_types(
        torch.promote_types(images.tensor.dtype, boxes.dtype), torch.float32
    )
    # A border of zeros: RoIAlign repeats the last pixel for samples up to a pixel outside, which
    # would tell an image at the edge of the batch from one with padding beside it.
    batch = F.pad(images.tensor.to(dtype), (1, 1, 1, 1))
    rois = torch.cat([image_index[:, None].to(dtype), boxes.to(dtype) + 1], dim=1)  # (P, 5)
    patches = roi_align(batch, rois, patch_size, sampling_ratio=sampling_ratio, aligned=True)
    patches = patches.to(images.tensor.dtype)
    if flipped is None:
        return patches
    return torch.where(flipped[:, None, None, None], patches.flip(-1), patches)


def boxes_to_patch(
    boxes: torch.Tensor, patch_boxes: torch.Tensor, patch_size: tuple[int, int]
) -> torch.Tensor:
    """Coordinates inside patches (not mirrored) of boxes given in the image.

    Args:
        boxes: (P, 4) XYXY, pixels of the image.
        patch_boxes: (P, 4) XYXY, pixels of the image: where each patch was cut.
        patch_size: (h, w).

    Returns:
        Tensor: (P, 4) XYXY, pixels of the patch.
    """
    corner, scale = _patch_frame(patch_boxes, patch_size)
    return (boxes - corner) * scale


def boxes_from_patch(
    boxes: torch.Tensor, patch_boxes: torch.Tensor, patch_size: tuple[int, int]
) -> torch.Tensor:
    """Inverse of :func:`boxes_to_patch`: (P, 4) pixels of the patch to pixels of the image."""
    corner, scale = _patch_frame(patch_boxes, patch_size)
    return boxes / scale + corner


def _patch_frame(
    patch_boxes: torch.Tensor, patch_size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper left corners (P, 4) as x, y, x, y, and patch pixels per image pixel (P, 4)."""
    corner = patch_boxes[:, :2].repeat(1, 2)
    side = (patch_boxes[:, 2:] - patch_boxes[:, :2]).repeat(1, 2)
    height, width = patch_size
    return corner, side.new_tensor([width, height, width, height]) / side
