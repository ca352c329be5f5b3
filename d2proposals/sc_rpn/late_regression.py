"""Refined boxes of the candidates alone, where scores do not need the regression map.

The second stage's deformable convolution makes two maps. Where the score of a proposal comes from
the classification map alone - the IoU mask is predicted from it, or not used - the regression map
is read at the best samples of each feature map only, at most a few thousand of its cells. Then the
regression half of the convolution is computed after they have been chosen, with the same boxes.

Shape shorthand in this module:

    N: number of images in the batch
    R: number of locations of one image
    S: number of candidates of one image
"""

import torch

from .head import SCRPNHead
from .locations import PyramidLocations
from .pixel_boxes import boxes_in_pixels
from .predictions import InitialPredictions


def can_regress_late(head: SCRPNHead, use_iou_mask: bool) -> bool:
    """Whether the boxes of candidates can wait until they are chosen.

    Not in a trace, which has to convolve whole maps, nor with torchvision's operator, which has no
    way to convolve at some cells.

    Args:
        head: of the generator.
        use_iou_mask: whether scores are IoU-aware.
    """
    needs_regression_map = use_iou_mask and head.iou_mask_feature in ("reg", "fused")
    return (
        head.num_stages == 2
        and head.alignment != "none"
        and not needs_regression_map
        and head.aligned_conv.uses_gather()
    )


def late_candidates(
    head: SCRPNHead,
    initial: InitialPredictions,
    scores: torch.Tensor,
    locations: PyramidLocations,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best samples of each feature map, and only then their refined boxes.

    Args:
        head: with one proposal per location.
        initial: of its first stage.
        scores: (N, R).
        locations: all locations of the batch.
        topk: of each feature map.

    Returns:
        Tensor: (N, S, 4) boxes, XYXY, pixels of the network input.
        Tensor: (N, S) scores.
        Tensor: (S,) feature map of each.
    """
    num_images, num_locations = scores.shape
    image = torch.arange(num_images, device=scores.device)[:, None]
    all_boxes, all_scores, levels = [], [], []
    for level in range(len(locations.strides)):
        cells = locations.level_slice(level)
        num_cells = cells.stop - cells.start
        best, cell = scores[:, cells].topk(min(topk, num_cells), dim=1)  # (N, Si)
        shape = head.refine_shapes_at(initial, level, (image * num_cells + cell).flatten())
        index = image * num_locations + cells.start + cell
        boxes = boxes_in_pixels(head.representation, shape, locations, index.flatten())
        all_boxes.append(boxes.view(num_images, -1, 4))
        all_scores.append(best)
        levels.append(torch.full_like(cell[0], level))
    return torch.cat(all_boxes, dim=1), torch.cat(all_scores, dim=1), torch.cat(levels)
