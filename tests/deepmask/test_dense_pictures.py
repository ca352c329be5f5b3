"""The picture of masks at every window of a row (Fig. 2), and its command."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model, build_proposal_generator
from PIL import Image
from torch import nn

from d2proposals.deepmask import trunk_maps
from d2proposals.deepmask.dense_inference import predict_row_of_windows, predict_windows
from d2proposals.deepmask.dense_pictures import MASK_COLOUR, make_dense_picture, write_sheet
from tests.common import CONFIGS, make_cfg
from tests.deepmask.deepmask_networks import build_network

TOOL = Path(__file__).resolve().parents[2] / "tools" / "visualize_dense_masks.py"
CONFIG = "shapes/deepmask_rpn_only.yaml"


def make_picture(model, image, name="", scale=1.0, num_windows=24):
    return make_dense_picture(model, image, name, scale, num_windows)


def square_model():
    """Its mask is the second quarter of each window's width, the upper half of its height."""
    generator = build_proposal_generator(make_cfg(CONFIG), {}).eval()
    head = generator.network.mask_head
    nn.init.zeros_(head.classify.weight)
    mask = torch.full((28, 28), -9.0)
    mask[:14, 7:14] = 9.0
    with torch.no_grad():
        head.classify.bias.copy_(mask.flatten())
    model = make_cfg(CONFIG).MODEL
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.PIXEL_MEAN, model.PIXEL_STD))
    return SimpleNamespace(proposal_generator=generator, pixel_mean=mean, pixel_std=std)


def test_windows_show_the_image_around_their_centres_and_their_masks():
    model = square_model()
    image = torch.randint(0, 256, (3, 90, 130)).float()
    picture = make_picture(model, image, name="x", num_windows=100)
    rgb = image.permute(1, 2, 0).numpy()
    assert np.array_equal(picture.image, rgb)
    # Stride 8, patches of 112 pixels: row 5 of windows, centred on row 40.
    assert picture.centres.tolist() == [[8 * k, 40] for k in range(130 // 8 + 1)]
    assert picture.windows.shape == (17, 112, 112, 3)
    padded = np.pad(rgb, ((200, 200), (200, 200), (0, 0)), constant_values=-1)
    mean = model.pixel_mean.flatten().round().numpy()
    for (x, y), window in zip(picture.centres, picture.windows, strict=True):
        expected = padded[y + 200 - 56 : y + 200 + 56, x + 200 - 56 : x + 200 + 56]
        expected = np.where(expected < 0, mean, expected)
        expected[:56, 28:56] = expected[:56, 28:56] * 0.4 + np.array(MASK_COLOUR) * 0.6
        # A pixel around the mask's outline is between the cells' logits.
        assert np.abs(window - expected).max(axis=2)[:52, 32:52].max() <= 1
        assert np.abs(window - expected)[60:].max() == np.abs(window - expected)[:, 60:].max() == 0


def test_few_windows_are_spread_and_scales_are_drawn():
    model, image = square_model(), torch.randint(0, 256, (3, 90, 130)).float()
    picture = make_picture(model, image, scale=2.0, num_windows=3)
    assert picture.image.shape == (180, 260, 3)
    assert picture.centres.tolist() == [[0, 88], [128, 88], [256, 88]]
    # Each of them with its own mask.
    head = model.proposal_generator.network.mask_head
    nn.init.normal_(head.classify.weight, std=10.0)
    few, every = (make_picture(model, image, scale=2.0, num_windows=n) for n in (3, 100))
    assert np.array_equal(few.windows, every.windows[[0, 16, 32]])


@pytest.mark.parametrize("tile_pixels", [2**21, 2**15])
@torch.no_grad()
def test_a_row_of_windows_is_that_of_the_whole(tile_pixels, monkeypatch):
    # The smaller tiles give two bands of rows.
    monkeypatch.setattr(trunk_maps, "TILE_PIXELS", tile_pixels)
    network, image = build_network(patch_size=64), torch.randn(3, 140, 90)
    whole = predict_windows(network, nn.Identity(), image, [1.0], 10**6)
    for row in range(140 // 16 + 1):
        windows = predict_row_of_windows(network, nn.Identity(), image, 1.0, row)
        assert len(windows.frames) == 90 // 16 + 1
        for k, frame in enumerate(windows.frames):
            (same,) = (whole.frames == frame).all(dim=1).nonzero()[:, 0].tolist()
            assert whole.score_logits[same] == windows.score_logits[k]
            torch.testing.assert_close(whole.mask_logits[same], windows.mask_logits[k])
    with pytest.raises(IndexError, match="no row 9"):
        predict_row_of_windows(network, nn.Identity(), image, 1.0, 9)


def test_sheet(tmp_path):
    model = square_model()
    images = [torch.zeros(3, 40, 200), torch.zeros(3, 200, 9)]
    write_sheet(tmp_path / "x.png", [make_picture(model, x, name="x" * 99) for x in images])
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG" and image.size[0] > 1000
    with pytest.raises(ValueError, match="at least one image"):
        write_sheet(tmp_path / "y.png", [])


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"scale": math.inf}, {"num_windows": 0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="must be"):
        make_picture(square_model(), torch.zeros(3, 30, 30), **settings)


def test_a_model_of_another_generator():
    model = build_model(make_cfg("shapes/rpn_only.yaml"))
    with pytest.raises(ValueError, match="this needs 'DeepMask'"):
        make_picture(model, torch.zeros(3, 30, 30))


def test_the_command(tmp_path, capsys):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(path)
    output = tmp_path / "dense.png"
    runpy.run_path(str(TOOL))["main"](
        ["--config-file", str(CONFIGS / CONFIG), "--input", str(path), "--output", str(output),
         "--windows", "5", "MODEL.DEVICE", "cpu"]
    )  # fmt: skip
    assert "1 images" in capsys.readouterr().out
    assert np.asarray(Image.open(output).convert("RGB")).std() > 10
