"""The times of SPOP's parts: Table IV."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2proposals.spop.proposal_selection import select_proposals
from tests.common import CONFIGS

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_spop.py"
SMALL = ("MODEL.DEVICE", "cpu", "MODEL.SPOP.TRUNK.WIDTH_FACTOR", "0.125",
         "MODEL.SPOP.HEAD_CHANNELS", "16")  # fmt: skip


def run(*arguments, config="spop_rpn_only.yaml"):
    main = runpy.run_path(str(TOOL))["main"]
    main(["--config-file", str(CONFIGS / config), *arguments, *SMALL])


def test_the_parts_are_the_networks_at_each_scale_and_the_rest(monkeypatch, capsys, tmp_path):
    # The tool measures a function of a module, for good.
    monkeypatch.setattr("d2proposals.spop.generator.select_proposals", select_proposals)
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "a.png")
    for source in (("--image-size", "24", "40"), ("--input", str(tmp_path / "a.png"))):
        run(*source, "--repeats", "2")
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "24 x 40, cpu, medians of 2:"
        parts = [re.fullmatch(r"(.*?) +\d+\.\d{3} s +\d+%", line)[1] for line in lines[1:]]
        networks = ("confidence", "large_size", "small_size")
        assert sorted(parts) == sorted(
            [f"{x} network, {size}" for x in networks for size in ("24 x 40", "48 x 80")]
            + ["superpixels", "refinement, ranking, NMS", "all"]
        )


def test_bad_arguments():
    with pytest.raises(SystemExit):
        run("--repeats", "0")
    with pytest.raises(SystemExit, match="needs 'SPOP'"):
        run("--image-size", "8", "8", config="shapes/sc_rpn_only.yaml")
