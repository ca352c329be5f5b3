"""The commands of docs/detectornet.md run, in the page's order, on tiny images and networks."""

import re
import shlex

import pytest
import torch
from detectron2.modeling import build_proposal_generator

from d2proposals.engine.job import check_config
from tests.common import ROOT, make_cfg
from tests.page_commands import read_commands, run_page

# AlexNet's public weights, 244 MB, are read by tests/backbones/test_alexnet.py.
# Times need the full size.
ELSEWHERE = {"tools/convert_weights.py", "tools/benchmark.py"}
MODEL = {"train_net.py", "tools/compare_refinement.py", "tools/visualize_box_masks.py",
         "tools/mine_hard_negatives.py", "tools/reuse_classifier.py"}  # fmt: skip
TINY = ["MODEL.DEVICE", "cpu", "MODEL.DETECTORNET.WIDTH_FACTOR", "0.01",
        "MODEL.DETECTORNET.INPUT_SIZE", "97", "MODEL.DETECTORNET.NETWORKS", "shared",
        "MODEL.DETECTORNET.MASK_SIZE", "6", "MODEL.DETECTORNET.STRIDE", "20.0",
        "MODEL.DETECTORNET.REFINEMENT.STRIDE", "40.0", "MODEL.DETECTORNET.NUM_CROPS", "5",
        "MODEL.DETECTORNET.CLASSIFIER.NUM_CROPS", "5", "MODEL.DETECTORNET.SCORE_THRESH", "-1.0",
        "MODEL.DETECTORNET.TOPK_PER_SCALE", "1",
        "MODEL.DETECTORNET.SLIDING_WINDOWS.STRIDE", "90.0",
        "MODEL.DETECTORNET.SLIDING_WINDOWS.MEAN_DIMENSIONS", "(0.5, 1.0)",
        "DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2",
        "DATASETS.TRAIN", "('tiny_train',)"]  # fmt: skip
# A training's last evaluation is that of --eval-only.
NO_TEST, TEST = ["DATASETS.TEST", "()"], ["DATASETS.TEST", "('tiny_val',)"]
# All boxes of the tiny dataset are squares.
EXTRA = {"tools/estimate_box_shapes.py": ["--number", "1"]}
DATASETS = {"d2p_shapes_val": "tiny_val", "coco_2017_train": "tiny_train"}


def tiny(program, arguments):
    """The arguments with tiny settings behind the page's own."""
    arguments = [DATASETS.get(x, x) for x in arguments]
    arguments = [str(ROOT / x) if x.startswith("configs/") else x for x in arguments]
    if program in MODEL:
        trains = program == "train_net.py" and "--eval-only" not in arguments
        arguments += TINY + (NO_TEST if trains else TEST)
    return arguments + EXTRA.get(program, [])


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_coco")
def test_the_page_s_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands, images = read_commands("detectornet.md"), ("street.jpg", "kitchen.jpg")
    programs = run_page(commands, tiny, ELSEWHERE, tmp_path, images)
    assert len(programs) > 15 and MODEL | ELSEWHERE < set(programs)
    written = {x.name for x in tmp_path.rglob("*") if x.is_file()}
    assert {"model_final.pth", "windows.pkl", "sliding.pkl", "refinement.png", "box_masks.png",
            "box_shapes.yaml", "round_1.pkl", "round_2.pkl", "classifier_reused.pth",
            } <= written  # fmt: skip


def ablation_rows():
    """The settings of each row of the page's ablations, KEY and VALUE, and its configuration."""
    text = (ROOT / "docs" / "detectornet.md").read_text(encoding="utf-8")
    for line in text.split("| What | Overrides |\n")[1].split("\n\n")[0].splitlines()[1:]:
        name, cell = (part.strip() for part in line.strip("|").split(" | ", 1))
        config = (
            "detectornet_voc.yaml" if "(in `configs/detect" in cell else "detectornet_rpn_only.yaml"
        )
        spans = [shlex.split(span) for span in re.findall(r"`([^`]*)`", cell)]
        yield name, config, [words for words in spans if len(words) > 1]


@pytest.mark.parametrize(("name", "config", "settings"), [*ablation_rows()])
def test_a_row_of_the_ablations_is_a_model(name, config, settings):
    assert settings, name
    for words in settings:
        overrides = [x if i % 2 or "SOLVER" in x else f"MODEL.DETECTORNET.{x}"
                     for i, x in enumerate(words)]  # fmt: skip
        cfg = make_cfg(config, *overrides)
        check_config(cfg)
        with torch.device("meta"):
            build_proposal_generator(cfg, {})


def test_every_row_of_the_ablations_is_read():
    rows = {name: settings for name, _, settings in ablation_rows()}
    assert len(rows) > 10 and rows["non-maximum suppression"] == [
        ["NMS_TYPE", "own_area"],
        ["NMS_TYPE", "iou"],
    ]
