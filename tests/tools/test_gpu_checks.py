"""Tests of dev/gpu_checks.py."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "dev" / "gpu_checks.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_dry_run_fills_the_report(script, tmp_path):
    output = tmp_path / "checks.json"
    arguments = ["--device", "cpu", "--only", "benchmark,parity", "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        script["main"](["--here", *arguments])
    content = json.loads(output.read_text())
    assert not stop.value.code, content
    rows = content["benchmark"]["rows"]
    modes = [(row["generator"], row["train"], row["amp"]) for row in rows]
    assert modes == [
        (name, train, amp)
        for name in ("RPN", "SC-RPN")
        for train in (False, True)
        for amp in (False, True)
    ]
    for row in rows:
        assert row["total"]["least"] > 0 and row["repeats"] == 1 and row["parameters"] > 0
        assert ("generator_step" in row) == row["train"]
        assert row["total"]["ratio"] == 1 or row["generator"] == "SC-RPN"
    (row,) = content["parity"]["rows"]
    assert row["passed"] and row["found"] == 1 and row["num_cpu"] > 0
    content["conditions"] = {"device": "cpu"}
    table = script["format_report"](content)
    assert "| SC-RPN" in table and "training step" in table and "parity: passed" in table


def test_a_failing_part_is_written_and_stops_nothing(script, tmp_path, monkeypatch, capsys):
    def fails(report, device):
        report.update("benchmark", rows=[{"seconds": float("nan")}])
        raise RuntimeError("no\nkernel")

    monkeypatch.setitem(script["RUNNERS"], "benchmark", fails)
    monkeypatch.setitem(script["RUNNERS"], "parity", lambda report, device: [])
    output = tmp_path / "folder" / "checks.json"
    with pytest.raises(SystemExit) as stop:
        script["main"](
            ["--here", "--device", "cpu", "--only", "benchmark,parity", "--output", str(output)]
        )
    assert stop.value.code
    content = json.loads(output.read_text())
    assert content["benchmark"]["failures"] == ["RuntimeError: no"]
    assert content["benchmark"]["rows"] == [{"seconds": None}]
    assert content["parity"]["failures"] == []


def test_wrong_part(script, capsys):
    with pytest.raises(SystemExit):
        script["main"](["--only", "tests,speed"])
    assert "--only takes tests, benchmark, parity, not speed" in capsys.readouterr().err
