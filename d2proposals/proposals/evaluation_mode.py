"""Proposals of a generator that is being trained: its networks as they are in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within this context: no dropout, and batch statistics that stay.

    Afterwards, also after an exception, each module in it has the mode it had: one that its owner
    keeps in evaluation stays there.

    Args:
        module: with all that is in it.
    """
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training
