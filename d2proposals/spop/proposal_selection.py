"""From the initial proposals of an image to the final ones: refinement, ranking and suppression.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Sec. III-D.

Shape shorthand in this module:

    H, W: height and width of the image, in pixels
    R: number of proposals
    T: number of cells, of all scales
"""

from __future__ import annotations

import torch
from detectron2.structures import Instances

from ..proposals.candidates import clip_candidates, make_proposals
from ..proposals.ranking import first_of_nms, probability_to_logit, strictly_decreasing
from .pixel_proposals import PixelProposals
from .superpixel_refinement import SuperpixelRefinement


def best_proposals(initial: PixelProposals, number: int) -> PixelProposals:
    """The best ``number`` of T initial proposals, best first.

    Unlike the paper, which ranks all of them: memory and time of what follows are bounded. The sort
    is stable: equal scores keep the order of scales and cells.
    """
    order = initial.logits.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:number]
    return PixelProposals(initial.boxes[order], initial.logits[order])


def select_proposals(
    initial: PixelProposals,
    image_size: tuple[int, int],
    *,
    nms_thresh: float,
    topk: int,
    min_box_size: float = 0.0,
    refinement: SuperpixelRefinement | None = None,
    superpixels: torch.Tensor | None = None,
) -> Instances:
    """Refinement, ranking and NMS of the proposals of one image (Sec. III-D).

    Args:
        initial: R proposals in pixels of the image, best first.
        image_size: (H, W).
        nms_thresh: IoU threshold of the NMS.
        topk: number of proposals wanted.
        min_box_size: proposals with a side of at most this are dropped, in pixels.
        refinement: adds two versions of each proposal; None for none.
        superpixels: (h, w) int64 labels for it, of the image or of a copy of another size.

    Returns:
        Instances: ``proposal_boxes`` and ``objectness_logits``, best first.
    """
    scores = initial.logits.sigmoid().nan_to_num(nan=-1.0)
    boxes, index = clip_candidates(initial.boxes, scores, image_size, min_box_size)
    logits = initial.logits[index]
    if refinement is not None and len(boxes):
        boxes, exists = _add_versions(boxes, image_size, refinement, superpixels)
        exists &= (boxes[..., 2:] - boxes[..., :2] > min_box_size).all(dim=-1)
        # All versions have the score of the initial one; equal scores rank in this order.
        logits = logits[:, None].expand(-1, 3)[exists]
        boxes = boxes[exists]
    keep = first_of_nms(boxes, nms_thresh, topk)
    logits = strictly_decreasing(probability_to_logit(logits[keep].sigmoid()))
    return make_proposals(image_size, boxes[keep], logits)


def _add_versions(
    boxes: torch.Tensor,
    image_size: tuple[int, int],
    refinement: SuperpixelRefinement,
    superpixels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial, shrunk and expanded versions of proposals.

    Args:
        boxes: (R, 4) XYXY in pixels of the image.
        image_size: (H, W).
        refinement: makes them.
        superpixels: (h, w) int64.

    Returns:
        Tensor: (R, 3, 4).
        Tensor: (R, 3) bool, whether there is such a version.
    """
    (height, width), (rows, columns) = image_size, superpixels.shape
    # The same box in the copy that the superpixels are of; 1 where it is the image itself.
    factor = boxes.new_tensor([columns / width, rows / height] * 2)
    refined = refinement(boxes * factor, superpixels)
    versions = torch.stack([boxes, refined.shrunk / factor, refined.expanded / factor], dim=1)
    exists = torch.ones_like(versions[..., 0], dtype=torch.bool)
    exists[:, 1] = refined.has_shrunk
    return versions, exists
