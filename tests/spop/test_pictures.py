"""Pictures of SPOP's maps, and their command."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from d2proposals.proposals.native_size import ImageSizes, given_sizes
from d2proposals.spop.pictures import make_picture, write_sheet
from d2proposals.spop.pixel_networks import PixelNetworks
from tests.common import CONFIGS
from tests.spop.test_spop_generator import build_generator, perfect_generator

TOOL = Path(__file__).resolve().parents[2] / "tools" / "visualize_spop.py"
BOXES = [[8.0, 8.0, 72.0, 56.0], [80.0, 16.0, 96.0, 48.0]]  # a large and a small object


def fake_model(generator):
    pixels = torch.zeros(3, 1, 1)
    return SimpleNamespace(proposal_generator=generator, pixel_mean=pixels, pixel_std=pixels + 1)


def test_arrows_lead_to_the_centres_of_the_objects():
    generator = perfect_generator(BOXES, (64, 104))
    image = torch.randint(0, 256, (3, 64, 104)).float()
    for scale in (1.0, 2.0):
        picture = make_picture(fake_model(generator), image, scale=scale)
        assert np.array_equal(picture.image, image.permute(1, 2, 0).numpy())
        assert picture.extent == (104, 64)
        inside = np.zeros(len(picture.cells), dtype=bool)
        for (x1, y1, x2, y2), is_large in zip(BOXES, (True, False), strict=True):
            x, y = picture.cells.T
            on_object = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
            assert on_object.sum() == (x2 - x1) * (y2 - y1) * scale**2 / 64
            assert np.allclose(
                picture.centres[on_object], [(x1 + x2) / 2, (y1 + y2) / 2], atol=0.01
            )
            assert (picture.is_large[on_object] == is_large).all()
            inside |= on_object
        assert inside.all()
        assert sorted(picture.boxes.round().tolist()) == BOXES
        assert picture.box_is_large[picture.boxes[:, 0].argsort()].tolist() == [True, False]


def test_the_scale_refers_to_the_image_as_it_was(tmp_path, monkeypatch):
    # An image of 64 x 104, enlarged to 128 x 208: the same cells, in pixels of the enlarged one.
    boxes = [[2 * x for x in box] for box in BOXES]
    generator = perfect_generator(boxes, (128, 208))
    image = torch.randint(0, 256, (3, 128, 208)).float()
    with given_sizes([ImageSizes((128, 208), (64, 104), (128, 208))]):
        picture = make_picture(fake_model(generator), image, scale=2.0)
        assert picture.objectness.shape == (16, 26)
        assert make_picture(fake_model(generator), image).objectness.shape == (8, 13)
    assert sorted(picture.boxes.round().tolist()) == boxes
    assert make_picture(fake_model(generator), image).objectness.shape == (16, 26)
    # The command tells it: 40 x 50, enlarged to 80 x 100.
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "a.png")
    seen = []
    predict_maps = PixelNetworks.predict_maps
    monkeypatch.setattr(
        PixelNetworks, "predict_maps",
        lambda self, image, size: seen.append((image.shape[1:], size))
        or predict_maps(self, image, size),
    )  # fmt: skip
    main = runpy.run_path(str(TOOL))["main"]
    main(["--config-file", str(CONFIGS / "shapes" / "spop_rpn_only.yaml"), "--input",
          str(tmp_path / "a.png"), "--output", str(tmp_path / "out.png"), "MODEL.DEVICE", "cpu",
          "INPUT.MIN_SIZE_TEST", "80"])  # fmt: skip
    assert seen == [((80, 100), (40, 50))]


@pytest.mark.parametrize("overrides", [(), ("MODEL.SPOP.SCALE_AWARE", False)])
def test_sheet(tmp_path, overrides):
    model = fake_model(build_generator(*overrides).eval())
    pictures = [
        make_picture(model, torch.zeros(3, *size), name="x" * 50) for size in ((40, 64), (64, 9))
    ]
    assert (pictures[0].size is None) == bool(overrides)
    write_sheet(tmp_path / "sheet.png", pictures)
    with Image.open(tmp_path / "sheet.png") as image:
        image.load()
        assert image.format == "PNG" and image.size[0] > 2000


def test_sheet_of_an_image_without_objects(tmp_path):
    generator = perfect_generator(BOXES, (64, 104))
    generator.networks.confidence.truth.boxes = torch.zeros(1, 4)
    picture = make_picture(fake_model(generator), torch.zeros(3, 64, 104))
    assert len(picture.cells) == len(picture.boxes) == 0
    write_sheet(tmp_path / "sheet.png", [picture])
    with pytest.raises(ValueError, match="at least one image"):
        write_sheet(tmp_path / "sheet.png", [])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_that_are_not_allowed(scale):
    with pytest.raises(ValueError, match="--scale.* must be a positive factor"):
        make_picture(fake_model(build_generator()), torch.zeros(3, 16, 16), scale=scale)


def test_the_command(tmp_path, capsys):
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "a.png")
    output = tmp_path / "out.png"
    config = str(CONFIGS / "shapes" / "spop_rpn_only.yaml")
    main = runpy.run_path(str(TOOL))["main"]
    main(["--config-file", config, "--input", str(tmp_path / "a.png"), "--output", str(output),
          "MODEL.DEVICE", "cpu"])  # fmt: skip
    assert "1 images" in capsys.readouterr().out and output.is_file()
    with pytest.raises(SystemExit, match="Error: MODEL.PROPOSAL_GENERATOR.NAME is SCRPN"):
        main(["--config-file", str(CONFIGS / "shapes" / "sc_rpn_only.yaml"), "--input",
              str(tmp_path / "a.png"), "--output", str(output), "MODEL.DEVICE", "cpu"])  # fmt: skip
