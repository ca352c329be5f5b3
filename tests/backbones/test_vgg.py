"""VGG: torchvision's layers and names, strides, how far a cell sees, weight conversion."""

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from d2proposals.backbones import VGG
from d2proposals.backbones.vgg import VGG_A, VGG_D
from d2proposals.backbones.weight_conversion import convert_vgg11, read_weights, write_checkpoint
from tests.common import make_cfg
from tools.convert_weights import main as convert_main

SMALL = ((4,), (6,), (8, 8), (10, 10), (12, 12))


def public_weights(features):
    """Of torchvision's network with these features; the classifier's sizes do not matter."""
    classifier = {"classifier.0.weight": torch.zeros(2, 3), "classifier.0.bias": torch.zeros(2)}
    return {f"features.{k}": v for k, v in features.state_dict().items()} | classifier


@pytest.mark.parametrize("norm", ["", "BN"])
def test_weights_of_torchvision_fit_and_give_the_same_map(norm):
    torch.manual_seed(0)
    theirs = make_layers(cfgs["A"], batch_norm=norm == "BN").eval()
    backbone = VGG(norm=norm).eval()
    backbone.features.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        expected = theirs[:-1](x)  # without the last pooling
        (actual,) = backbone(x).values()
    torch.testing.assert_close(actual, expected)
    assert actual.shape == (1, 512, 4, 5)


def test_other_plans_are_other_vggs():
    with torch.device("meta"):
        sixteen = VGG(stages=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3))
        theirs = make_layers(cfgs["D"])
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in sixteen.features.state_dict().items()} == shapes


def test_maps_of_all_stages():
    backbone = VGG(stages=SMALL, out_features=["stage2", "stage5"], width_factor=0.5)
    outputs = backbone(torch.randn(1, 3, 37, 50))
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "stage2": (1, 3, 18, 25),
        "stage5": (1, 6, 2, 3),
    }
    shapes = {k: (v.channels, v.stride) for k, v in backbone.output_shape().items()}
    assert shapes == {"stage2": (3, 2), "stage5": (6, 16)}


@pytest.mark.parametrize("stages, context", [(VGG_A, 64), (SMALL[:4], 32), (SMALL[:1], 1)])
def test_how_far_a_cell_sees(stages, context):
    backbone = VGG(stages=stages, width_factor=0.05 if stages is VGG_A else 1.0)
    assert backbone.context == context
    for parameter in backbone.parameters():  # positive weights: what a cell sees changes it
        nn.init.constant_(parameter, 0.01)
    side = 2 * context + 3 * backbone.stride
    x = torch.ones(1, 3, side, side, requires_grad=True)
    (maps,) = backbone(x).values()
    cell = (context // backbone.stride) + 1
    maps[0, 0, cell, cell].backward()
    seen = x.grad[0, 0].any(dim=0).nonzero()[:, 0]
    reach = sum(len(stage) * 2**k for k, stage in enumerate(stages))
    begin = cell * backbone.stride
    # Pooling hands its gradient to one of equal pixels, so the far end is not exact.
    assert seen.min() == begin - reach
    assert begin - seen.min() <= context
    assert seen.max() - (begin + backbone.stride - 1) <= context
    assert context - reach < backbone.stride


def test_frozen_stages():
    backbone = VGG(stages=SMALL, norm="BN", freeze_at=2)
    trainable = {n.split(".")[1] for n, p in backbone.named_parameters() if p.requires_grad}
    # conv bn relu pool conv bn relu pool | conv bn ...
    assert trainable == {"8", "9", "11", "12", "15", "16", "18", "19", "22", "23", "25", "26"}
    assert isinstance(backbone.features[5], FrozenBatchNorm2d)
    assert isinstance(backbone.features[9], nn.BatchNorm2d)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"stages": ()}, "STAGES"),
        ({"stages": ((8,), ())}, "STAGES"),
        ({"norm": "GN"}, "NORM"),
        ({"out_features": ["stage6"]}, "OUT_FEATURES"),
        ({"out_features": []}, "OUT_FEATURES"),
    ],
)
def test_settings_that_make_no_sense(settings, key):
    with pytest.raises(ValueError, match=f"MODEL.VGG.{key}"):
        VGG(**settings)


def test_every_key_reaches_the_backbone():
    cfg = make_cfg(
        None, "MODEL.BACKBONE.NAME", "build_vgg_backbone", "MODEL.VGG.STAGES", [[8], [12, 16]],
        "MODEL.VGG.WIDTH_FACTOR", 0.5, "MODEL.VGG.NORM", "BN",
        "MODEL.VGG.OUT_FEATURES", ["stage1", "stage2"], "MODEL.VGG.FREEZE_AT", 1,
    )  # fmt: skip
    backbone = build_backbone(cfg, ShapeSpec(channels=5))
    shapes = {k: (v.channels, v.stride) for k, v in backbone.output_shape().items()}
    assert shapes == {"stage1": (4, 1), "stage2": (8, 2)}
    assert backbone.features[0].weight.shape[:2] == (4, 5)
    assert not backbone.features[0].weight.requires_grad
    assert isinstance(backbone.features[5], nn.BatchNorm2d)


def test_converted_weights_load_into_the_generator_s_trunk(tmp_path):
    torch.manual_seed(1)
    public = public_weights(make_layers(cfgs["A"]))
    torch.save(public, tmp_path / "in.pth")
    weights = convert_vgg11(read_weights(str(tmp_path / "in.pth")))
    assert set(weights) == {k for k in public if k.startswith("features.")}
    path = str(tmp_path / "out.pkl")
    write_checkpoint(path, weights, matching_heuristics=True)
    # Full-size trunk, small branches.
    model = build_model(
        make_cfg("deepmask_rpn_only.yaml", "MODEL.DEEPMASK.CODE_DIM", 4,
                 "MODEL.DEEPMASK.MASK_CHANNELS", 4, "MODEL.DEEPMASK.SCORE_DIMS", (4, 4))
    )  # fmt: skip
    DetectionCheckpointer(model).load(path)
    trunk = model.proposal_generator.network.trunk.features
    for name, expected in weights.items():
        assert torch.equal(trunk.state_dict()[name.removeprefix("features.")], expected)


def test_full_names_load_into_two_trunks_and_beside_another_vgg(tmp_path):
    torch.manual_seed(1)
    public = public_weights(make_layers(cfgs["A"]))
    torch.save(public, tmp_path / "in.pth")
    output = str(tmp_path / "out.pkl")
    convert_main(["--architecture", "vgg11", "--separate-trunks", str(tmp_path / "in.pth"), output])
    assert np.load(output, allow_pickle=True)["matching_heuristics"] is False
    weights = convert_vgg11(public)
    small = ["MODEL.DEEPMASK.CODE_DIM", 4, "MODEL.DEEPMASK.MASK_CHANNELS", 4,
             "MODEL.DEEPMASK.SCORE_DIMS", (4, 4)]  # fmt: skip
    for overrides, trunks in (
        (["MODEL.DEEPMASK.SHARED_TRUNK", False], ("trunk", "score_trunk")),
        (["MODEL.BACKBONE.NAME", "build_vgg_backbone"], ("trunk",)),
    ):
        model = build_model(make_cfg("deepmask_rpn_only.yaml", *small, *overrides))
        DetectionCheckpointer(model).load(output)
        for trunk in trunks:
            state = getattr(model.proposal_generator.network, trunk).state_dict()
            assert set(state) == set(weights)
            assert all(torch.equal(state[name], weights[name]) for name in weights)


def test_conversion_names_what_does_not_fit():
    weights = public_weights(make_layers(cfgs["A"]))
    with pytest.raises(ValueError, match="VGG-A weights.*missing.*features.0.weight"):
        convert_vgg11({k: v for k, v in weights.items() if k != "features.0.weight"})
    with pytest.raises(ValueError, match="VGG-A weights.*unexpected"):
        convert_vgg11(weights | {"features.30.weight": weights["features.0.weight"]})
    with pytest.raises(ValueError, match="features.3.bias has shape"):
        convert_vgg11(weights | {"features.3.bias": torch.zeros(3)})


def test_an_image_has_the_same_maps_alone_and_in_a_padded_batch():
    """Told the sizes, as by the zoom network; without, a bias in the padding reaches the image."""
    torch.manual_seed(0)
    stages = [f"stage{k}" for k in range(1, 6)]
    backbone = VGG(stages=SMALL, out_features=stages).double()
    for index in backbone.convolutions.values():
        nn.init.normal_(backbone.features[index].bias)
    image = torch.randn(1, 3, 41, 50, dtype=torch.float64)
    size = torch.tensor([[41, 50]])
    alone = F.pad(image, (0, 14, 0, 7))  # to multiples of 16
    batch = torch.cat([F.pad(image, (0, 46, 0, 39)), torch.randn(1, 3, 80, 96).double()])
    sizes = torch.cat([size, torch.tensor([[80, 96]])])
    with torch.no_grad():
        expected, actual = backbone(alone, size), backbone(batch, sizes)
        leaking, cut = backbone(batch), backbone(alone)
    for k, name in enumerate(stages):
        rows, columns = -(-41 // 2**k), -(-50 // 2**k)
        first = actual[name][0]
        torch.testing.assert_close(
            first[:, :rows, :columns], expected[name][0, :, :rows, :columns], rtol=0, atol=1e-12
        )
        assert not first[:, rows:].any() and not first[:, :, columns:].any()
        assert first[:, rows - 1].any() and first[:, :, columns - 1].any()
        # The image that fills the batch is as without sizes.
        assert torch.equal(actual[name][1], leaking[name][1])
    difference = leaking["stage5"][0, :, :3, :4] - cut["stage5"][0, :, :3, :4]
    assert difference.abs().max() > 0.01


def test_batch_statistics_leave_the_padding_out():
    """In training, a batch and itself with more padding have the same maps, and statistics."""
    torch.manual_seed(0)
    networks = [VGG(stages=SMALL, norm="BN").double().train() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    sizes = torch.tensor([[32, 48], [41, 20]])
    images = torch.zeros(2, 3, 48, 48, dtype=torch.float64)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, dtype=torch.float64) + 1
    (expected,) = networks[0](images, sizes).values()
    (maps,) = networks[1](F.pad(images, (0, 64, 0, 32)), sizes).values()
    torch.testing.assert_close(maps[:, :, :3, :3], expected, rtol=0, atol=1e-10)
    assert not maps[:, :, 3:].any() and not maps[:, :, :, 3:].any() and expected.any()
    statistics = networks[1].state_dict()
    for name, value in networks[0].state_dict().items():
        torch.testing.assert_close(statistics[name], value, rtol=0, atol=1e-10)


def test_convolutions_by_name_and_their_mirrors():
    backbone = VGG(stages=VGG_D, width_factor=1 / 16)
    assert list(backbone.convolutions.values()) == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert backbone.level_blocks["stage5"] == ["conv5_1", "conv5_2", "conv5_3"]
    assert backbone.level_blocks["stage1"] == ["conv1_1", "conv1_2"]
    assert backbone.convolutions["conv4_2"] == 19
    mirror = backbone.mirror_block("conv4_1", 32, "")
    assert (mirror.in_channels, mirror.out_channels, mirror.kernel_size) == (32, 32, (3, 3))
