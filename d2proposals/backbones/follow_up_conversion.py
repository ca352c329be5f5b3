"""Conversion of ResNet-101's ImageNet weights for the follow-up blocks of ZIP's detector.

ZIP (Li et al., IJCV 2019), Sec. 4: the nine blocks correspond to res4b15-res4b20 and res5a-res5c.

Naming convention:
    public: weights under the names of the public file - torchvision's ("layer3.15.conv1.weight"),
        Detectron2's ("res4.15.conv1.weight") or Caffe2's ("res4_15_branch2a_w", MSRA's R-101.pkl).
    weights: weights under the names of :class:`FollowUpBlocks`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor

from ..files.safe_pickle import load_pickle, to_plain
from .weight_conversion import IDENTITY_STATISTICS, _check_keys, read_weights

# res4 has the blocks a, b1 ... b22; those of the detector end with b20.
_RES4_BLOCKS, _LAST_RES4_BLOCK = 23, 20


def read_resnet_weights(path: str) -> dict[str, Tensor]:
    """Read a ResNet's weights from a ``.pth`` file, or a ``.pkl`` file of Detectron2's model zoo.

    No code of the file is run.

    Args:
        path: the file.

    Returns:
        the tensors by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something other than weights by name.
    """
    if not path.endswith(".pkl") or not os.path.isfile(path):
        return read_weights(path)
    content = load_pickle(path)
    for name in ("model", "blobs"):
        if isinstance(content, dict) and name in content:
            content = content[name]
    arrays = {k: to_plain(v) for k, v in content.items()} if isinstance(content, dict) else {}
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    if not arrays:
        raise ValueError(f"{path} holds no weights by name; is this a file of Detectron2's zoo?")
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def convert_follow_up(
    public: Mapping[str, Tensor], blocks_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of the follow-up blocks from those of a whole ResNet-101.

    torchvision's have the stride of res5a in its 3x3 convolution, MSRA's in the first 1x1
    (MODEL.ZIP_DETECTOR.STRIDE_IN_1X1 True).

    Args:
        public: state dict; the other layers are ignored.
        blocks_state: state dict of :class:`FollowUpBlocks`, of which names and shapes are read.

    Returns:
        Weights as in ``blocks_state``, without the counters of training steps.

    Raises:
        ValueError: ``public`` lacks a weight, is another ResNet's, or a tensor has a wrong shape.
    """
    renamed = _detectron2_names(public)
    stage4 = {int(match[1]) for name in renamed if (match := re.match(r"res4\.(\d+)\.", name))}
    if len(stage4) != _RES4_BLOCKS:
        raise ValueError(
            f"ResNet-101 weights: res4 has {len(stage4)} blocks, expected {_RES4_BLOCKS}; is this "
            "the public file of that network?"
        )
    keys = [key for key in blocks_state if not key.endswith(".num_batches_tracked")]
    num_res4_blocks = len({key.split(".")[1] for key in keys if key.startswith("res4.")})
    first = _LAST_RES4_BLOCK + 1 - num_res4_blocks
    sources = {_source_name(key, first): key for key in keys}
    for name in sources:
        statistic = IDENTITY_STATISTICS.get(name.rpartition(".")[2])
        scale = renamed.get(name.rpartition(".")[0] + ".weight")
        if statistic is not None and scale is not None and name not in renamed:
            renamed[name] = torch.full_like(scale, statistic)
    _check_keys("ResNet-101", {k: v for k, v in renamed.items() if k in sources}, sources)
    weights = {}
    for name, key in sources.items():
        if renamed[name].shape != blocks_state[key].shape:
            raise ValueError(
                f"ResNet-101 weights: {name} has shape {tuple(renamed[name].shape)}, expected "
                f"{tuple(blocks_state[key].shape)}."
            )
        weights[key] = renamed[name].to(torch.float32).contiguous()
    return weights


def _source_name(key: str, first: int) -> str:
    """The name in ResNet-101 of a weight of the follow-up blocks, of which res4b``first`` is 0."""
    stage, index, rest = key.split(".", 2)
    return f"{stage}.{int(index) + first if stage == 'res4' else index}.{rest}"


def _detectron2_names(public: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under Detectron2's names, as far as they are in res4 and res5."""
    names = list(public)
    if any(name.startswith(("res4_", "res5_")) for name in names):
        names = convert_basic_c2_names(names)
    renamed = {}
    for name, value in zip(names, public.values(), strict=True):
        name = re.sub(r"^layer([34])\.", lambda m: f"res{int(m[1]) + 1}.", name)
        name = re.sub(r"\.bn([123])\.", r".conv\1.norm.", name)
        name = name.replace(".downsample.0.", ".shortcut.")
        name = name.replace(".downsample.1.", ".shortcut.norm.")
        renamed[name] = value
    return renamed
