"""The layers of a trained classifier for the mask networks: "we first train the network for
classification and reuse the weights of all layers but the classifier for localization".

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 6.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .network import BoxMaskNetwork, CropClassifier

# Where models have a classifier: in the heads, or before the suppression in the generator.
_SOURCES = ("roi_heads.classifier.network.", "proposal_generator.classifier.network.")


def reuse_classifier(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A copy of the classifier's layers for each network of a model's DetectorNet.

    Args:
        weights: state dict of a model with a :class:`CropClassifier`.
        model: with a :class:`BoxMaskNetwork`; only names and shapes are read.

    Returns:
        Weights by their keys in the model's state dict: the trunks of all mask networks, and its
        classifiers. A classifier of other classes gets the trunk alone.

    Raises:
        ValueError: there is no classifier, no mask network, or a layer of another shape.
    """
    source = next((x for x in _SOURCES if any(key.startswith(x) for key in weights)), None)
    if source is None:
        raise ValueError(
            f"The checkpoint has no weights {_SOURCES[0]}*: give one of a model with "
            "MODEL.ROI_HEADS.NAME DetectorNetHeads and MODEL.DETECTORNET.CLASSIFIER.ENABLED True."
        )
    classifier = {k.removeprefix(source): v for k, v in weights.items() if k.startswith(source)}
    trunk = {k: v for k, v in classifier.items() if k.startswith("trunk.")}
    named = list(model.named_modules())
    networks = [
        f"{name}.networks.{i}."
        for name, module in named
        if isinstance(module, BoxMaskNetwork)
        for i in range(len(module.networks))
    ]
    if not networks:
        raise ValueError("The model has no mask network: MODEL.PROPOSAL_GENERATOR.NAME DetectorNet")
    expected = model.state_dict()
    copies = {f"{network}{key}": value for network in networks for key, value in trunk.items()}
    for name, module in named:
        if isinstance(module, CropClassifier):
            same_classes = (
                expected[f"{name}.network.output.bias"].shape == classifier["output.bias"].shape
            )
            part = classifier if same_classes else trunk
            copies |= {f"{name}.network.{key}": value for key, value in part.items()}
    for key, value in copies.items():
        if key not in expected or expected[key].shape != value.shape:
            has = tuple(expected[key].shape) if key in expected else "nothing"
            raise ValueError(
                f"The classifier has {tuple(value.shape)} for {key}, where the model has {has}: "
                "MODEL.DETECTORNET.WIDTH_FACTOR, INPUT_SIZE and NORM must be the same for both."
            )
    return copies
