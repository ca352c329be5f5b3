"""The command that writes a model to a file."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.common import CONFIGS, run_tool
from tests.deployment.networks import NETWORKS, SMALL_HEADS


def overrides(name):
    return [str(x) for x in (*NETWORKS[name][1], *SMALL_HEADS, "MODEL.DEVICE", "cpu")]


def test_a_written_model_is_checked_on_images(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    path = tmp_path / "folder" / "rpn.ts"
    run_tool(
        "export_model",
        *("--config-file", CONFIGS / "shapes/rpn_only.yaml", "--format", "torchscript"),
        *("--check", tmp_path / "photo.png", "--output", path, *overrides("RPN")),
        *("INPUT.MIN_SIZE_TEST", 80),
    )
    out = capsys.readouterr().out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("photo.png"))
    assert row[1] == "80x120"
    assert "Counted as the same" in out and "nothing was compared" not in out
    boxes, scores = torch.jit.load(path)(torch.zeros(3, 80, 120))
    assert boxes.shape == (len(scores), 4)


def test_a_check_without_boxes_says_so(tmp_path, capsys):
    Image.new("RGB", (90, 60)).save(tmp_path / "photo.png")
    run_tool(
        "export_model",
        *("--config-file", CONFIGS / "shapes/rpn_only.yaml", "--format", "torchscript"),
        *("--check", tmp_path / "photo.png", "--output", tmp_path / "rpn.ts", *overrides("RPN")),
        *("INPUT.MIN_SIZE_TEST", 80, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 1000),
    )
    assert "No boxes in these images: nothing was compared." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("shapes/spop_rpn_only.yaml", "SPOP cannot be exported: its superpixels"),
        ("shapes/detectornet_rpn_only.yaml", "DetectorNet cannot be exported: its windows"),
        ("shapes/detectornet_sliding_windows.yaml", "SlidingWindows cannot be exported: its"),
        ("shapes/deepmask_rpn_only.yaml", "DeepMask cannot be exported: the sizes"),
        ("shapes/fast_rcnn_precomputed.yaml", "'PrecomputedProposals' cannot be exported"),
        ("shapes/zip_single_stage.yaml", "RetinaNet cannot be exported"),
    ],
)
def test_what_cannot_leave_python_is_one_line(tmp_path, config, words):
    path = tmp_path / "network"
    with pytest.raises(SystemExit, match=words) as error:
        run_tool(
            "export_model",
            *("--config-file", CONFIGS / config, "--format", "torchscript", "--output", path),
            *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
        )
    assert "\n" not in str(error.value) and not path.exists()
