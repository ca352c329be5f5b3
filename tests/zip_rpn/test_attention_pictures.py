"""Tests of the pictures of ZIP's maps with and without attention."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from PIL import Image

from d2proposals.zip_rpn.attention_pictures import (
    AttentionMaps,
    AttentionPicture,
    attention_maps,
    heat_maps,
    write_attention_sheet,
)
from tests.common import make_cfg

SMALL = ("MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "MODEL.ZIP.HEAD_CHANNELS", 8)


def build(*overrides, config="shapes/zip_rpn_only.yaml"):
    torch.manual_seed(0)
    return build_model(make_cfg(config, *SMALL, *overrides)).eval()


def make_image(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 255, (3, *size), dtype=torch.uint8, generator=generator)


VGG = ("MODEL.VGG.WIDTH_FACTOR", 0.125, "MODEL.ZIP_DETECTOR.CHANNELS", 16)


@pytest.mark.parametrize(
    ("level", "stride", "config", "overrides"),
    [
        (1, 8, "shapes/zip_rpn_only.yaml", ()),
        (2, 16, "shapes/zip_rpn_only.yaml", ()),
        (1, 8, "zip_vgg16_detector.yaml", VGG),
    ],
)
def test_maps_are_those_the_model_uses(level, stride, config, overrides):
    model = build(*overrides, config=config)
    image = make_image((90, 130))
    maps = attention_maps(model, image, level)
    cells = (-(-90 // stride), -(-130 // stride))
    assert all(x.shape == cells for x in maps)
    # The attended map is what the model's head sees when the whole model runs.
    seen = []
    hook = model.proposal_generator.heads.heads[level - 1].conv.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0], output))
    )
    with torch.no_grad():
        model([{"image": image}])
    hook.remove()
    attended = seen[0][1][0].mean(0)[: cells[0], : cells[1]]
    assert torch.allclose(maps.attended, attended, atol=1e-5)
    # Without attention it is another one, by the same weights.
    assert not torch.allclose(maps.convolved, maps.attended, atol=1e-4)


def test_without_attention_both_convolutions_agree():
    maps = attention_maps(build("MODEL.ZOOM_NETWORK.MAD.TYPE", "none"), make_image((64, 64)))
    assert torch.equal(maps.convolved, maps.attended)


def test_lambda_4_and_a_resnet():
    resnet = ("MODEL.ZOOM_NETWORK.BOTTOM_UP", "build_resnet_backbone",
              "MODEL.ZOOM_NETWORK.IN_FEATURES", ["res3", "res4", "res5"],
              "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
              "MODEL.ZOOM_NETWORK.MAD.LAMBDA", 4)  # fmt: skip
    maps = attention_maps(build(*resnet), make_image((64, 96)))
    assert all(x.shape == (4, 6) and x.isfinite().all() for x in maps)


def as_maps(x):
    return AttentionMaps(x, x * 2, x * 3 + 1, x.new_zeros(x.shape))


def test_heat_lies_where_its_cell_lies():
    cells = torch.zeros(4, 6)
    cells[1, 4] = 5.0
    # 52 x 88 pixels of the network input (of 64 x 96), shown at twice their size.
    heat = heat_maps(as_maps(cells), (52, 88), 16, (104, 176))
    assert heat.shape == (4, 104, 176) and heat.dtype == np.float32
    row, column = np.unravel_index(heat[0].argmax(), heat[0].shape)
    # The cell's middle is at (24, 72): at (48, 144) in the picture.
    assert abs(row - 48) <= 2 and abs(column - 144) <= 2
    # Each map has its own scale; a constant one is 0.
    np.testing.assert_allclose(heat[1], heat[0], atol=1e-6)
    np.testing.assert_allclose(heat[2], heat[0], atol=1e-6)
    assert not heat[3].any() and heat.min() >= 0 and 0.9 < heat.max() <= 1


def test_heat_of_an_image_that_fills_its_cells_is_a_plain_resize():
    cells = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    heat = heat_maps(as_maps(cells), (24, 40), 8, (24, 40))
    scaled = (cells - cells.min()) / (cells.max() - cells.min())
    expected = F.interpolate(scaled[None, None], size=(24, 40), mode="bilinear")[0, 0]
    np.testing.assert_allclose(heat[0], expected, atol=1e-6)


@pytest.mark.parametrize("sizes", [[(40, 60)], [(40, 60), (600, 50), (1, 1)]])
def test_sheet(tmp_path, sizes):
    pictures = [
        AttentionPicture(f"image {size}" * 9, np.zeros((*size, 3), np.uint8), np.zeros((4, *size)))
        for size in sizes
    ]
    path = tmp_path / "sheet.png"
    write_attention_sheet(path, pictures, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1000


def test_sheet_without_images(tmp_path):
    with pytest.raises(ValueError, match="needs at least one image"):
        write_attention_sheet(tmp_path / "sheet.png", [])


@pytest.mark.parametrize(
    ("config", "overrides", "level", "message"),
    [
        ("shapes/rpn_only.yaml", (), 2, "the backbone is a FPN; set MODEL.BACKBONE.NAME to"),
        (
            "shapes/zip_rpn_only.yaml",
            ("MODEL.ZOOM_NETWORK.ZOOM_IN", False, "MODEL.ZOOM_NETWORK.MAD.TYPE", "none"),
            2,
            "set MODEL.ZOOM_NETWORK.ZOOM_IN to True",
        ),
        ("shapes/zip_rpn_only.yaml", (), 3, "level must be 1 or 2, not 3"),
        (
            "shapes/zip_rpn_only.yaml",
            ("MODEL.ZOOM_NETWORK.OUT_CHANNELS", 16),
            2,
            "set MODEL.ZOOM_NETWORK.OUT_CHANNELS to 0",
        ),
        ("shapes/zip_single_stage.yaml", (), 2, "need the generator ZIP|OUT_CHANNELS to 0"),
        (
            "shapes/zip_rpn_only.yaml",
            ("MODEL.ZIP.IN_FEATURES", ["zoom2", "zoom3"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]),
            1,
            "level 1 need the generator ZIP on 'zoom1'",
        ),
        (
            "shapes/zip_rpn_only.yaml",
            ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.RPN.IN_FEATURES", ["zoom3"],
             "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]),
            2,
            "need the generator ZIP",
        ),
    ],
)  # fmt: skip
def test_models_without_such_maps(config, overrides, level, message):
    model = build(*overrides, config=config)
    with pytest.raises(ValueError, match=message):
        attention_maps(model, make_image((64, 64)), level)
