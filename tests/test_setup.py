"""dev/setup.sh says in one line what keeps it from working; setup.py asks for no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run_setup(tmp_path, **environment):
    environment = {**os.environ, "D2P_VENV": str(tmp_path / "venv"), **environment}
    result = subprocess.run(
        ["bash", "dev/setup.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    return result.stderr.strip()


def test_no_python(tmp_path):
    assert "no 'python9.9' found" in run_setup(tmp_path, PYTHON="python9.9")


def test_python_too_old(tmp_path):
    old = write_program(
        tmp_path / "old", 'case "$1" in --version) echo Python 3.9.1;; *) exit 1;; esac'
    )
    message = run_setup(tmp_path, PYTHON=str(old))
    assert "Python 3.9.1 is too old" in message and "3.11 or newer" in message


def test_disk_full(tmp_path):
    write_program(tmp_path / "df", "echo header; echo disk 9 9 1024 9 /")
    message = run_setup(
        tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", PYTHON=sys.executable
    )
    assert "only 1 MiB free" in message and "D2P_VENV" in message


@pytest.mark.parametrize("word", ["import torch", '"torch', '"detectron2'])
def test_setup_py_neither_imports_torch_nor_asks_for_torch_or_detectron2(word):
    assert word not in (ROOT / "setup.py").read_text()
