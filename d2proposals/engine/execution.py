"""How a built model computes: the same numbers, in less time.

Decides on the layout in memory of a model's weights, and of the maps of its backbone and of what
reads them. Networks of generators that read images (DeepMask, SPOP, DetectorNet) get no maps of a
backbone and lay out their own, channels last, wherever they stand. Nothing here changes what a
model predicts or learns by more than rounding, nor the names in its checkpoints.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling.proposal_generator import RPN
from torch import nn

from ..backbones.folded_norm import fold_frozen_norms
from ..proposals.proposal_generator import ProposalGenerator
from .loss_rpn import LossRPN

MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


def prepare_execution(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Have a model compute as ``MODEL.EXECUTION`` says.

    Args:
        cfg: of the model, checked by :func:`check_execution`.
        model: on its device, changed in place.

    Returns:
        nn.Module: ``model``.
    """
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    name, backbone = cfg.MODEL.EXECUTION.MEMORY_FORMAT, getattr(model, "backbone", None)
    if name == "auto" and on_cpu and backbone is not None:
        _lay_out_depthwise_trunk(backbone)
    elif name != "auto":
        model.to(memory_format=MEMORY_FORMATS[name])
        # A backbone without convolutions hands images on to generators that have their own ways.
        if name == "channels_last" and backbone is not None and _convolutions(backbone):
            backbone.register_forward_pre_hook(_channels_last)
    if cfg.MODEL.EXECUTION.FOLD_FROZEN_NORM and on_cpu:
        fold_frozen_norms(model)
    for part in cfg.MODEL.EXECUTION.COMPILE:
        for module in _PARTS[part](model):
            module.compile(backend=cfg.MODEL.EXECUTION.COMPILE_BACKEND)
    generator = getattr(model, "proposal_generator", None)
    # Of the very class: what inherits from it may do more than propose.
    if type(generator) is RPN and not cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING:
        generator.__class__ = LossRPN
    return model


def check_execution(cfg: CfgNode) -> None:
    """Raise ValueError unless ``MODEL.EXECUTION`` has what :func:`prepare_execution` knows."""
    known = ("auto", *MEMORY_FORMATS)
    if cfg.MODEL.EXECUTION.MEMORY_FORMAT not in known:
        raise ValueError(
            f"MODEL.EXECUTION.MEMORY_FORMAT must be one of {', '.join(known)}, not "
            f"'{cfg.MODEL.EXECUTION.MEMORY_FORMAT}'."
        )
    unknown = sorted(set(cfg.MODEL.EXECUTION.COMPILE) - set(_PARTS))
    if unknown:
        raise ValueError(
            f"MODEL.EXECUTION.COMPILE must name parts out of {', '.join(_PARTS)}, not "
            f"'{unknown[0]}'."
        )
    backend = cfg.MODEL.EXECUTION.COMPILE_BACKEND
    # The plain ones, such as "eager", are listed apart.
    if cfg.MODEL.EXECUTION.COMPILE and backend not in torch._dynamo.list_backends(()):
        raise ValueError(
            f"MODEL.EXECUTION.COMPILE_BACKEND '{backend}' is none of torch.compile's: "
            f"{', '.join(torch._dynamo.list_backends())}."
        )


def _backbone(model: nn.Module) -> list[nn.Module]:
    """The backbone."""
    return [model.backbone]


def _heads(model: nn.Module) -> list[nn.Module]:
    """What computes on maps behind the backbone; ValueError where there is nothing."""
    generator = getattr(model, "proposal_generator", None)
    parts = []
    if isinstance(generator, RPN):
        parts.append(generator.rpn_head)
    elif isinstance(generator, ProposalGenerator):
        parts += generator.head_parts()
    box_heads = getattr(getattr(model, "roi_heads", None), "box_head", [])
    parts += box_heads if isinstance(box_heads, nn.ModuleList | list) else [box_heads]
    if not parts:
        raise ValueError(
            f"MODEL.EXECUTION.COMPILE 'heads': {type(generator).__name__} computes on no feature "
            "maps."
        )
    return parts


_PARTS = {"backbone": _backbone, "heads": _heads}


def _lay_out_depthwise_trunk(backbone: nn.Module) -> None:
    """Channels last within a trunk of depthwise convolutions, whose maps leave it contiguous.

    On a CPU depthwise convolutions take a third to a sixth of the time so. Dense ones of 3x3, which
    a pyramid and heads have on large maps, gain little, and their backward pass takes up to twice.
    """
    trunk = getattr(backbone, "bottom_up", backbone)
    if any(conv.groups > 1 for conv in _convolutions(trunk)):
        trunk.to(memory_format=torch.channels_last)
        trunk.register_forward_pre_hook(_channels_last)
        trunk.register_forward_hook(_contiguous)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [child for child in module.modules() if isinstance(child, nn.Conv2d)]


def _channels_last(module: nn.Module, args: tuple) -> tuple:
    """A forward pre-hook: images (N, 3, H, W) in the layout of the weights."""
    images, *rest = args
    return (images.contiguous(memory_format=torch.channels_last), *rest)


def _contiguous(
    module: nn.Module, args: tuple, maps: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A forward hook: the maps as the next part of the model has its weights."""
    return {name: x.contiguous() for name, x in maps.items()}
