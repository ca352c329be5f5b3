"""The log of numbers that Detectron2 writes during a training: ``metrics.json``, one JSON object a
line."""

import json
import logging
import os
from typing import Any

logger = logging.getLogger(__name__)


def read_training_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read a training's log.

    A training that is killed may leave a broken line, on which the resumed one goes on writing.
    Such lines are left out, with a warning.

    Args:
        path: of the log.

    Returns:
        the entries in the file's order: "iteration", and numbers by their names.

    Raises:
        FileNotFoundError: there is no such file.
    """
    entries, broken = [], []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict):
                entries.append(entry)
            else:
                broken.append(number)
    if broken:
        logger.warning(
            f"{path}: {len(broken)} lines are no JSON object and left out, the first line "
            f"{broken[0]}; was the training interrupted?"
        )
    return entries
