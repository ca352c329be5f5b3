"""What DetectorNet's mask network is trained on: crops of a batch, their masks, and their loss.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 4, 5.1 and 6.

Shape shorthand in this module:

    N: number of images in the batch
    P: number of crops
    K: number of classes; 1 for class-agnostic masks
    G: number of crowd regions of one image
    d: cells per side of a mask
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances

from .box_masks import box_mask_loss, box_mask_targets, unknown_cells
from .crop_sampling import CropSampler, RefinementCrops, sample_mask_crops


class MaskSamples(NamedTuple):
    """What the network is trained on. L is K, or 1 where each crop has the masks of one class.

    Attributes:
        crops: (P, 4) XYXY, pixels of the network input.
        image_index: (P,) int64 image of each crop.
        gt_masks: (P, L, 5, d, d) in [0, 1].
        is_unknown: (P, L, 1, d, d) bool, cells that say nothing, in crowd regions.
        classes: (P,) int64, the one class of each crop whose masks these are; None for all.
        num_positives: number of crops that cover an object.
    """

    crops: torch.Tensor
    image_index: torch.Tensor
    gt_masks: torch.Tensor
    is_unknown: torch.Tensor
    classes: torch.Tensor | None
    num_positives: int


@torch.no_grad()
def sample_masks(
    sampler: CropSampler,
    image_sizes: Sequence[tuple[int, int]],
    gt_instances: Sequence[Instances],
    num_classes: int,
    mask_size: int,
    positive_coverage: float,
    refinement: RefinementCrops,
) -> MaskSamples:
    """Draw crops of all classes together, and make the masks of each class (Sec. 6, Eq. 1).

    A positive crop covers an object of any class, a negative one touches none of any.

    Args:
        sampler: how many crops.
        image_sizes: (H, W) of each image, in pixels of the network input.
        gt_instances: of each image; with K 1, their classes do not count.
        num_classes: K.
        mask_size: d.
        positive_coverage: part of an object that a positive crop covers at least.
        refinement: crops like those of the refinement.
    """
    boxes = [x.gt_boxes.tensor for x in gt_instances]
    classes = [x.gt_classes for x in gt_instances]
    crowds = [crowd_of(x) for x in gt_instances]
    if num_classes == 1:
        classes = [torch.zeros_like(x) for x in classes]
    chosen = sample_mask_crops(
        sampler, boxes, [crowd for crowd, _ in crowds], image_sizes, positive_coverage, refinement
    )
    sizes = chosen.image_index.bincount(minlength=len(boxes)).tolist()
    gt_masks, is_unknown = [], []
    for image, crops_i in enumerate(chosen.boxes.split(sizes)):
        masks_i = box_mask_targets(boxes[image], classes[image], crops_i, num_classes, mask_size)
        gt_masks.append(masks_i)
        crowd_i, crowd_classes_i = crowds[image]
        if num_classes == 1:
            crowd_classes_i = None
        is_unknown.append(unknown_cells(masks_i, crowd_i, crops_i, crowd_classes_i))
    return MaskSamples(
        chosen.boxes,
        chosen.image_index,
        torch.cat(gt_masks),
        torch.cat(is_unknown),
        None,
        int((chosen.labels > 0).sum()),
    )


@torch.no_grad()
def sample_masks_of_each_class(
    sampler: CropSampler,
    image_sizes: Sequence[tuple[int, int]],
    gt_instances: Sequence[Instances],
    mask_size: int,
    positive_coverage: float,
    refinement: RefinementCrops,
) -> MaskSamples:
    """Draw crops for each class by itself, as for networks that share nothing (Sec. 6).

    For a class, a positive crop covers one of its objects, and a negative one may hold objects of
    other classes. A class without an object in the batch gets no crops: all of them would be
    negative.

    Args:
        as :func:`sample_masks`; the sampler's numbers are those of each class.
    """
    present = torch.cat([x.gt_classes for x in gt_instances]).unique().tolist()
    parts = [
        sample_masks(
            sampler,
            image_sizes,
            [_only_class(x, class_id) for x in gt_instances],
            1,
            mask_size,
            positive_coverage,
            refinement,
        )
        for class_id in present
    ]
    if not parts:
        device = gt_instances[0].gt_classes.device
        none = torch.zeros(0, dtype=torch.int64, device=device)
        masks = torch.zeros(0, 1, 5, mask_size, mask_size, device=device)
        return MaskSamples(masks.new_zeros(0, 4), none, masks, masks[:, :, :1].bool(), none, 0)
    classes = [
        torch.full_like(part.image_index, class_id)
        for class_id, part in zip(present, parts, strict=True)
    ]
    return MaskSamples(
        *(torch.cat(x) for x in list(zip(*parts, strict=True))[:4]),
        torch.cat(classes),
        sum(part.num_positives for part in parts),
    )


def mask_loss(
    pred_masks: torch.Tensor,
    gt_masks: torch.Tensor,
    zero_weight: float,
    is_unknown: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted L2 loss of Sec. 4, as a mean over the outputs that count.

    Unlike the paper, which sums over outputs and crops, their mean: AdaGrad does not see the
    difference, and losses of a detector beside it need comparable sizes. And unlike it, which
    knows no crowd regions, cells there count only where an object is.

    Args:
        pred_masks: (P, L, 5, d, d), outputs of the network.
        gt_masks: (P, L, 5, d, d) in [0, 1].
        zero_weight: lambda.
        is_unknown: (P, L, 1, d, d) bool, cells that do not count; none by default.

    Returns:
        Tensor: a scalar.
    """
    loss = box_mask_loss(pred_masks, gt_masks, zero_weight, is_unknown)
    if is_unknown is None:
        return loss / max(gt_masks.numel(), 1)
    return loss / ((~is_unknown).sum() * gt_masks.shape[2]).clamp(min=1)


def check_classes(gt_instances: Sequence[Instances], num_classes: int) -> None:
    """Check that there is a place for the class of each object.

    Raises:
        ValueError: there is none for one of them.
    """
    classes = torch.cat([x.gt_classes for x in gt_instances])
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        wrong = classes[(classes < 0) | (classes >= num_classes)][0].item()
        raise ValueError(
            f"An object has class {wrong}, but MODEL.ROI_HEADS.NUM_CLASSES {num_classes} leaves "
            f"0 to {num_classes - 1}: set it to the number of classes of DATASETS.TRAIN."
        )


def crowd_of(gt_instances: Instances) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Crowd regions of one image; none where the mapper does not tell.

    Returns:
        Tensor: (G, 4) XYXY.
        Tensor: (G,) int64 their classes; None where nobody knows, so that they count for each.
    """
    boxes = gt_instances.gt_boxes.tensor
    if not gt_instances.has("crowd_regions"):
        return boxes[:0], None
    regions = gt_instances.crowd_regions
    classes = regions.classes
    return (
        regions.boxes.tensor.to(boxes),
        None if classes is None else classes.to(boxes.device),
    )


def _only_class(gt_instances: Instances, class_id: int) -> Instances:
    """The objects and crowd regions of one class; regions of no known class stay."""
    picked = gt_instances.gt_classes == class_id
    objects = Instances(
        gt_instances.image_size,
        gt_boxes=gt_instances.gt_boxes[picked],
        gt_classes=gt_instances.gt_classes[picked],
    )
    if gt_instances.has("crowd_regions"):
        objects.crowd_regions = gt_instances.crowd_regions[picked].of_class(class_id)
    return objects
