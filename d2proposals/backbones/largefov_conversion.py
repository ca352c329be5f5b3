"""Conversion of public VGG-16 weights to DeepLab-LargeFOV, and copies of them for SPOP's networks.

One function per source, listed in :data:`LARGEFOV_CONVERTERS`; ``tools/convert_weights.py`` is the
command. Each takes a public state dict and returns that of :class:`DeepLabLargeFOV`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .deeplab_largefov import DeepLabLargeFOV
from .weight_conversion import _check_keys

# SPOP's networks, as modules of its generator.
SCALE_AWARE_NETWORKS = (
    "confidence",
    "localization.large_size",
    "localization.small_size",
)
SINGLE_NETWORKS = ("confidence", "localization.all_sizes")

# Every how many of VGG-16's 4,096 hidden units, and of the 7 x 7 places they look at, are kept.
_UNIT_STEP = 4
_PLACE_STEP = 3
# Convolutions by stage, and the index of each in torchvision's "features".
_CONVS = {
    **{f"conv1_{i + 1}": index for i, index in enumerate((0, 2))},
    **{f"conv2_{i + 1}": index for i, index in enumerate((5, 7))},
    **{f"conv3_{i + 1}": index for i, index in enumerate((10, 12, 14))},
    **{f"conv4_{i + 1}": index for i, index in enumerate((17, 19, 21))},
    **{f"conv5_{i + 1}": index for i, index in enumerate((24, 26, 28))},
}


def convert_vgg16(public: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert torchvision's ``vgg16``, its hidden classifier layers decimated to fc6 and fc7.

    They expect what the defaults of MODEL.SPOP.TRUNK say (RGB, torchvision's mean and deviation).

    Unlike the paper, which starts from weights of DeepLab-LargeFOV trained on PASCAL VOC, these
    have seen ImageNet alone. They are what DeepLab itself starts from: of the first hidden layer,
    which looks at 7 x 7 places, every third place and every fourth unit is kept.

    Args:
        public: State dict; the last classifier layer is dropped.

    Returns:
        Weights as in the state dict of :class:`DeepLabLargeFOV` at full width.

    Raises:
        ValueError: Keys are missing or unknown, or a tensor has the wrong shape.
    """
    used = {key: value for key, value in public.items() if not key.startswith("classifier.6.")}
    hidden = {"classifier.0": (4096, 512 * 7 * 7), "classifier.3": (4096, 4096)}
    names = {f"features.{index}": f"features.{index}" for index in _CONVS.values()}
    names |= {"classifier.0": "fc6", "classifier.3": "fc7"}
    for name, shape in hidden.items():
        weight = used.get(f"{name}.weight")
        if weight is not None and tuple(weight.shape) != shape:
            raise ValueError(
                f"VGG-16 weights: {name}.weight has shape {tuple(weight.shape)}, expected {shape}."
            )
        if weight is None or f"{name}.bias" not in used:
            continue  # reported with all other missing keys
        if name == "classifier.0":
            weight = weight.view(4096, 512, 7, 7)[:, :, ::_PLACE_STEP, ::_PLACE_STEP]
        else:
            weight = weight[:, ::_UNIT_STEP, None, None]
        used[f"{name}.weight"] = weight[::_UNIT_STEP]
        used[f"{name}.bias"] = used[f"{name}.bias"][::_UNIT_STEP]
    return _rename("VGG-16", used, names)


def convert_vgg16_reducedfc(public: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert ``vgg16_reducedfc.pth``, a widespread VGG-16 with fc6 and fc7 decimated already.

    It is Caffe's network, not divided by a deviation: MODEL.SPOP.TRUNK.FORMAT "RGB", PIXEL_MEAN
    (123, 117, 104) and PIXEL_STD (1, 1, 1).

    Args:
        public: State dict whose keys are the numbers of the layers; fc6 is 31 and fc7 is 33.

    Returns:
        Weights as in the state dict of :class:`DeepLabLargeFOV` at full width.

    Raises:
        ValueError: Keys are missing or unknown, or a tensor has the wrong shape.
    """
    names = {str(index): f"features.{index}" for index in _CONVS.values()}
    return _rename("VGG-16 (reduced)", public, names | {"31": "fc6", "33": "fc7"})


def convert_deeplab_largefov(public: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert DeepLab-LargeFOV's published weights under Caffe's names of the layers.

    They expect MODEL.SPOP.TRUNK.FORMAT "BGR", PIXEL_MEAN (104.008, 116.669, 122.675) and PIXEL_STD
    (1, 1, 1).

    Args:
        public: State dict: "conv1_1.weight", ..., "fc7.bias"; its classifier (fc8) is dropped.

    Returns:
        Weights as in the state dict of :class:`DeepLabLargeFOV` at full width.

    Raises:
        ValueError: Keys are missing or unknown, or a tensor has the wrong shape.
    """
    used = {key: value for key, value in public.items() if not key.startswith("fc8")}
    names = {name: f"features.{index}" for name, index in _CONVS.items()}
    return _rename("DeepLab-LargeFOV", used, names | {"fc6": "fc6", "fc7": "fc7"})


def spop_weights(
    weights: Mapping[str, Tensor], networks: Sequence[str] = SCALE_AWARE_NETWORKS
) -> dict[str, Tensor]:
    """Copies of a trunk's weights for each of SPOP's networks.

    Every copy has its full name, since Detectron2 does not load one weight into two parameters.

    Args:
        weights: State dict of :class:`DeepLabLargeFOV`.
        networks: :data:`SCALE_AWARE_NETWORKS`, or :data:`SINGLE_NETWORKS` for
            MODEL.SPOP.SCALE_AWARE False.

    Returns:
        Weights by their keys in ``ProposalNetwork`` or ``GeneralizedRCNN``.
    """
    return {
        f"proposal_generator.networks.{network}.trunk.{key}": value
        for network in networks
        for key, value in weights.items()
    }


def _rename(
    title: str, public: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """Weights under this package's names; ValueError unless keys and shapes are right.

    Args:
        title: Of the network, for messages.
        public: Weights under the public names.
        names: This package's name of each public layer.
    """
    with torch.device("meta"):
        expected = DeepLabLargeFOV().state_dict()
    keys = {
        f"{name}.{leaf}": f"{ours}.{leaf}"
        for name, ours in names.items()
        for leaf in ("weight", "bias")
    }
    _check_keys(title, public, keys)
    weights = {}
    for name, key in keys.items():
        if public[name].shape != expected[key].shape:
            raise ValueError(
                f"{title} weights: {name} has shape {tuple(public[name].shape)}, "
                f"expected {tuple(expected[key].shape)}."
            )
        weights[key] = public[name].to(torch.float32).contiguous()
    return weights


# Public weights by the name of their network.
LARGEFOV_CONVERTERS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "deeplab_largefov": convert_deeplab_largefov,
    "vgg16": convert_vgg16,
    "vgg16_reducedfc": convert_vgg16_reducedfc,
}
