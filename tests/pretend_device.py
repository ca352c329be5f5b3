"""A device without hardware: its tensors compute on the CPU and refuse to meet CPU tensors.

What a GPU would refuse in a run of some minutes on it, this refuses on any machine: tensors on two
devices in one operator, an index on a GPU of a tensor on the CPU, the values of a GPU's tensor as
a NumPy array, a generator of random numbers on another device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# Indices on the CPU are welcome on a GPU too; values to assign are not, but for numbers.
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
COPIES = {aten.copy_.default, aten._to_copy.default}


NAME = "pretend"


@cache
def _register() -> torch.device:
    """Make the device known to torch, once in a process."""
    try:
        from torch.utils.backend_registration import (
            _DummyBackendModule,
            _setup_privateuseone_for_python_backend,
        )
    except ImportError:
        pytest.skip("this torch cannot have a backend written in Python")
    module = _DummyBackendModule()
    # Asked for where autocast is turned off.
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    return torch.device(NAME, 0)


class PretendTensor(torch.Tensor):
    """A tensor that says it is on the pretended device and holds one on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_register(),
            requires_grad=held.requires_grad,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"PretendTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("a tensor of the pretended device has no array: .cpu() first")
        return self.held.numpy(force=True)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees the operators that have no tensor: the makers of them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs) -> Any:
    """Run an operator on the CPU; its results are on the device of its arguments."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    pretended = [x for x in tensors if isinstance(x, PretendTensor)]
    _check(func, args, kwargs, tensors, pretended)
    is_pretended = bool(pretended)
    if func is aten.copy_.default:
        is_pretended = isinstance(args[0], PretendTensor)
    if kwargs.get("device") is not None:
        is_pretended = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if torch.Tag.inplace_view in func.tags and pretended:
        # The shape that the tensor itself tells changes too.
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
    argument_of = {id(x.held): x for x in pretended}

    def held(x):
        return x.held if isinstance(x, PretendTensor) else x

    def wrapped(x):
        if not is_pretended or not isinstance(x, torch.Tensor):
            return x
        # In place: the argument itself.
        return argument_of[id(x)] if id(x) in argument_of else PretendTensor(x)

    return tree_map(wrapped, func(*tree_map(held, args), **tree_map(held, kwargs)))


def _check(func, args, kwargs, tensors, pretended) -> None:
    """Refuse what a GPU refuses."""
    if pretended and len(pretended) < len(tensors) and func not in COPIES:
        if func in INDEXING:
            values = args[2:3]
            strangers = [x for x in values if not isinstance(x, PretendTensor) and x.dim() > 0]
            if not isinstance(args[0], PretendTensor):
                strangers = [args[0]]
        else:
            strangers = [x for x in tensors if not isinstance(x, PretendTensor) and x.dim() > 0]
        if strangers:
            shapes = [(str(x.device), tuple(x.shape)) for x in tensors]
            raise RuntimeError(f"{func} meets tensors on two devices: {shapes}")
    generator = kwargs.get("generator")
    if generator is not None:
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        if generator.device.type != device.type:
            raise RuntimeError(f"{func} on {device} has a generator on {generator.device}")


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """The device; within this context tensors and modules can be moved to it."""
    device = _register()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # torch.tensor and its like make their tensors on the CPU, and the mode sees them move.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
