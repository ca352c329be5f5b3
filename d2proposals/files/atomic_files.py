"""Files that are either complete or absent, whatever interrupts the program."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that takes its name only when it is complete.

    The content goes to a temporary file in the same folder, because a file can be renamed in one
    step only within a file system. If the block raises, the temporary file is removed and a file
    that already had the name is left as it was. Missing folders are made.

    Args:
        path: a path on a local file system.
        mode: "w" for text in UTF-8 or "wb" for bytes.

    Yields:
        The open temporary file.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f'atomic_write has the modes "w" and "wb", not {mode!r}')
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened as any other file, so that the permissions are those of the user's umask, which
    # tempfile would narrow to the owner.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write ``content`` as indented standard JSON, atomically.

    Raises:
        ValueError: for NaN and infinity, which standard JSON cannot say.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text + "\n")
