"""Single image files, read as people mean them.

* **Upright or as stored.** An image is turned as its EXIF orientation says, as Detectron2 does.
  Where annotations give the size that the file has before it is turned, and not the one after,
  their boxes are those of the stored pixels, and so the image is read as stored.
* **More than 8 bits.** PIL would cut a 16-bit image off at 255, and a float image to whole numbers.
  Here, 16-bit and 32-bit integers are scaled from the least range of 8, 10, 12, 14 or 16 bits that
  has room for the image's largest value (beyond that, from the value itself), and floats
  likewise, or from 0 to 1 if none is larger. With values below 0, the smallest becomes black.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from PIL import Image

logger = logging.getLogger(__name__)

_EXIF_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of these orientations width and height change places.
_TURNED_BY_A_QUARTER = (5, 6, 7, 8)
_RANGES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))
# Files of a folder that are asked for one by one.
_FEW_FILES = 50
# What has been said once a process.
_WARNED: set[str] = set()


def read_rgb_image(path: str | os.PathLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read an image file, turned upright as its EXIF orientation says.

    Args:
        path: a file of any format that PIL reads.
        size: (height, width) in pixels that annotations give it, None without annotations.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read as an image, or is larger than PIL takes.
    """
    path = with_separators_of_here(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no image file {path}; check the path.")
    try:
        with Image.open(path) as image:
            # A copy, because PIL's pixels may be read-only.
            return np.array(as_annotated(image, path, size).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(too_large(path)) from error
    # PIL says "broken PNG file" by a SyntaxError.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"Image file {path} cannot be read ({error}); give a whole JPEG, PNG or similar."
        ) from error


def as_annotated(image: Image.Image, path: str, size: tuple[int, int] | None) -> Image.Image:
    """Bring an image to 8 bits and into the frame of its annotations.

    Args:
        image: as opened.
        path: named in warnings.
        size: (height, width) in pixels that annotations give it, None without annotations.
    """
    if is_meant_as_stored(image, size):
        _warn_once(
            "orientation",
            f"Image {path} has an EXIF orientation, but its annotations have the size of the "
            "pixels as they are stored, so it is not turned; nor are others like it.",
        )
    else:
        image = _upright(image)
    if not is_deep(image):
        return image
    _warn_once(
        "depth",
        f"Image {path} has pixels of more than 8 bits (mode {image.mode}); its values, and those "
        "of others like it, are scaled to 0-255 from the range of bits that they need.",
    )
    return Image.fromarray(_to_eight_bits(np.asarray(image)))


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of integers of more than 8 bits, or of floats."""
    return image.mode.startswith("I") or image.mode == "F"


def is_meant_as_stored(image: Image.Image, size: tuple[int, int] | None) -> bool:
    """Whether the annotated size is that of the stored pixels, not that of the upright image."""
    stored = (image.height, image.width)
    if size is None or tuple(size) != stored or stored[0] == stored[1]:
        return False
    return image.getexif().get(_EXIF_ORIENTATION) in _TURNED_BY_A_QUARTER


def too_large(path: str) -> str:
    """The line about an image that PIL refuses for its size."""
    return (
        f"Image file {path} has more than {2 * Image.MAX_IMAGE_PIXELS} pixels, the most that are "
        "read; cut it into tiles or make it smaller."
    )


def image_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """(height, width) of an image file when upright, from its head; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            is_turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED_BY_A_QUARTER
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return (width, height) if is_turned else (height, width)


def find_image_file(image_root: str, image: dict[str, Any]) -> str | None:
    """The path of an image of a COCO-style file.

    Args:
        image_root: folder of the images.
        image: with ``file_name``, or, as LVIS has it, ``coco_url``, whose last part is the name and
            whose part before may be a folder.

    Returns:
        the path: of several possible ones the first that exists; None without a name.
    """
    name, url = image.get("file_name"), image.get("coco_url")
    if isinstance(name, str) and name:
        return with_separators_of_here(os.path.join(image_root, name))
    if not isinstance(url, str) or not url:
        return None
    parts = url.split("/")
    paths = [os.path.join(image_root, *parts[-2:]), os.path.join(image_root, parts[-1])]
    return next(filter(os.path.isfile, paths), paths[-1])


def missing_files(paths: Iterable[str]) -> list[str]:
    """Those of many paths, in their order, where no file is; addresses are not asked.

    A folder of many is listed once, rather than asked for each of them.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    paths = [os.fspath(path) for path in paths]
    for path in paths:
        if "://" not in path:
            folders[os.path.dirname(path)].append(path)
    unlisted = set()
    for folder, of_folder in folders.items():
        if len(of_folder) <= _FEW_FILES:
            unlisted.update(path for path in of_folder if not os.path.isfile(path))
            continue
        try:
            with os.scandir(folder or ".") as entries:
                # Of links alone this asks where they lead.
                names = {entry.name for entry in entries if entry.is_file()}
        except OSError:
            names = set()
        unlisted.update(path for path in of_folder if os.path.basename(path) not in names)
    # Under another spelling it may be there.
    return [x for x in paths if x in unlisted and not os.path.isfile(with_separators_of_here(x))]


def with_separators_of_here(path: str) -> str:
    """A path whose file is there only if the separators of Windows are taken for those of here."""
    if "\\" not in path or os.path.exists(path):
        return path
    other = path.replace("\\", "/")
    return other if os.path.isfile(other) else path


def to_input_format(image: np.ndarray, input_format: str) -> np.ndarray:
    """Convert an image to a model's colours.

    Args:
        image: (H, W, 3) uint8 RGB.
        input_format: ``INPUT.FORMAT`` of the configuration, e.g. "BGR".

    Returns:
        (H, W, channels) as Detectron2's own reader has it.
    """
    # PIL's picture of the array is what that reader's conversion takes.
    return detection_utils.convert_PIL_to_numpy(Image.fromarray(image), input_format)


def _upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says.

    PIL's own function writes the whole EXIF anew besides, and raises on odd values of other tags.
    """
    method = _TRANSPOSITIONS.get(image.getexif().get(_EXIF_ORIENTATION))
    return image if method is None else image.transpose(method)


def _to_eight_bits(pixels: np.ndarray) -> np.ndarray:
    """(H, W) integers or floats as uint8; for the rule see the head of this module."""
    values = np.nan_to_num(pixels.astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = min(float(values.min()), 0.0), float(values.max())
    if low < 0:
        top = high
    elif np.issubdtype(pixels.dtype, np.floating) and high <= 1:
        top = 1.0
    else:
        top = next((limit for limit in _RANGES if high <= limit), high)
    scale = 255 / max(top - low, np.finfo(np.float32).tiny)
    return ((values - low) * np.float32(scale)).round().clip(0, 255).astype(np.uint8)


def _warn_once(kind: str, message: str) -> None:
    if kind not in _WARNED:
        _WARNED.add(kind)
        logger.warning(message)
