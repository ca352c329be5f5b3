"""Tests of dev/gpu_checks.py."""

import contextlib
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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


def test_a_generator_that_time_is_over_for_is_skipped(script, tmp_path, monkeypatch):
    functions = script["run_benchmark"].__globals__
    timed = []

    def benchmark_row(*args, **settings):
        timed.append(1)
        return {"repeats": 1}

    clock = SimpleNamespace(perf_counter=lambda: 1e9 if len(timed) == 8 else 0.0)
    monkeypatch.setitem(functions, "time", clock)
    monkeypatch.setitem(functions, "benchmark_row", benchmark_row)
    monkeypatch.setitem(functions, "describe", lambda row: row["generator"])
    monkeypatch.setitem(functions, "format_times", lambda row: "")
    config = functions["DRY_GENERATORS"]["SC-RPN"]
    monkeypatch.setitem(functions["DRY_GENERATORS"], "last", config)
    report = script["Report"](tmp_path / "checks.json")
    assert script["run_benchmark"](report, "cpu") == []
    rows = json.loads((tmp_path / "checks.json").read_text())["benchmark"]["rows"]
    assert ["skipped" in row for row in rows] == [*[False] * 8, *[True] * 4]


def test_what_a_stopped_part_has_started_stops_too(script, tmp_path, monkeypatch):
    functions = script["run_apart"].__globals__
    pids = tmp_path / "pid"
    grandchild = (
        f"import os, time; open({str(pids)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    popen = subprocess.Popen

    def start(command, **settings):
        process = popen([sys.executable, "-c", child], **settings)
        while not pids.is_file() or not pids.read_text():
            time.sleep(0.05)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setitem(functions["PARTS"], "parity", 0.5)
    report = script["Report"](tmp_path / "checks.json")
    script["run_apart"]("parity", report, "cpu")
    content = json.loads((tmp_path / "checks.json").read_text())
    assert content["parity"]["failures"] == ["stopped after 0.5 s"]
    # What is dead stays a zombie until the system clears it away.
    state = Path("/proc", pids.read_text(), "stat")
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if state.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return
    pytest.fail("it goes on")


def test_wrong_part(script, capsys):
    with pytest.raises(SystemExit):
        script["main"](["--only", "tests,speed"])
    assert "--only takes tests, benchmark, parity, not speed" in capsys.readouterr().err
