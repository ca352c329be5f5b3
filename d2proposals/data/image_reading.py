"""Images of datasets that Detectron2's own reader would get wrong, handed to it mended.

Detectron2's ``DatasetMapper`` opens an image by its name through ``PathManager`` and reads what it
gets with PIL. Under a name with the prefix below it gets the image as ``files.image_files`` reads
it, in 8 bits and in the frame of its annotations.
"""

import io
import os
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from ..files.image_files import (
    as_annotated,
    is_deep,
    is_meant_as_stored,
    with_separators_of_here,
)

_PREFIX = "d2proposals-image://"
# A picture without losses, and without the work of compressing it.
_FORMAT = "PPM"


def readable_name(record: dict[str, Any]) -> str:
    """The name by which Detectron2's reader gets an image right.

    Args:
        record: of the image, with ``file_name`` and perhaps ``height`` and ``width``.

    Returns:
        its own name, or one that this module serves.

    Raises:
        OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError: if PIL cannot open it.
    """
    name = with_separators_of_here(os.fspath(record["file_name"]))
    size = _size_of(record)
    with PathManager.open(name, "rb") as file, Image.open(file) as image:
        if not is_deep(image) and not is_meant_as_stored(image, size):
            return name
    height, width = size or (0, 0)
    return f"{_PREFIX}{height}x{width}/{name}"


def _size_of(record: dict[str, Any]) -> tuple[int, int] | None:
    return (record["height"], record["width"]) if {"height", "width"} <= record.keys() else None


class _AnnotatedImageHandler(PathHandler):
    """Opens names of :func:`readable_name`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        size, _, name = path.removeprefix(_PREFIX).partition("/")
        height, width = map(int, size.split("x"))
        content = io.BytesIO()
        with PathManager.open(name, "rb") as file, Image.open(file) as image:
            image = as_annotated(image, name, (height, width) if height else None)
            image.convert("L" if image.mode == "L" else "RGB").save(content, format=_FORMAT)
        content.seek(0)
        return content


PathManager.register_handler(_AnnotatedImageHandler())
