"""VGG-16's public weights for ZIP's zoom network over it (Sec. 5.4), mirrored layers included.

``tools/convert_weights.py --architecture vgg16 --zoom-network`` is the command.
"""

import logging
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from .torchvision_weights import PIXELS, adapt_to_pixels
from .vgg import VGG, VGG_D
from .weight_conversion import convert_vgg_convolutions

logger = logging.getLogger(__name__)

# A weight of a mirrored convolution in a zoom network: "...mirror_conv5_3.weight".
_MIRROR_KEY = re.compile(r"(?:^|\.)mirror_(?P<layer>conv\d+_\d+)\.(?P<leaf>weight|bias)$")


def convert_vgg16_zoom(
    public: Mapping[str, Tensor],
    bottom_up: VGG,
    network_state: Mapping[str, Tensor],
    *,
    pixels: str = "torchvision",
    pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
) -> dict[str, Tensor]:
    """Weights of a meta-architecture whose backbone is a zoom network over VGG-16.

    "The zoom-in part is also initialized by copying the weights from its mirror layers" (Sec. 5.1):
    a mirrored convolution whose input has other channels than the convolution's keeps its own, and
    so do layers that VGG-16's convolutional part does not have. What is left out is logged.

    The first convolution becomes one for BGR images in [0, 255], of which Detectron2's default
    MODEL.PIXEL_MEAN is subtracted, divided by ``pixel_std``.

    Args:
        public: ``vgg16`` under torchvision's names, with or without its classifier, in any
            precision.
        bottom_up: the zoom-out network, for its names.
        network_state: state dict of the zoom network; only names and shapes are read.
        pixels: what ``public`` was trained on: "torchvision", or "caffe" for the network's first
            release (see :data:`PIXELS`).
        pixel_std: MODEL.PIXEL_STD of the model that loads the weights.

    Returns:
        Weights by their keys in ``ProposalNetwork``, ``GeneralizedRCNN`` or ``RetinaNet``.

    Raises:
        ValueError: keys are missing or unknown, or a tensor has the wrong shape.
    """
    weights = convert_vgg_convolutions(public, VGG_D, "VGG-16")
    first = "features.0.weight"
    target = PIXELS["caffe"]._replace(std=tuple(pixel_std))
    weights[first] = adapt_to_pixels(weights[first], PIXELS[pixels], target)
    result = {f"backbone.bottom_up.{name}": value for name, value in weights.items()}
    mirrored = {key: match for key in network_state if (match := _MIRROR_KEY.search(key))}
    left_out = []
    for key, match in mirrored.items():
        name = f"features.{bottom_up.convolutions[match['layer']]}"
        weight = weights.get(f"{name}.weight")
        shape = network_state[key.rpartition(".")[0] + ".weight"].shape
        if weight is not None and weight.shape == shape:
            result[f"backbone.{key}"] = weights[f"{name}.{match['leaf']}"]
        elif match["leaf"] == "weight":
            left_out.append(match["layer"])
    if left_out:
        logger.info(
            "%d of %d mirrored convolutions keep their initial weights, as their inputs differ or "
            "the file has none: %s",
            len(left_out),
            sum(match["leaf"] == "weight" for match in mirrored.values()),
            ", ".join(left_out),
        )
    return result
