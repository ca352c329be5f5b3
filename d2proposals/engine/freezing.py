"""Freezing: a backbone or a proposal generator that stays as it is while the rest is trained."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList, Instances
from torch import nn

from ..proposals.candidates import make_empty_proposals, with_two_fields

logger = logging.getLogger(__name__)

# Node of the configuration, part of the model.
FREEZABLE = {"BACKBONE": "backbone", "PROPOSAL_GENERATOR": "proposal_generator"}


def freeze(module: nn.Module) -> None:
    """Keep a module as it is, whatever happens around it: ``model.train()`` has no effect on it.

    Its parameters need no gradient. It stays in evaluation mode, so that its batch statistics stay
    and nothing is dropped. Names in its ``state_dict`` do not change. Copies and pickles of the
    module are frozen too.

    Args:
        module: changed in place, with all that is in it.
    """
    module.requires_grad_(False)
    for child in module.modules():
        if not isinstance(vars(child).get("train"), _StaysInEvaluation):
            child.train = _StaysInEvaluation(child)
            child.training = False


def freeze_generator(generator: nn.Module) -> None:
    """Freeze a proposal generator within a detector.

    In training it then yields what it does in evaluation: proposals and no losses. Labels are not
    sampled, no gradient reaches the features, and proposals have the fields ``proposal_boxes`` and
    ``objectness_logits`` alone, since R-CNN heads take no others in training. A generator whose
    proposals nobody wants in training (its ``proposals_in_training`` is False) computes nothing.

    Args:
        generator: changed in place, see :func:`freeze`.
    """
    freeze(generator)
    if not isinstance(vars(generator).get("forward"), _ProposesOnly):
        generator.forward = _ProposesOnly(generator)


def freeze_parts(cfg: CfgNode, model: nn.Module) -> None:
    """Freeze what ``MODEL.BACKBONE.FREEZE`` and ``MODEL.PROPOSAL_GENERATOR.FREEZE`` name.

    Args:
        cfg: a configuration.
        model: of this configuration, changed in place.

    Raises:
        ValueError: a part that the model does not have.
    """
    for node, name in FREEZABLE.items():
        if not cfg.MODEL[node].FREEZE:
            continue
        part = getattr(model, name, None)
        if part is None:
            raise ValueError(
                f"MODEL.{node}.FREEZE is True, but this {type(model).__name__} has no {name}: set "
                "it False."
            )
        freeze_generator(part) if node == "PROPOSAL_GENERATOR" else freeze(part)
        logger.info(f"MODEL.{node}.FREEZE: the {name} is not trained.")


def check_trainable(cfg: CfgNode, model: nn.Module) -> None:
    """Check before training that there is something to train, on features that make sense.

    Warns of a frozen generator whose backbone is trained.

    Args:
        cfg: a configuration.
        model: of this configuration, its parts frozen.

    Raises:
        ValueError: when nothing can be trained.
    """
    generator_node = cfg.MODEL.PROPOSAL_GENERATOR
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" and generator_node.FREEZE:
        raise ValueError(
            "MODEL.PROPOSAL_GENERATOR.FREEZE with MODEL.META_ARCHITECTURE 'ProposalNetwork' leaves "
            "no loss to train with: set it False, or evaluate with --eval-only."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The model has no parameter to train: set MODEL.BACKBONE.FREEZE or "
            "MODEL.PROPOSAL_GENERATOR.FREEZE False, or MODEL.BACKBONE.FREEZE_AT lower."
        )
    # Generators that read the images have no feature maps to name.
    if not generator_node.FREEZE or not hasattr(model.proposal_generator, "in_features"):
        return
    if any(parameter.requires_grad for parameter in model.backbone.parameters()):
        logger.warning(
            "MODEL.PROPOSAL_GENERATOR.FREEZE: the generator stays while the backbone, whose "
            "feature maps it reads, is trained, and its proposals get worse. Set "
            "MODEL.BACKBONE.FREEZE True as well."
        )


def warn_of_frozen_random_parts(cfg: CfgNode, missing_keys: set[str]) -> None:
    """Warn of parts that are frozen with random weights.

    Args:
        cfg: a configuration.
        missing_keys: names of the model's parameters and buffers that no checkpoint has set.
    """
    for node, name in FREEZABLE.items():
        is_random = any(
            key.startswith(f"{name}.") and not key.endswith("num_batches_tracked")
            for key in missing_keys
        )
        if cfg.MODEL[node].FREEZE and is_random:
            logger.warning(
                f"MODEL.{node}.FREEZE: random weights of the {name} stay. Name a checkpoint that "
                f"has them in MODEL.{node}.WEIGHTS or MODEL.WEIGHTS."
            )


def warn_of_frozen_random_layers(cfg: CfgNode, model: nn.Module, missing_keys: set[str]) -> None:
    """Warn of layers of parts that are trained which are frozen with random weights.

    Args:
        cfg: a configuration.
        model: its model.
        missing_keys: as of :func:`warn_of_frozen_random_parts`.
    """
    if cfg.MODEL.TORCHVISION.WEIGHTS:  # which no checkpoint has set, and are not random
        return
    frozen = tuple(f"{name}." for node, name in FREEZABLE.items() if cfg.MODEL[node].FREEZE)
    stay = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and name in missing_keys and not name.startswith(frozen)
    ]
    if stay:
        logger.warning(
            f"{len(stay)} parameters are frozen with random weights, the first is {stay[0]}: name "
            "a checkpoint in MODEL.WEIGHTS, or train them (MODEL.BACKBONE.FREEZE_AT 0; of a "
            "generator's own trunk the FREEZE_AT beside its other keys)."
        )


class _StaysInEvaluation:
    """Stands in for a module's ``train``; an object, since copies and pickles keep objects whole.

    Attributes:
        asked_for_training: what the last call asked for, in effect the mode of the whole model.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.asked_for_training = module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        self.asked_for_training = mode
        return type(self.module).train(self.module, False)


class _ProposesOnly:
    """Stands in for the ``forward`` of a frozen generator."""

    def __init__(self, generator: nn.Module):
        self.generator = generator

    @torch.no_grad()
    def __call__(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Any]]:
        generator = self.generator
        in_training = generator.train.asked_for_training
        if in_training and not getattr(generator, "proposals_in_training", True):
            return make_empty_proposals(images.image_sizes, images.tensor.device), {}
        proposals, _ = type(generator).forward(generator, images, features, None)
        if in_training:
            proposals = [with_two_fields(proposals_i) for proposals_i in proposals]
        return proposals, {}
