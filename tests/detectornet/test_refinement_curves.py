"""Precision and recall by hand, and the command that compares the two stages."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from d2proposals.detectornet.refinement_curves import ScoredBoxes, precision_recall
from tests.common import CONFIGS
from tests.engine.tiny_coco import registered, write_tiny_coco

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_refinement.py"


def record(*boxes, **extra):
    return {"annotations": [{"bbox": x, "bbox_mode": BoxMode.XYXY_ABS, **extra} for x in boxes]}


def found(*boxes_and_scores):
    boxes = np.array([x[:4] for x in boxes_and_scores], dtype=np.float32).reshape(-1, 4)
    return ScoredBoxes(boxes, np.array([x[4] for x in boxes_and_scores], dtype=np.float32))


def test_a_curve_by_hand():
    records = [record([0, 0, 10, 10], [20, 20, 40, 40]), record([0, 0, 30, 30])]
    # By score: right, wrong, right (IoU .8), and a third object never found.
    boxes = [found((0, 0, 10, 10, 3.0), (20, 20, 40, 36, -1.0)), found((50, 50, 60, 60, 1.0))]
    curve = precision_recall(records, boxes, 0.5)
    assert curve.greatest_recall == pytest.approx(2 / 3)
    # Precision 1 up to a recall of 1/3 (34 of 101 points), 2/3 up to 2/3 (33 points), then 0.
    assert curve.average_precision == pytest.approx((34 + 33 * 2 / 3) / 101)
    strict = precision_recall(records, boxes, 0.9)
    assert strict.greatest_recall == pytest.approx(1 / 3)


def test_no_boxes_and_no_objects():
    curve = precision_recall([record([0, 0, 9, 9])], [found()], 0.5)
    assert curve.average_precision == 0 and curve.greatest_recall == 0
    with pytest.raises(ValueError, match="with objects"):
        precision_recall([record([0, 0, 9, 9], iscrowd=1)], [found()])


def test_the_command_needs_images(capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOL))["main"](["--config-file", "x.yaml", "--num-images", "0"])
    assert "--num-images must be at least 1, got 0" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    output = tmp_path / "refinement.png"
    with registered(write_tiny_coco(tmp_path / "datasets") / "coco"):
        runpy.run_path(str(TOOL))["main"](
            ["--config-file", str(CONFIGS / "shapes" / "detectornet_rpn_only.yaml"),
             "--output", str(output), "--num-images", "2", "DATASETS.TEST", "('tiny_val',)",
             "MODEL.DEVICE", "cpu", "MODEL.DETECTORNET.WIDTH_FACTOR", "0.03"]
        )  # fmt: skip
    lines = capsys.readouterr().out
    for stage in ("first stage", "after refinement"):
        for threshold in (0.5, 0.7):
            assert f"{stage}, IoU {threshold}: AP " in lines
    assert "2 images of tiny_val" in lines
    with Image.open(output) as picture:
        picture.load()
