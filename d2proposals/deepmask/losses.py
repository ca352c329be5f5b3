"""DeepMask's joint loss (Sec. 3.2, Eq. 1), a sum of binary logistic regression losses.

Targets are 0 and 1 where the paper has -1 and 1: log(1 + exp(-y f)) is the binary cross-entropy
of the logit f.

Shape shorthand in this module:

    P: number of patches
    S: side of a mask, in pixels
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def mask_loss(logits: torch.Tensor, targets: torch.Tensor, is_sample: torch.Tensor) -> torch.Tensor:
    """First term of Eq. 1: means over the pixels of a patch, summed over patches.

    Args:
        logits: (P, S, S).
        targets: (P, S, S) of 0 and 1.
        is_sample: (P,) bool, which patches count: the positives, (1 + y) / 2 = 1.

    Returns:
        Tensor: a number.
    """
    loss = _logistic_loss(logits, targets).flatten(1)
    return (loss.mean(dim=1) * is_sample).sum()


def score_loss(logits: torch.Tensor, labels: torch.Tensor, is_sample: torch.Tensor) -> torch.Tensor:
    """Second term of Eq. 1 without lambda: a sum over patches.

    Args:
        logits: (P,).
        labels: (P,) of 0 and 1.
        is_sample: (P,) bool, which patches count.

    Returns:
        Tensor: a number.
    """
    return (_logistic_loss(logits, labels) * is_sample).sum()


def idle_branch_loss(parts: Sequence[nn.Module]) -> torch.Tensor:
    """Zero that depends on all parameters of a branch that an iteration does not train.

    Unlike the paper, which leaves the idle branch alone: one optimizer serves both, so the branch's
    momentum and weight decay go on.

    Args:
        parts: of the branch; at least one.
    """
    return sum(parameter.sum() * 0.0 for part in parts for parameter in part.parameters())


def _logistic_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each logit, of the logits' shape."""
    # Under autocast logits are of half precision, too coarse for a sum over patches.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
