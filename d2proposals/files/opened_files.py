"""Files of proposals, opened; what is compressed by gzip is unpacked."""

import gzip
import io
import os
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
        # In memory, because a ZIP archive or a pickle may be read from several places.
        with file:
            try:
                file = io.BytesIO(gzip.decompress(file.read()))
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(
                    f"{path} is truncated or damaged gzip ({one_line(error)}); write it again"
                ) from error
        head = file.getvalue()[:1]
    if not head:
        file.close()
        raise ValueError(f"{path} is empty; write it again")
    return file
