"""Tests of the benchmark of models."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2proposals.proposals.native_size import NativeSizes
from tests.common import CONFIGS, ROOT, make_cfg
from tests.engine.tiny_coco import SMALL as TINY

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
RPN = str(CONFIGS / "shapes" / "rpn_only.yaml")
ZIP = str(CONFIGS / "shapes" / "zip_rpn_only.yaml")
SIZE = ("--height", "64", "--width", "96")
CPU = ("MODEL.DEVICE", "cpu", "MODEL.BN_INCEPTION.WIDTH_FACTOR", "0.125")


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(TOOL))


@pytest.mark.parametrize(
    "mode", [(), ("--train",), ("--train", "--amp")], ids=["inference", "training", "mixed"]
)
def test_table_and_file(tool, tmp_path, capsys, mode):
    output = tmp_path / "benchmark.json"
    tool["main"]([RPN, ZIP, *mode, *SIZE, "--repeats", "2", "--batch", "2",
                  "--output", str(output), *CPU])  # fmt: skip
    printed = capsys.readouterr().out
    assert "| config" in printed and RPN in printed and ZIP in printed
    content = json.loads(output.read_text())
    assert content["conditions"]["mode"].startswith(
        "training" if "--train" in mode else "inference"
    )
    assert content["conditions"]["precision"] == ("mixed" if "--amp" in mode else "float32")
    assert content["conditions"]["overrides"] == list(CPU)
    rpn, zip_ = content["results"]
    assert [rpn["config"], zip_["config"]] == [RPN, ZIP]
    for row in (rpn, zip_):
        total, backbone, generator = (row[x] for x in ("total", "backbone", "generator"))
        assert total["least"] <= total["seconds_per_image"] <= total["greatest"]
        assert 0 < backbone["least"] and 0 < generator["least"]
        assert backbone["least"] + generator["least"] <= total["greatest"]
        assert row["parameters"] > 0
        assert 0 <= row["peak_memory_bytes"] < 2 << 30  # where there is a /proc: Linux
        assert ("generator_step" in row) == bool(mode)
        if mode:  # forward and backward, where "generator" is forward alone
            assert generator["least"] < row["generator_step"]["greatest"]
    assert ("generator step (s)" in printed) == bool(mode)
    assert rpn["total"]["ratio"] == rpn["backbone"]["ratio"] == rpn["generator"]["ratio"] == 1


def test_operations_are_columns(tool, tmp_path, capsys):
    arguments = [RPN, ZIP, *SIZE, "--repeats", "1", "--warmup", "0", "--count"]
    tool["main"]([*arguments, "--output", str(tmp_path / "a.json"), *CPU])
    rows = json.loads((tmp_path / "a.json").read_text())["results"]
    printed = capsys.readouterr().out
    for row in rows:
        counts = row["gflop_per_image"]
        assert 0 < counts["generator"] < counts["total"]
        assert counts["backbone"] + counts["generator"] == pytest.approx(counts["total"])
        assert f" {counts['total']:.1f} |" in printed
    assert "| total GFLOP |" in " ".join(printed.split())


def test_markdown_is_the_printed_report(tool, tmp_path, capsys):
    output = tmp_path / "speed.md"
    tool["main"]([RPN, *SIZE, "--repeats", "1", "--warmup", "0", "--output", str(output), *CPU])
    written = output.read_text()
    assert capsys.readouterr().out.endswith(written)
    conditions, _, header, alignment, row, _, note = written.splitlines()
    assert "mode inference, precision float32, device cpu" in conditions and "batch 1" in conditions
    assert header.startswith("| config") and set(alignment) <= set("|:-")
    assert row.count("|") == header.count("|") == 13 and RPN in row and note.startswith("memory")


def test_zip_on_a_plain_fpn(tool, capsys):
    """configs/zip_fpn_only.yaml builds, runs and trains beside the RPN on the same backbone."""
    configs = [str(CONFIGS / name) for name in ("rpn_only.yaml", "zip_fpn_only.yaml")]
    small = ("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS",
             "64", "MODEL.RESNETS.NORM", "BN")  # fmt: skip
    arguments = [*configs, *SIZE, "--repeats", "1", "--warmup", "0", *small]
    tool["main"](arguments)
    tool["main"]([*arguments[:2], "--train", *arguments[2:]])
    assert capsys.readouterr().out.count("zip_fpn_only.yaml") == 2


def test_the_first_model_may_be_as_detectron2_builds_it(tool, tmp_path):
    output = tmp_path / "benchmark.json"
    tool["main"]([RPN, RPN, *SIZE, "--repeats", "1", "--warmup", "0", "--train",
                  "--first-as-built", "--output", str(output), *CPU])  # fmt: skip
    assert json.loads(output.read_text())["conditions"]["first"] == "as built"
    kinds = {}
    for as_built in (True, False):
        built = tool["build_candidate"](RPN, CPU, [], train=True, as_built=as_built)
        kinds[as_built] = type(built.model.proposal_generator).__name__
    assert kinds == {True: "RPN", False: "LossRPN"}


def test_generator_step_is_forward_and_backward_on_detached_maps(tool):
    """A generator that sleeps a tenth of a second forwards and two tenths backwards."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.1)
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(0.2)
            return gradient

    class Generator(torch.nn.Module):
        def forward(self, images, features, gt_instances):
            assert (images, gt_instances) == ("images", "objects")
            return [], {"loss": Slow.apply(features["p2"]).sum()}

    maps = torch.ones(3, requires_grad=True) * 1  # as if a backbone had made it
    arguments = ("images", {"p2": maps}, "objects")
    seconds = tool["time_generator_step"](Generator(), arguments, torch.device("cpu"))
    assert seconds >= 0.3


def test_objects_of_an_image(tool):
    arguments = tool["parse_arguments"](["a.yaml", *SIZE, "--objects", "3"])
    (input_,) = tool["make_inputs"](arguments)
    assert len(input_["instances"]) == len(input_["instances"].gt_masks) == 3
    assert (input_["height"], input_["width"]) == (64, 96)


def test_the_original_size_reaches_the_generator(tool, monkeypatch):
    arguments = tool["parse_arguments"](["a.yaml", *SIZE, "--original-size", "32", "48"])
    (input_,) = inputs = tool["make_inputs"](arguments)
    assert (input_["height"], input_["width"]) == (32, 48)
    assert input_["image"].shape == (3, 64, 96)
    config = str(CONFIGS / "shapes" / "deepmask_rpn_only.yaml")
    candidate = tool["build_candidate"](config, ["MODEL.DEVICE", "cpu"], inputs, train=False)
    sizes, read = [], NativeSizes.__call__

    def reading(self, image_sizes):
        sizes.append(read(self, image_sizes))
        return sizes[-1]

    monkeypatch.setattr(NativeSizes, "__call__", reading)
    tool["measure"]([candidate], repeats=1, warmup=0)
    assert sizes == [[(32, 48)]]


def test_every_model_has_one_turn_in_each_round(tool):
    order = []

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, name):
            super().__init__()
            self.name = name
            self.backbone, self.proposal_generator = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, inputs):
            order.append(self.name)
            return self.proposal_generator(self.backbone(inputs))

    candidates = [tool["Candidate"](name, Model(name).eval(), [{}]) for name in "abc"]
    turns = tool["measure"](candidates, repeats=2, warmup=1)
    assert order == list("abcabcabc")
    assert [len(own_turns) for own_turns in turns] == [2, 2, 2]
    # Nothing is left on the models.
    assert not candidates[0].model.backbone._forward_hooks


def test_summary_worked_by_hand(tool):
    turn = tool["Turn"]
    candidates = [tool["Candidate"](name, torch.nn.Linear(3, 2), []) for name in "ab"]
    turns = [
        [turn(4.0, 2.0, 1.0, 10), turn(8.0, 2.0, 1.0, 30), turn(4.0, 4.0, 1.0, 20)],
        [turn(4.0, 2.0, 3.0, 10), turn(16.0, 2.0, 3.0, 10), turn(12.0, 2.0, 3.0, 10)],
    ]
    first, second = tool["summarize"](candidates, turns, batch=2)
    assert first["total"] == {
        "seconds_per_image": 2.0, "least": 2.0, "greatest": 4.0, "ratio": 1.0
    }  # fmt: skip
    assert first["peak_memory_bytes"] == 30 and first["parameters"] == 8
    # Ratios within the rounds: 1, 2 and 3.
    assert second["total"]["ratio"] == 2.0 and second["generator"]["ratio"] == 3.0
    assert "1.00" in tool["format_table"]([first, second])


def test_inputs_are_the_same_for_all_and_reproducible(tool, tmp_path):
    arguments = tool["parse_arguments"](["a.yaml", *SIZE, "--batch", "2"])
    first, second = (tool["make_inputs"](arguments) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["image"], b["image"]) and a["image"].shape == (3, 64, 96)
        objects = a["instances"]
        assert torch.equal(objects.gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        # Masks fill their boxes.
        found = objects.gt_masks.get_bounding_boxes().tensor
        assert (found - objects.gt_boxes.tensor).abs().max() <= 1
    assert not torch.equal(first[0]["image"], first[1]["image"])
    path = tmp_path / "red.png"
    Image.fromarray(np.full((10, 10, 3), (255, 0, 9), np.uint8)).save(path)
    arguments = tool["parse_arguments"](["a.yaml", *SIZE, "--input", str(path)])
    (input_,) = tool["make_inputs"](arguments)
    assert input_["image"].shape == (3, 64, 96)
    for image_format, colour in (("RGB", [255, 0, 9]), ("BGR", [9, 0, 255])):
        cfg = make_cfg(None, "INPUT.FORMAT", image_format)
        (model_input,) = tool["inputs_for"](cfg, [input_], train=False)
        assert model_input["image"][:, 5, 5].tolist() == colour
        assert "instances" not in model_input


PEAKS = """
import runpy, torch
tool = runpy.run_path("tools/benchmark.py")

class Model(torch.nn.Module):
    device = torch.device("cpu")

    def __init__(self, mebibytes):
        super().__init__()
        self.backbone, self.proposal_generator = torch.nn.Identity(), torch.nn.Identity()
        self.mebibytes = mebibytes

    def forward(self, inputs):
        torch.ones(self.mebibytes << 20, dtype=torch.uint8)
        return self.proposal_generator(self.backbone(inputs))

candidates = [tool["Candidate"](str(x), Model(x).eval(), [{}]) for x in (400, 100)]
for turns in tool["measure"](candidates, repeats=3, warmup=0):
    # A system short of memory takes pages back meanwhile, and a pass then counts for less.
    print(max(turn.memory for turn in turns) / 2**20)
"""


def test_peak_memory_is_that_of_one_pass():
    # In a process of its own: memory that other tests have used and freed may be used again.
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    large, small = map(float, done.stdout.split()[-2:])
    assert 395 <= large <= 440 and 95 <= small <= 140


def test_configurations_and_overrides_are_told_apart(tool):
    parse = tool["parse_arguments"]
    args = parse(["a.yaml", "b.yml", "--height", "9", "KEY", "c.yaml"])
    assert args.configs == ["a.yaml", "b.yml"] and args.opts == ["KEY", "c.yaml"]
    assert args.height == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL.DEVICE", "cpu"], "name at least one configuration"),
        ([RPN, "--repeats", "0"], "--repeats must be at least 1, not 0"),
    ],
)
def test_wrong_command_line(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool["main"](arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "Configuration file none.yaml is missing"),
        ([RPN, "--input", "none.jpg"], "There is no image file none.jpg"),
        ([RPN, *TINY, "MODEL.PROPOSAL_GENERATOR.NAME", "ZAP"], "Unknown MODEL.PROPOSAL_GENERATOR"),
        (
            [RPN, *TINY, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN",
             "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals",
             "MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", "True",
             "MODEL.ROI_HEADS.IN_FEATURES", "['p4']"],
            "without a proposal generator to time",
        ),
    ],
)  # fmt: skip
def test_bad_input_in_one_line(tool, arguments, message):
    with pytest.raises(SystemExit) as stop:
        tool["main"](arguments)
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_mixed_precision_reaches_the_pass_and_the_generators_step(tool):
    seen = []

    class Generator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, images, features, gt_instances=None):
            output = self.layer(features["x"])
            seen.append(output.dtype)
            return None, {"loss": output.sum()}

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.backbone, self.proposal_generator = torch.nn.Identity(), Generator()

        def forward(self, inputs):
            features = {"x": self.backbone(torch.ones(2, 3))}
            return self.proposal_generator(None, features, None)[1]

    candidate = tool["Candidate"]("a", Model().train(), [{}])
    for amp in (False, True):
        (turns,) = tool["measure"]([candidate], repeats=1, warmup=0, amp=amp)
        assert turns[0].generator <= turns[0].total and turns[0].generator_step > 0
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
