"""Tests of tools/pack_weights.py."""

import pytest
import torch

from tests.common import run_tool


def test_half_of_the_bytes_and_no_optimizer(tmp_path, capsys):
    weights = {"a": torch.tensor([1 / 3, -2.0]), "steps": torch.tensor(70000)}
    torch.save({"model": weights, "optimizer": {"state": 1}}, tmp_path / "in.pth")
    run_tool("pack_weights", tmp_path / "in.pth", tmp_path / "out.pth")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert set(content) == {"model"}
    assert content["model"]["a"].dtype == torch.float16
    # 1/3 to eleven binary digits.
    assert content["model"]["a"].tolist() == [1365 / 4096, -2.0]
    assert content["model"]["steps"].item() == 70000
    assert "2 tensors" in capsys.readouterr().out


def test_what_half_precision_does_not_reach_is_one_line(tmp_path, capsys):
    torch.save({"model": {"bn.running_var": torch.tensor([7e4])}}, tmp_path / "in.pth")
    with pytest.raises(SystemExit, match="bn.running_var has numbers"):
        run_tool("pack_weights", tmp_path / "in.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
    with pytest.raises(SystemExit):
        run_tool("pack_weights", tmp_path / "in.pth", tmp_path / "out.bin")
    assert "must end in .pth" in capsys.readouterr().err
