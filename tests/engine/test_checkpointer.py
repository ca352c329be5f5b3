"""Tests of d2proposals.engine.checkpointer."""

import argparse
import errno
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from d2proposals.engine import ProposalCheckpointer
from d2proposals.engine.bad_input import explain_bad_input


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


class RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_save_and_resume(model, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    checkpointer = ProposalCheckpointer(model, str(tmp_path), optimizer=optimizer)
    checkpointer.save("model_0000001", iteration=1)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    assert sorted(x.name for x in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")

    other = nn.Linear(3, 2)
    rest = ProposalCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 1
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name])


def test_no_training_is_begun_over_checkpoints_of_which_none_is_the_last(model, tmp_path):
    # What is no training's is nobody's to go on from.
    torch.save({"model": model.state_dict()}, tmp_path / "model_converted.pth")
    ProposalCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    checkpointer = ProposalCheckpointer(model, str(tmp_path))
    for number in (9, 19):
        checkpointer.save(f"model_{number:07d}", iteration=number)
    os.utime(tmp_path / "model_0000009.pth", (0, 0))
    (tmp_path / "last_checkpoint").unlink()
    line = "newest is model_0000019.pth, but no file 'last_checkpoint'.*write model_0000019.pth"
    with pytest.raises(ValueError, match=line):
        ProposalCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    ProposalCheckpointer(model, str(tmp_path)).resume_or_load("", resume=False)
    # What it would start from, alone, is nobody's training; an evaluation writes over nothing.
    ProposalCheckpointer(model, str(tmp_path), save_to_disk=False).resume_or_load("", resume=True)
    (tmp_path / "model_0000009.pth").rename(tmp_path / "other.pth")
    path = str(tmp_path / "model_0000019.pth")
    ProposalCheckpointer(model, str(tmp_path)).resume_or_load(path, resume=True)
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    rest = ProposalCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 19


def test_interrupted_save_leaves_the_last_checkpoint(model, tmp_path, monkeypatch):
    checkpointer = ProposalCheckpointer(model, str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()

    def interrupted(data, f):
        f.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_final")
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("size", [0, 10, 500, -1])
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_truncated_file_is_named(model, tmp_path, size, suffix):
    file = tmp_path / f"weights.{suffix}"
    state = {"weight": np.zeros((64, 3), np.float32)}
    if suffix == "pth":
        torch.save({"model": model.state_dict()}, file)
    else:
        file.write_bytes(pickle.dumps({"model": state, "__author__": "me"}))
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(ValueError) as error:
        ProposalCheckpointer(model, str(tmp_path)).load(str(file))
    message = str(error.value)
    assert f"{file} ({len(content[:size])} bytes) cannot be read" in message
    assert "cut off" in message and str(tmp_path / "last_checkpoint") in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyth"])
def test_code_is_refused_and_not_run(model, tmp_path, suffix):
    file, folder = tmp_path / f"evil.{suffix}", tmp_path / "made"
    if suffix == "pkl":
        file.write_bytes(pickle.dumps({"model": RunsCode(folder), "__author__": "me"}))
    else:
        torch.save({"model_state": RunsCode(folder)}, file)
    with pytest.raises(ValueError, match=r"it holds posix\.mkdir, which may run code") as error:
        ProposalCheckpointer(model, str(tmp_path)).load(str(file))
    assert not folder.exists()
    assert "cut off" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["pth", "pyth"])
@pytest.mark.parametrize("value", [np.float64(0.3), np.int32(3), np.bool_(True), np.arange(3.0)])
@pytest.mark.parametrize("other_numpy", [False, True])
def test_numbers_of_numpy_beside_tensors(model, tmp_path, suffix, value, other_numpy):
    """A good file, whichever version of NumPy wrote it."""
    weights = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    key = "model" if suffix == "pth" else "model_state"
    file = tmp_path / f"weights.{suffix}"
    torch.save({key: weights, "best": value}, file, _use_new_zipfile_serialization=False)
    if other_numpy:
        here, there = b"numpy._core.", b"numpy.core."
        content = file.read_bytes()
        here, there = (here, there) if here in content else (there, here)
        file.write_bytes(content.replace(b"c" + here, b"c" + there))
    ProposalCheckpointer(model, str(tmp_path)).load(str(file))
    assert model.weight.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_training_tools_settings_are_named_not_called_damage(model, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1)}, file)
    with pytest.raises(ValueError, match=r"it holds argparse\.Namespace.*save its tensors alone"):
        ProposalCheckpointer(model).load(str(file))


@pytest.mark.parametrize("fails_in", ["torch.save", "tag"])
def test_a_full_disk_leaves_no_unfinished_file(model, tmp_path, monkeypatch, fails_in):
    checkpointer = ProposalCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    before = sorted(path.name for path in tmp_path.iterdir())
    full = OSError(errno.ENOSPC, "No space left on device")

    def stops(data, f):
        f.write(b"half")
        try:
            raise full
        finally:
            # What torch's archive says when it cannot write its end, either.
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2 vs 1")

    def no_tag(*args):
        (tmp_path / "last_checkpoint.partial").write_text("half")
        raise full

    if fails_in == "tag":
        monkeypatch.setattr(checkpointer, "tag_last_checkpoint", no_tag)
    else:
        monkeypatch.setattr(torch, "save", stops)
    with pytest.raises(
        OSError, match="model_0000002.pth cannot be written.*No space left"
    ) as error:
        checkpointer.save("model_0000002")
    assert "--resume goes on from the last one" in str(error.value)
    assert explain_bad_input(error.value) == str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("numpy_1", [False, True])
def test_model_zoo_pickle_loads(model, tmp_path, protocol, numpy_1):
    state = {"weight": np.full((2, 3), 2, np.float32), "bias": np.arange(2, dtype=np.float32)}
    content = pickle.dumps(
        {"model": state, "__author__": "me", "scalar": np.float32(3)}, protocol=protocol
    )
    if numpy_1:
        if protocol > 2:
            pytest.skip("only protocol 2 writes names without their lengths")
        content = content.replace(b"numpy._core", b"numpy.core")
    file = tmp_path / "zoo.pkl"
    file.write_bytes(content)
    ProposalCheckpointer(model, str(tmp_path)).load(str(file))
    assert model.weight.tolist() == [[2, 2, 2], [2, 2, 2]]
    assert model.bias.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("suffix", "content", "line"),
    [
        ("pth", [torch.zeros(2)], "it holds a list"),
        ("pth", {"model": {"weight": [1.0]}}, "its 'weight' is of type list"),
        ("pth", {0: torch.zeros(2)}, "it holds a name 0"),
        ("pkl", {"a": 1}, "its 'a' is of type int"),
    ],
)
def test_what_holds_no_weights_is_one_line(model, tmp_path, suffix, content, line):
    file = tmp_path / f"other.{suffix}"
    if suffix == "pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    with pytest.raises(ValueError) as error:
        ProposalCheckpointer(model, str(tmp_path)).load(str(file))
    told = explain_bad_input(error.value)
    assert told.startswith(f"{file} is no checkpoint: {line} ") and "MODEL.WEIGHTS" in told


@pytest.mark.parametrize("content", ["hello there", "GET /weights HTTP/1.1", ""])
def test_a_text_file_is_called_what_it_is(model, tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_text(content)
    with pytest.raises(ValueError, match="it is cut off, or not a checkpoint") as caught:
        ProposalCheckpointer(model).load(str(path))
    assert "weights_only" not in str(caught.value) and "read (101)" not in str(caught.value)


def test_missing_file_is_named(model, tmp_path):
    checkpointer = ProposalCheckpointer(model, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"gone\.pth is missing\. Set MODEL\.WEIGHTS"):
        checkpointer.load(str(tmp_path / "gone.pth"))
    (tmp_path / "last_checkpoint").write_text("removed.pth")
    with pytest.raises(FileNotFoundError, match=r"removed\.pth.*last_checkpoint"):
        checkpointer.resume_or_load("", resume=True)


def test_address_without_network_is_named(model, tmp_path, monkeypatch):
    checkpointer = ProposalCheckpointer(model, str(tmp_path))

    def no_network(path):
        raise OSError("no route to host")

    monkeypatch.setattr(checkpointer.path_manager, "get_local_path", no_network)
    with pytest.raises(FileNotFoundError, match=r"x/R-50\.pkl cannot be fetched \(no route"):
        checkpointer.load("detectron2://x/R-50.pkl")


def test_query_in_a_path_still_works(model, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, file)
    ProposalCheckpointer(model, str(tmp_path)).load(f"{file}?matching_heuristics=True")
    assert model.weight.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_empty_path_leaves_the_model(model, tmp_path):
    before = model.weight.clone()
    assert ProposalCheckpointer(model, str(tmp_path)).load("") == {}
    assert torch.equal(model.weight, before)
