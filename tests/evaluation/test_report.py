"""Tests of the table and the curves."""

import numpy as np

from d2proposals.evaluation.recall import (
    CURVE_NUM_PROPOSALS,
    describe_idle_limits,
    find_idle_limits,
    match_proposals,
    recall_metrics,
)
from d2proposals.evaluation.report import format_table, plot_curves, recall_curves


def make_matches():
    """One medium ground truth whose best overlap comes second: .5, then .8."""
    overlaps = np.array([[0.5, 0.8]], np.float32)
    return match_proposals([overlaps], np.array([50.0**2]), CURVE_NUM_PROPOSALS)


def test_table():
    table = format_table(recall_metrics(make_matches(), np.zeros(1, int), (1, 10)), (1, 10))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    columns = cells[0]
    assert columns[:5] == ["proposals", "AR", "ARs", "ARm", "ARl"]
    first, second = (dict(zip(columns, row, strict=True)) for row in cells[2:4])
    assert first["proposals"] == "1" and second["proposals"] == "10"
    assert first["AR"] == "10.00" and second["AR"] == "70.00"
    assert first["ARs"] == "-" and first["ARm"] == "10.00"
    assert second["ABO"] == second["MABO"] == "80.00"
    assert second["AR-cont"] == "60.00" and second["Recall-IoU70"] == "100.00"
    assert cells[4] == ["AUC", "AUCs", "AUCm", "AUCl"]


def test_curves():
    curves = recall_curves(make_matches(), (1, 10))
    assert curves["ar_by_num_proposals"]["num_proposals"] == list(CURVE_NUM_PROPOSALS)
    np.testing.assert_allclose(curves["ar_by_num_proposals"]["medium"], [10] + [70] * 15)
    assert curves["ar_by_num_proposals"]["small"] is None
    by_number = curves["recall_by_num_proposals"]
    assert by_number["num_proposals"] == list(CURVE_NUM_PROPOSALS)
    # The first proposal reaches .5 exactly, the second .8 exactly.
    assert by_number["0.5"] == [100] * 16 and by_number["0.8"] == [0] + [100] * 15
    assert by_number["0.7"] == by_number["0.8"]
    overlap = curves["abo_by_num_proposals"]
    assert overlap["num_proposals"] == list(CURVE_NUM_PROPOSALS)
    np.testing.assert_allclose(overlap["ABO"], [50] + [80] * 15)
    assert curves["recall_by_iou"]["1"] == [100] + [0] * 50
    assert curves["recall_by_iou"]["10"] == [100] * 31 + [0] * 20


def test_curves_without_ground_truth():
    matches = match_proposals([np.zeros((0, 2), np.float32)], np.zeros(0), CURVE_NUM_PROPOSALS)
    curves = recall_curves(matches, (1, 10))
    assert curves["recall_by_num_proposals"]["0.5"] is None
    assert curves["abo_by_num_proposals"]["ABO"] is None
    assert curves["recall_by_iou"]["10"] is None


def test_limits_that_repeat_a_lower_one_are_named():
    limits = (10, 300, 1000, 1500, 2000)
    assert find_idle_limits(limits, [3, 1000, 7]) == [1500, 2000]
    assert find_idle_limits(limits, [999]) == [1500, 2000]  # 1,000 takes in more than 300 does
    assert find_idle_limits(limits, [1001]) == [2000]
    assert find_idle_limits(limits, [1501]) == find_idle_limits(limits, [2000]) == []
    assert find_idle_limits(limits, []) == [300, 1000, 1500, 2000]
    text = describe_idle_limits(limits, [3, 1000, 7])
    assert "more than 1000 proposals: the figures at 1500, 2000 repeat those at 1000" in text
    assert describe_idle_limits(limits, [2000]) == ""
    assert describe_idle_limits(limits, [0, 0]).startswith("no image has a proposal")


def test_pictures_do_not_depend_on_pyplot(tmp_path):
    import matplotlib.pyplot

    plot_curves(tmp_path / "curves.png", recall_curves(make_matches(), range(1, 11)[::9]), "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert matplotlib.pyplot.get_fignums() == []
