"""SPOP's networks: branches, the spatial-coordinate sum, initialisation, learning rates."""

import pytest
import torch
from torch import nn

from d2proposals.backbones.deeplab_largefov import DeepLabLargeFOV
from d2proposals.engine.optimizer import build_optimizer
from d2proposals.spop.networks import ConfidenceNetwork, LocalizationNetwork, coordinate_map
from tests.common import make_cfg


def small_trunk():
    return DeepLabLargeFOV(width_factor=0.125, dropout=0.0)


def test_coordinate_map_is_where_the_cells_look():
    # Two rows, three columns: x is 0, 8, 16 pixels, y is 0, 8, of 513.
    expected = torch.tensor([[[0, 8, 16], [0, 8, 16]], [[0, 0, 0], [8, 8, 8]]] * 2) / 513
    assert torch.allclose(coordinate_map((2, 3), 8, 513.0), expected)


def test_absolute_coordinates_are_offsets_and_the_coordinate_map():
    network = LocalizationNetwork(small_trunk(), normalizer=513.0).eval()
    image = torch.randn(2, 3, 40, 57)
    with torch.no_grad():
        difference = network(image) - network.offsets(image)
    assert difference.shape == (2, 4, 6, 8)
    expected = coordinate_map((6, 8), 8, 513.0).expand(2, -1, -1, -1)
    assert torch.allclose(difference, expected, atol=1e-6)
    # No weights after the sum: the offsets' convolution is the last module with any.
    assert [name for name, _ in network.named_parameters()][-2:] == ["offset.weight", "offset.bias"]


def test_offsets_do_not_depend_on_where_the_object_is():
    # Two equal patches 576 pixels apart in an even image: the same offsets, other coordinates.
    torch.manual_seed(0)
    network = LocalizationNetwork(small_trunk(), normalizer=513.0).eval()
    nn.init.normal_(network.offset.weight, std=1.0)
    image = torch.zeros(1, 3, 1200, 16)
    patch = torch.randn(3, 24, 16)
    image[0, :, 296:320] = patch
    image[0, :, 872:896] = patch
    with torch.no_grad():
        coordinates = network(image)[0, :, :, 1]
    first, second = coordinates[:, 300 // 8], coordinates[:, 300 // 8 + 72]
    shift = torch.tensor([0, 576, 0, 576]) / 513
    assert torch.allclose(second - first, shift, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_have_all_digits_under_autocast(dtype):
    network = LocalizationNetwork(small_trunk()).eval()
    nn.init.zeros_(network.offset.weight)
    network.offset.bias.data = torch.tensor([-1.01, -0.85, 1.13, 1.9])
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        offsets = network.offsets(torch.randn(1, 3, 16, 16))
    assert offsets.dtype == torch.float32
    assert torch.equal(offsets[0, :, 0, 0], network.offset.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_have_all_digits_under_autocast(dtype):
    torch.manual_seed(0)
    network = ConfidenceNetwork(small_trunk(), hidden_channels=8).eval()
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        confidence = network(image)
    for logits in confidence:
        assert logits.dtype == torch.float32
        assert len(logits[0, 0].unique()) > 0.9 * logits[0, 0].numel() > 900
        # None of them is a number of half precision by chance.
        assert (logits.to(dtype).float() != logits).float().mean() > 0.9


def test_receptive_field_of_the_confidence_network():
    # Averages instead of maxima: every pixel that may matter has a gradient.
    network = ConfidenceNetwork(small_trunk(), hidden_channels=2).eval()
    for parameter in network.parameters():
        parameter.data = parameter.abs() if parameter.dim() == 4 else torch.zeros_like(parameter)
    for i, layer in enumerate(network.trunk.features):
        if isinstance(layer, nn.MaxPool2d):
            network.trunk.features[i] = nn.AvgPool2d(3, layer.stride, 1, ceil_mode=True)
    image = torch.rand(1, 3, 8, 8 * 80 + 1).requires_grad_()
    network(image).objectness[0, 1, 0, 40].backward()
    columns = image.grad.abs().sum(dim=(0, 1, 2)).nonzero()[:, 0]
    assert network.receptive_field == columns[-1] - columns[0] + 1 == 467
    assert columns[0] + columns[-1] == 2 * 8 * 40


def test_confidence_network_is_figure_5():
    with torch.device("meta"):
        network = ConfidenceNetwork(DeepLabLargeFOV())
    for branch in (network.objectness, network.size):
        first, relu, last = branch
        assert isinstance(relu, nn.ReLU)
        assert (first.in_channels, first.out_channels, first.kernel_size) == (1024, 1024, (3, 3))
        assert (last.in_channels, last.out_channels, last.kernel_size) == (1024, 2, (3, 3))
    (features,) = network.trunk(torch.zeros(1, 3, 513, 513, device="meta")).values()
    for branch in (network.objectness, network.size):
        assert branch(features).shape == (1, 2, 65, 65)


def test_without_a_size_branch():
    network = ConfidenceNetwork(small_trunk(), hidden_channels=8, has_size_branch=False)
    assert network(torch.zeros(1, 3, 16, 16)).size is None


@pytest.mark.parametrize("part", ["objectness", "size"])
def test_branches_share_the_lower_layers_alone(part):
    network = ConfidenceNetwork(small_trunk(), hidden_channels=8)
    getattr(network(torch.randn(1, 3, 32, 32)), part).square().sum().backward()
    reached = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert reached == {"trunk", part}


def test_new_layers_begin_small_and_learn_ten_times_as_fast():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "confidence": ConfidenceNetwork(small_trunk(), hidden_channels=64),
            "localization": LocalizationNetwork(small_trunk()),
        }
    )
    weight = model["confidence"].size[0].weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.02) and abs(weight.mean()) < 1e-4
    assert not model["localization"].offset.bias.any()
    cfg = make_cfg(None, "SOLVER.BASE_LR", 0.001)
    rates = {}
    for group in build_optimizer(cfg, model).param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"]
    for name, parameter in model.named_parameters():
        expected = 0.001 if ".trunk." in name else 0.01
        assert rates[id(parameter)] == pytest.approx(expected), name
