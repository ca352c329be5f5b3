"""Precision and recall by hand, and the command that compares the two stages."""

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2proposals.detectornet.refinement_curves import (
    PrecisionRecall,
    ScoredBoxes,
    detections_of,
    plot_precision_recall,
    precision_recall,
)
from d2proposals.evaluation.voc_average_precision import Objects
from tests.common import CONFIGS, run_tool
from tests.engine.tiny_coco import registered, write_tiny_coco

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_refinement.py"


def objects(*boxes, categories=None, difficult=()):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    categories = np.zeros(len(boxes), int) if categories is None else np.array(categories)
    return Objects(boxes, categories, np.isin(np.arange(len(boxes)), difficult))


def found(*boxes_and_scores, classes=None):
    classes = np.zeros(len(boxes_and_scores), int) if classes is None else np.array(classes)
    boxes = np.array([x[:4] for x in boxes_and_scores], dtype=np.float32).reshape(-1, 4)
    scores = np.array([x[4] for x in boxes_and_scores], dtype=np.float32)
    return ScoredBoxes(boxes, scores, classes)


def test_a_curve_by_hand():
    truth = [objects([0, 0, 10, 10], [20, 20, 40, 40]), objects([0, 0, 30, 30])]
    # By score: right, wrong, right (IoU .8), and a third object never found.
    boxes = [found((0, 0, 10, 10, 3.0), (20, 20, 40, 36, -1.0)), found((50, 50, 60, 60, 1.0))]
    (curve,) = precision_recall(truth, boxes, 0.5).values()
    assert curve.greatest_recall == pytest.approx(2 / 3)
    # Precision 1 up to a recall of 1/3 (34 of 101 points), 2/3 up to 2/3 (33 points), then 0.
    assert curve.average_precision == pytest.approx((34 + 33 * 2 / 3) / 101)
    (strict,) = precision_recall(truth, boxes, 0.9).values()
    assert strict.greatest_recall == pytest.approx(1 / 3)


def test_no_boxes_and_no_objects():
    (curve,) = precision_recall([objects([0, 0, 9, 9])], [found()], 0.5).values()
    assert curve.average_precision == 0 and curve.greatest_recall == 0
    with pytest.raises(ValueError, match="with objects"):
        precision_recall([objects([0, 0, 9, 9], difficult=[0])], [found()])


def test_difficult_objects_are_neither_right_nor_wrong():
    truth = [objects([0, 0, 10, 10], [20, 20, 40, 40], difficult=[1])]
    boxes = [found((20, 20, 40, 40, 3.0), (0, 0, 10, 10, 2.0))]
    (curve,) = precision_recall(truth, boxes).values()
    assert (curve.greatest_recall, curve.average_precision) == (1, pytest.approx(1))
    # Without the mark it is one of two to be found.
    boxes = [found((0, 0, 10, 10, 2.0))]
    (curve,) = precision_recall([truth[0]], boxes).values()
    assert curve.greatest_recall == 1
    (curve,) = precision_recall([replace(truth[0], is_difficult=np.zeros(2, bool))], boxes).values()
    assert curve.greatest_recall == 0.5


def test_classes_by_hand():
    cat, dog = [0, 0, 10, 10], [20, 20, 40, 40]
    truth = [objects(cat, dog, categories=[0, 2]), objects(cat)]
    boxes = [
        found((*cat, 3.0), (*dog, 2.0), (*dog, 1.0), classes=[0, 0, 2]),
        found((*cat, 1.5), classes=[2]),
    ]
    curves = precision_recall(truth, boxes, class_agnostic=False)
    assert set(curves) == {0, 2}
    # Cat: right, then wrong, one of two found. Dog: one of its two boxes is on a cat.
    assert curves[0].greatest_recall == 0.5 and curves[2].greatest_recall == 1
    assert curves[0].average_precision == pytest.approx(51 / 101)
    assert curves[2].average_precision == pytest.approx(1 / 2)
    # All classes as one: every object is found; one box of four is a duplicate.
    agnostic = [x._replace(classes=np.zeros_like(x.classes)) for x in boxes]
    (curve,) = precision_recall(truth, agnostic).values()
    assert curve.greatest_recall == 1


def make_proposals(boxes, scores, classes=None):
    proposals = Instances((100, 100), proposal_boxes=Boxes(torch.tensor(boxes).float()))
    proposals.objectness_logits = torch.tensor(scores)
    if classes is not None:
        proposals.proposal_classes = torch.tensor(classes)
    return proposals


def test_duplicates_are_suppressed_as_by_the_heads():
    boxes = [[0, 0, 40, 40], [2, 0, 42, 40], [50, 50, 90, 90]]
    kept = detections_of(make_proposals(boxes, [3.0, 4.0, -1.0]), 0.5)
    assert kept.boxes.tolist() == boxes[1:] and kept.scores.tolist() == [4, -1]
    assert kept.classes.tolist() == [0, 0]
    kept = detections_of(make_proposals(boxes, [3.0, 4.0, -1.0], [2, 1, 1]), 0.5)
    assert kept.boxes.tolist() == [boxes[1], boxes[0], boxes[2]]
    assert kept.classes.tolist() == [1, 2, 1]
    assert len(detections_of(make_proposals(boxes, [3.0, 4.0, -1.0]), 1.0).boxes) == 3
    # Perfect boxes, each found five times as after the refinement: AP 100, not 63.
    truth = [objects(*(boxes[1:]))]
    five = make_proposals(boxes[1:] * 5, [float(x) for x in range(10, 0, -1)])
    curves = [precision_recall(truth, [detections_of(five, x)])[0] for x in (0.5, 1.0)]
    assert curves[0].average_precision == 1 and curves[0].greatest_recall == 1
    assert len(detections_of(five, 1.0).boxes) == 10


def test_the_command_needs_images(capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOL))["main"](["--config-file", "x.yaml", "--num-images", "0"])
    assert "--num-images must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_the_command(class_agnostic, tmp_path, capsys):
    output = tmp_path / "refinement.png"
    with registered(write_tiny_coco(tmp_path / "datasets") / "coco"):
        run_tool(
            "compare_refinement", "--config-file",
            CONFIGS / "shapes" / "detectornet_rpn_only.yaml", "--output", output,
            "--num-images", "2", "DATASETS.TEST", "('tiny_val',)", "MODEL.DEVICE", "cpu",
            "MODEL.DETECTORNET.WIDTH_FACTOR", "0.03", "MODEL.DETECTORNET.STRIDE", "20.0",
            "MODEL.DETECTORNET.REFINEMENT.STRIDE", "20.0",
            "MODEL.DETECTORNET.CLASS_AGNOSTIC", class_agnostic, "MODEL.ROI_HEADS.NUM_CLASSES", "2",
        )  # fmt: skip
    lines = capsys.readouterr().out
    # Only people are in these images.
    title = "all classes as one" if class_agnostic else "person"
    for stage in ("first stage", "after refinement"):
        for threshold in (0.5, 0.7):
            assert f"{stage}, IoU {threshold}, {title}: AP " in lines
    assert "2 images of tiny_val" in lines
    with Image.open(output) as picture:
        picture.load()


def test_panels_and_means_of_several_classes(tmp_path):
    tool = runpy.run_path(str(TOOL))
    recall = np.linspace(0, 1, 101)
    curves = {
        ("first stage", 0.5): {
            class_id: PrecisionRecall(recall, np.full(101, part), part, 2 * part)
            for class_id, part in ((0, 0.1), (3, 0.4))
        }
    }
    lines = tool["report"](curves, {0: "cat", 3: "dog"})
    assert lines == [
        "first stage, IoU 0.5, cat: AP 10.0, recall 20.0",
        "first stage, IoU 0.5, dog: AP 40.0, recall 80.0",
        "first stage, IoU 0.5, mean: AP 25.0, recall 50.0",
    ]
    curve = curves["first stage", 0.5][0]
    widths = []
    for number in (1, 5):
        panels = {str(i): {"first stage": curve} for i in range(number)}
        plot_precision_recall(tmp_path / "x.png", panels)
        with Image.open(tmp_path / "x.png") as picture:
            widths.append(picture.size)
    assert widths[1][0] == 4 * widths[0][0] and widths[1][1] == 2 * widths[0][1]
