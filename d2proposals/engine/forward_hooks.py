"""What is done around the forward passes of a module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def around_forward(
    part: nn.Module, before: Callable[[], None], behind: Callable[[], None]
) -> Iterator[None]:
    """Call something before and after every forward pass of a part within this context."""
    handles = [
        part.register_forward_pre_hook(lambda *_: before()),
        part.register_forward_hook(lambda *_: behind()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
