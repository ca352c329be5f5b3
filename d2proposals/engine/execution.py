"""How a built model computes: the same numbers, in less time.

The one place that decides on the layout of maps in memory. Nothing here changes what a model
predicts or learns by more than rounding, nor the names in its checkpoints.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling.proposal_generator import RPN
from torch import nn

from ..backbones.folded_norm import fold_frozen_norms
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
    name = cfg.MODEL.EXECUTION.MEMORY_FORMAT
    if name == "auto" and on_cpu:
        name = "channels_last"
    if name != "auto":
        model.to(memory_format=MEMORY_FORMATS[name])
    backbone = getattr(model, "backbone", None)
    # A backbone without convolutions hands the images on to generators that have their own ways.
    if name == "channels_last" and any(x.dim() == 4 for x in _parameters(backbone)):
        backbone.register_forward_pre_hook(_channels_last)
    if cfg.MODEL.EXECUTION.FOLD_FROZEN_NORM and on_cpu:
        fold_frozen_norms(model)
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


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _channels_last(module: nn.Module, args: tuple) -> tuple:
    """A forward pre-hook of a backbone: its images (N, 3, H, W) in the layout of its weights."""
    images, *rest = args
    return (images.contiguous(memory_format=torch.channels_last), *rest)
