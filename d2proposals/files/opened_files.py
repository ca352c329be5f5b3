"""Files of proposals, opened; what is compressed by gzip is unpacked."""

import gzip
import os
import shutil
import tempfile
import zlib
from typing import IO

from .safe_pickle import one_line

_GZIP = b"\x1f\x8b"


def open_content(path: str | os.PathLike) -> IO[bytes]:
    """Open a file for reading, unpacked if gzip has compressed it, whatever its name.

    Returns:
        IO[bytes]: seekable; to be closed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line, if it is empty, not readable, or damaged gzip.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no proposal file at {path}")
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)})") from error
    head = file.read(2)
    file.seek(0)
    if head == _GZIP:
        # Unpacked as a whole, because a ZIP archive or a pickle may be read from several places.
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115
        with file, gzip.open(file) as packed:
            try:
                shutil.copyfileobj(packed, unpacked)
            except (OSError, EOFError, zlib.error) as error:
                unpacked.close()
                raise ValueError(
                    f"{path} is truncated or damaged gzip ({one_line(error)}); write it again"
                ) from error
        file = unpacked
        file.seek(0)
        head = file.read(1)
        file.seek(0)
    if not head:
        file.close()
        raise ValueError(f"{path} is empty; write it again")
    return file
