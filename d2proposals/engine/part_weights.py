"""Weights of a model's part from a checkpoint of its own.

A generator that was trained alone goes into a detector whose other weights come from elsewhere.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
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
    "DeepMask": "MODEL.DEEPMASK",
    "SPOP": "MODEL.SPOP",
    "DetectorNet": "MODEL.DETECTORNET",
    "build_resnet_backbone": "MODEL.RESNETS",
    "build_resnet_fpn_backbone": "MODEL.RESNETS and MODEL.FPN",
    "build_bn_inception_backbone": "MODEL.BN_INCEPTION",
    "build_zoom_network_backbone": "MODEL.ZOOM_NETWORK and those of its BOTTOM_UP",
    "build_torchvision_backbone": "MODEL.TORCHVISION",
    "build_torchvision_fpn_backbone": "MODEL.TORCHVISION and MODEL.FPN",
    "build_vgg_backbone": "MODEL.VGG",
}
# Generators with a network of their own, and where the configuration has its normalisation.
_NORM_NODES = {
    "DeepMask": ("VGG",),
    "SPOP": ("SPOP", "TRUNK"),
    "DetectorNet": ("DETECTORNET",),
}


def load_part_weights(
    cfg: CfgNode, checkpointer: ProposalCheckpointer, *, only_missing: bool = False
) -> None:
    """Load what ``MODEL.BACKBONE.WEIGHTS`` and ``MODEL.PROPOSAL_GENERATOR.WEIGHTS`` name.

    A part that is going to be trained may start from a file that has only some of its weights, such
    as a trunk's of tools/convert_weights.py. A warning says how many weights are random then.

    Args:
        cfg: a configuration.
        checkpointer: of the model, which has loaded ``MODEL.WEIGHTS``; its ``missing_keys`` are
            kept true.
        only_missing: for an evaluation: leave a part alone that the checkpointer has loaded as a
            whole, and take no file that has less than a whole part.

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
        if only_missing and keys and not _learnt(keys & checkpointer.missing_keys):
            loaded = checkpointer.loaded_path
            logger.log(
                logging.INFO if path == loaded else logging.WARNING,
                f"{key} ({path}) is not read: {loaded or 'the model'} has the whole {name}.",
            )
            continue
        state = _part_state(key, path, checkpointer.model, name)
        may_lack = not only_missing and not cfg.MODEL[node].FREEZE
        lacking = _check_fits(cfg, key, path, part, name, state, may_lack=may_lack)
        part.load_state_dict(state, strict=False)
        checkpointer.missing_keys -= keys - lacking
        random = [entry for entry in part.state_dict() if f"{name}.{entry}" in lacking]
        random = [entry for entry in random if f"{name}.{entry}" in checkpointer.missing_keys]
        if random:
            logger.warning(
                f"{key}: {path} has a part of the {name}; {len(random)} of its {len(keys)} entries "
                f"start from random values, the first is {name}.{random[0]}."
            )
        logger.info(f"The {name} has the weights of {path} ({key}).")
        if name == "proposal_generator" and hasattr(part, "in_features"):
            _warn_of_other_backbone(cfg, path)


def _warn_of_other_backbone(cfg: CfgNode, path: str) -> None:
    """Warn where a generator reads feature maps of another backbone than in its training.

    Args:
        cfg: a configuration.
        path: of the generator's checkpoint.
    """
    backbone_weights = cfg.MODEL.BACKBONE.WEIGHTS or cfg.MODEL.WEIGHTS
    if os.path.realpath(path) != os.path.realpath(backbone_weights):
        logger.warning(
            f"MODEL.PROPOSAL_GENERATOR.WEIGHTS: the generator of {path} reads feature maps of "
            f"another backbone ({backbone_weights or 'from no checkpoint'}). Set "
            "MODEL.BACKBONE.WEIGHTS to the generator's checkpoint as well, unless both have the "
            "same backbone, or the generator is to learn anew."
        )


def check_weights_are_whole(checkpointer: ProposalCheckpointer, cfg: CfgNode | None = None) -> None:
    """Warn before an evaluation of random weights, and refuse those of another network.

    Args:
        checkpointer: of the model, which has loaded all that the configuration names.
        cfg: the configuration; None of a lazy one, whose keys are not told.

    Raises:
        ValueError: a checkpoint is named, and lacks weights of the backbone or of the proposal
            generator, or has them in another shape.
    """
    missing = _learnt(checkpointer.missing_keys)
    if not missing:
        return
    path = checkpointer.loaded_path
    if not path:
        parts = sorted({key.split(".")[0] for key in missing})
        logger.warning(
            f"These are results of random weights ({', '.join(parts)}): name a checkpoint in "
            f"{checkpointer.weights_key}."
        )
        return
    # Also statistics of a batch normalisation, without which its weights say nothing. Detectron2
    # takes a frozen one without for one whose statistics are folded in.
    entries = [entry for entry in checkpointer.model.state_dict() if not _is_optional(entry)]
    for name in FREEZABLE.values():
        own = [entry for entry in entries if entry.startswith(f"{name}.")]
        lacking = [key for key in own if key in missing]
        if not lacking:
            continue
        what = f"has no {lacking[0]}"
        if lacking[0] in checkpointer.other_shapes:
            of_file, of_model = checkpointer.other_shapes[lacking[0]]
            what = f"has {lacking[0]} as {of_file}, which is {of_model} in the model"
        part = getattr(checkpointer.model, name)
        advice = f" {_advice(cfg, name, part)}." if cfg is not None else ""
        raise ValueError(
            f"{path} is of another network: it {what}, and {len(lacking)} of the {len(own)} "
            f"weights of the {name} would be random.{advice} Take its configuration, or "
            f"{checkpointer.mend}"
        )


def warn_of_random_generator(cfg: CfgNode, checkpointer: ProposalCheckpointer) -> None:
    """Warn before the training of a generator that will hardly learn from its start.

    That is one whose own network has random weights and no normalisation.

    Args:
        cfg: a configuration.
        checkpointer: of the model, which has loaded all that the configuration names.
    """
    node = cfg.MODEL.PROPOSAL_GENERATOR
    if node.NAME not in _NORM_NODES or node.FREEZE:
        return
    generator = checkpointer.model.proposal_generator
    names = {f"proposal_generator.{name}" for name, _ in generator.named_parameters()}
    path, weights = _NORM_NODES[node.NAME], "MODEL.PROPOSAL_GENERATOR.WEIGHTS"
    if _trunk_name(cfg) == "build_torchvision_backbone":
        if cfg.MODEL.TORCHVISION.WEIGHTS:
            return
        path, weights = ("TORCHVISION",), f"MODEL.TORCHVISION.WEIGHTS or {weights}"
    norm_node = cfg.MODEL
    for name in path:
        norm_node = norm_node[name]
    # That of no trained statistics normalises nothing.
    if norm_node.NORM in ("", "FrozenBN") and names <= checkpointer.missing_keys:
        logger.warning(
            f"The {node.NAME} starts from random weights without normalisation, and learns slowly "
            "or not at all. Name its checkpoint, or its network's converted weights "
            f"(tools/convert_weights.py), in {weights}, or set MODEL.{'.'.join(path)}.NORM 'BN'."
        )


def _trunk_name(cfg: CfgNode) -> str:
    """What the configuration calls the trunk of a generator with a network of its own."""
    return {
        "DeepMask": cfg.MODEL.DEEPMASK.TRUNK,
        "SPOP": cfg.MODEL.SPOP.TRUNK.NAME,
        "DetectorNet": cfg.MODEL.DETECTORNET.TRUNK,
    }[cfg.MODEL.PROPOSAL_GENERATOR.NAME]


class _StateReader(ProposalCheckpointer):
    """Reads a checkpoint, as safely as any other, without loading it into the model."""

    without_weights = "takes them from MODEL.WEIGHTS"

    def __init__(self, model: nn.Module, weights_key: str):
        super().__init__(model, save_to_disk=False)
        self.weights_key = weights_key
        self.state: dict[str, Any] = {}
        self.matching_heuristics = False
        self.is_caffe2 = False

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        self.state = checkpoint.pop("model")
        self.matching_heuristics = checkpoint.get("matching_heuristics", False)
        self.is_caffe2 = checkpoint.get("__author__") == "Caffe2"


def _part_state(key: str, path: str, model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The weights of the part ``name`` in a checkpoint, by their names within the part."""
    reader = _StateReader(model, key)
    reader.load(path, checkpointables=[])
    state = reader.state
    if not isinstance(state, dict) or not all(isinstance(entry, str) for entry in state):
        raise ValueError(f"{key}: {path} is no checkpoint: it holds no weights with names.")
    if all(entry.startswith(_PARALLEL) for entry in state):
        state = {entry.removeprefix(_PARALLEL): value for entry, value in state.items()}
    state = {entry: torch.as_tensor(value) for entry, value in state.items()}
    of_part = {
        entry.removeprefix(f"{name}."): value
        for entry, value in state.items()
        if entry.startswith(f"{name}.")
    }
    if not of_part and reader.matching_heuristics:
        own = getattr(model, name).state_dict()
        of_part = _matched(key, path, own, state, is_caffe2=reader.is_caffe2)
    if not of_part:
        tops = sorted({entry.split(".")[0] for entry in state})
        raise ValueError(
            f"{key}: {path} has no entries '{name}.*', but {', '.join(tops[:5]) or 'nothing'}"
            f"{' ...' if len(tops) > 5 else ''}. Name a checkpoint of a proposal network or "
            "detector; weights of another kind go into MODEL.WEIGHTS."
        )
    return of_part


def _matched(
    key: str,
    path: str,
    own: dict[str, torch.Tensor],
    state: dict[str, torch.Tensor],
    *,
    is_caffe2: bool,
) -> dict[str, torch.Tensor]:
    """Weights by the names of a part, each of which ends in the weight's name in the file.

    What matches none keeps its name. Nothing is returned if nothing matches.

    Raises:
        ValueError: when a weight matches several.
    """
    try:
        aligned = align_and_update_state_dicts(own, state, c2_conversion=is_caffe2)
    except ValueError as error:
        raise ValueError(
            f"{key}: {path} has a network's weights once, but they fit several networks of the "
            "part: convert them with full names (tools/convert_weights.py, --separate-trunks for "
            "DeepMask)."
        ) from error
    matched = {}
    for entry, value in aligned.items():
        # Detectron2 leaves out those of another shape.
        ends = [name for name in own if name.endswith(f".{entry}") and name not in aligned]
        matched[ends[0] if ends and entry not in own else entry] = value
    return matched if matched.keys() & own.keys() else {}


def _is_optional(entry: str) -> bool:
    return any(name in entry for name in _OPTIONAL)


def _learnt(keys: set[str]) -> set[str]:
    return {key for key in keys if not _is_optional(key)}


def _check_fits(
    cfg: CfgNode,
    key: str,
    path: str,
    part: nn.Module,
    name: str,
    state: dict[str, torch.Tensor],
    *,
    may_lack: bool,
) -> set[str]:
    """Check that the weights of a checkpoint are those of the part.

    Args:
        may_lack: whether they may be some of the part's.

    Returns:
        the names in the model of what the checkpoint lacks.

    Raises:
        ValueError: when they are not.
    """
    advice = _advice(cfg, name, part)
    own = part.state_dict()
    missing = [entry for entry in own if entry not in state and not _is_optional(entry)]
    extra = [entry for entry in state if entry not in own and not _is_optional(entry)]
    if missing and (extra or not may_lack):
        instead = f", but {name}.{extra[0]}" if extra else ""
        enough = "" if extra else f" Less than the whole {name} is enough to train it only."
        raise ValueError(
            f"{key}: {path} has no {name}.{missing[0]}{instead} ({len(missing)} entries are "
            f"missing). {advice}.{enough}"
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
    return {f"{name}.{entry}" for entry in missing}


def _advice(cfg: CfgNode, name: str, part: nn.Module) -> str:
    """What the configuration of a checkpoint that does not fit a part probably differs in."""
    key = next(key for key, value in FREEZABLE.items() if value == name)
    kind = cfg.MODEL[key].NAME
    kinds = [kind, _trunk_name(cfg)] if kind in _NORM_NODES else [kind]
    shaping = " and ".join(_SHAPING_KEYS[kind] for kind in kinds if kind in _SHAPING_KEYS)
    advice = (
        f"The checkpoint's configuration probably differs in MODEL.{key}.NAME ({kind})"
        f"{', ' if shaping else ''}{shaping}"
    )
    if name == "proposal_generator" and hasattr(part, "in_features"):
        advice += ", or in the channels of its backbone"
    return advice
