"""The losses of SPOP's networks, means over the cells they are about.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Eq. 1-4.

Unlike the paper, whose equations are sums over the pixels of an image, all losses are means: the
gradient of a sum over some thousand cells is far above what the paper's learning rates bear.

Shape shorthand in this module:

    T: number of cells in the batch
"""

import torch
import torch.nn.functional as F

LOCALIZATION_LOSS_TYPES = ("squared_l2", "l2")


def localization_loss(
    pred_boxes: torch.Tensor, gt_boxes: torch.Tensor, is_trained: torch.Tensor, loss_type: str
) -> torch.Tensor:
    """Eq. 1, 2 and 3: the distance between predicted and true coordinates of the chosen cells.

    Args:
        pred_boxes: (T, 4) in units of the normaliser.
        gt_boxes: (T, 4), the same.
        is_trained: (T,) bool: p*, l* or s*.
        loss_type: "squared_l2": half the squared Euclidean distance; "l2": the distance itself.

    Returns:
        Tensor: mean over the chosen cells; 0, connected to ``pred_boxes``, without any.
    """
    trained = _indices(is_trained)
    difference = pred_boxes[trained] - gt_boxes[trained]
    squared = difference.square().sum(dim=1)
    # Unlike the paper, whose equations print the distance, by default half its square: the loss
    # layer of the paper's code base. The root's gradient is infinite at 0.
    distance = squared / 2 if loss_type == "squared_l2" else (squared + 1e-12).sqrt()
    return distance.sum() / max(len(difference), 1)


def two_way_loss(
    logits: torch.Tensor, labels: torch.Tensor, is_trained: torch.Tensor
) -> torch.Tensor:
    """One of the two terms of Eq. 4, the cross-entropy of a two-way softmax.

    Unlike the paper, whose Eq. 4 lacks it, there is a minus sign.

    Args:
        logits: (T, 2) of label 0 and label 1.
        labels: (T,) bool.
        is_trained: (T,) bool, or (K,) indices of cells.

    Returns:
        Tensor: mean over the chosen cells; 0, connected to ``logits``, without any.
    """
    trained = _indices(is_trained)
    logits, labels = logits[trained], labels[trained]
    return F.cross_entropy(logits, labels.long(), reduction="sum") / max(len(labels), 1)


def _indices(chosen: torch.Tensor) -> torch.Tensor:
    """(K,) indices of the cells that a (T,) mask chooses, which may be indices already.

    The host waits for the device each time that a mask picks, not where indices do.
    """
    return chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
