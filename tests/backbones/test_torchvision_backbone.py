"""Tests of torchvision's networks as backbones."""

import logging

import numpy as np
import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model, build_proposal_generator
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.backbones.block_chain import Reach, dilations, find_chain, map_ends
from d2proposals.backbones.masked_norm import MaskedGroupNorm
from d2proposals.backbones.torchvision_backbone import TorchvisionBackbone, _plan, _reach
from tests.common import make_cfg, make_instances

# Channels at strides 4, 8, 16, 32, from the papers' tables of each network.
CHANNELS = {
    "resnet18": (64, 128, 256, 512),
    "mobilenet_v2": (24, 32, 96, 1280),
    "mobilenet_v3_small": (16, 24, 48, 576),
    "efficientnet_b0": (24, 40, 112, 1280),
    "convnext_tiny": (96, 192, 384, 768),
    "regnet_x_400mf": (32, 64, 160, 400),
    "densenet121": (256, 512, 1024, 1024),
    "vgg11": (256, 512, 512, 512),
}
# Tiny, for what does not depend on the family.
SMALL = "shufflenet_v2_x0_5"
FPN = ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 16,
       "MODEL.FPN.IN_FEATURES", ["stride4", "stride8", "stride16", "stride32"],
       "MODEL.BACKBONE.FREEZE_AT", 0]  # fmt: skip


def build(name, strides=(8, 16), **arguments):
    torch.manual_seed(0)
    return TorchvisionBackbone(
        name=name, out_features=[f"stride{stride}" for stride in strides], **arguments
    )


@pytest.fixture(scope="module", params=CHANNELS)
def family(request):
    """A network of each family with all of its maps; in evaluation, its statistics not trivial."""
    backbone = build(request.param, (4, 8, 16, 32), norm="BN").eval()
    return request.param, backbone


@pytest.mark.parametrize(
    ("name", "block"),
    [
        # The next block begins with an expansion that has the stride still.
        ("mobilenet_v2", "features.3"),
        # The next stage's down-sampling begins with a normalisation that has the stride still.
        ("convnext_tiny", "features.1"),
        # The transition behind it halves the channels before it pools.
        ("densenet121", "features.denseblock1"),
        ("resnet18", "layer1"),
        ("vgg11", "features.9"),
    ],
)
def test_a_map_ends_with_a_whole_block(name, block):
    network = torchvision.models.get_model(name, weights=None)
    assert map_ends(find_chain(network, name))[4].name == block


def test_strides_and_channels(family):
    name, backbone = family
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert list(maps) == ["stride4", "stride8", "stride16", "stride32"]
    for stride, channels in zip((4, 8, 16, 32), CHANNELS[name], strict=True):
        shape = backbone.output_shape()[f"stride{stride}"]
        assert (shape.channels, shape.stride) == (channels, stride)
        assert maps[f"stride{stride}"].shape == (1, channels, 64 // stride, 96 // stride)
    assert backbone.size_divisibility == 32


def test_weights_of_torchvision_fit_by_name_and_give_its_maps(family):
    name, backbone = family
    torch.manual_seed(1)
    network = torchvision.models.get_model(name, weights=None).eval()
    result = backbone.load_state_dict(network.state_dict(), strict=False)
    assert result.missing_keys == []
    ends = map_ends(find_chain(network, name))
    seen = {}
    for stride in (4, 8, 16, 32):
        network.get_submodule(ends[stride].name).register_forward_hook(
            lambda module, inputs, output, key=stride: seen.__setitem__(key, output)
        )
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        network(image)
        maps = backbone(image)
    for stride, expected in seen.items():
        # In place, the network's next layer may have cut off what is negative.
        got = maps[f"stride{stride}"]
        assert torch.allclose(got, expected, atol=1e-5) or torch.allclose(
            got.relu(), expected, atol=1e-5
        )


def test_padding_moves_no_cell_that_does_not_see_it(family):
    name, backbone = family
    sees_all = name in ("mobilenet_v3_small", "efficientnet_b0")
    image = torch.randn(1, 3, 64, 64)
    padded = torch.zeros(1, 3, 128, 192)
    padded[..., :64, :64] = image
    with torch.no_grad():
        alone, batched = backbone(image)["stride4"], backbone(padded)["stride4"][..., :16, :16]
    # Up to the map's end where the padding is masked, else its first cells.
    cells = 16 if sees_all else 6
    difference = (alone - batched)[..., :cells, :cells].abs().max()
    assert difference <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("mask_padding", [True, False])
def test_squeeze_excitation_sees_the_image_alone(mask_padding):
    backbone = build("mobilenet_v3_small", (8, 32), mask_padding=mask_padding).eval()
    image = torch.randn(1, 3, 64, 96)
    padded = torch.zeros(2, 3, 128, 160)
    padded[0, :, :64, :96] = image[0]
    padded[1] = torch.randn(3, 128, 160)
    with torch.no_grad():
        alone, batched = backbone(image)["stride32"], backbone(padded)["stride32"][:1, :, :2, :3]
    same = torch.allclose(alone, batched, atol=1e-5 * float(alone.abs().max()))
    assert same == mask_padding


@pytest.mark.parametrize(
    ("norm", "trains"), [("GN", False), ("GN", True), ("BN", True), ("SyncBN", True)]
)
def test_statistics_leave_the_padding_out(norm, trains):
    """Of networks whose padding is masked; in single precision through ten normalisations."""
    backbone = build("mobilenet_v3_small", (8, 32), norm=norm).double().train(trains)
    image = torch.randn(1, 3, 128, 160, dtype=torch.double)
    padded = torch.zeros(1, 3, 192, 256, dtype=torch.double)
    padded[..., :128, :160] = image
    alone, batched = backbone(image), backbone(padded)
    for name, stride in (("stride8", 8), ("stride32", 32)):
        own = batched[name][..., : 128 // stride, : 160 // stride]
        assert alone[name].abs().max() > 0.1
        torch.testing.assert_close(own, alone[name], atol=1e-4, rtol=1e-3)


def test_the_statistics_of_a_network_are_kept_where_its_padding_is_masked():
    network = torchvision.models.mobilenet_v3_small()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
    backbone = build("mobilenet_v3_small", (8, 32), norm="BN")
    norms = [x for x in backbone.modules() if isinstance(x, nn.BatchNorm2d)]
    of_network = [x for x in network.modules() if isinstance(x, nn.BatchNorm2d)]
    # torchvision's own, which differ from torch's defaults.
    assert {(x.eps, x.momentum) for x in norms} == {(0.001, 0.01)}
    assert len(norms) == len(of_network)
    backbone.load_state_dict(
        {k: v for k, v in network.state_dict().items() if not k.startswith("classifier")}
    )
    assert torch.equal(norms[0].running_mean, of_network[0].running_mean)


@pytest.mark.parametrize("name", [SMALL, "mobilenet_v2", "resnet18"])
def test_dilated_maps_are_the_strided_ones_in_between(name):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).eval()
    strided = build(name, (8, 32), norm="BN").eval()
    dilated = build(name, (8,), norm="BN", max_stride=8).eval()
    for backbone in (strided, dilated):
        backbone.load_state_dict(network.state_dict(), strict=False)
    image = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected, got = strided(image)["stride32"], dilated(image)["stride8"]
    assert got.shape[-2:] == (16, 12)
    scale = float(expected.abs().max())
    assert torch.allclose(got[..., ::4, ::4], expected, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["convnext_tiny", "vgg11", "densenet121"])
def test_layers_that_cannot_be_dilated_are_named(name):
    network = torchvision.models.get_model(name, weights=None)
    with pytest.raises(ValueError, match="MAX_STRIDE 16.*its layer features"):
        dilations(network, 16, name)


def test_random_weights_are_the_same_whether_the_network_is_known_or_not():
    _plan.cache_clear()
    _reach.cache_clear()
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        backbones = [
            TorchvisionBackbone(name="mobilenet_v2", out_features=["stride16"], max_stride=16)
            for _ in range(2)
        ]
        assert backbones[0].stride == 16 < backbones[0].receptive_field
        weights.append([x for backbone in backbones for x in backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert _plan.cache_info().misses == _reach.cache_info().misses == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_t", "is no backbone|must be of"),
        ("vit_b_16", "does not take images of any size"),
        ("alexnet", "do not hand on maps"),
        ("resnet19", "no classification network of torchvision"),
    ],
)
def test_networks_without_such_maps_are_one_line(name, message):
    with pytest.raises(ValueError, match=message) as error:
        build(name)
    assert "\n" not in str(error.value)


def test_resnet_gives_detectron2_s_maps_with_equal_weights():
    """Detectron2's ResNet-18 with the stride in the first 3x3 convolution, as torchvision's."""
    cfg = make_cfg(None, "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
                   "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0,
                   "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"])  # fmt: skip
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    theirs = build_backbone(cfg).eval()
    ours = build("resnet18", (4, 8, 16, 32), norm="BN").eval()

    def theirs_name(key):
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for index in (1, 2):
            key = key.replace(f".bn{index}", f".conv{index}.norm")
        for index in (1, 2, 3, 4):
            key = key.replace(f"layer{index}", f"res{index + 1}")
        return f"stem.{key.replace('bn1', 'conv1.norm')}" if key[0] in "cb" else key

    state = {theirs_name(key): value for key, value in ours.state_dict().items()}
    assert theirs.load_state_dict(state, strict=False).missing_keys == []
    image = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected, got = theirs(image), ours(image)
    for level, stride in zip((2, 3, 4, 5), (4, 8, 16, 32), strict=True):
        assert torch.allclose(got[f"stride{stride}"], expected[f"res{level}"], atol=1e-5)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN"])
def test_norms(norm):
    backbone = build(SMALL, norm=norm)
    kinds = {type(x) for x in backbone.modules()} & {
        FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, MaskedGroupNorm
    }  # fmt: skip
    expected = {"FrozenBN": FrozenBatchNorm2d, "BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}
    assert kinds == {expected.get(norm, MaskedGroupNorm)}


@pytest.mark.parametrize(("strides", "max_stride"), [((8, 32), 32), ((8,), 8), ((16,), 16)])
def test_frozen_blocks_end_at_their_stride(strides, max_stride):
    backbone = build("mobilenet_v2", strides, norm="BN", freeze_at=3, max_stride=max_stride).train()
    trained = {key.split(".")[1] for key, x in backbone.named_parameters() if x.requires_grad}
    # Stride 8 ends with block 6, stride 32 with block 18: also where they are dilated.
    assert trained == {str(index) for index in range(7, 19)}
    norms = [x for x in backbone.features[:7].modules() if isinstance(x, nn.BatchNorm2d)]
    assert norms == [] and not backbone.features[6].training and backbone.features[7].training


@pytest.mark.parametrize(
    ("name", "stride", "first", "last", "context"),
    [
        # 3x3 convolutions: 1, 1, 2, 2, 2 at strides 1 to 16 reach 59 pixels to both sides; the
        # 2x2 pools between them see 1, 2, 4 and 8 pixels more to the right.
        ("vgg11", 16, -59, 59 + 15, 64),
        # 7x7 (3), pool (2), at stride 4 four 3x3 (16) and the next one (4), at stride 8 three (24).
        ("resnet18", 8, -49, 49, 56),
        # 4x4 patches, and at stride 4 three 7x7 (3 * 3 cells of 4 pixels).
        ("convnext_tiny", 4, -36, 36 + 3, 36),
    ],
)
def test_reach_is_what_the_layers_add_up_to(name, stride, first, last, context):
    backbone = build(name, (stride,)).train()
    assert backbone.reach == Reach(first, last, stride)
    assert (backbone.stride, backbone.context) == (stride, context)
    assert backbone.receptive_field == last - first + 1
    assert backbone.reach.first_centre == (first + last) / 2
    assert backbone.training


@pytest.mark.parametrize(("name", "norm"), [("mobilenet_v3_small", "FrozenBN"), (SMALL, "GN")])
def test_networks_that_see_the_whole_image_have_no_context(name, norm):
    with pytest.raises(ValueError, match="sees the whole image"):
        _ = build(name, (8, 16), norm=norm).context


@pytest.mark.parametrize(("name", "norm"), [("mobilenet_v3_small", "FrozenBN"), (SMALL, "GN")])
def test_networks_that_see_the_whole_image_can_be_traced(name, norm):
    backbone = build(name, (8,), norm=norm).eval()
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        traced = torch.jit.trace(backbone, image, strict=False)
        torch.testing.assert_close(traced(image)["stride8"], backbone(image)["stride8"])


@pytest.mark.parametrize("freeze_at", [2, 3, 5])
def test_frozen_blocks_go_image_by_image_and_give_the_same_maps(freeze_at):
    backbone = build("mobilenet_v2", (4, 8, 16, 32), freeze_at=freeze_at)
    whole = build("mobilenet_v2", (4, 8, 16, 32))
    whole.load_state_dict(backbone.state_dict())
    batches = []
    backbone.features[0].register_forward_pre_hook(lambda module, args: batches.append(args[0]))
    images = torch.randn(3, 3, 64, 96)
    maps, expected = backbone(images), whole(images)
    assert [len(x) for x in batches] == [1, 1, 1]
    assert list(maps) == list(expected)
    for name, x in maps.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5)
    assert maps["stride32"].requires_grad == (freeze_at < 5)


def test_layers_behind_the_last_map_are_gone():
    names = {key.split(".")[1] for key, _ in build("mobilenet_v2", (8,)).named_parameters()}
    assert max(int(x) for x in names) == 6


@pytest.mark.parametrize("features_only", [True, False])
def test_weights_from_a_file(features_only, tmp_path, caplog):
    torch.manual_seed(3)
    state = torchvision.models.get_model(SMALL, weights=None).state_dict()
    if features_only:
        state = {key: x.half() for key, x in state.items() if not key.startswith("fc.")}
        state = {key: x for key, x in state.items() if "num_batches" not in key}
    path = tmp_path / "weights.pth"
    torch.save(state if features_only else {"state_dict": state}, path)
    backbone = build(SMALL, weights=str(path))
    got = backbone.stage2[0].branch1[0].weight
    assert torch.equal(got, state["stage2.0.branch1.0.weight"].float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer1.weight": torch.zeros(3)}, "arrays of shufflenet_v2_x0_5 are not in it"),
        ([torch.zeros(3)], "holds a list"),
        (b"no file of torch", "Cannot read .*name a state dictionary"),
    ],
)
def test_files_of_something_else_are_named(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        build(SMALL, weights=str(path))


def test_a_file_of_another_width_is_named(tmp_path):
    torch.save(torchvision.models.get_model("shufflenet_v2_x1_0").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="has the shape .* needs"):
        build(SMALL, weights=str(tmp_path / "w.pth"))


def test_unknown_weights_are_named():
    with pytest.raises(ValueError, match="neither a file nor weights of .* IMAGENET1K_V1"):
        build(SMALL, weights="missing.pth")


@pytest.mark.parametrize(
    ("pixels", "input_format", "std", "is_warned"),
    [
        ("torchvision", "RGB", (58.395, 57.12, 57.375), False),
        ("torchvision", "BGR", (58.395, 57.12, 57.375), True),
        ("torchvision", "RGB", (1.0, 1.0, 1.0), True),
        ("caffe", "BGR", (1.0, 1.0, 1.0), False),
    ],
)
def test_pixels_unlike_those_of_the_weights_are_a_warning(
    pixels, input_format, std, is_warned, tmp_path, caplog
):
    torch.save(torchvision.models.get_model(SMALL).state_dict(), tmp_path / "weights.pth")
    mean = [103.53, 116.28, 123.675]
    cfg = make_cfg(
        None, "MODEL.BACKBONE.NAME", "build_torchvision_backbone", "MODEL.TORCHVISION.NAME", SMALL,
        "MODEL.TORCHVISION.WEIGHTS", str(tmp_path / "weights.pth"),
        "MODEL.TORCHVISION.PIXELS", pixels, "INPUT.FORMAT", input_format,
        "MODEL.PIXEL_MEAN", mean if pixels == "caffe" else mean[::-1], "MODEL.PIXEL_STD", std,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        build_backbone(cfg, ShapeSpec(channels=3))
    assert ("were trained on" in caplog.text) == is_warned


@pytest.mark.parametrize("generator", ["deepmask", "spop", "detectornet"])
@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_trunk_s_pixels_are_its_generator_s(generator, is_wrong, tmp_path, caplog):
    """In a detector whose backbone has others."""
    network = torchvision.models.mobilenet_v2()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    cfg = make_cfg(
        f"photos/{generator}_mobilenet_v2.yaml",
        "MODEL.TORCHVISION.WEIGHTS", str(tmp_path / "weights.pth"), "INPUT.FORMAT", "BGR",
        "MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0],
    )  # fmt: skip
    if is_wrong:
        node = cfg.MODEL.SPOP.TRUNK if generator == "spop" else cfg.MODEL[generator.upper()]
        node.FORMAT = "BGR"
    with caplog.at_level(logging.WARNING):
        build_proposal_generator(cfg, {})
    assert ("FORMAT, ... of a generator's trunk" in caplog.text) == is_wrong


@pytest.mark.parametrize("config", ["rpn_only.yaml", "sc_rpn_only.yaml"])
def test_each_family_trains_under_a_pyramid(config, family):
    name, _ = family
    cfg = make_cfg(config, *FPN, "MODEL.TORCHVISION.NAME", name, "MODEL.SCRPN.HEAD_CHANNELS", 16,
                   "MODEL.TORCHVISION.NORM", "GN", "MODEL.WEIGHTS", "")  # fmt: skip
    torch.manual_seed(0)
    model = build_model(cfg).train()
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 64, 96)))
    instances = make_instances((64, 96), [[8, 8, 40, 40], [50, 20, 90, 60]])
    with EventStorage():
        losses = model([{"image": image, "instances": instances}])
    loss = sum(losses.values())
    loss.backward()
    assert torch.isfinite(loss)
    first = next(model.backbone.bottom_up.parameters())
    assert first.grad is not None and torch.isfinite(first.grad).all() and first.grad.any()


def test_a_pyramid_names_maps_that_its_network_does_not_return():
    cfg = make_cfg("rpn_only.yaml", *FPN, "MODEL.FPN.IN_FEATURES", ["res4"],
                   "MODEL.TORCHVISION.NAME", SMALL)  # fmt: skip
    with pytest.raises(ValueError, match="MODEL.FPN.IN_FEATURES must be of"):
        build_model(cfg)
