"""The authors' weights of DeepMask on ResNet-50: from their Torch7 file to this network's names.

Source: DeepMask.lua, SharpMask.lua and modelUtils.lua of facebookresearch/deepmask, and
models/resnet.lua of facebook/fb.resnet.torch, whose network they load. The file holds the layers
themselves; they are compared with those of configs/deepmask_r50_rpn_only.yaml one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backbones.weight_conversion import IDENTITY_STATISTICS
from ..files.stored_arrays import StoredTensor
from ..files.torch7_file import TorchObject, load_torch7

_NETWORK = "proposal_generator.network."

_CONTAINERS = ("Sequential", "ConcatTable")
# Layers that change no number in a test, or only its place.
_WITHOUT_EFFECT = ("Identity", "View", "Dropout", "Copy")
# What layers are called here, and which of their fields count, by class.
_KINDS = {
    "SpatialConvolution": ("convolution", ("nInputPlane", "nOutputPlane", "kW", "dW", "padW")),
    "SpatialMaxPooling": ("max pooling", ("kW", "dW", "padW")),
    "SpatialSymmetricPadding": ("symmetric padding", ("pad_l", "pad_r", "pad_t", "pad_b")),
    "SpatialZeroPadding": ("zero padding", ("pad_l", "pad_r", "pad_t", "pad_b")),
    "SpatialReSamplingEx": ("resampling", ("owidth", "oheight")),
    "SpatialConstDiagonal": ("affine", ()),
    "ConstAffine": ("affine", ()),
    "Linear": ("linear", ()),
    "CAddTable": ("sum", ()),
    "ReLU": ("ReLU", ()),
    # At 0, for negative numbers 1e-6; the authors' own tests have a ReLU in its place.
    "Threshold": ("ReLU", ()),
}
_MODELS = ("DeepMask", "SharpMask", "Container")
# In the refinement of a SharpMask, which is not read.
_OF_SHARPMASK = ("ParallelTable", "SpatialUpSamplingNearest")
CLASSES = frozenset(
    f"{package}.{name}"
    for package in ("nn", "cudnn", "inn")
    for name in (*_CONTAINERS, *_WITHOUT_EFFECT, *_KINDS, *_MODELS, *_OF_SHARPMASK)
)

# Fields of the model that hold its parts.
_PARTS = {
    "DeepMask": {"trunk": "trunk", "mask": "maskBranch", "score": "scoreBranch"},
    "SharpMask": {"trunk": "trunk", "mask": "maskBranchDM", "score": "scoreBranch"},
}
# Of res2 to res4: blocks, channels of their 3x3 convolutions, stride.
_STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2))
# A hostile file may have a container in itself, or twice in each of many.
_MAX_OBJECTS = 2000


class _Layer(NamedTuple):
    """A layer that a network must have, or that a file has.

    Attributes:
        kind: such as "convolution".
        numbers: channels, kernel and so on, as in ``_KINDS``; sizes of its weights without any.
        name: of its weights in this network, "" where it has none.
        fields: of the file.
    """

    kind: str
    numbers: tuple[float, ...] = ()
    name: str = ""
    fields: Mapping[Any, Any] = {}

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{number:g}" for number in self.numbers)])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weights."""
        if self.kind == "convolution":
            channels, width, kernel, *_ = self.numbers
            return (width, channels, kernel, kernel)
        return self.numbers


def read_released_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the authors' ``model.t7`` of DeepMask, or the DeepMask in that of SharpMask.

    No code of the file is run.

    Args:
        path: of the file.

    Returns:
        Weights by their keys in ``ProposalNetwork`` or ``GeneralizedRCNN``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: in one line, if it is damaged or holds another network.
    """
    content = load_torch7(path, CLASSES)
    model = content.get("model") if isinstance(content, dict) else content
    parts = _PARTS.get(_class(model)) if isinstance(model, TorchObject) else None
    if parts is None:
        raise ValueError(f"{path} holds no DeepMask; is this the authors' model.t7?")
    weights: dict[str, Tensor] = {}
    for part, expected in _EXPECTED.items():
        try:
            found = _layers(model.fields.get(parts[part]))
            _check_layers(found, expected)
            weights |= _convert(found, expected)
        except ValueError as error:
            raise ValueError(
                f"{path}: {part} branch: {error}; is this the authors' model.t7?"
            ) from error
    return weights


def _class(layer: TorchObject) -> str:
    """Its name without the package: cudnn's layers are nn's."""
    return layer.class_name.rpartition(".")[2]


def _trunk() -> Iterator[_Layer]:
    """ResNet-50 up to res4, and the layers that both branches share."""
    yield from _convolution("trunk.conv1", "trunk.bn1", 3, 64, 7, 2)
    yield _Layer("ReLU")
    yield _Layer("max pooling", (3, 2, 1))
    channels = 64
    for stage, (number, width, stage_stride) in enumerate(_STAGES, 1):
        for block in range(number):
            prefix = f"trunk.layer{stage}.{block}."
            stride = stage_stride if block == 0 else 1
            yield from _convolution(f"{prefix}conv1", f"{prefix}bn1", channels, width, 1, 1)
            yield _Layer("ReLU")
            yield from _convolution(f"{prefix}conv2", f"{prefix}bn2", width, width, 3, stride)
            yield _Layer("ReLU")
            yield from _convolution(f"{prefix}conv3", f"{prefix}bn3", width, 4 * width, 1, 1)
            if block == 0:
                names = (f"{prefix}downsample.0", f"{prefix}downsample.1")
                yield from _convolution(*names, channels, 4 * width, 1, stride)
            yield _Layer("sum")
            yield _Layer("ReLU")
            channels = 4 * width
    yield _Layer("zero padding", (-1, -1, -1, -1))
    yield _Layer("convolution", (channels, 128, 1, 1, 0), "shared_code.conv")
    yield _Layer("ReLU")
    yield _Layer("linear", (512, 12800), "shared_code.encode")


def _convolution(
    name: str, norm: str, channels: int, width: int, kernel: int, stride: int
) -> Iterator[_Layer]:
    """A convolution, what pads it, and the normalisation behind it."""
    if kernel > 1:
        yield _Layer("symmetric padding", (kernel // 2,) * 4)
    yield _Layer("convolution", (channels, width, kernel, stride, 0), name)
    yield _Layer("affine", (width,), norm)


_EXPECTED = {
    "trunk": [*_trunk()],
    "mask": [_Layer("linear", (3136, 512), "mask_head.classify"), _Layer("resampling", (112, 112))],
    "score": [
        _Layer("linear", (1024, 512), "score_head.fc1"),
        _Layer("ReLU"),
        _Layer("linear", (1, 1024), "score_head.fc2"),
    ],
}


def _layers(branch: Any) -> list[_Layer]:
    """The layers of a branch in their order, containers taken apart."""
    layers, waiting = [], [branch]
    for _ in range(_MAX_OBJECTS):
        if not waiting:
            return layers
        layer = waiting.pop()
        if not isinstance(layer, TorchObject):
            raise ValueError(f"something in it is no layer but {type(layer).__name__}")
        if _class(layer) in _CONTAINERS:
            modules = layer.fields.get("modules", {})
            numbers = range(len(modules), 0, -1) if isinstance(modules, dict) else ()
            waiting += [modules.get(number) for number in numbers]
        elif _class(layer) not in _WITHOUT_EFFECT:
            layers.append(_describe(layer))
    raise ValueError(f"it has more than {_MAX_OBJECTS} layers")


def _describe(layer: TorchObject) -> _Layer:
    """What a layer of the file does."""
    kind, names = _KINDS.get(_class(layer), (layer.class_name, ()))
    numbers = tuple(layer.fields.get(name, 0) for name in names)
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(f"a layer ({kind}) has sizes that are no numbers")
    weight = layer.fields.get("a" if kind == "affine" else "weight")
    if not names and isinstance(weight, StoredTensor):
        # The first release of "affine" has (1, C, 1, 1).
        numbers = (max(weight.shape),) if kind == "affine" else weight.shape
    return _Layer(kind, numbers, fields=layer.fields)


def _check_layers(found: list[_Layer], expected: list[_Layer]) -> None:
    """Raise ValueError unless both do the same."""
    for number, layer in enumerate(expected):
        has = found[number] if number < len(found) else "nothing"
        if str(has) != str(layer):
            raise ValueError(f"layer {number + 1} is {has}, expected {layer}")
    if len(found) > len(expected):
        raise ValueError(f"it has {len(found)} layers, expected {len(expected)}")


def _convert(found: list[_Layer], expected: list[_Layer]) -> dict[str, Tensor]:
    """Weights of a branch that is the expected one, by their names in a model."""
    weights: dict[str, Tensor] = {}
    bias = torch.zeros(1)
    for layer, wanted in zip(found, expected, strict=True):
        if not wanted.name:
            continue
        prefix = f"{_NETWORK}{wanted.name}."
        if wanted.kind == "affine":
            scale, shift = (_array(layer, name, wanted.shape) for name in ("a", "b"))
            weights[f"{prefix}weight"] = scale
            # A bias of the convolution goes through its normalisation, too.
            weights[f"{prefix}bias"] = shift + scale * bias
            for name, value in IDENTITY_STATISTICS.items():
                weights[prefix + name] = torch.full_like(scale, value)
            weights[f"{prefix}num_batches_tracked"] = torch.tensor(0)
            continue
        weights[f"{prefix}weight"] = _array(layer, "weight", wanted.shape)
        bias = torch.zeros(wanted.shape[0])
        if layer.fields.get("bias") is not None:
            bias = _array(layer, "bias", wanted.shape[:1])
        if not wanted.name.startswith("trunk."):
            weights[f"{prefix}bias"] = bias
    return weights


def _array(layer: _Layer, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a layer, which may have more dimensions of 1, or be a matrix."""
    stored = layer.fields.get(name)
    values = stored.values if isinstance(stored, StoredTensor) else np.zeros(0)
    if values.size != np.prod(shape):
        raise ValueError(
            f"the {name} of a layer ({layer}) has {values.size} numbers, expected "
            f"{np.prod(shape):g}"
        )
    return torch.from_numpy(values.reshape(shape).astype(np.float32))
