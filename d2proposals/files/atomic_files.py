"""Files that are either complete or absent, whatever interrupts the program."""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that takes its name only when it is complete.

    The content goes to a temporary file in the same folder, because a file can be renamed in one
    step only within a file system. If the block raises, the temporary file is removed and a file
    that already had the name is left as it was. Missing folders are made. Of a link it is the
    target that is written. What is no file, such as a pipe or a device, is not replaced: the
    content goes into it at once.

    Args:
        path: a path on a local file system.
        mode: "w" for text in UTF-8 or "wb" for bytes.

    Yields:
        The open temporary file; what ``path`` names itself if that is no file.

    Raises:
        OSError: in one line, if the file cannot be made, as under an empty path or a folder's, or
            the disk is full.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f'atomic_write has the modes "w" and "wb", not {mode!r}')
    target = Path(os.path.realpath(path))
    if os.path.isdir(target):
        raise OSError(not_written(path, IsADirectoryError("it is a folder")))
    is_replaced = os.path.isfile(target) or not os.path.exists(path)
    # Opened as any other file, so that the permissions are those of the user's umask, which
    # tempfile would narrow to the owner.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(
            temporary if is_replaced else path, mode, encoding=None if "b" in mode else "utf-8"
        )
    except OSError as error:
        raise OSError(not_written(path, error)) from error
    is_in_block = True
    try:
        with file:
            yield file
            is_in_block = False
            file.flush()
            if is_replaced:
                os.fsync(file.fileno())
        if is_replaced:
            os.replace(temporary, target)
    except OSError as error:
        # Others are of other files, which the block may read.
        if not is_in_block or error.errno in _NO_ROOM:
            raise OSError(not_written(path, error)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def not_written(path: str | os.PathLike, error: OSError) -> str:
    """The line about a file or folder that cannot be written."""
    reason = error.strerror or str(error)
    name = os.fspath(path) or "An empty path"
    return f"{name} cannot be written ({reason}); name another one, or make room"


def check_output_folder(path: str | os.PathLike) -> None:
    """Make a folder, and check that files can be written into it.

    Raises:
        OSError: in one line, if they cannot.
    """
    probe = Path(path) / f".{uuid.uuid4().hex}.tmp"
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(not_written(path, error)) from error


def check_output_file(path: str | os.PathLike) -> None:
    """Make the folder of a file to come, and check that it can be written, before long work for it.

    As :func:`atomic_write`, it takes what is no file as it is, and goes to where a link leads.

    Raises:
        OSError: in one line, if it cannot.
    """
    if os.path.isdir(path):
        raise OSError(not_written(path, IsADirectoryError("it is a folder")))
    target = Path(os.path.realpath(path))
    # A pipe or a device is written into, not replaced.
    if target.is_file() or not os.path.exists(path):
        try:
            check_output_folder(target.parent)
        except OSError as error:
            raise OSError(not_written(path, error.__cause__)) from error


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write ``content`` as indented standard JSON, atomically.

    Raises:
        ValueError: for NaN and infinity, which standard JSON cannot say.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text + "\n")
