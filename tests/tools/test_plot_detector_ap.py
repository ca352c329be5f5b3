"""tools/plot_detector_ap.py."""

import json

import pytest
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import StandardROIHeads
from PIL import Image

from d2proposals.evaluation.comparison import read_precision_by_number
from tests.engine.proposal_files import NUM_PROPOSALS, proposals_of, write_pickle
from tests.engine.tiny_coco import SMALL, loggers_as_before, registered, write_tiny_coco
from tools.plot_detector_ap import main

CONFIG = "configs/shapes/faster_rcnn_rpn.yaml"
PRECOMPUTED = "configs/shapes/fast_rcnn_precomputed.yaml"


@pytest.fixture
def overrides(tmp_path):
    with registered(write_tiny_coco(tmp_path / "datasets") / "coco"), loggers_as_before():
        yield [
            *SMALL, "DATASETS.TEST", "('tiny_val',)", "MODEL.ROI_BOX_HEAD.FC_DIM", "8",
            "MODEL.ROI_HEADS.NUM_CLASSES", "80", "OUTPUT_DIR", str(tmp_path / "out"),
        ]  # fmt: skip


def test_numbers_and_curve(overrides, tmp_path, capsys):
    before = tmp_path / "before.json"
    curve = {"5": {"AP": 1.0, "AP50": 2.0}, "50": {"AP": 2.0, "AP50": 3.0}}
    before.write_text(json.dumps({"name": "earlier", "ap_by_limit": curve}))
    output = tmp_path / "ap.json"
    main(
        ["--config-file", CONFIG, "--limits", "20", "5", "--name", "ours", "--output", str(output),
         "--beside", str(before), *overrides]
    )  # fmt: skip
    content = json.loads(output.read_text())
    assert content["name"] == "ours" and content["dataset"] == "tiny_val"
    assert list(content["ap_by_limit"]) == ["5", "20"]
    assert "20 proposals: AP " in capsys.readouterr().out
    assert Image.open(tmp_path / "ap.png").size[0] > 400
    assert set(read_precision_by_number([str(before), str(output)])) == {"earlier", "ours"}
    assert read_precision_by_number([before], "AP50") == {"earlier": {5: 2.0, 50: 3.0}}


def test_the_measure_that_is_asked_for_is_drawn(overrides, tmp_path, monkeypatch):
    drawn = []

    def draw(path, runs, title, measure):
        drawn.append((runs, measure))

    results = {"bbox": {"AP": 1.0, "AP50": 4.0}}
    monkeypatch.setattr("tools.plot_detector_ap.plot_precision_by_number", draw)
    monkeypatch.setattr("tools.plot_detector_ap.Trainer.test", lambda cfg, model: results)
    main(["--config-file", CONFIG, "--limits", "5", "--name", "ours", "--measure", "AP50",
          "--output", str(tmp_path / "ap.json"), *overrides])  # fmt: skip
    assert drawn == [({"ours": {5: 4.0}}, "AP50")]


@pytest.fixture
def seen(monkeypatch):
    """The numbers of proposals that heads get, image after image."""
    numbers = []
    forward = StandardROIHeads.forward

    def spy(self, images, features, proposals, targets=None):
        numbers.extend(map(len, proposals))
        return forward(self, images, features, proposals, targets)

    monkeypatch.setattr(StandardROIHeads, "forward", spy)
    return numbers


def run(config, limits, output, *opts):
    limits = map(str, limits)
    main(["--config-file", config, "--limits", *limits, "--output", str(output), *map(str, opts)])
    return json.loads(output.read_text())["mean_number_by_limit"]


def warnings_in(caplog):
    records = [x for x in caplog.records if x.name == "d2proposals.plot_detector_ap"]
    return [x.getMessage() for x in records]


def test_the_heads_get_as_many_as_the_limit_says(overrides, tmp_path, seen, caplog, capsys):
    topk = ("MODEL.RPN.POST_NMS_TOPK_TEST", 30)
    means = run(CONFIG, [30, 5, 5000], tmp_path / "ap.json", *overrides, *topk)
    # Of four images each.
    assert seen == [5] * 4 + [30] * 4 + [30] * 4
    assert means == {"5": 5, "30": 30, "5000": 30}
    (warning,) = warnings_in(caplog)
    assert warning.startswith("No image has 5000 proposals, the most are 30")
    lines = [x for x in capsys.readouterr().out.splitlines() if " proposals: AP " in x]
    endings = ["5.0", "30.0", "30.0"]
    assert [x.split(", ")[-1] for x in lines] == [f"{x} proposals per image" for x in endings]


@pytest.fixture
def precomputed(overrides, tmp_path):
    """Overrides for proposals in a file, which the first image has three of."""
    content = proposals_of("tiny_val")
    for key in ("boxes", "objectness_logits"):
        content[key][0] = content[key][0][:3]
    path = write_pickle(tmp_path / "val.pkl", content)
    # An evaluation needs no proposals of the training images.
    gone = tmp_path / "no_training_file.pkl"
    return path, [
        *overrides, "DATASETS.PROPOSAL_FILES_TEST", f"('{path}',)",
        "DATASETS.PROPOSAL_FILES_TRAIN", f"('{gone}',)",
    ]  # fmt: skip


def test_precomputed_proposals_are_limited_and_counted_too(precomputed, tmp_path, seen, caplog):
    _, opts = precomputed
    means = run(PRECOMPUTED, [7, NUM_PROPOSALS, 90], tmp_path / "ap.json", *opts)
    assert seen == [3, 7, 7, 7] + [3, 40, 40, 40] * 2
    assert means == {"7": 6, "40": 30.75, "90": 30.75}
    (warning,) = warnings_in(caplog)
    assert warning.startswith("No image has 90 proposals, the most are 40")


def test_a_bad_file_of_proposals_ends_it_with_one_line(precomputed, tmp_path):
    path, opts = precomputed
    content = proposals_of("tiny_val")
    write_pickle(
        path, {**content, **{k: content[k][1:] for k in ("ids", "boxes", "objectness_logits")}}
    )
    with pytest.raises(SystemExit) as stop:
        run(PRECOMPUTED, [7], tmp_path / "ap.json", *opts)
    assert str(stop.value).startswith("Error: DATASETS.PROPOSAL_FILES_TEST: ")
    assert "lacks 1 of 4 images" in str(stop.value) and "\n" not in str(stop.value)


def test_own_two_stage_detectors_are_taken(overrides, tmp_path, seen, monkeypatch):
    class OwnRCNN(GeneralizedRCNN):
        pass

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "OwnRCNN", OwnRCNN)
    own = ("MODEL.META_ARCHITECTURE", "OwnRCNN")
    assert run(CONFIG, [5], tmp_path / "ap.json", *overrides, *own) == {"5": 5}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--limits", "0", "--name", "x"], "--limits must be positive, not 0"),
        (["--beside", "nowhere.json"], "nowhere.json is missing"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "takes a two-stage detector"),
        (["DATASETS.TEST", "()"], "takes one dataset in DATASETS.TEST, not 0"),
    ],
)
def test_bad_input_has_its_line(overrides, arguments, line, capsys):
    options = arguments if arguments[0].startswith("--") else []
    opts = [] if options else arguments
    with pytest.raises(SystemExit) as stop:
        main(["--config-file", CONFIG, *options, *overrides, *opts])
    assert line in f"{stop.value} {capsys.readouterr().err}"


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="was not written by tools"):
        read_precision_by_number([str(tmp_path / "x.json")])
