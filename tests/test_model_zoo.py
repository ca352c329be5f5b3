"""Tests of configurations by name, and of the wheel that carries them."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import skimage.data
import torch
from detectron2.modeling import ProposalNetwork
from detectron2.structures import Boxes, pairwise_iou

from d2proposals import model_zoo
from d2proposals.engine import load_trained_model, network_input_of
from d2proposals.files.checkpoint_file import read_model
from tests.common import CONFIGS, ROOT, make_cfg

SHAPES = "shapes/rpn_only.yaml"
# Configurations whose weights come with the package, and how many of the 19 objects drawn by hand
# on four photographs they find at least.
TRAINED = {"photos/sc_rpn_mobilenet_v2.yaml": 11, "photos/deepmask_narrow_mobilenet_v2.yaml": 10}


def test_a_lazy_configuration_is_no_model_by_name():
    with pytest.raises(ValueError, match="is a lazy configuration: build its model with"):
        model_zoo.get("lazy/sc_rpn_only.py")


def test_a_configuration_by_name():
    assert model_zoo.get_config_file(SHAPES) == str(CONFIGS / SHAPES)
    cfg = model_zoo.get_config(SHAPES)
    assert cfg.MODEL.DEVICE == "cuda"  # as the file has it
    cfg.MODEL.DEVICE = "cpu"
    assert cfg == make_cfg(SHAPES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shapes/rpn.yaml", "there are shapes/.*shapes/rpn_only.yaml"),
        ("nowhere/rpn_only.yaml", "there are Base-"),
        ("lazy/scrpn_only.py", "there are lazy/.*lazy/sc_rpn_only.py"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(name, message):
    with pytest.raises(ValueError, match=message):
        model_zoo.get_config_file(name)


def test_a_model_by_name(tmp_path):
    model = model_zoo.get(SHAPES, weights="", device="cpu")
    assert isinstance(model, ProposalNetwork) and not model.training
    assert model.device == torch.device("cpu")
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    again = model_zoo.get(SHAPES, weights=str(tmp_path / "model.pth"), device="cpu")
    for (name, value), other in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("weights", ["", "model.pth"])
def test_weights_of_one_s_own_need_none_of_the_trunk(weights, monkeypatch):
    """Which would be downloaded, and make random weights others."""
    monkeypatch.setattr(model_zoo, "load_trained_model", lambda cfg: cfg)
    cfg = model_zoo.get("photos/rpn_mobilenet_v2.yaml", weights=weights, device="cpu")
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.TORCHVISION.WEIGHTS) == (weights, "")
    cfg = model_zoo.get("photos/rpn_mobilenet_v2.yaml", device="cpu")
    assert cfg.MODEL.TORCHVISION.WEIGHTS == "IMAGENET1K_V1"


def test_weights_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(model_zoo, "_WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match="there are those of none"):
        model_zoo.get_config(SHAPES, trained=True)
    file = tmp_path / "shapes" / "rpn_only.pth"
    file.parent.mkdir()
    model = model_zoo.get(SHAPES, weights="", device="cpu")
    # In half precision, as they are shipped.
    torch.save({"model": {k: v.half() for k, v in model.state_dict().items()}}, file)
    cfg = model_zoo.get_config(SHAPES, trained=True)
    assert cfg.MODEL.WEIGHTS == str(file) and cfg.MODEL.TORCHVISION.WEIGHTS == ""
    trained = model_zoo.get(SHAPES, trained=True, device="cpu").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value.half(), trained[name].half()), name
        assert trained[name].dtype == value.dtype
    with pytest.raises(ValueError, match="there are those of shapes/rpn_only.yaml"):
        model_zoo.get("sc_rpn_only.yaml", trained=True)


@pytest.mark.slow
def test_the_wheel_alone_is_enough(tmp_path):
    """Built, unpacked into an empty folder, and trained for two steps from there."""
    run = {"check": True, "capture_output": True, "text": True, "timeout": 600}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # A copy, since setuptools leaves a folder beside what it builds.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("d2proposals", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, **run)
    (wheel,) = tmp_path.glob("d2proposals-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"d2proposals/configs/{x.relative_to(CONFIGS)}" for x in CONFIGS.rglob("*.yaml")}
    assert expected == {name for name in names if name.endswith(".yaml")}
    weights = {name for name in names if name.endswith(".pth")}
    assert weights == {f"d2proposals/weights/{Path(x).with_suffix('.pth')}" for x in TRAINED}
    page = {
        x.name for x in (ROOT / "d2proposals" / "pictures").glob("gallery*") if x.suffix != ".py"
    }
    assert len(page) == 5 and {f"d2proposals/pictures/{name}" for name in page} <= set(names)
    lazy = {f"d2proposals/configs/{x.relative_to(CONFIGS)}" for x in CONFIGS.rglob("*.py")}
    assert lazy == {name for name in names if name.startswith("d2proposals/configs/lazy/")}
    assert not [name for name in names if name.startswith(("tests/", "tools/", "configs/"))]
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], **run)
    script = """
import d2proposals, sys
from d2proposals import model_zoo
from d2proposals.engine import Trainer
assert d2proposals.__file__.startswith(sys.argv[1])
assert "proposal_generator" in model_zoo.get_config("lazy/sc_rpn_only.py").model
cfg = model_zoo.get_config("shapes/zip_rpn_only.yaml")
cfg.merge_from_list(["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (),
                     "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0,
                     "DATASETS.TRAIN", ("d2p_shapes_val",), "DATASETS.TEST", (),
                     "MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "OUTPUT_DIR", sys.argv[2]])
trainer = Trainer(cfg)
trainer.train()
"""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    arguments = [str(target), str(tmp_path / "output")]
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, env=environment, **run)
    assert Path(arguments[1], "model_final.pth").is_file()


def test_the_weights_of_the_package_are_small():
    assert sum(os.path.getsize(model_zoo.get_checkpoint_file(name)) for name in TRAINED) < 12e6


@pytest.mark.parametrize(("name", "least"), TRAINED.items())
def test_the_weights_of_the_package_find_objects_on_photographs(name, least):
    cfg = model_zoo.get_config(name, trained=True)
    cfg.MODEL.DEVICE = "cpu"
    model, network_input = load_trained_model(cfg), network_input_of(cfg)
    # Every weight is the file's: none stayed random.
    saved = read_model(cfg.MODEL.WEIGHTS)
    assert {n for n, x in model.state_dict().items() if x.is_floating_point()} <= set(saved)
    objects = runpy.run_path(str(ROOT / "demo" / "photographs.py"))["OBJECTS"]
    covered = []
    for photograph, drawn in objects.items():
        image = getattr(skimage.data, photograph)()
        height, width = image.shape[:2]
        record = {"image": network_input(image), "height": height, "width": width}
        with torch.no_grad():
            best = model([record])[0]["proposals"].proposal_boxes[:100]
        boxes = Boxes(torch.tensor([box for _, box in drawn], dtype=torch.float32))
        covered += (pairwise_iou(boxes, best).amax(dim=1) >= 0.5).tolist()
    print(f"{sum(covered)} of {len(covered)} objects are covered by the 100 best proposals")
    assert sum(covered) >= least
