"""Single image files, read for people's own pictures rather than for a dataset."""

import os

import numpy as np
from detectron2.data import detection_utils


def read_rgb_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file, turned upright as its EXIF orientation says.

    Args:
        path: a file of any format that PIL reads.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read as an image.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no image file {path}; check the path.")
    try:
        # A copy, because PIL's pixels may be read-only.
        return np.array(detection_utils.read_image(path, "RGB"))
    # PIL says "broken PNG file" by a SyntaxError.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"Image file {path} cannot be read ({error}); give a whole JPEG, PNG or similar."
        ) from error


def to_input_format(image: np.ndarray, input_format: str) -> np.ndarray:
    """Convert an image to a model's colours.

    Args:
        image: (H, W, 3) uint8 RGB.
        input_format: ``INPUT.FORMAT`` of the configuration, e.g. "BGR".

    Returns:
        (H, W, channels) as Detectron2's own reader has it.
    """
    # PIL's picture of the array is what that reader's conversion takes.
    return detection_utils.convert_PIL_to_numpy(
        detection_utils.Image.fromarray(image), input_format
    )
