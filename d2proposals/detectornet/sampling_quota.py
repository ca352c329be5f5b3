"""How many crops each image of a batch gives, and in which order an image's crops are taken.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 6: 60 % negative and 40 % positive samples, which not every image has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def share_out(supply: Sequence[int], wanted: int) -> list[int]:
    """How much each image gives so that together they give so much each, if they can.

    Every image gives what is wanted of it. What one lacks, those with more to give make up, in
    equal parts as far as each can.

    Args:
        supply: what each image has.
        wanted: of each image, on average.
    """
    given = [min(has, wanted) for has in supply]
    missing = wanted * len(supply) - sum(given)
    while missing > 0 and sum(given) < sum(supply):
        helpers = [i for i, has in enumerate(supply) if has > given[i]]
        part = max(missing // len(helpers), 1)
        for i in helpers[:missing]:
            more = min(part, supply[i] - given[i])
            given[i] += more
            missing -= more
    return given


def interleaved(first: torch.Tensor, second: torch.Tensor, fraction: float) -> torch.Tensor:
    """Two lists as one, each beginning of which has about the given part of the first list.

    Where one list is at its end, the other one goes on.

    Args:
        first: (A, ...).
        second: (B, ...).
        fraction: in [0, 1]; with 0 the first list comes behind the second one, with 1 before it.

    Returns:
        Tensor: (A + B, ...); each list keeps its order.
    """
    # Where each entry would stand if both lists never ended.
    places = [
        (torch.arange(len(x), device=x.device, dtype=torch.float64) + 0.5) / max(part, 1e-12)
        for x, part in ((first, fraction), (second, 1 - fraction))
    ]
    order = torch.cat(places).argsort(stable=True)
    return torch.cat([first, second])[order]
