"""DeepLab-LargeFOV: Table I of SPOP, where a cell looks, names of the weights."""

import pytest
import torch
import torchvision
from torch import nn

from d2proposals.backbones.deeplab_largefov import (
    RECEPTIVE_FIELD,
    DeepLabLargeFOV,
    output_size,
)

# Table I: layer -> (channels, map size for 513, receptive field at its input, weights).
TABLE = {
    "features.0": (64, 513, 435, 1728),
    "features.2": (64, 513, 433, 36 * 1024),
    "features.4": (64, 257, 431, 0),
    "features.5": (128, 257, 215, 72 * 1024),
    "features.7": (128, 257, 213, 144 * 1024),
    "features.9": (128, 129, 211, 0),
    "features.10": (256, 129, 105, 288 * 1024),
    "features.12": (256, 129, 103, 576 * 1024),
    "features.14": (256, 129, 101, 576 * 1024),
    "features.16": (256, 65, 99, 0),
    "features.17": (512, 65, 49, 1152 * 1024),
    "features.19": (512, 65, 47, 2304 * 1024),
    "features.21": (512, 65, 45, 2304 * 1024),
    "features.23": (512, 65, 43, 0),
    "features.24": (512, 65, 41, 2304 * 1024),
    "features.26": (512, 65, 37, 2304 * 1024),
    "features.28": (512, 65, 33, 2304 * 1024),
    "features.30": (512, 65, 29, 0),
    "pool5a": (512, 65, 27, 0),
    "fc6": (1024, 65, 25, 4608 * 1024),
    "fc7": (1024, 65, 1, 1024 * 1024),
}
KERNELS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def kernel_layers(trunk):
    return {name: x for name, x in trunk.named_modules() if isinstance(x, KERNELS)}


def side(value):
    return value if isinstance(value, int) else value[0]


def map_shapes(trunk, height, width):
    """Layer -> shape of its output, computed without numbers."""
    shapes = {}
    for name, layer in kernel_layers(trunk).items():
        layer.register_forward_hook(
            lambda _, __, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    trunk(torch.zeros(1, 3, height, width, device="meta"))
    return shapes


def test_table_1():
    with torch.device("meta"):
        trunk = DeepLabLargeFOV()
    layers = kernel_layers(trunk)
    assert list(layers) == list(TABLE)
    shapes = map_shapes(trunk, 513, 513)
    field = 1
    for name, layer in reversed(layers.items()):
        channels, size, table_field, weights = TABLE[name]
        assert shapes[name] == (1, channels, size, size), name
        extent = (side(layer.kernel_size) - 1) * side(getattr(layer, "dilation", 1)) + 1
        field = (field - 1) * side(layer.stride) + extent
        assert field == table_field, name
        assert (layer.weight.numel() if isinstance(layer, nn.Conv2d) else 0) == weights, name
    assert field == RECEPTIVE_FIELD
    assert trunk.output_shape()["fc7"].channels == 1024 and trunk.output_shape()["fc7"].stride == 8
    holes = {name: x.dilation[0] for name, x in layers.items() if isinstance(x, nn.Conv2d)}
    assert {name for name, hole in holes.items() if hole == 2} == {
        f"features.{i}" for i in (24, 26, 28)
    }
    assert holes["fc6"] == 12 and set(holes.values()) == {1, 2, 12}


# Worked out layer by layer with Caffe's formula, ceil((n + 2 - 3) / 2) + 1 three times. A pool that
# rounds down gives 63 for 500.
@pytest.mark.parametrize(
    "pixels, halves",
    [(513, (257, 129, 65)), (500, (251, 126, 64)), (640, (321, 161, 81)), (480, (241, 121, 61)),
     (375, (188, 95, 48)), (1, (1, 1, 1)), (2, (2, 2, 2)), (9, (5, 3, 2)), (10, (6, 4, 3))],
)  # fmt: skip
def test_map_sizes(pixels, halves):
    with torch.device("meta"):
        trunk = DeepLabLargeFOV(width_factor=0.125)
    shapes = map_shapes(trunk, pixels, 77)
    assert tuple(shapes[f"features.{i}"][2] for i in (4, 9, 16)) == halves
    assert shapes["fc7"][2:] == (halves[-1], output_size(77)) and output_size(pixels) == halves[-1]


def positive_trunk():
    """A trunk in which every pixel of the receptive field contributes to a cell.

    Means instead of maxima, which pass the gradient on to one pixel each.
    """
    trunk = DeepLabLargeFOV(width_factor=1 / 64).double().eval()
    for parameter in trunk.parameters():
        if parameter.dim() == 4:
            nn.init.constant_(parameter, 1 / parameter[0].numel())
    for i, layer in enumerate(trunk.features):
        if isinstance(layer, nn.MaxPool2d):
            trunk.features[i] = nn.AvgPool2d(3, layer.stride, padding=1, ceil_mode=True)
    return trunk


@pytest.mark.parametrize("row, column", [(32, 32), (28, 35), (0, 64)])
def test_receptive_field_is_435_and_cell_i_is_centred_on_pixel_8_i(row, column):
    image = torch.ones(1, 3, 513, 513, dtype=torch.float64, requires_grad=True)
    positive_trunk()(image)["fc7"][0, 0, row, column].backward()
    seen = image.grad[0].sum(dim=0) > 0
    for cell, is_seen in ((row, seen.any(dim=1)), (column, seen.any(dim=0))):
        places = is_seen.nonzero()[:, 0]
        assert places[0] == max(8 * cell - 217, 0) and places[-1] == min(8 * cell + 217, 512)


def test_receptive_field_with_maxima_stays_within_435():
    torch.manual_seed(0)
    trunk = DeepLabLargeFOV(width_factor=1 / 64).eval()
    image = torch.randn(1, 3, 489, 489, requires_grad=True)
    trunk(image)["fc7"][0, :, 30, 30].sum().backward()
    rows = image.grad[0].abs().sum(dim=(0, 2)).nonzero()[:, 0]
    assert len(rows) > 100 and rows[0] >= 240 - 217 and rows[-1] <= 240 + 217


def test_convolutions_are_those_of_torchvisions_vgg16():
    with torch.device("meta"):
        ours = DeepLabLargeFOV().state_dict()
        theirs = torchvision.models.vgg16().state_dict()
    shared = {k: v.shape for k, v in theirs.items() if k.startswith("features.")}
    assert {k: v.shape for k, v in ours.items() if k.startswith("features.")} == shared


def test_first_stage_equals_torchvisions_vgg16():
    torch.manual_seed(0)
    ours, theirs = DeepLabLargeFOV().eval(), torchvision.models.vgg16().eval()
    theirs.features.load_state_dict(ours.features.state_dict())
    image = torch.randn(1, 3, 17, 20)
    with torch.no_grad():
        assert torch.equal(ours.features[:4](image), theirs.features[:4](image))


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_width_and_normalisation(norm):
    trunk = DeepLabLargeFOV(width_factor=0.125, norm=norm)
    assert trunk.fc7.out_channels == 128 and trunk.features[0].out_channels == 8
    assert (trunk.fc6.bias is None) == bool(norm) and (trunk.fc6.norm is None) == (not norm)
    output = trunk(torch.randn(2, 3, 40, 33))["fc7"]
    assert output.shape == (2, 128, 6, 5) and (output >= 0).all()


def test_dropout_in_training_only():
    torch.manual_seed(0)
    trunk = DeepLabLargeFOV(width_factor=0.125, dropout=0.5)
    image = torch.randn(1, 3, 64, 64)
    assert not torch.equal(trunk(image)["fc7"], trunk(image)["fc7"])
    trunk.eval()
    assert torch.equal(trunk(image)["fc7"], trunk(image)["fc7"])


@pytest.mark.parametrize(
    "key, value", [("width_factor", 0.0), ("norm", "FrozenBN"), ("dropout", 1.0)]
)
def test_values_that_are_not_allowed(key, value):
    with pytest.raises(ValueError, match=f"MODEL.SPOP.TRUNK.{key.upper()}"):
        DeepLabLargeFOV(**{key: value})
