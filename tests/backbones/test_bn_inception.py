"""BN-Inception: its layer table, sizes, normalisation, freezing and independence of padding."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from d2proposals import add_d2proposals_config
from d2proposals.backbones import BNInception, InceptionBlock
from d2proposals.backbones.inception_block import (
    AverageConvNormReLU,
    BranchWidths,
    scale_width,
)
from d2proposals.backbones.masked_norm import MaskedGroupNorm, build_norm
from tests.common import make_images

# Block: (channels in, channels out, branches). A branch is a chain of (kernel, channels out).
LAYER_TABLE = {
    "3a": (192, 256, [[(1, 64)], [(1, 64), (3, 64)], [(1, 64), (3, 96), (3, 96)], [(1, 32)]]),
    "3b": (256, 320, [[(1, 64)], [(1, 64), (3, 96)], [(1, 64), (3, 96), (3, 96)], [(1, 64)]]),
    "3c": (320, 576, [[(1, 128), (3, 160)], [(1, 64), (3, 96), (3, 96)]]),
    "4a": (576, 576, [[(1, 224)], [(1, 64), (3, 96)], [(1, 96), (3, 128), (3, 128)], [(1, 128)]]),
    "4b": (576, 576, [[(1, 192)], [(1, 96), (3, 128)], [(1, 96), (3, 128), (3, 128)], [(1, 128)]]),
    "4c": (
        576,
        608,
        [[(1, 160)], [(1, 128), (3, 160)], [(1, 128), (3, 160), (3, 160)], [(1, 128)]],
    ),
    "4d": (608, 608, [[(1, 96)], [(1, 128), (3, 192)], [(1, 160), (3, 192), (3, 192)], [(1, 128)]]),
    "4e": (608, 1056, [[(1, 128), (3, 192)], [(1, 192), (3, 256), (3, 256)]]),
    "5a": (
        1056,
        1024,
        [[(1, 352)], [(1, 192), (3, 320)], [(1, 160), (3, 224), (3, 224)], [(1, 128)]],
    ),
    "5b": (
        1024,
        1024,
        [[(1, 352)], [(1, 192), (3, 320)], [(1, 192), (3, 224), (3, 224)], [(1, 128)]],
    ),
}
ALL_BLOCKS = [f"inception_{name}" for name in LAYER_TABLE]
SMALL_WIDTHS = BranchWidths(16, 8, 16, 8, 24, 8)


def count_block_parameters(channels_in, branches):
    """Weights and biases of a block's convolutions."""
    total = 0
    for branch in branches:
        channels = channels_in
        for kernel, out in branch:
            total += kernel * kernel * channels * out + out
            channels = out
    return total


def randomise(module):
    """Give every parameter and running statistic of a module a random value (in place)."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator).mul_(0.2)
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return module


def config(**overrides):
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_bn_inception_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.BN_INCEPTION.merge_from_other_cfg(type(cfg)(overrides))
    return cfg


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return BNInception(out_features=ALL_BLOCKS)


@pytest.mark.parametrize("name", LAYER_TABLE)
def test_block_matches_the_layer_table(full_size, name):
    channels_in, channels_out, branches = LAYER_TABLE[name]
    block = getattr(full_size, f"inception_{name}")
    assert (block.in_channels, block.out_channels) == (channels_in, channels_out)
    assert full_size.output_shape()[f"inception_{name}"].channels == channels_out
    num_parameters = sum(p.numel() for p in block.parameters())
    assert num_parameters == count_block_parameters(channels_in, branches)
    double = ["conv_double_3x3_reduce", "conv_double_3x3_1", "conv_double_3x3_2"]
    names = [["conv_1x1"], ["conv_3x3_reduce", "conv_3x3"], double, ["conv_pool_proj"]]
    names = names if len(branches) == 4 else names[1:3]
    for branch, branch_names in zip(branches, names, strict=True):
        channels = channels_in
        for (kernel, out), conv in zip(branch, branch_names, strict=True):
            assert getattr(block, conv).weight.shape == (out, channels, kernel, kernel)
            channels = out


def test_full_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = BNInception(norm="FrozenBN")
    # conv1 7x7 3 -> 64, conv2 1x1 64 -> 64 and 3x3 64 -> 192, with biases.
    stem = (49 * 3 * 64 + 64) + (64 * 64 + 64) + (9 * 64 * 192 + 192)
    blocks = sum(count_block_parameters(c, branches) for c, _, branches in LAYER_TABLE.values())
    parameters = sum(p.numel() for p in model.parameters())
    affine = sum(t.numel() for k, t in model.named_buffers() if k.endswith(("weight", "bias")))
    assert parameters == stem + blocks
    # The public model has 11,295,240 with its classifier (1,024 x 1,000 weights, 1,000 biases).
    assert parameters + affine + 1024 * 1000 + 1000 == 11_295_240


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (96, 160), (224, 224), (800, 1216)])
def test_maps_have_exact_strides(size):
    with torch.device("meta"):
        model = BNInception(out_features=ALL_BLOCKS)
        outputs = model(torch.zeros(2, 3, *size))
    strides = dict.fromkeys(ALL_BLOCKS[:2], 8)
    strides |= dict.fromkeys(ALL_BLOCKS[2:7], 16) | dict.fromkeys(ALL_BLOCKS[7:], 32)
    assert list(outputs) == ALL_BLOCKS
    for name, shape in model.output_shape().items():
        assert shape.stride == strides[name]
        expected = (2, shape.channels, size[0] // shape.stride, size[1] // shape.stride)
        assert tuple(outputs[name].shape) == expected


def test_other_sizes_are_refused():
    model = BNInception(width_factor=0.1)
    with pytest.raises(AssertionError, match="multiples of 32, got 32 x 48"):
        model(torch.zeros(1, 3, 32, 48))


def plain_block(block, x):
    """The block 5b (max pooling) or another of stride 1 (average), written out."""

    def layer(name, x):
        conv = getattr(block, name)
        padding = conv.weight.shape[-1] // 2
        y = F.conv2d(x, conv.weight, conv.bias, padding=padding)
        mean, variance = conv.norm.running_mean, conv.norm.running_var
        y = (y - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        y = y * conv.norm.weight[:, None, None] + conv.norm.bias[:, None, None]
        return y.clamp(min=0)

    if block.pool == "max":
        windows = F.pad(x, (1, 1, 1, 1), value=float("-inf")).unfold(2, 3, 1).unfold(3, 3, 1)
        pooled = windows.amax(dim=(-1, -2))
    else:
        windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        pooled = windows.sum(dim=(-1, -2)) / 9  # zeros outside the image count
    double = layer("conv_double_3x3_1", layer("conv_double_3x3_reduce", x))
    return torch.cat(
        [
            layer("conv_1x1", x),
            layer("conv_3x3", layer("conv_3x3_reduce", x)),
            layer("conv_double_3x3_2", double),
            layer("conv_pool_proj", pooled),
        ],
        dim=1,
    )


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_block_equals_its_plain_statement(pool):
    torch.manual_seed(0)
    block = randomise(InceptionBlock(12, SMALL_WIDTHS, pool=pool))
    x = torch.randn(2, 12, 5, 7)
    torch.testing.assert_close(block(x), plain_block(block, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["", "FrozenBN", "GN", "BN"])
def test_projection_before_the_average_pool_is_the_projection_after_it(norm):
    """Both orders to 1e-5, with a bias where the layer has one, alone and masked."""
    torch.manual_seed(0)
    layer = randomise(AverageConvNormReLU(24, 8, 1, norm=norm))
    valid = torch.zeros(2, 1, 9, 11)
    valid[0, :, :6, :7] = valid[1] = 1
    x = torch.randn(2, 24, 9, 11) * valid
    for mask in (None, valid):
        convolved = F.conv2d(F.avg_pool2d(x, 3, stride=1, padding=1), layer.weight, layer.bias)
        if norm == "FrozenBN" or norm == "":
            twin = layer.norm(convolved) if norm else convolved
        else:
            twin = layer.norm(convolved, mask)
        twin = twin.clamp(min=0) * (1 if mask is None else mask)
        assert twin.max() > 0.1
        torch.testing.assert_close(layer(x, mask), twin, rtol=1e-5, atol=1e-5)


def test_reduction_block_pools_its_input_and_halves_the_size():
    torch.manual_seed(0)
    block = InceptionBlock(12, BranchWidths(0, 8, 16, 8, 24, 0), stride=2, pool="max")
    x = torch.randn(2, 12, 4, 6)
    y = block(x)
    assert y.shape == (2, 16 + 24 + 12, 2, 3)
    # Window (1, 1) covers rows 2-4 and columns 2-4, the last row being outside.
    torch.testing.assert_close(y[:, -12:, 1, 1], x[:, :, 2:4, 2:5].amax(dim=(2, 3)))
    torch.testing.assert_close(y[:, -12:, 1, 2], x[:, :, 2:4, 4:6].amax(dim=(2, 3)))
    with pytest.raises(AssertionError, match="even sides, got a map of \\(5, 6\\)"):
        block(torch.zeros(1, 12, 5, 6))


@pytest.mark.parametrize("norm", ["", "FrozenBN", "GN"])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (5, 7)])
def test_padding_has_no_influence_on_a_block(norm, pool, size):
    torch.manual_seed(0)
    height, width = size
    block = randomise(InceptionBlock(12, SMALL_WIDTHS, pool=pool, norm=norm))
    alone = torch.randn(1, 12, height, width)  # negative values, too
    batch = torch.randn(2, 12, 5, 7)  # whatever stands on the padding
    batch[0, :, :height, :width] = alone[0]
    valid = torch.zeros(2, 1, 5, 7)
    valid[0, :, :height, :width] = 1
    valid[1] = 1
    expected = block(alone)[0]
    for mask in (valid, valid.bool()):
        y = block(batch, mask)
        torch.testing.assert_close(y[0, :, :height, :width], expected, rtol=1e-5, atol=1e-5)
        assert (y * (1 - valid)).abs().max() == 0
        torch.testing.assert_close(y[1], block(batch[1:])[0], rtol=1e-5, atol=1e-5)


def test_masked_max_pooling_has_finite_gradients():
    block = InceptionBlock(12, SMALL_WIDTHS, pool="max", norm="GN")
    x = torch.randn(1, 12, 5, 7, requires_grad=True)
    valid = torch.zeros(1, 1, 5, 7)
    valid[..., :2, :2] = 1
    block(x, valid).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad * (1 - valid)).abs().max() == 0
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


def test_masked_group_norm_without_padding_is_group_norm():
    torch.manual_seed(0)
    norm = randomise(MaskedGroupNorm(4, 24))
    x = torch.randn(2, 24, 5, 7)
    twin = F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x, torch.ones(2, 1, 5, 7)), twin, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm(x), twin)
    # Means a thousand times the deviations.
    x = x * 0.1 + 100
    twin = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps).float()
    torch.testing.assert_close(norm(x, torch.ones(2, 1, 5, 7)), twin, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "channels, groups", [(8, 2), (16, 4), (24, 4), (40, 8), (64, 16), (128, 32), (352, 32)]
)
def test_group_norm_fits_narrow_layers(channels, groups):
    norm = build_norm("GN", channels)
    assert norm.num_groups == groups
    assert norm(torch.randn(1, channels, 2, 2)).shape == (1, channels, 2, 2)


@pytest.mark.parametrize(
    "width, factor, expected",
    [(64, 1.0, 64), (352, 1.0, 352), (96, 0.25, 24), (160, 0.3, 48), (32, 0.1, 8), (0, 0.5, 0)],
)
def test_scale_width(width, factor, expected):
    assert scale_width(width, factor) == expected


def test_widths_of_the_published_network_stay_at_factor_one(full_size):
    channels = [full_size.output_shape()[name].channels for name in ALL_BLOCKS]
    assert channels == [out for _, out, _ in LAYER_TABLE.values()]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN", ""])
@pytest.mark.parametrize("width_factor", [0.1, 0.25])
def test_every_parameter_gets_a_gradient(norm, width_factor):
    torch.manual_seed(0)
    model = BNInception(width_factor=width_factor, norm=norm)
    outputs = model(torch.randn(2, 3, 64, 64))
    assert {name: tuple(y.shape) for name, y in outputs.items()} == {
        name: (2, shape.channels, 64 // shape.stride, 64 // shape.stride)
        for name, shape in model.output_shape().items()
    }
    sum(y.square().mean() for y in outputs.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("norm, has_bias", [("FrozenBN", True), ("", True), ("GN", False)])
def test_only_fixed_normalisation_comes_with_a_bias(norm, has_bias):
    model = BNInception(width_factor=0.1, norm=norm)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    # Three in the stem, seven in a block of stride 1, five in a block of stride 2.
    assert len(convolutions) == 3 + 8 * 7 + 2 * 5
    assert all((m.bias is not None) == has_bias for m in convolutions)


def test_extra_blocks_come_before_the_next_stage():
    torch.manual_seed(0)
    model = BNInception(width_factor=0.1, norm="GN", extra_blocks=(1, 2, 0))
    plain = BNInception(width_factor=0.1, norm="GN")
    assert model.output_shape() == plain.output_shape()
    extra = {name for name, _ in model.named_children()} - {n for n, _ in plain.named_children()}
    assert extra == {"inception_3b_extra1", "inception_4d_extra1", "inception_4d_extra2"}
    assert model.level_blocks == plain.level_blocks
    calls = []
    for name, child in model.named_children():
        child.register_forward_hook(lambda _m, _i, out, name=name: calls.append((name, out)))
    outputs = model(torch.randn(1, 3, 32, 32))
    order = [name.removeprefix("inception_") for name, _ in calls][3:]
    assert order == (
        ["3a", "3b", "3b_extra1", "3c", "4a", "4b", "4c", "4d", "4d_extra1", "4d_extra2"]
        + ["4e", "5a", "5b"]
    )
    assert outputs["inception_3b"] is dict(calls)["inception_3b_extra1"]
    assert outputs["inception_4d"] is dict(calls)["inception_4d_extra2"]


def test_layers_after_the_last_map_are_not_built():
    model = BNInception(width_factor=0.1, norm="GN", out_features=["inception_3b"])
    assert model.size_divisibility == 8
    assert not hasattr(model, "inception_3c")
    assert list(model(torch.randn(1, 3, 40, 24))) == ["inception_3b"]


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze(freeze_at):
    model = BNInception(width_factor=0.1, norm="BN", extra_blocks=(1, 0, 0), freeze_at=freeze_at)
    stages = [
        ["conv1_7x7_s2"],
        ["conv2_3x3_reduce", "conv2_3x3"],
        ["inception_3a", "inception_3b", "inception_3b_extra1"],
        [f"inception_{name}" for name in ("3c", "4a", "4b", "4c", "4d")],
        [f"inception_{name}" for name in ("4e", "5a", "5b")],
    ]
    assert sorted(itertools.chain(*stages)) == sorted(name for name, _ in model.named_children())
    for stage, names in enumerate(stages, start=1):
        for module in (getattr(model, name) for name in names):
            frozen = stage <= freeze_at
            assert all(p.requires_grad != frozen for p in module.parameters())
            norms = [m for m in module.modules() if hasattr(m, "running_mean")]
            assert norms
            assert all(isinstance(m, FrozenBatchNorm2d) == frozen for m in norms)


def test_mirror_block_has_the_branches_of_its_original():
    model = BNInception(width_factor=0.25, norm="GN")
    original = model.inception_5b
    mirror = model.mirror_block("inception_5b", in_channels=48, norm="FrozenBN")
    assert (mirror.in_channels, mirror.out_channels) == (48, original.out_channels)
    assert mirror.pool == "max"
    assert mirror.conv_3x3.weight.shape == original.conv_3x3.weight.shape
    assert mirror.conv_1x1.weight.shape[1] == 48
    assert mirror.conv_1x1.bias is not None and original.conv_1x1.bias is None
    with pytest.raises(ValueError, match="No block of stride 1 is called 'inception_4e'"):
        model.mirror_block("inception_4e", in_channels=48, norm="GN")


def test_level_blocks():
    assert BNInception(width_factor=0.1).level_blocks == {
        "inception_3b": ["inception_3a", "inception_3b"],
        "inception_4d": ["inception_4a", "inception_4b", "inception_4c", "inception_4d"],
        "inception_5b": ["inception_5a", "inception_5b"],
    }


def test_configuration_reaches_the_backbone():
    cfg = config(
        WIDTH_FACTOR=0.25, NORM="GN", EXTRA_BLOCKS=(0, 0, 1), OUT_FEATURES=["inception_5b"]
    )
    cfg.MODEL.BACKBONE.FREEZE_AT = 1
    model = build_backbone(cfg)
    twin = BNInception(
        width_factor=0.25,
        norm="GN",
        extra_blocks=(0, 0, 1),
        out_features=["inception_5b"],
        freeze_at=1,
    )
    assert model.output_shape() == twin.output_shape()
    assert model.output_shape()["inception_5b"].stride == 32
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in twin.state_dict().items()
    ]
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in twin.parameters()
    ]


def test_number_of_image_channels_follows_the_input_shape():
    model = build_backbone(config(WIDTH_FACTOR=0.1), ShapeSpec(channels=1))
    assert model.conv1_7x7_s2.weight.shape[1] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"out_features": ["res2"]}, "OUT_FEATURES must name at least one of"),
        ({"out_features": []}, "OUT_FEATURES must name at least one of"),
        ({"width_factor": 0.0}, "WIDTH_FACTOR must be positive, got 0.0"),
        ({"extra_blocks": (1, 2)}, r"three numbers of 0 or more .* got \(1, 2\)"),
        ({"extra_blocks": (0, -1, 0)}, r"three numbers of 0 or more .* got \(0, -1, 0\)"),
        ({"norm": "LN"}, "Unknown normalisation 'LN'"),
        ({"freeze_at": 6}, "FREEZE_AT must be 0 to 5, got 6"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BNInception(**{"width_factor": 0.1} | arguments)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_padding_is_not_in_the_statistics_of_training(norm):
    torch.manual_seed(0)
    # In double precision: thirty layers blow rounding up where 2x2 cells give the statistics.
    backbone = BNInception(width_factor=0.125, norm=norm).double()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    padded = torch.zeros(1, 3, 160, 192, dtype=torch.float64)
    padded[..., :64, :64] = image
    alone, together = backbone(image), backbone(padded)
    for name, shape in backbone.output_shape().items():
        side = 64 // shape.stride
        inside = together[name][..., :side, :side]
        torch.testing.assert_close(inside, alone[name], rtol=1e-6, atol=1e-6)
        assert (together[name][..., side:, :] == 0).all()
        assert alone[name].max() > 1


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_an_image_has_the_same_maps_alone_and_in_a_padded_batch(norm):
    torch.manual_seed(0)
    backbone = BNInception(width_factor=0.125, norm=norm).eval()
    sizes = [(75, 100), (128, 160)]
    images = make_images(*sizes)
    together = backbone(images.tensor)
    alone = backbone(make_images(sizes[0]).tensor)
    for name, shape in backbone.output_shape().items():
        rows, columns = (-(-side // shape.stride) for side in sizes[0])
        inside = alone[name][..., :rows, :columns]
        assert inside.abs().max() > 0.01
        # Rounding adds up over thirty normalised layers; a leak would show in the first digit.
        assert torch.allclose(together[name][:1, :, :rows, :columns], inside, atol=1e-3)
        assert (together[name][0, :, rows:] == 0).all()
