"""Masks of training patches.

Source: DeepMask, Sec. 3. A mask shows the object in the patch's centre and no other.

Shape shorthand in this module:

    P: number of patches
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks

from ..proposals.patches import crop_patches
from .ground_truth import GroundTruth
from .patch_samples import PatchSamples

# Pixels of bitmaps that are resampled at a time: 64 MiB as float32.
_CHUNK_PIXELS = 2**24


@torch.no_grad()
def cut_masks(
    gt_instances: Sequence[Instances],
    ground_truth: GroundTruth,
    samples: PatchSamples,
    boxes: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Masks of the centred objects of patches, and of no other object (Sec. 3).

    Args:
        gt_instances: of each image, with ``gt_masks``: ``BitMasks`` or ``PolygonMasks``.
        ground_truth: of the same images.
        samples: P patches.
        boxes: (P, 4) where they are cut.
        size: side of the masks, in cells.

    Returns:
        Tensor: (P, size, size) float32 of 0 and 1; all 0 for patches without an object.

    Raises:
        ValueError: an image has objects without masks, or masks of an unknown kind.
    """
    masks = boxes.new_zeros(len(boxes), size, size)
    index = samples.object_index
    has_object = (index >= 0) & samples.is_valid
    # Images are cropped one by one: how many patches each has is the one thing to be transferred.
    owner = torch.where(has_object, samples.image_index + 1, 0)
    counts = owner.bincount(minlength=len(gt_instances) + 1).tolist()
    patches_of_images = owner.argsort(stable=True).split(counts)[1:]
    for instances, patches in zip(gt_instances, patches_of_images, strict=True):
        if len(patches) == 0:
            continue
        gt_masks = _masks_of(instances)
        numbers = ground_truth.number_in_image[index[patches]]
        if isinstance(gt_masks, PolygonMasks):
            cut = gt_masks[numbers.cpu()].crop_and_resize(boxes[patches], size)
        else:
            cut = _cut_bitmaps(gt_masks, numbers, boxes[patches], size)
        masks[patches] = cut.to(masks)
    flipped = samples.flipped[:, None, None]
    return torch.where(flipped, masks.flip(-1), masks)


def _cut_bitmaps(
    gt_masks: BitMasks, numbers: torch.Tensor, boxes: torch.Tensor, size: int
) -> torch.Tensor:
    """(P, size, size) bool of the objects ``numbers`` (P,) of one image, cut at ``boxes`` (P, 4).

    Many patches show the same object: each is copied once, and few at a time.
    """
    objects, position = numbers.unique(return_inverse=True)
    height, width = gt_masks.image_size
    chunk = max(_CHUNK_PIXELS // (height * width), 1)
    masks = boxes.new_zeros(len(boxes), size, size, dtype=torch.bool)
    for first, objects_i in zip(
        range(0, len(objects), chunk), objects.to(gt_masks.device).split(chunk), strict=True
    ):
        here = ((position >= first) & (position < first + chunk)).nonzero()[:, 0]
        bitmaps = gt_masks.tensor[objects_i].to(boxes)[:, None]
        images = ImageList(bitmaps, [(height, width)] * len(bitmaps))
        pieces = crop_patches(images, boxes[here], position[here] - first, (size, size))
        masks[here] = pieces[:, 0] >= 0.5
    return masks


def _masks_of(instances: Instances) -> BitMasks | PolygonMasks:
    if not instances.has("gt_masks"):
        raise ValueError(
            "DeepMask learns from instance masks, and the training images have none: set "
            "INPUT.USE_INSTANCE_MASK True, and take a dataset whose annotations have masks."
        )
    if not isinstance(instances.gt_masks, BitMasks | PolygonMasks):
        raise ValueError(
            f"DeepMask cannot read masks of type {type(instances.gt_masks).__name__}: set "
            "INPUT.MASK_FORMAT to 'polygon' or 'bitmask'."
        )
    return instances.gt_masks
