"""Optimizers: Detectron2's SGD and AdaGrad, with learning rates that differ by module.

Detectron2's gradient clipping bounds each parameter's gradient by itself ("value", "norm"). The
methods that SC-RPN is compared with bound that of all parameters together: "full_model" here.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

_OPTIMIZERS = ("AdaGrad", "SGD")
_CLIP_TYPES = ("value", "norm", "full_model")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that ``SOLVER.OPTIMIZER`` names, as Detectron2 builds SGD.

    A module with an attribute ``lr_factor`` (float) has the learning rate of its parameters
    multiplied by it; of nested modules, the innermost counts. All of ``proposal_generator`` is
    multiplied by ``SOLVER.PROPOSAL_GENERATOR_LR_FACTOR`` besides, and every bias by
    ``SOLVER.BIAS_LR_FACTOR``.

    Args:
        cfg: a configuration.
        model: whose parameters are trained.

    Returns:
        torch.optim.Optimizer: SGD with momentum, or AdaGrad, with ``SOLVER.CLIP_GRADIENTS``.

    Raises:
        ValueError: an unknown name, or a factor or bound that is not positive.
    """
    name = cfg.SOLVER.OPTIMIZER
    if name not in _OPTIMIZERS:
        raise ValueError(f"SOLVER.OPTIMIZER must be one of {_OPTIMIZERS}, got '{name}'.")
    groups = parameter_groups(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        generator_lr_factor=cfg.SOLVER.PROPOSAL_GENERATOR_LR_FACTOR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    settings = {
        "lr": cfg.SOLVER.BASE_LR,
        "weight_decay": cfg.SOLVER.WEIGHT_DECAY,
        "foreach": True,
    }
    if name == "AdaGrad":
        return add_gradient_clipping(cfg, torch.optim.Adagrad)(groups, **settings)
    settings["momentum"], settings["nesterov"] = cfg.SOLVER.MOMENTUM, cfg.SOLVER.NESTEROV
    return add_gradient_clipping(cfg, torch.optim.SGD)(groups, **settings)


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    generator_lr_factor: float = 1.0,
    bias_lr_factor: float | None = 1.0,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Detectron2's groups of parameters, with the learning rates of :func:`build_optimizer`.

    Args:
        model: whose parameters are trained.
        base_lr: learning rate.
        generator_lr_factor: on the learning rate of ``proposal_generator``.
        bias_lr_factor: on that of biases, whatever other factor they have. Detectron2's own takes
            the place of others.
        **settings: as for Detectron2's ``get_default_optimizer_params``.

    Raises:
        ValueError: the factor is not positive.
    """
    if not generator_lr_factor > 0:
        raise ValueError(
            f"SOLVER.PROPOSAL_GENERATOR_LR_FACTOR must be positive, got {generator_lr_factor}; "
            "MODEL.PROPOSAL_GENERATOR.FREEZE True stops the generator's training."
        )
    factors = {
        prefix: float(module.lr_factor)
        for prefix, module in model.named_modules()
        if hasattr(module, "lr_factor")
    }

    def lr_factor(parameter_name: str) -> float:
        prefixes = [x for x in factors if x == "" or parameter_name.startswith(x + ".")]
        factor = factors[max(prefixes, key=len)] if prefixes else 1.0
        if parameter_name.startswith("proposal_generator."):
            factor *= generator_lr_factor
        if parameter_name.rpartition(".")[2] == "bias" and bias_lr_factor is not None:
            factor *= bias_lr_factor
        return factor

    return get_default_optimizer_params(
        model, base_lr=base_lr, lr_factor_func=lr_factor, **settings
    )


def add_gradient_clipping(
    cfg: CfgNode, optimizer_class: type[torch.optim.Optimizer]
) -> type[torch.optim.Optimizer]:
    """A class of optimizers that clip gradients by ``SOLVER.CLIP_GRADIENTS`` before each step.

    Like Detectron2's, it clips what the optimizer is given: with mixed precision, gradients whose
    scale has been taken back.

    Args:
        cfg: a configuration.
        optimizer_class: to derive from.

    Returns:
        type: ``optimizer_class`` itself where clipping is off.

    Raises:
        ValueError: an unknown type, or a bound that is not positive.
    """
    settings = cfg.SOLVER.CLIP_GRADIENTS
    if not settings.ENABLED:
        return optimizer_class
    if settings.CLIP_TYPE not in _CLIP_TYPES:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be one of {_CLIP_TYPES}, "
            f"got '{settings.CLIP_TYPE}'."
        )
    if settings.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, optimizer_class)
    return full_model_clipping(optimizer_class, settings.CLIP_VALUE, settings.NORM_TYPE)


def full_model_clipping(
    optimizer_class: type[torch.optim.Optimizer], bound: float, norm_type: float = 2.0
) -> type[torch.optim.Optimizer]:
    """A class of optimizers that bound the norm of all parameters' gradients together.

    Args:
        optimizer_class: to derive from.
        bound: the greatest norm.
        norm_type: p of the p-norm.

    Raises:
        ValueError: a bound that is not positive.
    """
    bound, norm_type = float(bound), float(norm_type)
    if not bound > 0:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be positive, got {bound}.")

    class FullModelClipping(optimizer_class):
        """Scales the gradients of all parameters by one factor, to a norm of at most ``bound``."""

        def step(self, closure=None):
            parameters = [x for group in self.param_groups for x in group["params"]]
            nn.utils.clip_grad_norm_(parameters, bound, norm_type)
            return super().step(closure)

    return FullModelClipping
