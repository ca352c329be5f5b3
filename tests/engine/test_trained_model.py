"""Tests of what weights a trained model fetches."""

import importlib

import pytest
import torch

from d2proposals.backbones import torchvision_weights
from d2proposals.engine import Trainer, load_trained_model, without_needless_weights
from d2proposals.engine.trained_model import without_trunk_weights
from tests.common import CONFIGS, make_cfg

CONFIG = "photos/zip_mobilenet_v2.yaml"
KEY = "MODEL.TORCHVISION.WEIGHTS"


@pytest.fixture
def no_connection(monkeypatch):
    def refuse(name, weights):
        raise ConnectionError(f"{weights} of {name}")

    monkeypatch.setattr(torchvision_weights, "_download_state", refuse)


def test_a_checkpoint_s_weights_need_no_others(no_connection, tmp_path, caplog):
    cfg = make_cfg(CONFIG, KEY, "IMAGENET1K_V1", "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(ConnectionError):
        load_trained_model(cfg)
    model = Trainer.build_model(without_trunk_weights(cfg))
    path = str(tmp_path / "trained.pth")
    torch.save({"model": model.state_dict()}, path)
    named = make_cfg(CONFIG, KEY, "IMAGENET1K_V1", "MODEL.WEIGHTS", path)
    loaded = load_trained_model(named)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    other_pixels = make_cfg(CONFIG, KEY, "IMAGENET1K_V1", "INPUT.FORMAT", "BGR")
    without_trunk_weights(other_pixels)
    assert "were trained on torchvision's pixels" in caplog.text
    # The configuration stays what it is, and a training may begin with a part.
    assert named.MODEL.TORCHVISION.WEIGHTS == "IMAGENET1K_V1"
    assert without_needless_weights(named, trains=True) is named
    assert without_needless_weights(cfg, trains=True, resume=True) is cfg
    (tmp_path / "last_checkpoint").write_text("trained.pth")
    assert without_needless_weights(cfg, trains=True) is cfg
    assert not without_needless_weights(cfg, trains=True, resume=True).MODEL.TORCHVISION.WEIGHTS


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [("plot_anchor_sizes", ("--output", "a.png")), ("measure_training_scale", ("--draws", "7"))],
)
def test_shapes_need_no_weights(no_connection, tmp_path, monkeypatch, capsys, tool, arguments):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"tools.{tool}").main
    names = dict.fromkeys(("DATASETS.TRAIN", "DATASETS.TEST"), "('d2p_shapes_val',)")
    overrides = [KEY, "IMAGENET1K_V1", *(word for item in names.items() for word in item)]
    main(["--config-file", str(CONFIGS / CONFIG), *arguments, *overrides])
    assert capsys.readouterr().out
