"""Bad input ends a job with one line that says what to mend, not with a screen of traceback.

The rule: a ``ValueError`` or ``OSError`` that a ``raise`` statement of this package raises is about
bad input, and its message is that line. So is Detectron2's ``FloatingPointError`` about a loss that
became infinite, and whoever raises it, an error of a disk that is full. Whatever else is raised
keeps its traceback.
"""

import errno
import logging
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Detectron2's training loop logs every exception with its traceback before passing it on.
_TRAIN_LOOP_LOGGER = "detectron2.engine.train_loop"


def explain_bad_input(error: BaseException) -> str | None:
    """Return the line that says what is wrong with the input, or None for any other error.

    Args:
        error: an exception with its traceback, also one that a data loader's worker process sent.
    """
    if isinstance(error, FloatingPointError):
        return (
            f"{' '.join(str(error).split())} Lower the learning rate (SOLVER.BASE_LR; of a lazy "
            "configuration optimizer.params.base_lr) or bound the gradients "
            "(SOLVER.CLIP_GRADIENTS.ENABLED True); --resume goes on from the last checkpoint."
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = error.filename or "the output"
        return f"{where} cannot be written ({error.strerror}): make room, and start again."
    if not isinstance(error, ValueError | OSError):
        return None
    message = str(error)
    frames = [(frame.filename, frame.line) for frame in traceback.extract_tb(error.__traceback__)]
    if message.startswith("Caught ") and " in DataLoader worker process " in message:
        # A worker's exception arrives as text: its traceback, then "Type: message".
        frames = re.findall(r'^ *File "(.+?)", line .*\n *(.*)$', message, flags=re.MULTILINE)
        message = message.rsplit(f"\n{type(error).__name__}: ", maxsplit=1)[-1]
    file_name, source_line = frames[-1] if frames else ("", "")
    if not os.path.realpath(file_name).startswith(_PACKAGE) or not source_line.startswith("raise"):
        return None
    return " ".join(message.split())


@contextmanager
def bad_input_in_one_line() -> Iterator[None]:
    """Turn bad input within this context into ``SystemExit`` with its line.

    Raises:
        SystemExit: with the line as its message, which Python prints; the exit status is 1.
    """
    train_loop_logger = logging.getLogger(_TRAIN_LOOP_LOGGER)
    train_loop_logger.addFilter(_drop_explained_traceback)
    try:
        yield
    except Exception as error:
        line = explain_bad_input(error)
        if line is None:
            raise
        raise SystemExit(f"Error: {line}") from None
    finally:
        train_loop_logger.removeFilter(_drop_explained_traceback)


def _drop_explained_traceback(record: logging.LogRecord) -> bool:
    """A logging filter: a traceback whose error has its line is left out of the log."""
    if record.exc_info and record.exc_info[1] and explain_bad_input(record.exc_info[1]):
        record.exc_info = None
        record.msg = f"{record.msg} see the last line."
    return True
