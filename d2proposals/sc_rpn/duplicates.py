"""From scored boxes to proposals: the best of each feature map, and NMS twice.

Source: W. Zou, Z. Zhang, Y. Peng, C. Xiang, S. Tian and L. Zhang, "SC-RPN: A Strong Correlation
Learning Framework for Region Proposal", IEEE Transactions on Image Processing 30, 2021, Sec. III
(steps 4 and 5 of the pipeline) and IV-A.

Shape shorthand in this module:

    N: number of images in the batch
    R: number of samples of one image
    S: number of candidates of one image
"""

import torch
from detectron2.layers import batched_nms, nms
from detectron2.structures import Instances

from ..proposals.candidates import at_most, clip_candidates, make_proposals
from ..proposals.ranking import probability_to_logit


def best_of_each_map(
    boxes: torch.Tensor, scores: torch.Tensor, cells: list[slice], topk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The candidates: the ``topk`` best samples of each feature map.

    Args:
        boxes: (N, R, 4).
        scores: (N, R).
        cells: the samples of each feature map.
        topk: of each feature map.

    Returns:
        Tensor: (N, S, 4) boxes.
        Tensor: (N, S) scores.
        Tensor: (S,) feature map of each.
    """
    topk_boxes, topk_scores, levels = [], [], []
    for level, cells_i in enumerate(cells):
        best, index = scores[:, cells_i].topk(at_most(cells_i.stop - cells_i.start, topk), dim=1)
        topk_scores.append(best)
        topk_boxes.append(boxes[:, cells_i].gather(1, index[..., None].expand(-1, -1, 4)))
        levels.append(torch.full_like(index[0], level))
    return torch.cat(topk_boxes, dim=1), torch.cat(topk_scores, dim=1), torch.cat(levels)


def filter_duplicates(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    levels: torch.Tensor,
    image_size: tuple[int, int],
    *,
    level_nms_thresh: float,
    nms_thresh: float,
    topk: int,
    min_box_size: float,
) -> Instances:
    """NMS on each feature map, then over all of them, of one image's candidates.

    Whether NMS keeps a box depends on better boxes alone. So both are run on the best 2 * topk
    boxes, twice as many where too few stay, and so on; the result is that of all boxes.

    Args:
        boxes: (S, 4) XYXY, pixels of the network input.
        scores: (S,) in [0, 1]; -1 for boxes to drop. Equal scores keep the order of the input.
        levels: (S,) feature map of each box.
        image_size: (height, width).
        level_nms_thresh: IoU threshold of the NMS on each feature map.
        nms_thresh: IoU threshold of the NMS over all of them.
        topk: how many are kept.
        min_box_size: smaller boxes are dropped, in pixels.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, index = clip_candidates(boxes[order], scores[order], image_size, min_box_size)
    scores, levels = scores[order][index], levels[order][index]
    # Ranked once, with positions instead of scores: NMS then cannot reorder equal scores.
    rank = -torch.arange(boxes.shape[0], device=boxes.device, dtype=torch.float32)
    # A trace has no loop: it runs on all boxes at once.
    length = boxes.shape[0] if torch.jit.is_tracing() else 2 * topk
    while True:
        first = boxes[:length]
        keep = batched_nms(first, rank[:length], levels[:length], level_nms_thresh)
        keep = keep[nms(first[keep], rank[keep], nms_thresh)[:topk]]
        if torch.jit.is_tracing() or len(keep) == topk or length >= len(boxes):
            break
        length *= 2
    return make_proposals(image_size, boxes[keep], probability_to_logit(scores[keep]))
