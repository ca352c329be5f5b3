"""Operators that torch's exporter to ONNX lacks, by those of the standard.

Source: the ONNX standard, https://onnx.ai/onnx/operators: ``DeformConv`` (since operator set 19)
and ``TopK`` (since 11: of equal values the one of the lower index comes first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.onnx import register_custom_op_symbolic, symbolic_helper, unregister_custom_op_symbolic

# The first operator set with DeformConv, which onnxruntime runs since 1.25.
OPSET = 19


@contextmanager
def added_operators() -> Iterator[None]:
    """Let torch's exporter know the operators of this module within this context."""
    for name, symbolic in _SYMBOLICS.items():
        register_custom_op_symbolic(name, symbolic, OPSET)
    try:
        yield
    finally:
        for name in _SYMBOLICS:
            unregister_custom_op_symbolic(name, OPSET)


@symbolic_helper.parse_args("v", "v", "v", "v", "v", *"iiiiiiii", "b")
def _deform_conv2d(
    graph: Any,
    x: Any,
    weight: Any,
    offset: Any,
    mask: Any,
    bias: Any,
    stride_height: int,
    stride_width: int,
    padding_height: int,
    padding_width: int,
    dilation_height: int,
    dilation_width: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Any:
    """``torchvision.ops.deform_conv2d``. Offsets are (dy, dx) by tap in both."""
    padding = [padding_height, padding_width]
    return graph.op(
        "DeformConv",
        *(x, weight, offset, bias, *([mask] if use_mask else [])),
        kernel_shape_i=symbolic_helper._get_tensor_sizes(weight)[2:],
        strides_i=[stride_height, stride_width],
        pads_i=[*padding, *padding],
        dilations_i=[dilation_height, dilation_width],
        group_i=groups,
        offset_group_i=offset_groups,
    )


def _argsort(graph: Any, x: Any, *settings: Any) -> Any:
    """``Tensor.argsort(dim, descending)``, or with ``stable`` before: the standard's is stable."""
    dim = symbolic_helper._get_const(settings[-2], "i", "dim")
    descending = symbolic_helper._get_const(settings[-1], "b", "descending")
    number = graph.op(
        "Gather", graph.op("Shape", x), graph.op("Constant", value_t=torch.tensor([dim]))
    )
    _, index = graph.op("TopK", x, number, axis_i=dim, largest_i=descending, outputs=2)
    return index


_SYMBOLICS: dict[str, Callable] = {
    "torchvision::deform_conv2d": _deform_conv2d,
    "aten::argsort": _argsort,
}
