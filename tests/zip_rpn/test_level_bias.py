"""The search for the levels' biases, and that it ranks as the generator with these biases does."""

import shlex
from ast import literal_eval

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.structures import BoxMode
from PIL import Image

from d2proposals.evaluation.ground_truth import GroundTruth
from d2proposals.zip_rpn.level_bias import (
    RecordedImage,
    recall_with_bias,
    recorded_candidates,
    tune_level_bias,
)
from d2proposals.zip_rpn.level_candidates import LevelCandidates
from tests.common import make_cfg, make_images
from tools.tune_level_bias import main

SHAPES = {f"zoom{i}": ShapeSpec(channels=8, stride=s) for i, s in ((1, 8), (2, 16), (3, 32))}


def build(*overrides):
    torch.manual_seed(0)
    settings = ["MODEL.ZIP.HEAD_CHANNELS", 16, *overrides]
    generator = build_proposal_generator(make_cfg("zip_rpn_only.yaml", *settings), SHAPES).eval()
    for parameter in generator.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return generator


def ground_truth_of(boxes):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return GroundTruth(
        [0], [(64, 64)], boxes, areas, np.zeros(len(boxes), int), np.array([len(boxes)]), True
    )


def test_search_finds_the_top_of_a_hill():
    seen = []

    def evaluate(bias):
        seen.append(bias)
        return -((bias[1] - 0.3) ** 2) - (bias[2] + 0.15) ** 2

    bias, best = tune_level_bias(evaluate, 3)
    assert bias[0] == 0 and abs(bias[1] - 0.3) < 0.0125 and abs(bias[2] + 0.15) < 0.0125
    assert best == evaluate(bias)
    assert all(b[0] == 0 for b in seen) and len(seen) < 60


def test_the_last_step_is_tried():
    tried = []
    tune_level_bias(lambda bias: tried.append(bias) or 0.0, 2, first_step=0.4, last_step=0.1)
    assert {abs(bias[1]) for bias in tried} == {0.0, 0.4, 0.2, 0.1}


def test_nothing_better_leaves_zeros():
    assert tune_level_bias(lambda _: 0.5, 3) == ((0.0, 0.0, 0.0), 0.5)


def test_recall_by_hand():
    """The second level has the object, but the lower score, until a bias lifts it."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 60, 60]])
    candidates = LevelCandidates(boxes, torch.tensor([0.9, 0.6]), torch.tensor([0, 1]))
    records = [RecordedImage(candidates, (64, 64))]
    arguments = build(), records, ground_truth_of([[20, 20, 60, 60]])
    assert recall_with_bias(*arguments, (0.0, 0.0, 0.0), 1) == 0
    assert recall_with_bias(*arguments, (0.0, 0.29, 0.0), 1) == 0
    assert recall_with_bias(*arguments, (0.0, 0.31, 0.0), 1) == 1
    assert recall_with_bias(*arguments, (0.0, 0.0, 0.0), 2) == 1
    bias, best = tune_level_bias(lambda b: recall_with_bias(*arguments, b, 1), 3)
    assert best == 1 and bias[1] - bias[0] > 0.3


def test_recorded_candidates_with_a_bias_are_those_of_the_generator_with_it():
    images = make_images((128, 160), (96, 128))
    generator = torch.Generator().manual_seed(1)
    features = {
        name: torch.randn(2, 8, 128 // s.stride, 160 // s.stride, generator=generator)
        for name, s in SHAPES.items()
    }
    bias = (0.0, 0.2, -0.1)
    plain, biased = build(), build("MODEL.ZIP.LEVEL_BIAS", bias)
    with recorded_candidates(plain) as records:
        for (boxes, scores), size in zip(
            plain.candidates(images, features), images.image_sizes, strict=True
        ):
            plain.select(boxes, scores, size)
    assert "select" not in vars(plain) and "candidates" not in vars(plain)
    for record, (boxes, scores) in zip(records, biased.candidates(images, features), strict=True):
        assert torch.equal(record.candidates.boxes, boxes)
        torch.testing.assert_close(record.candidates.biased_scores(bias), scores)
        assert set(record.candidates.levels.tolist()) == {0, 1, 2}
    assert [record.image_size for record in records] == [tuple(s) for s in images.image_sizes]


def make_images_with_objects(folder):
    """Records of two images, a bright box on noise each."""
    rng = np.random.default_rng(0)
    records = []
    for i, box in enumerate(([10, 12, 50, 44], [40, 30, 80, 90])):
        image = rng.integers(0, 60, (100, 120, 3), dtype=np.uint8)
        image[box[1] : box[3], box[0] : box[2]] = 220
        Image.fromarray(image).save(folder / f"{i}.png")
        annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
        records.append({"file_name": str(folder / f"{i}.png"), "height": 100, "width": 120,
                        "image_id": i, "annotations": [annotation]})  # fmt: skip
    return records


@pytest.mark.parametrize("scales", [False, True])
def test_command_prints_an_override(tmp_path, capsys, scales):
    records = make_images_with_objects(tmp_path)
    DatasetCatalog.register("tuned_set", lambda: records)
    try:
        main(["--config-file", "configs/shapes/zip_rpn_only.yaml", "--dataset", "tuned_set",
              "--limit", "3", "MODEL.BN_INCEPTION.WIDTH_FACTOR", "0.125", "MODEL.DEVICE", "cpu",
              "INPUT.MIN_SIZE_TEST", "96", "TEST.AUG.ENABLED", str(scales),
              "TEST.AUG.MIN_SIZES", "(96, 64)", "OUTPUT_DIR", str(tmp_path)])  # fmt: skip
    finally:
        DatasetCatalog.remove("tuned_set")
    *tried, summary, override = capsys.readouterr().out.splitlines()
    assert tried[0].startswith("(0.0, 0.0, 0.0): AR@3 ") and len(tried) > 1
    assert summary.startswith("2 images of tuned_set: AR@3 ")
    key, value = shlex.split(override)
    assert key == "MODEL.ZIP.LEVEL_BIAS" and len(literal_eval(value)) == 3


def test_command_needs_a_dataset(capsys):
    with pytest.raises(SystemExit):
        main(["--config-file", "configs/zip_rpn_only.yaml"])
    assert "--dataset" in capsys.readouterr().err
