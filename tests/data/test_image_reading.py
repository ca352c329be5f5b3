"""Tests of images that Detectron2's own reader would get wrong, through the mapper."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import BoxMode
from PIL import Image

from d2proposals import add_d2proposals_config
from d2proposals.data.image_reading import readable_name
from d2proposals.data.mapper import ProposalDatasetMapper


@pytest.fixture
def mapper():
    """Of training, at the images' own size."""
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    cfg.INPUT.RANDOM_FLIP = "none"
    return ProposalDatasetMapper(cfg, True)


def record(path, size, box):
    height, width = size
    item = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return {"file_name": str(path), "height": height, "width": width, "annotations": [item]}


def save_with_object(path, orientation=None):
    """40 x 60 stored pixels with a white object at (30, 10, 50, 20)."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:20, 30:50] = 255
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def brightness(out):
    """Mean brightness inside and outside of the object's box."""
    x1, y1, x2, y2 = out["instances"].gt_boxes.tensor[0].int().tolist()
    inside = torch.zeros(out["image"].shape[1:], dtype=torch.bool)
    inside[y1:y2, x1:x2] = True
    pixels = out["image"][0].float()
    return pixels[inside].mean().item(), pixels[~inside].mean().item()


@pytest.mark.parametrize(
    ("orientation", "size", "box"),
    [
        (None, (40, 60), [30, 10, 50, 20]),
        (6, (40, 60), [30, 10, 50, 20]),  # annotated on the stored pixels
        (8, (40, 60), [30, 10, 50, 20]),
        (6, (60, 40), [20, 30, 30, 50]),  # annotated upright, after a quarter to the right
        (3, (40, 60), [10, 20, 30, 30]),  # half a turn: upright
    ],
)
def test_boxes_and_image_agree_in_training(tmp_path, mapper, orientation, size, box):
    save_with_object(tmp_path / "a.png", orientation)
    out = mapper(record(tmp_path / "a.png", size, box))
    assert out["image"].shape[1:] == size and out["file_name"] == str(tmp_path / "a.png")
    assert brightness(out) == (255, 0)


@pytest.mark.parametrize("input_format", ["BGR", "RGB", "L"])
def test_deep_images_are_the_same_as_those_of_8_bits(tmp_path, input_format):
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = input_format, 0
    mapper = ProposalDatasetMapper(cfg, False)
    pixels = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "eight.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(pixels.astype(np.float32) / 255).save(tmp_path / "float.tif")
    of_8_bits = mapper({"file_name": str(tmp_path / "eight.png")})
    for name in ("sixteen.png", "float.tif"):
        out = mapper({"file_name": str(tmp_path / name)})
        assert torch.equal(out["image"], of_8_bits["image"])
        assert (out["height"], out["width"]) == (12, 20) and out["file_name"].endswith(name)


def test_ordinary_images_keep_their_name(tmp_path):
    save_with_object(tmp_path / "a.png")
    item = record(tmp_path / "a.png", (40, 60), [0, 0, 1, 1])
    assert readable_name(item) == item["file_name"]


def test_names_with_the_separators_of_windows(tmp_path, mapper):
    (tmp_path / "images").mkdir()
    save_with_object(tmp_path / "images" / "a.png")
    out = mapper(record(f"{tmp_path}/images\\a.png", (40, 60), [30, 10, 50, 20]))
    assert brightness(out) == (255, 0)
    with pytest.raises(FileNotFoundError, match="b.png is missing"):
        mapper(record(f"{tmp_path}/images\\b.png", (40, 60), [30, 10, 50, 20]))


def test_too_large_and_mismatching_images_are_named(tmp_path, mapper, monkeypatch):
    save_with_object(tmp_path / "a.png", 6)
    with pytest.raises(ValueError, match=r"a\.png.*expect \(7, 5\).*EXIF"):
        mapper(record(tmp_path / "a.png", (5, 7), [0, 0, 1, 1]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="a.png has more than 2000 pixels"):
        mapper(record(tmp_path / "a.png", (40, 60), [0, 0, 1, 1]))
