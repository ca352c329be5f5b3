import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from d2proposals.zip_rpn.zoom_network import IMAGE_SIZES, ZoomNetwork
from tests.common import make_cfg, make_images

SMALL = ["MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "MODEL.BN_INCEPTION.NORM", "GN",
         "MODEL.ZOOM_NETWORK.NORM", "GN"]  # fmt: skip


def build(*overrides, small=True) -> ZoomNetwork:
    torch.manual_seed(0)
    cfg = make_cfg(
        None,
        "MODEL.BACKBONE.NAME", "build_zoom_network_backbone", "MODEL.BACKBONE.FREEZE_AT", 0,
        *(SMALL if small else ()), *overrides,
    )  # fmt: skip
    return build_backbone(cfg)


RESNET = ["MODEL.ZOOM_NETWORK.BOTTOM_UP", "build_resnet_backbone",
          "MODEL.ZOOM_NETWORK.IN_FEATURES", ["res3", "res4", "res5"],
          "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
          "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]  # fmt: skip


def test_full_size_channels_strides_and_parameters():
    network = build(small=False)
    channels = {name: shape.channels for name, shape in network.output_shape().items()}
    assert channels == {"zoom1": 640, "zoom2": 1216, "zoom3": 1024}  # paper, Sec. 4
    strides = {name: shape.stride for name, shape in network.output_shape().items()}
    assert strides == {"zoom1": 8, "zoom2": 16, "zoom3": 32}
    # Three 3x3 convolutions with 2C channels each: C = 320 and 608, from 1024 channels of F3.
    expected = sum(9 * (1024 * d + d * d + d * d) + 3 * d for d in (640, 1216))
    assert sum(p.numel() for p in network.attentions.parameters()) == expected == 51_099_072


def test_mirror_is_the_zoom_out_path_backwards():
    path = build(small=False).zoom_in_path
    assert list(path.level3) == ["mirror_5b", "mirror_5a"]
    assert list(path.level2) == ["mirror_4d", "mirror_4c", "mirror_4b", "mirror_4a"]
    assert list(path.level1) == ["mirror_3b", "mirror_3a"]
    assert path.upsample2.weight.shape == (608, 1024, 1, 1)
    assert path.upsample1.weight.shape == (320, 576, 1, 1)
    assert path.project.weight.shape == (320, 256, 1, 1)
    released = build("MODEL.ZOOM_NETWORK.MIRROR_DEPTHS", (2, 2, 0), small=False).zoom_in_path
    assert list(released.level2) == ["mirror_4d", "mirror_4c"] and len(released.level1) == 0
    assert released.project is None


@pytest.mark.parametrize("bottom_up", [[], RESNET], ids=["bn_inception", "resnet"])
@pytest.mark.parametrize(
    "variant",
    [
        [],
        ["MODEL.ZOOM_NETWORK.MIRROR_DEPTHS", (2, 2, 0)],
        ["MODEL.ZOOM_NETWORK.MAD.TYPE", "spatial"],
        ["MODEL.ZOOM_NETWORK.MAD.TYPE", "excitation", "MODEL.ZOOM_NETWORK.MAD.LAMBDA", 4],
        ["MODEL.ZOOM_NETWORK.MAD.TYPE", "none"],
        ["MODEL.ZOOM_NETWORK.MAD.LAMBDA", 4],
        ["MODEL.ZOOM_NETWORK.MAD.TYPE", "none", "MODEL.ZOOM_NETWORK.ZOOM_IN", False],
    ],
    ids=["mad", "released", "spatial", "excitation", "no_mad", "lambda4", "zoom_out"],
)
def test_maps_of_an_image_alone_and_in_a_padded_batch(bottom_up, variant):
    network = build(*bottom_up, *variant).eval()
    sizes = torch.tensor([[75, 100], [128, 160]])
    shapes = [network.bottom_up.output_shape()[name] for name in network.in_features]
    # 75 rows are 10, 5 and 3 cells; the batch is padded to 128 rows: 16, 8 and 4.
    batch = [torch.rand(2, s.channels, 128 // s.stride, 160 // s.stride) for s in shapes]
    together = network.zoom_maps(batch, sizes)["attended"]
    alone_maps = [
        x[:1, :, : -(-96 // s.stride), : -(-128 // s.stride)]  # padded to 32 pixels, as stock
        for x, s in zip(batch, shapes, strict=True)
    ]
    alone = network.zoom_maps(alone_maps, sizes[:1])["attended"]
    for a, b, s in zip(alone, together, shapes, strict=True):
        rows, columns = -(-75 // s.stride), -(-100 // s.stride)
        inside = a[..., :rows, :columns]
        torch.testing.assert_close(inside, b[:1, :, :rows, :columns], atol=1e-4, rtol=1e-4)
        assert inside.abs().max() > 0
        assert (b[0, :, rows:] == 0).all() and (b[0, :, :, columns:] == 0).all()


def test_forward_gives_maps_of_the_declared_shapes_and_the_sizes_it_saw():
    network = build()
    images = make_images((70, 96), (64, 128))
    outputs = network(images.tensor)
    assert outputs.pop(IMAGE_SIZES).tolist() == [[70, 96], [64, 128]]
    for name, shape in network.output_shape().items():
        height, width = (side // shape.stride for side in images.tensor.shape[-2:])
        assert outputs[name].shape == (2, shape.channels, height, width)


@pytest.mark.parametrize("bottom_up", [[], RESNET], ids=["bn_inception", "resnet"])
@pytest.mark.parametrize("num_sources", [2, 4])
def test_every_parameter_gets_a_gradient(bottom_up, num_sources):
    norm = ["MODEL.RESNETS.NORM", "BN"]
    network = build(*bottom_up, *norm, "MODEL.ZOOM_NETWORK.MAD.LAMBDA", num_sources)
    outputs = network(make_images((64, 96), (96, 64)).tensor)
    sum(outputs[name].square().sum() for name in network.output_shape()).backward()
    without = [
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without == []


def test_level_2_of_the_attended_maps_is_f_and_h_times_the_vector():
    network = build().eval()
    images = make_images((64, 64))
    features = network.bottom_up(images.tensor)
    maps = network.zoom_maps([features[n] for n in network.in_features], torch.tensor([[64, 64]]))
    merged = torch.cat([maps["zoom_out"][1], maps["zoom_in"][1]], dim=1)
    assert torch.equal(maps["concatenated"][1], merged)
    vector = network.attentions[1].vector(maps["zoom_out"][2], torch.ones(1, 1, 2, 2))
    assert torch.equal(maps["attended"][1], merged * vector)
    assert torch.equal(maps["attended"][2], features["inception_5b"])  # level 3: F3 alone


def maps_of_one_image(network):
    """All maps of an image without padding: 8 x 12 cells on level 1, 4 x 6 and 2 x 3."""
    features = network.bottom_up(make_images((64, 96)).tensor)
    zoom_out = [features[name] for name in network.in_features]
    return network.zoom_maps(zoom_out, torch.tensor([[64, 96]]))


@torch.no_grad()
def test_excitation_vectors_come_from_each_level_s_own_maps_and_act_on_f3_too():
    network = build("MODEL.ZOOM_NETWORK.MAD.TYPE", "excitation").eval()
    maps = maps_of_one_image(network)
    inputs = [*maps["concatenated"], maps["zoom_out"][2]]  # "for level m = 3, [...] F(3)"
    for level, (x, attended) in enumerate(zip(inputs, maps["attended"], strict=True)):
        unit = network.attentions[level]
        vector = unit.excite(unit.squeeze(x.mean(dim=(2, 3))).relu()).sigmoid()
        assert torch.allclose(attended, x * vector[:, :, None, None], atol=1e-5)
        assert (x > 0).any() and vector.std() > 0


@torch.no_grad()
def test_lambda_4_appends_the_other_levels_projected_and_resampled():
    network = build("MODEL.ZOOM_NETWORK.MAD.LAMBDA", 4).eval()
    maps = maps_of_one_image(network)
    (f1, f2, f3), (h1, h2) = maps["zoom_out"], maps["zoom_in"]
    (f2_to_1, f3_to_1), (f1_to_2, f3_to_2) = network.source_projections

    def enlarge(x, factor):
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    level1 = torch.cat([f1, h1, enlarge(f2_to_1(f2), 2), enlarge(f3_to_1(f3), 4)], dim=1)
    level2 = torch.cat([f2, h2, F.avg_pool2d(f1_to_2(f1), 2), enlarge(f3_to_2(f3), 2)], dim=1)
    for actual, expected in zip(maps["concatenated"], (level1, level2), strict=True):
        assert torch.allclose(actual, expected, atol=1e-5)
        # None of the four sources is blank.
        assert all(source.any() for source in expected.chunk(4, dim=1))
    vector = network.attentions[0].vector(f3, torch.ones(1, 1, 2, 3))
    assert torch.equal(maps["attended"][0], maps["concatenated"][0] * vector)


def test_h2_is_the_mirrored_top_resized_and_convolved():
    network = build("MODEL.ZOOM_NETWORK.MIRROR_DEPTHS", (1, 0, 0)).eval()
    path = network.zoom_in_path
    top = torch.rand(1, network.output_shape()["zoom3"].channels, 2, 3)
    ones = [torch.ones(1, 1, 8, 12), torch.ones(1, 1, 4, 6), torch.ones(1, 1, 2, 3)]
    h1, h2 = path(top, ones)
    x = F.interpolate(path.level3["mirror_5b"](top), scale_factor=2.0, mode="bilinear")
    assert torch.allclose(h2, path.upsample2(x), atol=1e-5)
    x = F.interpolate(h2, scale_factor=2.0, mode="bilinear")
    assert torch.allclose(h1, path.upsample1(x), atol=1e-5)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["MODEL.ZOOM_NETWORK.IN_FEATURES", ["inception_3b", "res4", "res5"]], "does not return"),
        (["MODEL.ZOOM_NETWORK.IN_FEATURES", ["inception_3b", "inception_4d"]], "three maps"),
        (["MODEL.ZOOM_NETWORK.MAD.LAMBDA", 3], "MAD.LAMBDA must be 2 or 4"),
        (["MODEL.ZOOM_NETWORK.ZOOM_IN", False], "no second stream"),
        (
            ["MODEL.ZOOM_NETWORK.ZOOM_IN", False, "MODEL.ZOOM_NETWORK.MAD.LAMBDA", 4],
            "merges no maps: leave MODEL.ZOOM_NETWORK.MAD.LAMBDA at 2",
        ),
        (["MODEL.ZOOM_NETWORK.MIRROR_DEPTHS", (2, 5, 2)], "asks for 5 mirrored blocks"),
        (["MODEL.ZOOM_NETWORK.MIRROR_DEPTHS", (2, 4)], "three numbers of blocks"),
        (["MODEL.ZOOM_NETWORK.MAD.TYPE", "attention"], "MAD.TYPE must be one of"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(*overrides)


def test_explicit_constructor_equals_from_config():
    from_config = build()
    torch.manual_seed(0)
    bottom_up = type(from_config.bottom_up)(width_factor=0.125, norm="GN")
    explicit = ZoomNetwork(
        bottom_up=bottom_up,
        in_features=["inception_3b", "inception_4d", "inception_5b"],
        norm="GN",
    )
    assert isinstance(explicit.output_shape()["zoom1"], ShapeSpec)
    explicit.load_state_dict(from_config.state_dict())
    x = make_images((64, 64)).tensor
    assert torch.equal(explicit(x)["zoom1"], from_config(x)["zoom1"])
