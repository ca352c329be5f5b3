"""What the tests of the commands for files of proposals share."""

import io
import runpy
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest

from d2proposals.evaluation.ground_truth import encode_segmentation
from d2proposals.files.proposal_set import ProposalSet
from tests.common import ROOT

SIZE = (40, 50)


def load_tool(name):
    return runpy.run_path(str(ROOT / "tools" / f"{name}.py"))


EVALUATE = load_tool("evaluate_proposals")
CONVERT = load_tool("convert_proposals")


def evaluate(*arguments):
    """Standard output and error of the command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        EVALUATE["main"]([str(x) for x in arguments])
    return out.getvalue(), err.getvalue()


def stop_line(*arguments, main=EVALUATE["main"]):
    with pytest.raises(SystemExit) as stop, redirect_stderr(io.StringIO()):
        main([str(x) for x in arguments])
    line = str(stop.value)
    assert line.startswith("Error: ") and "\n" not in line
    return line


def perfect(with_masks=True):
    """All objects, the small one first, and a stray box in the first image."""
    boxes = np.array([[2, 3, 12, 13], [20, 5, 45, 35]], np.float32)
    masks = [
        encode_segmentation([[x1, y1, x2, y1, x2, y2, x1, y2]], SIZE, 0)
        for x1, y1, x2, y2 in boxes.tolist()
    ]
    scores = np.array([2.0, 1.0])
    return ProposalSet("d2proposals", [1, 2, 3], [boxes] * 3, [scores] * 3,
                       [masks] * 3 if with_masks else None, True)  # fmt: skip
