"""Conversion of torchvision's AlexNet weights for DetectorNet.

Naming convention:
    public: weights under the names of torchvision's file.
    weights: weights under the names of :class:`AlexNet`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .alexnet import AlexNet

# The layer in whose place DetectorNet has its regression (Sec. 4).
_CLASSIFIER_LAYER = "classifier.6."


def convert_alexnet(public: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert torchvision's ``alexnet`` weights; the layer of the classes is dropped.

    They expect RGB images normalised by torchvision's mean and deviation (the default of
    MODEL.DETECTORNET.FORMAT, PIXEL_MEAN and PIXEL_STD).

    Args:
        public: State dict.

    Returns:
        Weights as in the state dict of :class:`AlexNet` at full width.

    Raises:
        ValueError: Keys are missing or unknown, or a tensor has the wrong shape.
    """
    with torch.device("meta"):
        expected = AlexNet().state_dict()
    used = {k: v for k, v in public.items() if not k.startswith(_CLASSIFIER_LAYER)}
    missing, unknown = sorted(expected.keys() - used.keys()), sorted(used.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"AlexNet weights: of {len(expected)} keys {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} unexpected {unknown[:3]}; is this torchvision's file of alexnet?"
        )
    for name, value in used.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"AlexNet weights: {name} has shape {tuple(value.shape)}, expected "
                f"{tuple(expected[name].shape)}."
            )
    return {name: value.to(torch.float32).contiguous() for name, value in used.items()}


def alexnet_copies(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A copy of AlexNet's weights for each AlexNet in a model.

    Every copy has its full name, since Detectron2 does not load one weight into two parameters.

    Args:
        weights: of :func:`convert_alexnet`.
        model: any; only the names of its modules are read.

    Returns:
        Weights by their keys in the model's state dict.

    Raises:
        ValueError: there is no AlexNet in the model.
    """
    prefixes = [name for name, module in model.named_modules() if isinstance(module, AlexNet)]
    if not prefixes:
        raise ValueError(
            "The configuration's model has no AlexNet; name one with "
            "MODEL.PROPOSAL_GENERATOR.NAME 'DetectorNet'."
        )
    return {f"{p}.{name}": value for p in prefixes for name, value in weights.items()}
