"""The weights in a checkpoint of train_net.py, read without running any code in it."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def read_model(path: str) -> Mapping[str, Tensor]:
    """The model's weights in a checkpoint of train_net.py, without running any code in it.

    Args:
        path: of the .pth file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no checkpoint.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint {path}; train_net.py writes .pth files.")
    content = load_tensors(path, "give a checkpoint of train_net.py")
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path} has no entry 'model': give a checkpoint of train_net.py.")
    return content["model"]


def to_half_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of floating point in half precision, other tensors as they are.

    Raises:
        ValueError: a tensor has numbers beyond 65,504, which half precision does not reach.
    """
    packed = {}
    for name, value in weights.items():
        packed[name] = value.half() if value.is_floating_point() else value
        if not torch.equal(packed[name].isfinite(), value.isfinite()):
            raise ValueError(f"{name} has numbers that half precision does not reach.")
    return packed


def load_tensors(path: str, remedy: str) -> Any:
    """What a file of ``torch.save`` holds, on the CPU, read without running code of it.

    Args:
        path: of a file that is there.
        remedy: what to do if it cannot be read, for the error.

    Raises:
        ValueError: it is damaged, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises a dozen kinds, by where it is damaged
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"Cannot read {path}: cut off, or no file of tensors alone ({reason}); {remedy}."
        ) from error
