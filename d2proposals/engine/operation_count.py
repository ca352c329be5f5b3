"""How many floating-point operations a model takes, in all and by its parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .forward_hooks import around_forward


def count_operations(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, float]:
    """Operations of a pass over a batch, in 10^9 an image.

    Counted are convolutions and matrix products, a multiplication and an addition as two; not what
    is done element by element, pooling, sorting, the suppression of overlapping boxes, superpixels.

    Args:
        model: with ``backbone`` and ``proposal_generator``, in training or evaluation mode.
        inputs: the batch, in the model's input format.

    Returns:
        dict: "total", in training with the backward pass; "backbone" and "generator", of their
        forward pass.
    """
    with (
        FlopCounterMode(display=False) as counter,
        _part_counter(model.backbone, counter) as backbone,
        _part_counter(model.proposal_generator, counter) as generator,
        torch.set_grad_enabled(model.training),
        EventStorage(),
    ):
        outputs = model(inputs)
        if model.training:
            sum(outputs.values()).backward()
    model.zero_grad(set_to_none=True)
    counts = {
        "total": counter.get_total_flops(),
        "backbone": sum(backbone),
        "generator": sum(generator),
    }
    return {part: count / 1e9 / len(inputs) for part, count in counts.items()}


@contextmanager
def _part_counter(part: nn.Module, counter: FlopCounterMode) -> Iterator[list[int]]:
    """Collect the operations of every forward pass of a part of a model within this context."""
    counts: list[int] = []
    started: list[int] = []
    with around_forward(
        part,
        lambda: started.append(counter.get_total_flops()),
        lambda: counts.append(counter.get_total_flops() - started.pop()),
    ):
        yield counts
