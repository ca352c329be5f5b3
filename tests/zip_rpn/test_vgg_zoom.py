"""The zoom network over VGG-16 (Sec. 5.4): its structure, its weights, padding."""

import logging

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from skimage import data
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.functional import normalize

from d2proposals.backbones.torchvision_weights import PIXELS, adapt_to_pixels
from d2proposals.backbones.vgg import VGG, VGG_D
from d2proposals.backbones.vgg_zoom_conversion import convert_vgg16_zoom
from tests.common import make_cfg
from tools.convert_weights import (
    MIRROR_DEPTHS,
    build_parser,
    build_zoom_network,
    main,
    zoom_weights,
)

SMALL = ["MODEL.VGG.WIDTH_FACTOR", 0.125, "MODEL.ZIP.HEAD_CHANNELS", 16,
         "MODEL.ZIP_DETECTOR.CHANNELS", 16, "MODEL.ZIP_DETECTOR.NORM", "GN"]  # fmt: skip


@pytest.fixture(scope="module")
def public():
    """Weights by torchvision's names: the convolutional part alone, in half precision."""
    with torch.device("meta"):
        state = torchvision.models.vgg16().state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator).half()
        for name, value in state.items()
        if name.startswith("features.")
    }


def test_paper_s_geometry_over_vgg16():
    with torch.device("meta"):
        model = build_model(make_cfg("zip_vgg16_detector.yaml", "MODEL.DEVICE", "meta"))
    network = model.backbone
    assert network.strides == [8, 16, 32]
    path = network.zoom_in_path
    names = [list(level) for level in (path.level3, path.level2, path.level1)]
    assert names == [
        ["mirror_conv6_1"],
        ["mirror_conv5_3", "mirror_conv5_2", "mirror_conv5_1"],
        ["mirror_conv4_3", "mirror_conv4_2", "mirror_conv4_1"],
    ]
    assert path.project is None  # H1 has as many channels as F1 as it is
    shapes = network.output_shape()
    assert [shapes[f"zoom{m}"].channels for m in (1, 2, 3)] == [1024, 1024, 1024]
    # The converter's network is the configuration's.
    names = {k: v.shape for k, v in network.state_dict().items()}
    theirs = build_zoom_network("vgg16", None, trainable_norm=False).state_dict()
    assert {k: v.shape for k, v in theirs.items()} == names
    assert (
        tuple(make_cfg("zip_vgg16_detector.yaml").MODEL.ZOOM_NETWORK.MIRROR_DEPTHS)
        == (MIRROR_DEPTHS["vgg16"])
    )


def test_weights_and_their_mirrors(public, caplog):
    network = build_zoom_network("vgg16", None, trainable_norm=False)
    state = network.state_dict()
    with caplog.at_level(logging.INFO, "d2proposals"):
        weights = convert_vgg16_zoom(public, network.bottom_up, state)
    assert caplog.messages[-1].startswith("2 of 7 mirrored convolutions keep their initial")
    assert caplog.messages[-1].endswith("conv6_1, conv4_1")
    assert len(weights) == 26 + 2 * 5
    for key, value in weights.items():
        assert value.dtype == torch.float32
        assert value.shape == state[key.removeprefix("backbone.")].shape
    for name, value in public.items():
        if name == "features.0.weight":  # adapted to the pixels, see below
            continue
        assert torch.equal(weights[f"backbone.bottom_up.{name}"], value.float())
    for level, layer, index in ((2, "conv5_3", 28), (2, "conv5_1", 24), (1, "conv4_2", 19)):
        for leaf in ("weight", "bias"):
            copy = weights[f"backbone.zoom_in_path.level{level}.mirror_{layer}.{leaf}"]
            assert torch.equal(copy, public[f"features.{index}.{leaf}"].float())


def test_the_command_reads_torchvisions_file(public, tmp_path, capsys):
    torch.save(public | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg16.pth")
    arguments = ["--architecture", "vgg16", "--zoom-network"]
    main([*arguments, str(tmp_path / "vgg16.pth"), str(tmp_path / "zip.pkl")])
    assert "36 tensors of vgg16" in capsys.readouterr().out
    short = {name: value for name, value in public.items() if name != "features.28.bias"}
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "short.pth"), str(tmp_path / "zip.pkl")])
    assert "VGG-16 weights: of 26 keys 1 missing (features.28.bias)" in capsys.readouterr().err


@pytest.mark.parametrize("pixels", sorted(PIXELS))
def test_a_photograph_has_torchvisions_maps(pixels):
    """The configuration's pixels, through the converted weights, and torchvision's own."""
    torch.manual_seed(0)
    theirs = make_layers(cfgs["D"]).eval()
    public = {f"features.{name}": value for name, value in theirs.state_dict().items()}
    arguments = ["--architecture", "vgg16", "--zoom-network", "--pixels", pixels, "", ""]
    weights = zoom_weights(build_parser().parse_args(arguments), public)
    ours = VGG(stages=VGG_D, out_features=["stage4", "stage5"]).eval()
    ours.load_state_dict(
        {k.removeprefix("backbone.bottom_up."): v for k, v in weights.items() if "up.feat" in k}
    )
    # RGB, rows and columns around the face.
    photo = torch.from_numpy(data.astronaut()[60:124, 180:260]).permute(2, 0, 1)
    cfg = make_cfg("zip_vgg16_detector.yaml")
    assert cfg.INPUT.FORMAT == "BGR"
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    if pixels == "torchvision":
        settings = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()
        images = normalize(photo / 255, settings.mean, settings.std)
    else:  # Detectron2's defaults
        default = get_cfg().MODEL.PIXEL_MEAN
        images = photo.flip(0) - torch.tensor(default)[:, None, None]
    with torch.no_grad():
        maps = ours(((photo.flip(0) - mean) / std)[None])
        expected = theirs[:23](images[None])
        torch.testing.assert_close(maps["stage4"], expected, rtol=1e-4, atol=1e-4 * expected.max())
        expected = theirs[23:30](expected)
        torch.testing.assert_close(maps["stage5"], expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_pixels_of_another_mean_cannot_be_made_up_for():
    weight, target = torch.zeros(1, 3, 1, 1), PIXELS["caffe"]._replace(mean=(104.0, 117.0, 128.0))
    with pytest.raises(ValueError, match=r"mean \(103.53, 116.28, 123.675\) \(BGR\)"):
        adapt_to_pixels(weight, PIXELS["torchvision"], target)


def test_pixels_are_asked_for_where_they_are_used(capsys):
    with pytest.raises(SystemExit):
        main(["--architecture", "vgg16", "--pixels", "caffe", "in.pth", "out.pkl"])
    assert "--pixels caffe goes with --architecture vgg16 --zoom" in capsys.readouterr().err


def test_an_image_gets_the_same_proposals_alone_and_in_a_padded_batch():
    torch.manual_seed(0)
    model = build_model(make_cfg("zip_vgg16_detector.yaml", *SMALL)).double().eval()
    for name, parameter in model.backbone.named_parameters():
        if name.endswith("bias"):  # as trained ones, which make something of the padding
            torch.nn.init.normal_(parameter, std=0.1)
    for head in model.proposal_generator.heads.heads:
        torch.nn.init.normal_(head.class_logits.weight, std=0.5)
    generator = torch.Generator().manual_seed(1)
    small, large = (
        {"image": torch.randint(0, 256, (3, *size), generator=generator).double()}
        for size in ((75, 100), (160, 192))
    )

    def proposals(batch):
        images = model.preprocess_image(batch)
        with torch.no_grad():
            return model.proposal_generator(images, model.backbone(images.tensor))[0][0]

    alone, together = proposals([small]), proposals([small, large])
    assert len(alone) == len(together) > 20
    assert alone.objectness_logits.std() > 1e-3
    torch.testing.assert_close(together.objectness_logits, alone.objectness_logits)
    torch.testing.assert_close(
        together.proposal_boxes.tensor, alone.proposal_boxes.tensor, rtol=0, atol=1e-4
    )
