"""Peak memory of a training on the CPU; Detectron2's log tells that of CUDA alone."""

import logging
import sys
from pathlib import Path

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")


def resident_bytes(field: str) -> int:
    """This process's resident memory on Linux, by field of its status: "VmRSS" or "VmHWM"."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(kibibytes) << 10


def peak_resident_memory() -> int:
    """Greatest resident memory of this process so far, in bytes; where it runs on Linux, without
    that of the process that started it."""
    if _STATUS.is_file():
        return resident_bytes("VmHWM")
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, on macOS bytes.
    return peak if sys.platform == "darwin" else peak << 10


class ResidentMemoryLogger(HookBase):
    """Says after the training how much memory its process had at most, in Detectron2's words."""

    def after_train(self) -> None:
        logger.info(f"Resident memory of the process: max_mem: {peak_resident_memory() >> 20}M")
