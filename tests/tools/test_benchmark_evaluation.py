"""tools/benchmark_evaluation.py: the same results whoever measures, and files to measure again."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from tests.common import run_tool

SMALL = ("--num-images", 6, "--num-gt", 4, "--num-proposals", 30)


@pytest.fixture(autouse=True)
def no_dataset_stays():
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_detectron2_has_the_same_results(capsys):
    run_tool("benchmark_evaluation", *SMALL)
    difference = float(capsys.readouterr().out.split("largest difference: ")[1].split()[0])
    assert difference < 1e-4


def test_kept_files_measure_the_same(tmp_path, capsys):
    run_tool("benchmark_evaluation", "--ours-alone", *SMALL, "--keep", tmp_path)
    assert "Detectron2" not in capsys.readouterr().out
    expected = json.loads((tmp_path / "proposal_results.json").read_text())
    run_tool("evaluate_proposals", "--gt", tmp_path / "gt.json", "--kind", "box",
             "--proposals", f"kept={tmp_path}/box_proposals.pkl", "--limits", 100,
             "--output", tmp_path / "again")  # fmt: skip
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    metrics = again["runs"]["kept"]["box_proposals"]["metrics_in_percent"]["all"]
    # Areas are those of the simulated masks, not the boxes'.
    for key in ("AR@100", "ARs@100", "ARm@100"):
        assert metrics[key] == pytest.approx(expected["metrics_in_percent"][key])
