"""Detectron2's file of precomputed proposals: a safe reader and a writer.

The format is a pickled dictionary, the one that ``MODEL.LOAD_PROPOSALS`` and
``DATASETS.PROPOSAL_FILES_*`` take:

* ``ids``: list of image ids, as in the dataset's dictionaries;
* ``boxes``: list of (R, 4) float32 arrays, one per image;
* ``objectness_logits``: list of (R,) float32 arrays, one per image;
* ``bbox_mode``: the integer value of a ``BoxMode``; XYXY_ABS, in pixels of the original image, in
  the files written here.

A pickle is a program that its reader runs. The reader here runs none of it: it knows the few names
that such a file contains and builds the arrays itself from their bytes.

Shape shorthand: R proposals of an image.
"""

import os
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode

from .atomic_files import atomic_write


class ProposalFile(NamedTuple):
    """Proposals of a set of images.

    Attributes:
        image_ids: image ids, without duplicates.
        boxes: one (R, 4) float32 array per image, XYXY in pixels of the original image.
        objectness_logits: one (R,) float32 array per image.
    """

    image_ids: list[int | str]
    boxes: list[np.ndarray]
    objectness_logits: list[np.ndarray]


def write_proposal_file(
    path: str | os.PathLike,
    image_ids: Sequence[int | str],
    boxes: Sequence[np.ndarray],
    objectness_logits: Sequence[np.ndarray],
) -> None:
    """Write proposals in Detectron2's precomputed format, atomically.

    Every image of the dataset belongs into the file, because Detectron2 stops at an image that is
    not listed; an image without proposals has arrays of the shapes (0, 4) and (0,).

    Args:
        path: where to write.
        image_ids: one id per image, all different.
        boxes: one (R, 4) array per image, XYXY in pixels of the original image.
        objectness_logits: one (R,) array per image.

    Raises:
        ValueError: if the three lists do not belong together.
    """
    boxes = [np.asarray(boxes_i, np.float32).reshape(-1, 4) for boxes_i in boxes]
    logits = [np.asarray(logits_i, np.float32).reshape(-1) for logits_i in objectness_logits]
    content = ProposalFile(list(image_ids), boxes, logits)
    _check_lists(content, str(path))
    data = {
        "ids": content.image_ids,
        "boxes": content.boxes,
        "objectness_logits": content.objectness_logits,
        "bbox_mode": BoxMode.XYXY_ABS.value,
    }
    with atomic_write(path, "wb") as file:
        pickle.dump(data, file, protocol=4)


def read_proposal_file(path: str | os.PathLike) -> ProposalFile:
    """Read a file of precomputed proposals without running any code of it.

    Files of Detectron (the first), with ``indexes`` and ``scores``, and files pickled under
    Python 2 are read as Detectron2 reads them.

    Args:
        path: a file of this module, of Detectron2's ``COCOEvaluator`` or of another tool.

    Returns:
        The proposals with boxes converted to XYXY.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line, if the file is damaged, contains anything but arrays and plain
            containers, or is not a proposal file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no proposal file at {path}")
    with open(path, "rb") as file:
        data = _load_pickle(file, path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a proposal file: it holds a {type(data).__name__}")
    for old_name, name in (("indexes", "ids"), ("scores", "objectness_logits")):
        if old_name in data:
            data[name] = data.pop(old_name)
    missing = [key for key in ("ids", "boxes", "objectness_logits") if key not in data]
    if missing:
        raise ValueError(f"{path} is not a proposal file: it lacks {', '.join(missing)}")
    try:
        bbox_mode = BoxMode(data.get("bbox_mode", BoxMode.XYXY_ABS))
        content = ProposalFile(
            image_ids=[_plain_id(image_id) for image_id in _items(data["ids"])],
            boxes=[_xyxy(_array(item), bbox_mode) for item in _items(data["boxes"])],
            objectness_logits=[
                _array(item).reshape(-1) for item in _items(data["objectness_logits"])
            ],
        )
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a proposal file: {_one_line(error)}") from error
    _check_lists(content, str(path))
    return content


def _check_lists(content: ProposalFile, path: str) -> None:
    """Raise ValueError unless ids, boxes and logits belong together."""
    lengths = [len(items) for items in content]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{path}: {lengths[0]} ids, {lengths[1]} arrays of boxes and {lengths[2]} arrays of "
            "objectness logits; there must be one of each per image"
        )
    # Detectron2 compares ids as text.
    if len({str(image_id) for image_id in content.image_ids}) < lengths[0]:
        raise ValueError(f"{path}: an image id occurs more than once")
    for image_id, boxes_i, logits_i in zip(*content, strict=True):
        if len(boxes_i) != len(logits_i):
            raise ValueError(
                f"{path}: image {image_id} has {len(boxes_i)} boxes but {len(logits_i)} "
                "objectness logits"
            )


def _items(value: Any) -> list:
    """The items of a list, a tuple or an array that stands for one."""
    if isinstance(value, _StoredArray):
        return list(value.values)
    if isinstance(value, (list, tuple)):
        return list(value)
    raise TypeError(f"a list was expected, not {type(value).__name__}")


def _plain_id(value: Any) -> int | str:
    """An image id as Python's own int or str."""
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, (int, str)):
        raise TypeError(f"an image id is an integer or text, not {type(value).__name__}")
    return value


def _array(value: Any) -> np.ndarray:
    """Numbers of one image as float32."""
    if isinstance(value, _StoredArray):
        value = value.values
    array = np.asarray(value)
    if array.size and array.dtype.kind not in "biuf":
        raise TypeError(f"numbers were expected, not {array.dtype}")
    return array.astype(np.float32)


def _xyxy(boxes: np.ndarray, bbox_mode: BoxMode) -> np.ndarray:
    """Boxes of one image, (R, 4) in ``bbox_mode``, as (R, 4) float32 XYXY."""
    if boxes.size == 0:
        return np.zeros((0, 4), np.float32)
    if boxes.ndim != 2:
        raise ValueError(f"boxes have the shape {boxes.shape}, not (R, 4)")
    boxes = np.asarray(BoxMode.convert(boxes, bbox_mode, BoxMode.XYXY_ABS), np.float32)
    if boxes.shape[1] != 4:
        raise ValueError(f"boxes have the shape {boxes.shape}, not (R, 4)")
    return boxes


def _one_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _load_pickle(file: IO[bytes], path: str | os.PathLike) -> Any:
    """Unpickle with names limited to ``_KNOWN_NAMES``; ValueError for whatever goes wrong."""
    try:
        return _ProposalUnpickler(file, encoding="latin1").load()
    except _UnknownNameError as error:
        raise ValueError(
            f"{path} is not read: it contains {error}, which no proposal file needs and which "
            "could run code"
        ) from error
    # A damaged pickle makes the unpickler raise almost any exception.
    except Exception as error:
        raise ValueError(
            f"{path} is truncated, damaged or not a pickle ({_one_line(error)}); write it again"
        ) from error


class _UnknownNameError(Exception):
    """A pickle refers to a name that a proposal file does not need."""


class _StoredDtype:
    """Stands in for ``numpy.dtype``: the type of numbers or of text, never a structure or object.

    NumPy's own restoration trusts the file's description of the memory layout; this one takes
    from it the type's code and the byte order only.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufSU":
            raise _UnknownNameError(f"an array of the type {code}")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _StoredArray:
    """Stands in for ``numpy.ndarray``: ``values`` holds the array once it is restored."""

    values: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran_order, data = state
        self.values = _decode(data, dtype, shape, "F" if is_fortran_order else "C")


def _decode(data: Any, dtype: _StoredDtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """An array out of the bytes of a pickle (text under Python 2)."""
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _new_array(*_: Any) -> _StoredArray:
    """Stands in for the function with which NumPy's pickles make an array to be filled."""
    return _StoredArray()


def _array_of_buffer(
    data: Any, dtype: _StoredDtype, shape: tuple[int, ...], order: str, *_: Any
) -> _StoredArray:
    """Stands in for the function with which NumPy's pickles of protocol 5 make an array."""
    array = _StoredArray()
    array.values = _decode(data, dtype, shape, order)
    return array


def _new_scalar(dtype: _StoredDtype, data: Any) -> np.generic:
    """Stands in for the function with which NumPy's pickles make a number of its own types."""
    return _decode(data, dtype, (1,), "C")[0]


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    """Stands in for ``_codecs.encode``, with which pickles of protocol 2 hold bytes."""
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stands in for ``bytes``, with which pickles up to protocol 2 hold an empty array."""
    return b""


_KNOWN_NAMES = {
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    ("numpy", "dtype"): _StoredDtype,
    ("numpy", "ndarray"): _StoredArray,
    ("_codecs", "encode"): _latin1_bytes,
    ("collections", "OrderedDict"): OrderedDict,
    ("detectron2.structures.boxes", "BoxMode"): BoxMode,
}
# NumPy 2 renamed its inner package; files of either are read under either.
for _core in ("numpy.core", "numpy._core"):
    _KNOWN_NAMES[f"{_core}.multiarray", "_reconstruct"] = _new_array
    _KNOWN_NAMES[f"{_core}.multiarray", "scalar"] = _new_scalar
    _KNOWN_NAMES[f"{_core}.numeric", "_frombuffer"] = _array_of_buffer


class _ProposalUnpickler(pickle.Unpickler):
    """An unpickler in which only ``_KNOWN_NAMES`` exist."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN_NAMES[module, name]
        except KeyError:
            raise _UnknownNameError(f"the name {module}.{name}") from None
