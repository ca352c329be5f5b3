"""ImageNet weights of torchvision's networks, by name or from a file, and the pixels they expect.

Weights belong to the pixels that a network was trained on. This module alone knows them:

    "torchvision": RGB, [0, 255] minus torchvision's means, divided by its deviations.
    "caffe": BGR, [0, 255] minus the means, not divided; Detectron2's defaults.
"""

from __future__ import annotations

import logging
import os
from typing import NamedTuple
from urllib.error import URLError

import torch
from detectron2.config import CfgNode
from torch import nn
from torchvision.models import get_model_weights

from ..files.checkpoint_file import load_tensors

logger = logging.getLogger(__name__)


class Pixels(NamedTuple):
    """What a network's weights expect of its input.

    Attributes:
        format: channel order, "RGB" or "BGR".
        mean, std: in that order, of values in [0, 255].
    """

    format: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


PIXELS = {
    "torchvision": Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "caffe": Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
}


def adapt_to_pixels(weight: torch.Tensor, source: Pixels, target: Pixels) -> torch.Tensor:
    """A first convolution's weights for images that are normalised in another way.

    The convolution then computes the same of the same photograph, at the border of the image too:
    where it sees zeros, pixels are the mean, which has to be the same.

    Args:
        weight: (channels, 3, height, width), as trained on ``source``.
        source: pixels that the weights expect.
        target: pixels that they are to expect.

    Raises:
        ValueError: the means differ.
    """
    is_reversed = source.format != target.format
    mean, std = (x[::-1] if is_reversed else x for x in (source.mean, source.std))
    if tuple(mean) != tuple(target.mean):
        raise ValueError(
            f"Weights for the mean {tuple(mean)} ({target.format}) do not fit images from which "
            f"{tuple(target.mean)} is subtracted."
        )
    scale = torch.tensor(target.std, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    weight = weight.flip(1) if is_reversed else weight
    return weight * scale.to(weight.dtype)[:, None, None]


def load_torchvision_weights(network: nn.Module, name: str, weights: str) -> None:
    """Load weights under torchvision's layer names, in place.

    Args:
        network: with torchvision's names; layers that it lacks, such as a classifier, are left out
            of the weights.
        name: of the network in torchvision, e.g. "resnet50".
        weights: name of torchvision's weights, e.g. "IMAGENET1K_V1", downloaded on first use; or a
            file of a state dictionary, of the whole network or of its features.

    Raises:
        ValueError: neither a file nor weights of this network; a file of other layers.
        ConnectionError: the weights cannot be downloaded.
    """
    if os.path.isfile(weights):
        state = _read_state(weights)
    else:
        state = _download_state(name, weights)
    own = network.state_dict()
    # Counts of batches are of no use, and old files lack them.
    needed = {key for key in own if not key.endswith("num_batches_tracked")}
    missing = sorted(needed - state.keys())
    if missing:
        raise ValueError(
            f"MODEL.TORCHVISION.WEIGHTS {weights}: {len(missing)} of {len(needed)} arrays of "
            f"{name} are not in it, such as {missing[0]}; it has {', '.join(list(state)[:2])} ... "
            "Name weights of this network under torchvision's layer names."
        )
    wrong = [key for key in sorted(needed) if state[key].shape != own[key].shape]
    if wrong:
        raise ValueError(
            f"MODEL.TORCHVISION.WEIGHTS {weights}: {wrong[0]} has the shape "
            f"{tuple(state[wrong[0]].shape)}, {name} needs {tuple(own[wrong[0]].shape)}."
        )
    # Half precision becomes the network's own.
    network.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    logger.info(f"{name}: {len(needed)} arrays of {weights}")


def warn_of_other_pixels(cfg: CfgNode) -> None:
    """Warn where the configuration's pixels are not those of the weights.

    Args:
        cfg: with ``MODEL.TORCHVISION``, ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN``, ``.PIXEL_STD``.

    Raises:
        ValueError: ``MODEL.TORCHVISION.PIXELS`` is unknown.
    """
    node = cfg.MODEL.TORCHVISION
    if node.PIXELS not in PIXELS:
        raise ValueError(
            f"MODEL.TORCHVISION.PIXELS must be one of {', '.join(PIXELS)}, not '{node.PIXELS}'."
        )
    pixels = PIXELS[node.PIXELS]
    stated = Pixels(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))
    keys = "INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD (FORMAT, ... of a generator's trunk)"
    close = all(
        len(a) == len(b) and all(abs(x - y) < 0.5 for x, y in zip(a, b, strict=True))
        for a, b in zip(pixels[1:], stated[1:], strict=True)
    )
    if node.WEIGHTS and (stated.format != pixels.format or not close):
        logger.warning(
            f"MODEL.TORCHVISION.WEIGHTS were trained on {node.PIXELS}'s pixels: set {keys} to "
            f"'{pixels.format}', {list(pixels.mean)}, {list(pixels.std)}, instead of "
            f"'{stated.format}', {list(stated.mean)}, {list(stated.std)}; or say what the weights "
            "expect by MODEL.TORCHVISION.PIXELS."
        )


def _read_state(path: str) -> dict[str, torch.Tensor]:
    """The state dictionary of a file, read without running code of it."""
    state = load_tensors(
        path, "name a state dictionary in MODEL.TORCHVISION.WEIGHTS, saved by torch.save"
    )
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"MODEL.TORCHVISION.WEIGHTS {path} holds a {type(state).__name__}.")
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def _download_state(name: str, weights: str) -> dict[str, torch.Tensor]:
    """torchvision's own weights by their name."""
    known = get_model_weights(name)
    if weights not in known.__members__:
        raise ValueError(
            f"MODEL.TORCHVISION.WEIGHTS '{weights}' is neither a file nor weights of {name}; "
            f"torchvision has {', '.join(known.__members__)}."
        )
    try:
        return known[weights].get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError) as error:
        raise ConnectionError(
            f"MODEL.TORCHVISION.WEIGHTS {weights} of {name} cannot be downloaded ({error}); name a "
            "file of them instead."
        ) from error
