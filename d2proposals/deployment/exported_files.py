"""Networks in files that need neither this project nor Detectron2 to run: TorchScript and ONNX.

Beside the network a file says what goes in and what comes out, as JSON: in ``contract.json`` of a
TorchScript file (``_extra_files`` of ``torch.jit.load``), under "contract" in the metadata of an
ONNX file.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from ..files.atomic_files import atomic_write
from .image_network import ImageFunction, ImageNetwork
from .onnx_operators import OPSET, added_operators

_CONTRACT_FILE = "contract.json"


def write_torchscript(network: ImageNetwork, path: str | os.PathLike, contract: dict) -> None:
    """Trace a network and write it for ``torch.jit.load``. It runs on the model's device.

    Args:
        network: to write.
        path: of the file.
        contract: of :func:`contract_of`.
    """
    adapter, buffer = network.adapter(), io.BytesIO()
    with _without_tracer_warnings():
        # Unchecked: the check would only run the model again on the image of the trace.
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        torch.jit.save(traced, buffer, _extra_files={_CONTRACT_FILE: json.dumps(contract)})
    with atomic_write(path, "wb") as file:
        file.write(buffer.getvalue())


def write_onnx(network: ImageNetwork, path: str | os.PathLike, contract: dict) -> None:
    """Trace a network and write it for onnxruntime or another host of the standard.

    Torch's exporter by tracing is used, for the newer one does not take ``TracingAdapter``.

    Args:
        network: to write.
        path: of the file.
        contract: of :func:`contract_of`.

    Raises:
        ValueError: the onnx package is missing.
    """
    check_installed("onnx")
    import onnx

    adapter, buffer = network.adapter(), io.BytesIO()
    with added_operators(), _without_tracer_warnings():
        torch.onnx.export(
            adapter,
            adapter.flattened_inputs,
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=network.output_names,
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "number"} for name in network.output_names},
            },
        )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, {"contract": json.dumps(contract)})
    with atomic_write(path, "wb") as file:
        file.write(model.SerializeToString())


WRITERS: dict[str, Callable[[ImageNetwork, str | os.PathLike, dict], None]] = {
    "torchscript": write_torchscript,
    "onnx": write_onnx,
}


def contract_of(network: ImageNetwork, cfg: Any) -> dict[str, Any]:
    """What a file promises, for whoever has the file alone.

    Args:
        network: to be exported.
        cfg: the configuration of its model.
    """
    return {
        "input": {
            "image": "(3, H, W) float32 in [0, 255], resized, not normalised, of any H and W",
            "format": cfg.INPUT.FORMAT,
            "shorter_side": cfg.INPUT.MIN_SIZE_TEST,
            "longer_side_at_most": cfg.INPUT.MAX_SIZE_TEST,
        },
        "outputs": {output.name: output.meaning for output in network.outputs},
    }


def load_torchscript(path: str | os.PathLike) -> ImageFunction:
    """The network of a file of :func:`write_torchscript`, on the device of its trace."""
    with _without_tracer_warnings():
        module = torch.jit.load(path)

    @torch.no_grad()
    def run(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(module(image))

    return run


def load_onnx(path: str | os.PathLike, num_threads: int = 0) -> ImageFunction:
    """The network of a file of :func:`write_onnx`, run by onnxruntime on the CPU.

    Args:
        path: of the file.
        num_threads: of an operator; 0 for onnxruntime's choice.

    Raises:
        ValueError: onnxruntime is missing.
    """
    check_installed("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )

    def run(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = session.run(None, {"image": image.cpu().numpy()})
        return tuple(torch.from_numpy(output) for output in outputs)

    return run


def check_installed(name: str) -> None:
    """ValueError unless a package of the extra "export" is there."""
    if find_spec(name) is None:
        raise ValueError(f"{name} is missing: pip install onnx onnxruntime")


@contextmanager
def _without_tracer_warnings() -> Iterator[None]:
    """Without what torch says of Python values in a trace, and of its older exporter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category)
        yield
