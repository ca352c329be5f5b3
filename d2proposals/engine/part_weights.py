"""Weights of a model's part from a checkpoint of its own.

A generator that was trained alone goes into a detector whose other weights come from elsewhere.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from .checkpointer import ProposalCheckpointer
from .freezing import FREEZABLE

logger = logging.getLogger(__name__)

# Beginning of the names that checkpoints of DistributedDataParallel models may have.
_PARALLEL = "module."
# Entries that some checkpoints lack, and that some have in vain: neither is learnt.
_OPTIONAL = ("num_batches_tracked", "cell_anchors")
# Keys that shape the parts of Detectron2 and of this project, by name in the configuration.
_SHAPING_KEYS = {
    "RPN": "MODEL.RPN and MODEL.ANCHOR_GENERATOR",
    "ZIP": "MODEL.ZIP and MODEL.ANCHOR_GENERATOR",
    "SCRPN": "MODEL.SCRPN",
    "DeepMask": "MODEL.DEEPMASK and MODEL.VGG",
    "SPOP": "MODEL.SPOP",
    "DetectorNet": "MODEL.DETECTORNET",
    "build_resnet_backbone": "MODEL.RESNETS",
    "build_resnet_fpn_backbone": "MODEL.RESNETS and MODEL.FPN",
    "build_bn_inception_backbone": "MODEL.BN_INCEPTION",
    "build_zoom_network_backbone": "MODEL.ZOOM_NETWORK and MODEL.BN_INCEPTION",
    "build_vgg_backbone": "MODEL.VGG",
}


def load_part_weights(
    cfg: CfgNode, checkpointer: ProposalCheckpointer, *, only_missing: bool = False
) -> None:
    """Load what ``MODEL.BACKBONE.WEIGHTS`` and ``MODEL.PROPOSAL_GENERATOR.WEIGHTS`` name.

    Args:
        cfg: a configuration.
        checkpointer: of the model, which has loaded ``MODEL.WEIGHTS``; its ``missing_keys`` are
            kept true.
        only_missing: leave a part alone of which the checkpointer has loaded anything.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is no checkpoint, or the part's weights in it do not fit.
    """
    for node, name in FREEZABLE.items():
        path = cfg.MODEL[node].WEIGHTS
        if not path:
            continue
        part = getattr(checkpointer.model, name, None)
        key = f"MODEL.{node}.WEIGHTS"
        if part is None:
            raise ValueError(
                f"{key} is {path}, but this {type(checkpointer.model).__name__} has no {name}: "
                "set it ''."
            )
        keys = {f"{name}.{entry}" for entry in part.state_dict()}
        if only_missing and not keys <= checkpointer.missing_keys:
            logger.info(f"{key} is not read: the checkpoint of the model has a {name}.")
            continue
        state = _part_state(key, path, checkpointer.model, name)
        _check_fits(cfg, key, path, part, name, state)
        part.load_state_dict(state, strict=False)
        checkpointer.missing_keys -= keys
        logger.info(f"The {name} has the weights of {path} ({key}).")


class _StateReader(ProposalCheckpointer):
    """Reads a checkpoint, as safely as any other, without loading it into the model."""

    without_weights = "takes them from MODEL.WEIGHTS"

    def __init__(self, model: nn.Module, weights_key: str):
        super().__init__(model, save_to_disk=False)
        self.weights_key = weights_key
        self.state: dict[str, Any] = {}

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        self.state = checkpoint.pop("model")


def _part_state(key: str, path: str, model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The weights of the part ``name`` in a checkpoint, by their names within the part."""
    reader = _StateReader(model, key)
    reader.load(path, checkpointables=[])
    state = reader.state
    if not isinstance(state, dict) or not all(isinstance(entry, str) for entry in state):
        raise ValueError(f"{key}: {path} is no checkpoint: it holds no weights with names.")
    if all(entry.startswith(_PARALLEL) for entry in state):
        state = {entry.removeprefix(_PARALLEL): value for entry, value in state.items()}
    of_part = {
        entry.removeprefix(f"{name}."): torch.as_tensor(value)
        for entry, value in state.items()
        if entry.startswith(f"{name}.")
    }
    if not of_part:
        tops = sorted({entry.split(".")[0] for entry in state})
        raise ValueError(
            f"{key}: {path} has no entries '{name}.*', but {', '.join(tops[:5]) or 'nothing'}"
            f"{' ...' if len(tops) > 5 else ''}. Name a checkpoint of a proposal network or "
            "detector; weights of another kind go into MODEL.WEIGHTS."
        )
    return of_part


def _is_optional(entry: str) -> bool:
    return any(name in entry for name in _OPTIONAL)


def _check_fits(
    cfg: CfgNode,
    key: str,
    path: str,
    part: nn.Module,
    name: str,
    state: dict[str, torch.Tensor],
) -> None:
    """Raise ValueError unless the weights of a checkpoint are all that the part has."""
    node = cfg.MODEL.PROPOSAL_GENERATOR if name == "proposal_generator" else cfg.MODEL.BACKBONE
    kind = f"{key.rsplit('.', 1)[0]}.NAME ({node.NAME})"
    shaping = f", {_SHAPING_KEYS[node.NAME]}" if node.NAME in _SHAPING_KEYS else ""
    advice = f"The checkpoint's configuration probably differs in {kind}{shaping}"
    if name == "proposal_generator" and hasattr(part, "in_features"):
        advice += ", or in the channels of its backbone"
    own = part.state_dict()
    missing = [entry for entry in own if entry not in state and not _is_optional(entry)]
    extra = [entry for entry in state if entry not in own and not _is_optional(entry)]
    if missing:
        instead = f", but {name}.{extra[0]}" if extra else ""
        raise ValueError(
            f"{key}: {path} has no {name}.{missing[0]}{instead} ({len(missing)} entries are "
            f"missing). {advice}."
        )
    for entry, value in own.items():
        if entry in state and state[entry].shape != value.shape:
            raise ValueError(
                f"{key}: {name}.{entry} is {tuple(state[entry].shape)} in {path}, "
                f"{tuple(value.shape)} in the model. {advice}."
            )
    if extra:
        logger.warning(
            f"{key}: the model has no {name}.{extra[0]}, which {path} has ({len(extra)} such "
            f"entries). {advice}."
        )
