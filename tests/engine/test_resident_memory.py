"""Tests of the memory that a training's log tells of."""

import logging
import resource
import subprocess
import sys

import numpy as np

from d2proposals.engine import resident_memory
from d2proposals.engine.resident_memory import ResidentMemoryLogger, peak_resident_memory
from tests.common import ROOT

BLOCK = 300 << 20
# What has been given back counts, what the process that started it has does not.
CHILD = f"""
import numpy as np
from d2proposals.engine.resident_memory import peak_resident_memory, resident_bytes
before = resident_bytes("VmRSS")
block = np.ones({BLOCK}, np.uint8)
del block
print(peak_resident_memory() - before)
"""


def test_the_peak_is_that_of_the_process_alone():
    large = np.ones(3 * BLOCK, np.uint8)
    child = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert large.any() and BLOCK <= int(child.stdout) + (10 << 20) < 2 * BLOCK


def test_the_peak_without_linux(monkeypatch, tmp_path):
    monkeypatch.setattr(resident_memory, "_STATUS", tmp_path / "none")
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(resident_memory.sys, "platform", "linux")
    assert usage <= peak_resident_memory() >> 10 <= 2 * usage
    monkeypatch.setattr(resident_memory.sys, "platform", "darwin")
    assert usage <= peak_resident_memory() <= 2 * usage


def test_the_log_tells_it_in_detectron2_s_words(caplog):
    with caplog.at_level(logging.INFO, "d2proposals"):
        ResidentMemoryLogger().after_train()
    assert f"max_mem: {peak_resident_memory() >> 20}M"[:12] in caplog.text
