"""Tests of the demo: images, folders, videos, masks."""

import argparse
import base64
import json
import re
import runpy
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2proposals.engine.model_command import return_overrides
from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.files.annotation_file import register_annotation_file
from d2proposals.proposals.mask_proposals import ProposalMasks
from tests.common import make_cfg
from tests.engine.tiny_coco import CONFIG as RPN_CONFIG
from tests.engine.tiny_coco import SMALL as TINY

DEMO = runpy.run_path(str(Path(__file__).resolve().parents[2] / "demo" / "demo.py"))
SIZE = (48, 64)


def run(*arguments):
    DEMO["main"](["--config-file", RPN_CONFIG, *map(str, arguments)])


def noise(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def write_video(path, codec):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10.0, SIZE[::-1])
    for index in range(3):
        writer.write(noise(index))
    writer.release()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        Image.fromarray(noise(index, (48 + 8 * index, 64))).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_and_folders(images, tmp_path, capsys, caplog):
    """A picture for each image, of its size and changed; two of one name do not collide."""
    out = tmp_path / "out"
    run("--input", images, images / "0.png", "--output", out, *TINY)
    assert sorted(x.name for x in out.iterdir()) == ["0.png", "0_2.png", "1.png"]
    drawn = np.array(Image.open(out / "1.png"))
    assert drawn.shape == (56, 64, 3) and (drawn != noise(1, (56, 64))).any()
    assert (out / "0.png").read_bytes() == (out / "0_2.png").read_bytes()
    assert "results of random weights" in caplog.text
    assert str(out / "1.png") in capsys.readouterr().out


def test_overrides_may_follow_the_images(images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(DEMO["main"].__globals__, "load_proposer", lambda cfg: seen.append(cfg))
    monkeypatch.setitem(DEMO["main"].__globals__, "draw_image", lambda path, *_: seen.append(path))
    to = ("--output", tmp_path / "out")
    run(*to, "--input", images / "0.png", images / "1.png", "SEED", 7, "MODEL.DEVICE", "cpu")
    cfg, *paths = seen
    assert [path.name for path in paths] == ["0.png", "1.png"]
    assert (cfg.MODEL.DEVICE, cfg.SEED) == ("cpu", 7)
    # A file may be called like a key, and one that is not there like one of no configuration.
    (tmp_path / "TEST.PNG").touch()
    monkeypatch.chdir(tmp_path)
    files = ["x.png", "TEST.PNG", "IMG_0002.JPG", "MODEL"]
    args = argparse.Namespace(input=[*files, "MODEL.NO", "w.pth"], opts=["SEED", "1"])
    return_overrides(args)
    assert args.input == files and args.opts == ["MODEL.NO", "w.pth", "SEED", "1"]


def test_masks_are_of_the_package_s_own_network(images, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setitem(DEMO["main"].__globals__, "load_proposer", lambda cfg: seen.append(cfg))
    monkeypatch.setitem(DEMO["main"].__globals__, "draw_image", lambda *_: None)
    for flags in ((), ("--masks",)):
        DEMO["main"]([*flags, "--input", str(images), "--output", str(tmp_path / "out")])
    generators = [cfg.MODEL.PROPOSAL_GENERATOR.NAME for cfg in seen]
    files = [Path(cfg.MODEL.WEIGHTS).name for cfg in seen]
    assert generators == ["SCRPN", "DeepMask"]
    assert files == ["sc_rpn_mobilenet_v2.pth", "deepmask_narrow_mobilenet_v2.pth"]
    with pytest.raises(SystemExit) as stop:
        run("--masks", "--input", images)
    assert stop.value.code == 2 and "--masks is for the DeepMask" in capsys.readouterr().err


def test_numbered_pictures_do_not_collide_either():
    paths = [Path(name) for name in ("a.jpg", "a.png", "a_2.jpg", "a.mp4", "b/a.jpg")]
    names = ["a.png", "a_2.png", "a_2_2.png", "a.mp4", "a_3.png"]
    assert DEMO["output_paths"](paths, Path("out")) == [Path("out", name) for name in names]


def test_inputs_are_never_written_over(images, tmp_path):
    before = {path: path.read_bytes() for path in images.glob("*.png")}
    run("--input", images, "--output", images, *TINY)
    assert {path: path.read_bytes() for path in before} == before
    drawn = {path.name for path in images.glob("*.png")} - {path.name for path in before}
    assert len(drawn) == len(before) and any(name.endswith("_2.png") for name in drawn)


def test_video(tmp_path, capsys):
    path = tmp_path / "clip.avi"
    write_video(path, "MJPG")
    out = tmp_path / "out"
    run("--input", path, "--output", out, *TINY)
    assert [x.name for x in out.iterdir()] == ["clip.mp4"]
    capture = cv2.VideoCapture(str(out / "clip.mp4"))
    frames = list(DEMO["read_frames"](capture))
    assert len(frames) == 3 and frames[0].shape == (*SIZE, 3)
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert f"{out / 'clip.mp4'}: 3 frames" in capsys.readouterr().out


def test_the_documented_commands_run(images, tmp_path, monkeypatch):
    """The pages' commands as they stand, with the files that they name."""
    root = Path(__file__).resolve().parents[2]
    lines = {
        line
        for page in ("README.md", "docs/toolbox.md")
        for line in re.findall(r"^    python demo/demo.py (.*)$", (root / page).read_text(), re.M)
    }
    commands = [shlex.split(line, comments=True) for line in sorted(lines)]
    assert sorted("--gallery" in arguments for arguments in commands) == [False] * 3 + [True]
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(7)).save("photo.jpg")
    write_video("clip.mp4", "mp4v")
    for arguments in commands:
        if "--config-file" not in arguments:  # a network that comes with the package
            out = "masks" if "--masks" in arguments else "boxes"
            DEMO["main"]([*arguments, "--output", out, "MODEL.DEVICE", "cpu"])
            assert Path(out, "photo.png").is_file()
            continue
        config = str(root / arguments[arguments.index("--config-file") + 1])
        arguments[arguments.index("--config-file") + 1] = config
        weights = Path(arguments[-1])
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": build_model(make_cfg(config)).state_dict()}, weights)
        DEMO["main"](arguments)
    drawn = sorted(x.name for x in Path("drawn").iterdir())
    assert drawn == ["0.png", "1.png", "clip.mp4", "photo.png"]
    assert Path("gallery.html").is_file()


def test_photographs_with_objects_drawn_by_hand(tmp_path, capsys):
    """A dataset without faults, of objects within their photographs."""
    photographs = runpy.run_path(str(Path(DEMO["__file__"]).with_name("photographs.py")))
    photographs["main"]([str(tmp_path / "new")])
    folder = tmp_path / "new"
    assert capsys.readouterr().out == f"{folder}: 4 photographs and objects.json\n"
    ground_truth = load_ground_truth(register_annotation_file(str(folder / "objects.json")))
    assert ground_truth.faults == [] and len(ground_truth.boxes) == 19
    sizes = np.repeat(ground_truth.image_sizes, ground_truth.num_per_image, axis=0)
    assert (ground_truth.boxes[:, 2:] <= sizes[:, ::-1]).all()
    for name, size in zip(ground_truth.file_names, ground_truth.image_sizes, strict=True):
        assert Image.open(folder / Path(name).name).size == size[::-1]


def test_what_cannot_be_written_is_said_before_the_images_are_seen(images, tmp_path, monkeypatch):
    def refuse(image):
        pytest.fail("the network saw an image")

    monkeypatch.setitem(DEMO["main"].__globals__, "load_proposer", lambda cfg: refuse)
    (tmp_path / "file").touch()
    for place in (("--gallery", tmp_path), ("--output", tmp_path / "file")):
        with pytest.raises(SystemExit, match="cannot be written"):
            run("--input", images, *place)


def test_gallery(images, tmp_path, capsys):
    path = tmp_path / "gallery.html"
    run("--input", images, "--gallery", path, "--top", 5, "--keep", 7, *TINY)
    assert not (tmp_path / "demo_output").exists() and not Path("demo_output").exists()
    assert f"{path}: 2 images" in capsys.readouterr().out
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    data = json.loads(text[1])
    assert [image["name"] for image in data["images"]] == ["0.png", "1.png"]
    assert data["top"] == 5 and all(image["objects"] is None for image in data["images"])
    assert [len(base64.b64decode(image["runs"][0]["logits"])) for image in data["images"]] == [
        28
    ] * 2


def test_best_proposals_are_on_top_and_masks_are_filled():
    boxes = torch.tensor([[10.0, 10, 30, 30], [10, 10, 30, 30], [40, 10, 60, 30]])
    proposals = Instances(
        SIZE,
        proposal_boxes=Boxes(boxes),
        objectness_logits=torch.tensor([-1.0, 3, 0]),
    )
    grey = np.full((*SIZE, 3), 100, np.uint8)
    drawn = DEMO["draw"](grey, proposals, 10)
    best, worst = drawn[20, 10], drawn[20, 40]
    # Yellow is brighter than any later colour; the inside stays.
    assert best.sum() > 400 > worst.sum() and best[0] > 200 > best[2]
    assert (drawn[20, 20] == 100).all() and (grey == 100).all()
    only_best = DEMO["draw"](grey, proposals, 1)
    assert (only_best[20, 38:43] == 100).all()
    proposals.proposal_masks = ProposalMasks(
        torch.full((3, 1, 1), 5.0), boxes / torch.tensor([64.0, 48, 64, 48])
    )
    filled = DEMO["draw"](grey, proposals, 10)
    assert (filled[20, 20] != 100).any() and (filled[40, 20] == 100).all()
    assert (DEMO["draw"](grey, proposals[:0], 10) == grey).all()


def test_bad_input(images, tmp_path):
    def stop_line(*arguments):
        with pytest.raises(SystemExit) as stop:
            run(*arguments, *TINY)
        line = str(stop.value)
        assert line.startswith("Error: ") and "\n" not in line
        return line

    assert "no image, folder or video" in stop_line("--input", tmp_path / "x", "--top", 5)
    (tmp_path / "empty").mkdir()
    assert "has no images" in stop_line("--input", tmp_path / "empty", "--top", 5)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    line = stop_line("--input", tmp_path / "broken.mp4", "--gallery", tmp_path / "a.html")
    assert "a gallery shows images; leave the video" in line
    line = stop_line("--input", tmp_path / "broken.mp4", "--output", tmp_path / "out")
    assert "broken.mp4 cannot be read" in line
    line = stop_line("--input", images / "notes.txt", "--output", tmp_path / "out")
    assert "notes.txt cannot be read" in line
    assert not list(tmp_path.glob("out/*"))
    line = stop_line("--input", images / "notes.txt", "--gallery", tmp_path / "a.html")
    assert "notes.txt cannot be read" in line and not (tmp_path / "a.html").exists()


def test_a_broken_image_among_others_is_left_out(images, tmp_path, capsys):
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:60])
    names = ("0.png", "broken.png", "1.png")
    inputs = ("--input", *(images / name for name in names))
    line = "Error: 1 of 3 images are left out: .*broken.png cannot be read"
    with pytest.raises(SystemExit, match=line):
        run(*inputs, "--output", tmp_path / "out", *TINY)
    assert sorted(x.name for x in tmp_path.glob("out/*")) == ["0.png", "1.png"]
    with pytest.raises(SystemExit, match=line):
        run(*inputs, "--gallery", tmp_path / "gallery.html", *TINY)
    assert "gallery.html: 2 images" in capsys.readouterr().out
    assert (tmp_path / "gallery.html").is_file()
