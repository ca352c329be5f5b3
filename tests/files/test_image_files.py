"""Tests of reading single image files: orientation, depth, size, and where the file is."""

import json
import logging
import struct

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image, ImageOps

from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.files import image_files
from d2proposals.files.annotation_file import register_annotation_file
from d2proposals.files.image_files import (
    find_image_file,
    image_size,
    missing_files,
    read_rgb_image,
)


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    monkeypatch.setattr(image_files, "_WARNED", set())


def save_turned(path, orientation, size=(4, 6)):
    """A picture whose first stored pixel, its upper left one, is white."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def white_pixel(image):
    return tuple(int(x) for x in np.argwhere(image[..., 0] > 128)[0])


@pytest.mark.parametrize("number", [3, 60])
def test_missing_files(tmp_path, number):
    """A folder of many is listed, of few they are asked for."""
    (tmp_path / "inside").mkdir()
    paths = [tmp_path / "inside" / f"{k}.png" for k in range(number)]
    for path in paths:
        path.touch()
    paths[1].unlink()
    paths[2].unlink()
    paths[2].symlink_to(tmp_path / "nowhere.png")
    folder = tmp_path / "inside" / "folder"
    folder.mkdir()
    others = [f"{tmp_path}\\inside\\0.png", "https://example.org/a.png", tmp_path / "no" / "a.png"]
    missing = missing_files([*paths, folder, *others])
    assert missing == [str(x) for x in (paths[1], paths[2], folder, tmp_path / "no" / "a.png")]
    assert missing_files([]) == []


@pytest.mark.parametrize(
    ("orientation", "size", "expected_size", "white"),
    [
        (6, None, (6, 4), (0, 3)),  # a quarter to the right
        (6, (6, 4), (6, 4), (0, 3)),
        (6, (4, 6), (4, 6), (0, 0)),  # annotated as stored
        (8, (4, 6), (4, 6), (0, 0)),
        (8, (7, 9), (6, 4), (5, 0)),  # neither: upright, as Detectron2, which then complains
        (3, (4, 6), (4, 6), (3, 5)),  # half a turn has the same size: upright
        (1, (4, 6), (4, 6), (0, 0)),
    ],
)
def test_images_are_read_in_the_frame_of_their_annotations(
    tmp_path, orientation, size, expected_size, white
):
    path = save_turned(tmp_path / "a.png", orientation)
    image = read_rgb_image(path, size)
    assert image.shape == (*expected_size, 3) and white_pixel(image) == white


def test_a_square_image_is_upright(tmp_path):
    image = read_rgb_image(save_turned(tmp_path / "a.png", 6, (4, 4)), (4, 4))
    assert white_pixel(image) == (0, 3)
    assert image_size(save_turned(tmp_path / "b.png", 6)) == (6, 4)
    assert image_size(save_turned(tmp_path / "b.png", 3)) == (4, 6)
    assert image_size(tmp_path / "none.png") is None


def test_an_image_without_size_in_its_annotations_warns_of_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read_rgb_image(save_turned(tmp_path / "a.png", 6))
        assert not caplog.messages
        for name in "bc":
            read_rgb_image(save_turned(tmp_path / f"{name}.png", 6), (4, 6))
    assert len(caplog.messages) == 1 and "b.png has an EXIF orientation" in caplog.messages[0]


DEEP = {
    # name: values, and what they become by hand
    "sixteen.png": (np.uint16([[0, 32768, 65535]]), [0, 128, 255]),
    "twelve.tif": (np.uint16([[0, 1000, 4095]]), [0, 62, 255]),
    "eight_in_sixteen.png": (np.uint16([[0, 100, 255]]), [0, 100, 255]),
    "ten.png": (np.uint16([[1023, 0, 256]]), [255, 0, 64]),
    "int32.tif": (np.int32([[0, 50000, 100000]]), [0, 128, 255]),
    "negative.tif": (np.int32([[-100, 0, 100]]), [0, 128, 255]),
    "unit_float.tif": (np.float32([[0, 0.5, 0.75]]), [0, 128, 191]),
    "float.tif": (np.float32([[0, 100.4, 255]]), [0, 100, 255]),
    "large_float.tif": (np.float32([[0, 8192, 16383]]), [0, 128, 255]),
    "signed_float.tif": (np.float32([[-1, 0, 1]]), [0, 128, 255]),
    "not_finite.tif": (np.float32([[np.nan, np.inf, 1]]), [0, 0, 255]),
    "black.tif": (np.float32([[0, 0, 0]]), [0, 0, 0]),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_are_scaled_by_the_rule(tmp_path, caplog, name):
    values, expected = DEEP[name]
    Image.fromarray(values).save(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        image = read_rgb_image(tmp_path / name)
    assert image.dtype == np.uint8 and image.shape == (1, 3, 3)
    assert image[0, :, 0].tolist() == expected == image[0, :, 2].tolist()
    assert len(caplog.messages) == 1 and "scaled to 0-255" in caplog.messages[0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_8_bits_are_as_pil_converts_them(tmp_path, caplog, mode):
    image = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    np.testing.assert_array_equal(read_rgb_image(path), np.asarray(image.convert("RGB")))
    assert not caplog.messages


def test_too_large_and_damaged_images_are_named(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("1", (30, 20)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"large.png has more than 200 pixels.*tiles"):
        read_rgb_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="large.png cannot be read"):
        read_rgb_image(path)


def test_where_an_image_is(tmp_path):
    for name in ("val2017/2.png", "3.png", "sub/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root = str(tmp_path)
    url = "http://images.example.org/val2017/"
    for image, expected in [
        ({"file_name": "3.png"}, "3.png"),
        ({"file_name": "sub\\4.png"}, "sub/4.png"),
        ({"coco_url": url + "2.png"}, "val2017/2.png"),
        ({"coco_url": url + "3.png"}, "3.png"),
        ({"file_name": "gone.png", "coco_url": url + "2.png"}, "gone.png"),
    ]:
        assert find_image_file(root, image) == str(tmp_path / expected)
    assert find_image_file(root, {"id": 1}) is None


def test_annotation_files_find_their_images_and_sizes(tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "val2017" / "1.png")
    save_turned(tmp_path / "sub" / "2.png", 6)
    content = {
        "images": [
            {"id": 1, "coco_url": "http://images.example.org/val2017/1.png"},
            {"id": 2, "file_name": "sub\\2.png", "width": 6},
            {"id": 3, "file_name": "gone.png"},
            {"id": 4},
        ],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    records = DatasetCatalog.get(register_annotation_file(tmp_path / "gt.json"))
    assert records[0]["file_name"] == str(tmp_path / "val2017" / "1.png")
    assert records[1]["file_name"] == str(tmp_path / "sub" / "2.png")
    sizes = [(record.get("height"), record.get("width")) for record in records]
    assert sizes == [(20, 30), (6, 4), (None, None), (None, None)]
    assert "file_name" not in records[3]


def test_records_of_own_functions_have_the_sizes_of_their_images(tmp_path):
    save_turned(tmp_path / "1.png", 6)
    names = [str(tmp_path / "1.png"), str(tmp_path / "gone.png")]
    records = [{"file_name": x, "image_id": x, "annotations": []} for x in names]
    DatasetCatalog.register("sizes_of_images", lambda: records)
    try:
        assert load_ground_truth("sizes_of_images").image_sizes == [(6, 4), None]
    finally:
        DatasetCatalog.remove("sizes_of_images")


def test_odd_values_beside_the_orientation_are_not_read(tmp_path):
    """A width of -5, as a signed long, which PIL would not write anew."""
    entries = struct.pack("<HHLl", 0x0100, 9, 1, -5) + struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4)
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    image = read_rgb_image(tmp_path / "a.jpg")
    assert image.shape == (24, 16, 3) and image[0, -1, 0] > 200 and image[0, 0, 0] < 50


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_turned_as_pil_turns_it(tmp_path, orientation):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_rgb_image(tmp_path / "a.png"), expected)
