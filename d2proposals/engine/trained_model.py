"""A trained model and its input, for commands that look at single images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from torch import nn

from ..data.nonempty_resize import without_empty_sides
from ..files.image_files import to_input_format
from ..proposals.native_size_hosts import hand_over_native_sizes
from .checkpointer import ProposalCheckpointer
from .execution import prepare_execution
from .part_weights import check_weights_are_whole, load_part_weights


def load_trained_model(cfg: CfgNode) -> nn.Module:
    """Build the configuration's model with its weights, for evaluation.

    Its generator is told how large images were before they were resized, if it asks.

    Args:
        cfg: checked, see :func:`~d2proposals.engine.job.check_config`.

    Returns:
        nn.Module: in evaluation mode. Without weights they are random, which a warning says.
    """
    model = hand_over_native_sizes(prepare_execution(cfg, build_model(cfg))).eval()
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
