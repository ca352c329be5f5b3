"""Ground truth with masks, made by hand."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances

from d2proposals.data.mapper import CrowdRegions


def make_gt(image_size, boxes=(), areas=None, crowd=None, crowd_masks=True):
    """Objects that fill their boxes (whole pixels, XYXY); ``areas`` None: no gt_areas.

    ``crowd``: boxes of crowd regions, None: no crowd_regions.
    """
    gt = Instances(tuple(image_size))
    gt.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    gt.gt_classes = torch.zeros(len(gt.gt_boxes), dtype=torch.int64)
    gt.gt_masks = BitMasks(fill(image_size, boxes))
    if areas is not None:
        gt.gt_areas = torch.tensor(areas, dtype=torch.float32)
    if crowd is not None:
        masks = BitMasks(fill(image_size, crowd)) if crowd_masks else None
        regions = Boxes(torch.tensor(crowd, dtype=torch.float32).reshape(-1, 4))
        gt.crowd_regions = CrowdRegions(regions, masks, len(gt))
    return gt


def fill(image_size, boxes):
    """(M, H, W) bool masks of boxes."""
    masks = torch.zeros(len(boxes), *image_size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[max(int(y1), 0) : max(int(y2), 0), max(int(x1), 0) : max(int(x2), 0)] = True
    return masks
