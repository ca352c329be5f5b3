"""docs/deepmask.md: its commands are run as they stand on the page, but for tiny data; its rows."""

import json
import re
import runpy
import shlex

import pytest
import torch
from PIL import Image

from d2proposals.deepmask.network import build_network
from tests.common import CONFIGS, make_cfg
from tests.deepmask.released_model import ReleasedModel
from tests.page_commands import read_commands, run_command
from tests.torch7_writer import torch7_bytes

PAGE = CONFIGS.parent / "docs" / "deepmask.md"
DATASETS = {"d2p_shapes_val": "tiny_val", "coco_2017_val": "tiny_val",
            "voc_2007_trainval": "tiny_train", "voc_2007_test": "tiny_val"}  # fmt: skip
# What keeps a run short, behind the overrides of the page.
TRAINING = [
    *("DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"),
    *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "0"),
]
MODEL = ["MODEL.DEVICE", "cpu", "MODEL.DEEPMASK.LOG2_SCALES", "(0.0,)",
         "MODEL.DEEPMASK.PRE_NMS_TOPK_TEST", "60"]  # fmt: skip


def commands(program, *words):
    """Arguments of the page's commands with these words; at least one."""
    found = [a for p, a in read_commands(PAGE.name) if p == program and set(words) <= set(a)]
    assert found, (program, words)
    return found


def run(program, arguments, *overrides):
    """Run a command of the page on the tiny data."""
    arguments = [DATASETS.get(x, x) for x in arguments]
    # The paper's network is too large for this: the small variant stands for it.
    paper = "configs/deepmask_rpn_only.yaml"
    small = str(CONFIGS / "shapes" / "deepmask_rpn_only.yaml")
    arguments = [small if x in (paper, f"configs/{small.split('configs/')[1]}") else x
                 for x in arguments]  # fmt: skip
    return run_command(program, [*arguments, *overrides])


@pytest.mark.slow
def test_the_commands_of_the_page(tiny_coco, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tiny_coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 88  # a teddy bear, which is not one of PASCAL's
    file.write_text(json.dumps(content))
    shapes = "configs/shapes/deepmask_rpn_only.yaml"
    train = ["--config-file", shapes]
    assert train in commands("train_net.py", shapes)
    (untrained,) = commands("train_net.py", shapes, "--eval-only")
    output = tmp_path / "output" / "shapes" / "deepmask_rpn_only"
    run("train_net.py", train, *MODEL, *TRAINING)
    assert (output / "model_final.pth").is_file()
    results = run("train_net.py", untrained, *MODEL, *TRAINING)
    assert "mask_proposals" in results
    (fill,) = commands("tools/fill_boxes.py")
    run("tools/fill_boxes.py", fill)
    (compare,) = commands("tools/evaluate_proposals.py", "boxes=filled.json")
    run("tools/evaluate_proposals.py", compare)
    printed = capsys.readouterr().out
    assert "boxes" in printed and "masks" in printed
    # The commands that name the paper's own model.
    (tmp_path / "output").mkdir(exist_ok=True)
    for name in ("deepmask_rpn_only", "deepmask20_star"):
        (tmp_path / "output" / name).symlink_to(output)
    (unseen,) = commands("tools/evaluate_proposals.py", "--seen", "voc")
    run("tools/evaluate_proposals.py", unseen)
    assert "unseen categories alone" in capsys.readouterr().out
    (masks,) = commands("tools/visualize_masks.py")
    run("tools/visualize_masks.py", masks, *MODEL, "DATASETS.TEST", "('tiny_val',)")
    Image.new("RGB", (70, 50)).save("monkeys.jpg")
    (dense,) = commands("tools/visualize_dense_masks.py")
    run("tools/visualize_dense_masks.py", dense, *MODEL)
    (export,) = commands("tools/export_proposals.py")
    run("tools/export_proposals.py", export, *MODEL)
    for name in ("masks.png", "dense_masks.png", "filled.json", "output/proposals/tiny_val.pkl",
                 "output/proposals/tiny_train.pkl"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0


def test_the_commands_of_weights_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("output/deepmask20", "output/deepmask_rpn_only"):
        cfg = make_cfg("shapes/deepmask_rpn_only.yaml")
        state = build_network(cfg).state_dict()
        (tmp_path / name).mkdir(parents=True)
        model = {f"proposal_generator.network.{k}": v for k, v in state.items()}
        torch.save({"model": model}, tmp_path / name / "model_final.pth")
    (combine,) = commands("tools/combine_branches.py")
    run("tools/combine_branches.py", combine)
    weights = torch.load("combined.pth", weights_only=True)["model"]
    assert any(".score_trunk." in x for x in weights)


@pytest.mark.slow
def test_the_commands_of_the_released_network(tiny_coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.t7").write_bytes(torch7_bytes(ReleasedModel().table()))
    Image.new("RGB", (70, 50)).save("monkeys.jpg")
    config = "configs/deepmask_r50_rpn_only.yaml"
    (convert,) = commands("tools/convert_weights.py", "deepmask_r50")
    run("tools/convert_weights.py", convert)
    (demo,) = commands("demo/demo.py", config)
    (evaluate,) = commands("train_net.py", config, "--eval-only")
    here = [str(CONFIGS.parent / config) if x == config else x for x in demo]
    runpy.run_path(str(CONFIGS.parent / "demo" / "demo.py"))["main"]([*here, *MODEL])
    assert (tmp_path / "demo_output" / "monkeys.png").stat().st_size > 0
    here = [str(CONFIGS.parent / config) if x == config else x for x in evaluate]
    results = run("train_net.py", here, *MODEL, *TRAINING, "OUTPUT_DIR", "output")
    assert {"AR@10", "AR@100", "AR@1000"} <= set(results["mask_proposals"])


def ablation_rows():
    """Overrides of the table of ablations, by row."""
    table = PAGE.read_text().split("| Row | Overrides |\n")[1].split("\n\n")[0].splitlines()[1:]
    for line in table:
        row, cell = (x.strip() for x in line.strip("|").split(" | ", 1))
        pairs = []
        for span in re.findall(r"`([^`]*)`", cell):
            words = shlex.split(span)
            if len(words) == 2 and re.fullmatch(r"[A-Z0-9_.]+", words[0]) or len(words) == 4:
                pairs += words
        yield row, cell, pairs


@pytest.mark.parametrize("row, cell, pairs", ablation_rows())
def test_a_row_of_the_ablations_is_a_model(row, cell, pairs):
    keys = [x if "." in x else f"MODEL.DEEPMASK.{x}" for x in pairs[::2]]
    overrides = [x for pair in zip(keys, pairs[1::2], strict=True) for x in pair]
    cfg = make_cfg("deepmask_rpn_only.yaml", *overrides)
    with torch.device("meta"):
        build_network(cfg)
    assert overrides or "none" in cell or "configs/" in cell or "CONTEXT" in cell
    for config in re.findall(r"configs/(\S+\.yaml)", cell):
        make_cfg(config)
    if "`CONTEXT`" in cell:
        for context in re.findall(r"\d+", cell):
            with torch.device("meta"):
                build_network(
                    make_cfg("deepmask_rpn_only.yaml", "MODEL.DEEPMASK.CONTEXT", int(context))
                )


def test_tests_and_files_that_the_page_names_exist():
    text = PAGE.read_text()
    root = CONFIGS.parent
    tests = "\n".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", text):
        assert f"def {name}" in tests, name
    for name in re.findall(r"`(\w+\.py)`", text):
        assert (root / "d2proposals" / "deepmask" / name).is_file() or list(
            (root / "tests" / "deepmask").glob(name)
        ), name
    for name in re.findall(r"`((?:tools|tests|configs|evaluation|backbones)/[\w/.]+)`", text):
        assert (root / name).exists() or (root / "d2proposals" / name).exists(), name
