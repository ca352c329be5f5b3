"""Non-maximum suppression of the boxes found for each class, all classes at a time.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 5.2, "as in [9]": P. Felzenszwalb, R. Girshick, D. McAllester and D. Ramanan, "Object
Detection with Discriminatively Trained Part-Based Models", PAMI 2010, Sec. 7.2.

Shape shorthand in this module:

    K: number of classes
    T: number of boxes of each class
    R: number of boxes that are kept, of all classes
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# What the intersection with a better box is compared with: the area of the worse box, as in [9], or
# that of the union of both.
NMS_TYPES = ("own_area", "iou")


def best_boxes_of_classes(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    threshold: float,
    number: int,
    nms_type: str,
    accepts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    budget: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first boxes that greedy non-maximum suppression keeps of each class.

    A round for each box of a class that is kept, so that the work is that of as many boxes as are
    wanted times all, and the memory that of a few numbers for each box.

    With ``accepts``, the result is that of pruning all boxes by it before the suppression (Sec.
    5.2). Only those are asked about whose answer matters: a box that a better one suppresses is
    not kept whatever the answer.

    Args:
        boxes: (K, T, 4) XYXY, best first, with an area.
        scores: (K, T) descending; -inf at places that are not filled.
        threshold: overlap with a better box of the class above which a box goes.
        number: boxes of each class at most.
        nms_type: "own_area", the overlap is the part of the worse box's area that lies in the
            better box; "iou", intersection over union.
        accepts: takes boxes (R, 4) and their classes (R,), returns (R,) bool, which of them are
            not pruned; None prunes none.
        budget: boxes of each class that ``accepts`` is asked about at most.

    Returns:
        Tensor: (R,) int64 classes, ascending.
        Tensor: (R,) int64 positions in the list of the class, ascending within a class.
    """
    x1, y1, x2, y2 = boxes.unbind(dim=2)  # (K, T) each
    area = (x2 - x1) * (y2 - y1)
    is_left = scores > -torch.inf
    is_kept = torch.zeros_like(is_left)
    for _ in range(min(number if accepts is None else budget, scores.shape[1])):
        # The first that is left. A class without any repeats one that is gone, to no effect.
        index = is_left.int().argmax(dim=1, keepdim=True)
        is_best = torch.zeros_like(is_left).scatter_(1, index, True)
        is_wanted = torch.ones_like(index, dtype=torch.bool)  # (K, 1)
        if accepts is not None:
            is_left &= is_kept.sum(dim=1, keepdim=True) < number
            is_wanted = _asked(accepts, boxes, index, is_left.gather(1, index))
        is_kept |= is_left & is_best & is_wanted
        best_x1, best_y1, best_x2, best_y2 = (x.gather(1, index) for x in (x1, y1, x2, y2))
        width = torch.minimum(x2, best_x2) - torch.maximum(x1, best_x1)
        height = torch.minimum(y2, best_y2) - torch.maximum(y1, best_y1)
        intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
        whole = area
        if nms_type == "iou":
            whole = area + area.gather(1, index) - intersection
        is_suppressed = (intersection > threshold * whole) & is_wanted
        is_left &= ~(is_suppressed | is_best)
        if accepts is not None and not is_left.any():
            break
    return is_kept.nonzero().unbind(dim=1)


def _asked(
    accepts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    boxes: torch.Tensor,
    index: torch.Tensor,
    is_open: torch.Tensor,
) -> torch.Tensor:
    """(K, 1) bool: the box at the index (K, 1) of each class is accepted.

    Args:
        accepts: see :func:`best_boxes_of_classes`.
        boxes: (K, T, 4).
        index: (K, 1).
        is_open: (K, 1) bool, classes that have a box to ask about.
    """
    classes = is_open[:, 0].nonzero()[:, 0]
    is_accepted = torch.zeros_like(is_open)
    if len(classes):
        is_accepted[classes, 0] = accepts(boxes[classes, index[classes, 0]], classes)
    return is_accepted
