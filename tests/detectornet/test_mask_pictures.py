"""Pictures of the five masks: what is drawn where, and the command."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from d2proposals.detectornet.box_masks import box_mask_targets
from d2proposals.detectornet.mask_pictures import (
    MaskPicture,
    half_colours,
    picture_masks,
    pixel_masks,
    write_mask_sheet,
)
from d2proposals.detectornet.windows import make_windows, merge_masks
from tests.common import CONFIGS, make_cfg

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SMALL = ["MODEL.DETECTORNET.WIDTH_FACTOR", 0.03, "MODEL.DETECTORNET.SCORE_THRESH", -1.0]


def test_masks_of_whole_cells_are_the_boxes_pixels():
    size = (48, 96)
    box = torch.tensor([[24.0, 12.0, 72.0, 36.0]])
    windows = make_windows(size)[1]
    masks = box_mask_targets(box, torch.zeros(1).long(), windows.boxes(), 1, 24)
    full, bottom, top, left, right = pixel_masks(merge_masks(masks, windows), size)
    expected = np.zeros(size)
    expected[12:36, 24:72] = 1
    np.testing.assert_allclose(full, expected)
    np.testing.assert_allclose(top, expected * (np.arange(48) < 24)[:, None])
    np.testing.assert_allclose(right, expected * (np.arange(96) >= 48))
    np.testing.assert_allclose(bottom + top, expected)
    np.testing.assert_allclose(left + right, expected)


def test_colours_of_the_halves():
    masks = np.zeros((5, 1, 6))
    masks[0] = 1  # the full mask has a picture of its own
    for index in range(1, 5):
        masks[index, 0, index] = 0.5
    masks[[1, 4], 0, 5] = 1.0  # red and yellow
    expected = [[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0], [1, 0.5, 0]]
    np.testing.assert_allclose(half_colours(masks)[0], expected)


def test_what_cannot_be_drawn(tmp_path):
    image = torch.zeros(3, 64, 96)
    model = build_model(make_cfg("shapes/detectornet_rpn_only.yaml", *SMALL)).eval()
    with pytest.raises(ValueError, match="scale must be from 1 to 3, got 4"):
        picture_masks(model, image, name="x", scale=4)
    with pytest.raises(ValueError, match="class must be from 0 to 0, got 1"):
        picture_masks(model, image, name="x", class_id=1)
    model.proposal_generator = torch.nn.Identity()
    with pytest.raises(ValueError, match="DetectorNet, not Identity"):
        picture_masks(model, image, name="x")
    with pytest.raises(ValueError, match="at least one image"):
        write_mask_sheet(tmp_path / "x.png", [])


def test_a_sheet_shows_boxes_and_masks(tmp_path):
    image, masks = np.full((60, 80, 3), 128, np.uint8), np.zeros((5, 60, 80))
    masks[2] = 1  # the top halves: green everywhere
    picture = MaskPicture("a", image, masks, np.array([[10.0, 10, 50, 40]]))
    write_mask_sheet(tmp_path / "sheet.png", [picture])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    third = sheet.shape[1] // 3
    green, red = ((sheet == colour).all(axis=2) for colour in ((0, 255, 0), (255, 0, 0)))
    assert green[:, 2 * third :].mean() > 0.5 and green[:, : 2 * third].sum() == 0
    assert red[:, :third].sum() > 50 and red[:, third:].sum() == 0


def test_the_command(tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    config, output = CONFIGS / "shapes" / "detectornet_rpn_only.yaml", tmp_path / "masks.png"
    runpy.run_path(str(TOOLS / "visualize_box_masks.py"))["main"](
        ["--config-file", str(config), "--input", str(tmp_path / "a.png"), "--output", str(output),
         "MODEL.DEVICE", "cpu", *(str(x) for x in SMALL)]
    )  # fmt: skip
    assert "scale 2 of 1 images" in capsys.readouterr().out
    with Image.open(output) as sheet:
        sheet.load()
        assert sheet.format == "PNG"
