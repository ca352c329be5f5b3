"""Tests of the commands that draw proposals and attention maps."""

import functools

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from d2proposals.files.precomputed_format import write_proposal_file
from tests.common import CONFIGS, make_cfg, run_tool
from tests.engine.tiny_coco import CONFIG as RPN_CONFIG
from tests.engine.tiny_coco import SMALL as TINY

ZIP_CONFIG = str(CONFIGS / "shapes" / "zip_rpn_only.yaml")
SMALL_ZIP = ("MODEL.DEVICE", "cpu", "MODEL.BN_INCEPTION.WIDTH_FACTOR", "0.125",
             "INPUT.MIN_SIZE_TEST", "96")  # fmt: skip


def draw_proposals(*arguments):
    run_tool(
        "visualize_proposals", "--config-file", RPN_CONFIG, "--dataset", "tiny_val", *arguments
    )


def draw_attention(*arguments, config=ZIP_CONFIG):
    run_tool("visualize_attention", "--config-file", config, *arguments)


def stop_line(run, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    line = str(stop.value)
    assert line.startswith("Error: ") and "\n" not in line
    return line


def is_png(path):
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG"


def test_proposals_of_a_model(tiny_coco, tmp_path, capsys):
    weights = tmp_path / "model.pth"
    cfg = make_cfg("shapes/rpn_only.yaml", *TINY)
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    output = tmp_path / "sheet.png"
    draw_proposals("--num-images", 3, "--output", output, *TINY, "MODEL.WEIGHTS", weights)
    assert is_png(output)
    assert capsys.readouterr().out == f"{output}: 3 images of tiny_val\n"


def test_default_dataset_and_random_weights(tiny_coco, tmp_path, caplog):
    output = tmp_path / "sheet.png"
    run_tool("visualize_proposals", "--config-file", RPN_CONFIG, "--num-images", 1, "--output",
             output, *TINY, "DATASETS.TEST", "('tiny_val',)")  # fmt: skip
    assert is_png(output) and "results of random weights" in caplog.text


def test_proposals_of_a_file(tiny_coco, tmp_path, caplog, monkeypatch):
    file = tmp_path / "proposals.pkl"
    boxes = np.array([[0, 0, 5, 5], [1, 2, 30, 40]], np.float32)
    write_proposal_file(file, [1, 2, 3], [boxes] * 3, [np.array([0.0, 1.0])] * 3)
    drawn = []
    monkeypatch.setattr(
        "d2proposals.pictures.coverage.write_contact_sheet",
        lambda path, pictures, **settings: drawn.extend([pictures, settings]),
    )
    draw_proposals("--proposals", file, "--top", 1, "--iou", 0.7)
    pictures, settings = drawn
    assert [picture.name for picture in pictures] == ["1", "2", "3", "4"]
    # Best score first; the fourth image is not in the file.
    assert pictures[0].proposal_boxes.tolist() == boxes[::-1].tolist()
    assert (
        len(pictures[3].proposal_boxes) == 0
        and "1 of 4 images of the dataset are not in the file" in caplog.text
    )
    # Two squares per image; the crowd region of every other one is no object.
    assert [len(picture.gt_boxes) for picture in pictures] == [2, 2, 2, 2]
    assert settings == {"top": 1, "iou_threshold": 0.7, "title": "tiny_val"}


def test_bad_input_of_proposals(tiny_coco, tmp_path):
    line = stop_line(draw_proposals, "--proposals", tmp_path / "none.pkl")
    assert "there is no proposal file at" in line
    line = stop_line(draw_proposals, *TINY, "MODEL.WEIGHTS", tmp_path / "none.pth")
    assert "none.pth is missing" in line
    line = stop_line(draw_proposals, "--dataset", "coco_2017_vla")
    assert "Unknown dataset 'coco_2017_vla'" in line
    line = stop_line(draw_proposals, "--num-images", 0)
    assert "number of images must be at least 1" in line
    (tiny_coco / "val2017" / "000000000001.jpg").unlink()
    line = stop_line(draw_proposals, "--num-images", 1, *TINY)
    assert "000000000001.jpg" in line


def test_annotations_apart_from_their_images(tiny_coco, tmp_path):
    proposals = tmp_path / "proposals.pkl"
    write_proposal_file(proposals, [1], [np.array([[0, 0, 5, 5]], np.float32)], [np.zeros(1)])
    apart = ["--gt", tiny_coco / "annotations" / "instances_val2017.json"]
    apart += ["--proposals", proposals, "--output", tmp_path / "out.png"]
    draw = functools.partial(run_tool, "visualize_proposals")
    line = stop_line(draw, *apart)
    assert ".jpg: name the folder of the images with --image-root" in line
    draw(*apart, "--image-root", tiny_coco / "val2017")
    assert is_png(tmp_path / "out.png")


def test_attention(tmp_path, capsys):
    images = []
    for index, size in enumerate([(80, 60), (50, 90)]):
        images.append(tmp_path / f"{index}.png")
        pixels = np.random.default_rng(index).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images[-1])
    output = tmp_path / "attention.png"
    draw_attention("--input", *images, "--output", output, "--level", 1, *SMALL_ZIP)
    assert is_png(output) and capsys.readouterr().out == f"{output}: level 1 of 2 images\n"


def test_bad_input_of_attention(tmp_path):
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30)).save(image)
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    output = ("--output", tmp_path / "out.png")
    line = stop_line(draw_attention, "--input", tmp_path / "none.jpg", *output, *SMALL_ZIP)
    assert "There is no image file" in line and "none.jpg" in line
    line = stop_line(draw_attention, "--input", image, text, *output, *SMALL_ZIP)
    assert "text.jpg cannot be read" in line
    no_zoom_in = ("MODEL.ZOOM_NETWORK.ZOOM_IN", "False", "MODEL.ZOOM_NETWORK.MAD.TYPE", "none")
    line = stop_line(draw_attention, "--input", image, *output, *SMALL_ZIP, *no_zoom_in)
    assert "set MODEL.ZOOM_NETWORK.ZOOM_IN to True" in line
    with pytest.raises(SystemExit, match="the backbone is a FPN"):
        draw_attention("--input", image, *output, "MODEL.DEVICE", "cpu", config=RPN_CONFIG)
    assert not (tmp_path / "out.png").exists()
