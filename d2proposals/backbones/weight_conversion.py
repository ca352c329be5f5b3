"""Conversion of public ImageNet weights into checkpoints that Detectron2 loads.

One function per source format, listed in :data:`CONVERTERS`; ``tools/convert_weights.py`` is the
command. Each takes the public state dict and returns that of this package's trunk.

Naming convention:
    public: weights under the names of the public file.
    weights: weights under the names of this package's trunk.
"""

import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..files.atomic_files import atomic_write
from ..files.checkpoint_file import load_tensors
from .bn_inception import BNInception
from .torchvision_weights import Pixels, adapt_to_pixels
from .vgg import VGG, VGG_A

logger = logging.getLogger(__name__)

# Of a normalisation whose statistics are folded into its scale and shift; it adds 1e-5.
IDENTITY_STATISTICS = {"running_mean": 0.0, "running_var": 1.0 - 1e-5}
_BN_INCEPTION_PIXELS = Pixels("BGR", (104.0, 117.0, 128.0), (1.0, 1.0, 1.0))
# Keys that a trunk has no use for: classifiers, and BN's counter of training steps.
_UNUSED_BN_INCEPTION = re.compile(r"^(last_linear|fc)\.|\.num_batches_tracked$")
# The keys of a mirrored block inside a network: "...mirror_5b.conv_1x1.norm.weight".
_MIRROR_KEY = re.compile(r"(?:^|\.)mirror_(?P<block>\w+)\.(?P<layer>conv_\w+)\.(?P<rest>.+)$")


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a state dict that was saved with ``torch.save``, without running any code in it.

    Args:
        path: The file, of PyTorch's present (zip) or older format.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds something other than tensors by name.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no weight file {path}; give the path of a .pth file.")
    public = load_tensors(path, "download it again")
    if not isinstance(public, Mapping) or not all(
        isinstance(value, Tensor) for value in public.values()
    ):
        raise ValueError(
            f"{path} holds no state dict (tensors by name); save model.state_dict() alone."
        )
    return dict(public)


def write_checkpoint(
    path: str, weights: Mapping[str, Tensor], *, matching_heuristics: bool
) -> None:
    """Write weights in the format of Detectron2's model zoo, atomically.

    Args:
        path: Ends in ".pkl", by which ``DetectionCheckpointer`` knows the format.
        weights: Tensors by name.
        matching_heuristics: Whether Detectron2 may load each weight into the one parameter whose
            name *ends* in the weight's name, so that a trunk's weights fit the trunk wherever it
            is; otherwise names must be equal.

    Raises:
        ValueError: ``path`` does not end in ".pkl".
        FileNotFoundError: Its folder does not exist.
    """
    if not path.endswith(".pkl"):
        raise ValueError(f"The output must be a .pkl file for Detectron2 to read it, got {path}.")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"The output folder {folder} does not exist; create it first.")
    content = {
        "model": {name: tensor.numpy() for name, tensor in weights.items()},
        "__author__": "d2proposals",  # without an author Detectron2 takes the names for Caffe2's
        "matching_heuristics": matching_heuristics,
    }
    with atomic_write(path, "wb") as file:
        pickle.dump(content, file, protocol=4)


def convert_bn_inception(
    public: Mapping[str, Tensor],
    *,
    fold_bias: bool = False,
    pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
) -> dict[str, Tensor]:
    """Convert the public BN-Inception weights (``bninception`` of pretrained-models.pytorch).

    They expect BGR images in [0, 255], of which the mean (104, 117, 128) is subtracted
    (INPUT.FORMAT "BGR", MODEL.PIXEL_MEAN [104, 117, 128]), not divided by anything.

    Args:
        public: State dict. The normalisation's tensors are (C,), or (1, C) as in the first
            release; classifier and step counters are dropped.
        fold_bias: Leave out the convolutions' biases and lower the running means by them instead,
            for a network whose normalisation is trainable and which therefore has no biases
            (MODEL.BN_INCEPTION.NORM "BN" or "SyncBN"). The network computes the same.
        pixel_std: MODEL.PIXEL_STD of the model that loads the weights. The first convolution is
            multiplied by it, so that the network computes the same from divided images; training
            from scratch wants them divided.

    Returns:
        Weights as in the state dict of :class:`BNInception` at full width.

    Raises:
        ValueError: Keys are missing or unknown, or a tensor has the wrong shape.
    """
    with torch.device("meta"):
        expected = BNInception().state_dict()
    names = {_public_bn_inception_key(key): key for key in expected}
    used = {name: value for name, value in public.items() if not _UNUSED_BN_INCEPTION.search(name)}
    _check_keys("BN-Inception", used, names)
    weights = {}
    for name, key in names.items():
        value = used[name]
        if ".norm." in key and value.dim() == 2 and value.shape[0] == 1:
            value = value.squeeze(0)
        if value.shape != expected[key].shape:
            raise ValueError(
                f"BN-Inception weights: {name} has shape {tuple(value.shape)}, "
                f"expected {tuple(expected[key].shape)}."
            )
        weights[key] = value.to(torch.float32).contiguous()
    first = "conv1_7x7_s2.weight"
    target = _BN_INCEPTION_PIXELS._replace(std=tuple(pixel_std))
    weights[first] = adapt_to_pixels(weights[first], _BN_INCEPTION_PIXELS, target)
    return _fold_biases(weights) if fold_bias else weights


def _public_bn_inception_key(key: str) -> str:
    """The public name of a weight of :class:`BNInception`.

    "inception_3a.conv_1x1.norm.weight" -> "inception_3a_1x1_bn.weight".
    """
    module, _, leaf = key.replace(".conv_", "_").rpartition(".")
    if module.endswith(".norm"):
        module = module.removesuffix(".norm") + "_bn"
    return f"{module}.{leaf}"


def _check_keys(title: str, public: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
    """Raise ValueError unless both have the same keys."""
    missing = [name for name in expected if name not in public]
    unknown = [name for name in public if name not in expected]
    if missing or unknown:
        problems = [
            f"{len(names)} {what} ({_shorten(names)})"
            for what, names in (("missing", missing), ("unexpected", unknown))
            if names
        ]
        raise ValueError(
            f"{title} weights: of {len(expected)} keys {' and '.join(problems)}; "
            "is this the public file of that network?"
        )


def _shorten(names: Sequence[str], limit: int = 3) -> str:
    """The first names, separated by commas."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _fold_biases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the convolutions' biases into the running means: (x + b) - m = x - (m - b)."""
    folded = dict(weights)
    for key in weights:
        if key.endswith(".norm.running_mean"):
            bias = folded.pop(key.removesuffix("norm.running_mean") + "bias")
            folded[key] = folded[key] - bias
    return folded


def mirror_weights(
    weights: Mapping[str, Tensor], network_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of BN-Inception's weights for the mirrored blocks of a zoom network (ZIP, Sec. 5.1).

    A layer (convolution and normalisation) is copied as a whole or not at all: where the mirrored
    block's input has other channels than the block's, its 1x1 convolutions stay as they are, and
    running statistics of other filters would do them no good. What is left out is logged.

    Args:
        weights: State dict of :class:`BNInception`; may lack the normalisation's step counters.
        network_state: State dict of the network, whose mirrored blocks are modules called
            "mirror_5b" and so on, anywhere in it; other keys are ignored. Only shapes are read.

    Returns:
        The weights to load, by their keys in ``network_state``.
    """
    layers: dict[str, list[str]] = {}  # {"mirror_5b.conv_1x1.": its keys in the network}
    sources: dict[str, str] = {}  # {"mirror_5b.conv_1x1.": "inception_5b.conv_1x1."}
    for key in network_state:
        match = _MIRROR_KEY.search(key)
        if match and match["rest"] != "norm.num_batches_tracked":
            layer = key[: match.start("rest")]
            layers.setdefault(layer, []).append(key)
            sources[layer] = f"inception_{match['block']}.{match['layer']}."
    copies: dict[str, Tensor] = {}
    left_out = []
    for layer, keys in layers.items():
        layer_copies = {
            layer + name.removeprefix(sources[layer]): tensor
            for name, tensor in weights.items()
            if name.startswith(sources[layer]) and not name.endswith(".num_batches_tracked")
        }
        shapes = {key: tensor.shape for key, tensor in layer_copies.items()}
        if shapes == {key: network_state[key].shape for key in keys}:
            copies.update(layer_copies)
        else:
            left_out.append(layer.removesuffix("."))
    if left_out:
        logger.info(
            "%d of %d mirrored layers keep their initial weights, as their inputs or "
            "normalisation differ: %s",
            len(left_out),
            len(layers),
            ", ".join(left_out),
        )
    return copies


def zoom_network_weights(
    weights: Mapping[str, Tensor], network_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of a meta-architecture whose backbone is a zoom network over BN-Inception.

    Every copy has its full name, since Detectron2 does not load one weight into two parameters.

    Args:
        weights: State dict of :class:`BNInception`.
        network_state: State dict of the zoom network, its zoom-out part called "bottom_up".

    Returns:
        Weights by their keys in ``ProposalNetwork`` or ``GeneralizedRCNN``.
    """
    bottom_up = {f"backbone.bottom_up.{key}": value for key, value in weights.items()}
    mirrored = mirror_weights(weights, network_state)
    return bottom_up | {f"backbone.{key}": value for key, value in mirrored.items()}


def convert_vgg11(public: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert torchvision's ``vgg11`` weights: its convolutions, under the same names.

    They expect RGB images normalised by torchvision's mean and deviation (the default of
    MODEL.DEEPMASK.FORMAT, PIXEL_MEAN and PIXEL_STD).

    Args:
        public: State dict; the classifier is dropped.

    Returns:
        Weights as in the state dict of :class:`VGG` at full width.

    Raises:
        ValueError: Keys are missing or unknown, or a tensor has the wrong shape.
    """
    return convert_vgg_convolutions(public, VGG_A, "VGG-A")


def convert_vgg_convolutions(
    public: Mapping[str, Tensor], stages: Sequence[Sequence[int]], title: str
) -> dict[str, Tensor]:
    """Convert torchvision's names of a VGG: its convolutions, in single precision.

    Args:
        public: State dict, of any precision; the classifier is dropped.
        stages: The network's channels, as in MODEL.VGG.STAGES.
        title: The network's name, for errors.

    Raises:
        ValueError: Keys are missing or unknown, or a tensor has the wrong shape.
    """
    with torch.device("meta"):
        expected = VGG(stages=stages).state_dict()
    used = {name: value for name, value in public.items() if not name.startswith("classifier.")}
    _check_keys(title, used, {name: name for name in expected})
    for name, value in used.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{title} weights: {name} has shape {tuple(value.shape)}, "
                f"expected {tuple(expected[name].shape)}."
            )
    return {name: value.to(torch.float32).contiguous() for name, value in used.items()}


def deepmask_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a trunk's weights for both trunks of a DeepMask whose branches share none.

    Every copy has its full name, since Detectron2 does not load one weight into two parameters.

    Args:
        weights: State dict of the trunk.

    Returns:
        Weights by their keys in ``ProposalNetwork`` or ``GeneralizedRCNN``.
    """
    return {
        f"proposal_generator.network.{trunk}.{key}": value
        for trunk in ("trunk", "score_trunk")
        for key, value in weights.items()
    }


# Public weights by the name of their network.
CONVERTERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "bn_inception": convert_bn_inception,
    "vgg11": convert_vgg11,
}
