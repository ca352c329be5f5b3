"""Peak memory of a training on the CPU; Detectron2's log tells that of CUDA alone."""

import logging
import resource
import sys

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)


def peak_resident_memory() -> int:
    """Greatest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak << 10


class ResidentMemoryLogger(HookBase):
    """Says after the training how much memory its process had at most, in Detectron2's words."""

    def after_train(self) -> None:
        logger.info(f"Resident memory of the process: max_mem: {peak_resident_memory() >> 20}M")
