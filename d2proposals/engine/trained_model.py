"""A trained model and its input, for commands that look at single images."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from torch import nn

from ..backbones.torchvision_weights import warn_of_other_pixels
from ..data.nonempty_resize import without_empty_sides
from ..files.image_files import to_input_format
from ..proposals.native_size_hosts import hand_over_native_sizes
from .checkpointer import ProposalCheckpointer
from .execution import prepare_execution
from .part_weights import check_weights_are_whole, load_part_weights


def without_trunk_weights(cfg: CfgNode) -> CfgNode:
    """The configuration of a model that takes no weights of torchvision, which may be downloaded.

    For one whose weights a checkpoint has, or of which the shapes are all that is wanted. Of other
    pixels than those of these weights is warned here, as where they are loaded.

    Args:
        cfg: of any model; not changed.
    """
    if not cfg.MODEL.TORCHVISION.WEIGHTS:
        return cfg
    warn_of_other_pixels(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    cfg.freeze()
    return cfg


def without_needless_weights(
    cfg: CfgNode, *, trains: bool = False, resume: bool = False
) -> CfgNode:
    """The configuration without weights of torchvision where a checkpoint has the whole model's.

    Args:
        cfg: of a job; not changed.
        trains: whether it trains, and so may begin with a part of the weights in
            ``MODEL.WEIGHTS``.
        resume: whether the last checkpoint in ``OUTPUT_DIR`` is loaded, if there is one.
    """
    resumes = resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    has_checkpoint = resumes or (cfg.MODEL.WEIGHTS and not trains)
    return without_trunk_weights(cfg) if has_checkpoint else cfg


def load_trained_model(cfg: CfgNode) -> nn.Module:
    """Build the configuration's model with its weights, for evaluation.

    Its generator is told how large images were before they were resized, if it asks.

    Args:
        cfg: checked, see :func:`~d2proposals.engine.job.check_config`.

    Returns:
        nn.Module: in evaluation mode. Without weights they are random, which a warning says.
    """
    built = build_model(without_needless_weights(cfg))
    model = hand_over_native_sizes(prepare_execution(cfg, built)).eval()
    checkpointer = ProposalCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    load_part_weights(cfg, checkpointer, only_missing=True)
    check_weights_are_whole(checkpointer, cfg)
    return model


def network_input_of(cfg: CfgNode) -> Callable[[np.ndarray], torch.Tensor]:
    """What turns an image into the input of the configuration's model.

    Args:
        cfg: its ``INPUT`` decides on format and size.

    Returns:
        a function from (H, W, 3) uint8 RGB to (3, h, w) in ``INPUT.FORMAT``, at the size of the
        test.
    """
    augmentations = without_empty_sides(detection_utils.build_augmentation(cfg, False))
    augmentations = T.AugmentationList(augmentations)

    def network_input(image: np.ndarray) -> torch.Tensor:
        aug_input = T.AugInput(to_input_format(image, cfg.INPUT.FORMAT))
        augmentations(aug_input)
        return torch.from_numpy(aug_input.image.transpose(2, 0, 1).copy())

    return network_input
