"""tools/plot_detector_ap.py."""

import json

import pytest
from PIL import Image

from d2proposals.evaluation.comparison import read_precision_by_number
from tests.engine.tiny_coco import SMALL, loggers_as_before, registered, write_tiny_coco
from tools.plot_detector_ap import main

CONFIG = "configs/shapes/faster_rcnn_rpn.yaml"


@pytest.fixture
def overrides(tmp_path):
    with registered(write_tiny_coco(tmp_path / "datasets") / "coco"), loggers_as_before():
        yield [
            *SMALL, "DATASETS.TEST", "('tiny_val',)", "MODEL.ROI_BOX_HEAD.FC_DIM", "8",
            "MODEL.ROI_HEADS.NUM_CLASSES", "80", "OUTPUT_DIR", str(tmp_path / "out"),
        ]  # fmt: skip


def test_numbers_and_curve(overrides, tmp_path, capsys):
    before = tmp_path / "before.json"
    before.write_text('{"name": "earlier", "ap_by_limit": {"5": {"AP": 1.0}, "50": {"AP": 2.0}}}')
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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--limits", "0", "--name", "x"], "--limits must be positive, not 0"),
        (["--beside", "nowhere.json"], "nowhere.json is missing"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "takes a two-stage detector"),
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
