"""Hosts that tell their generator how large images were before they were resized.

Detectron2's ``ProposalNetwork`` and ``GeneralizedRCNN`` stay as they are: hooks read the sizes from
their inputs. Of a call of ``inference``, which passes hooks by, the caller tells them by itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .native_size import ImageSizes, NativeSizes, pop_sizes, push_sizes


def hand_over_native_sizes(model: nn.Module) -> nn.Module:
    """Let all hosts in a model tell their generator the images' original sizes, if it asks.

    The hooks hold nothing, so that copies, pickles and ``DistributedDataParallel`` have their own.

    Args:
        model: with hosts of a ``proposal_generator`` that has ``native_sizes``; changed in place,
            once if this is called again.

    Returns:
        nn.Module: ``model``.
    """
    for host in model.modules():
        if not reads_native_sizes(host) or _tell in host._forward_pre_hooks.values():
            continue
        host.register_forward_pre_hook(_tell, with_kwargs=True)
        # Also after an exception: the sizes of one batch are never those of the next.
        host.register_forward_hook(_forget, always_call=True)
    return model


def reads_native_sizes(host: nn.Module) -> bool:
    """Whether a module is a host whose generator asks for original sizes."""
    generator = getattr(host, "proposal_generator", None)
    return isinstance(getattr(generator, "native_sizes", None), NativeSizes)


def _tell(host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: say the sizes of the batch."""
    batch = args[0] if args else kwargs.get("batched_inputs")
    # Anything else is for the host to complain of.
    is_batch = isinstance(batch, list) and all(
        isinstance(x, dict) and hasattr(x.get("image"), "shape") for x in batch
    )
    push_sizes([ImageSizes.of_input(x) for x in batch] if is_batch else None)


def _forget(host: nn.Module, args: tuple, output: Any) -> None:
    """A forward hook: the batch is done."""
    pop_sizes()
