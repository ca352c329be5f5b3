"""The weights in a checkpoint of train_net.py, read without running any code in it."""

import os
from collections.abc import Mapping

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
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises a dozen kinds, by where it is damaged
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is cut off, or no checkpoint of tensors ({reason}).") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path} has no entry 'model': give a checkpoint of train_net.py.")
    return content["model"]
