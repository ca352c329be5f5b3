"""Detectron2's file of precomputed proposals: a safe reader and a writer.

The format is a pickled dictionary, the one that ``MODEL.LOAD_PROPOSALS`` and
``DATASETS.PROPOSAL_FILES_*`` take:

* ``ids``: list of image ids, as in the dataset's dictionaries;
* ``boxes``: list of (R, 4) float32 arrays, one per image;
* ``objectness_logits``: list of (R,) float32 arrays, one per image; no two of an image
  are equal in the files written here, since Detectron2 sorts by them and reverses what is equal;
* ``bbox_mode``: the integer value of a ``BoxMode``; XYXY_ABS, in pixels of the original image, in
  the files written here.

Shape shorthand: R proposals of an image.
"""

import io
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from detectron2.structures import BoxMode

from .atomic_files import atomic_write
from .proposal_set import plain_value
from .safe_pickle import load_pickle, one_line, taken, to_plain
from .strict_order import lower_equal_scores

# The newest without frames, which would split what is written value by value.
_PROTOCOL = 3


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
    boxes: Iterable[np.ndarray],
    objectness_logits: Iterable[np.ndarray],
) -> None:
    """Write proposals in Detectron2's precomputed format, atomically, image by image.

    Every image of the dataset belongs into the file, because Detectron2 stops at an image that is
    not listed; an image without proposals has arrays of the shapes (0, 4) and (0,).

    Args:
        path: where to write.
        image_ids: one id per image, all different.
        boxes: one (R, 4) array per image, XYXY in pixels of the original image. They are asked for
            one after the other, and those of all images before the first logits.
        objectness_logits: one (R,) array per image. Equal ones, which keep their order, are lowered
            by the smallest amounts that tell it.

    Raises:
        ValueError: if the three lists do not belong together.
    """
    image_ids = list(image_ids)
    _check_ids(image_ids, str(path))
    numbers: tuple[list[int], list[int]] = ([], [])

    def counted(arrays: Iterable[np.ndarray], side: int, shape: tuple) -> Iterator[np.ndarray]:
        for array in arrays:
            array = np.ascontiguousarray(array, np.float32).reshape(shape)
            numbers[side].append(len(array))
            yield array

    with atomic_write(path, "wb") as file:
        write = _PickleWriter(file)
        write.begin_dict()
        write.value("ids")
        write.value(image_ids)
        write.value("boxes")
        write.list_of(counted(boxes, 0, (-1, 4)))
        write.value("objectness_logits")
        write.list_of(map(_without_equals, counted(objectness_logits, 1, (-1,))))
        write.value("bbox_mode")
        write.value(BoxMode.XYXY_ABS.value)
        write.end_dict()
        _check_numbers(image_ids, *numbers, str(path))


def _without_equals(logits: np.ndarray) -> np.ndarray:
    """(R,) float32 logits in the same order, no two of which are equal, unless they are infinite
    or no numbers."""
    order = np.argsort(-logits, kind="stable")
    order = order[np.isfinite(logits[order])]
    lowered = logits.copy()
    lowered[order] = lower_equal_scores(torch.from_numpy(logits[order])).numpy()
    return lowered


class _PickleWriter:
    """Writes a pickled dictionary whose lists need not be in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def begin_dict(self) -> None:
        self._file.write(pickle.PROTO + bytes([_PROTOCOL]) + pickle.EMPTY_DICT + pickle.MARK)

    def end_dict(self) -> None:
        self._file.write(pickle.SETITEMS + pickle.STOP)

    def value(self, value: Any) -> None:
        """A key, or the value of one."""
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, protocol=_PROTOCOL)
        # No references to what was written before, which would count from the start of the file.
        pickler.fast = True
        pickler.dump(value)
        # Between the number of the protocol, two bytes, and the stop.
        self._file.write(buffer.getbuffer()[2:-1])

    def list_of(self, values: Iterable[Any]) -> None:
        """A list, the value of a key."""
        self._file.write(pickle.EMPTY_LIST)
        for value in values:
            self.value(value)
            self._file.write(pickle.APPEND)


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
    content = parse_proposals(load_pickle(path), path)
    _check_ids(content.image_ids, str(path))
    return content


def parse_proposals(data: Any, path: str | os.PathLike, *, consume: bool = False) -> ProposalFile:
    """The proposals in the content of a file of precomputed proposals.

    Args:
        data: of ``load_pickle``.
        path: named in errors.
        consume: take the arrays out of the lists of ``data``, image by image, so that they are in
            memory once.

    Returns:
        The proposals with boxes converted to XYXY; lists of equal lengths.

    Raises:
        ValueError: if the content is not that of a proposal file.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a proposal file: it holds a {type(data).__name__}")
    data = dict(data)
    for old_name, name in (("indexes", "ids"), ("scores", "objectness_logits")):
        if old_name in data:
            data[name] = data.pop(old_name)
    missing = [key for key in ("ids", "boxes", "objectness_logits") if key not in data]
    if missing:
        raise ValueError(f"{path} is not a proposal file: it lacks {', '.join(missing)}")
    passing = taken if consume else iter
    try:
        bbox_mode = data.get("bbox_mode", BoxMode.XYXY_ABS)
        if not isinstance(bbox_mode, (int, BoxMode)):
            raise TypeError(f"bbox_mode is an integer, not {type(bbox_mode).__name__}")
        bbox_mode = BoxMode(bbox_mode)
        content = ProposalFile(
            image_ids=[_plain_id(image_id) for image_id in _items(data["ids"])],
            boxes=[_xyxy(_array(item), bbox_mode) for item in passing(_items(data["boxes"]))],
            objectness_logits=[
                _array(item).reshape(-1) for item in passing(_items(data["objectness_logits"]))
            ],
        )
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a proposal file: {one_line(error)}") from error
    _check_lists(content, str(path))
    return content


def _check_lists(content: ProposalFile, path: str) -> None:
    """Raise ValueError unless ids, boxes and logits belong together."""
    numbers = [list(map(len, arrays)) for arrays in (content.boxes, content.objectness_logits)]
    _check_numbers(content.image_ids, *numbers, path)


def _check_numbers(
    image_ids: list[int | str], num_boxes: list[int], num_logits: list[int], path: str
) -> None:
    """Raise ValueError unless each image has boxes, and a logit for each of them."""
    lengths = [len(image_ids), len(num_boxes), len(num_logits)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{path}: {lengths[0]} ids, {lengths[1]} arrays of boxes and {lengths[2]} arrays of "
            "objectness logits; there must be one of each per image"
        )
    for image_id, boxes_i, logits_i in zip(image_ids, num_boxes, num_logits, strict=True):
        if boxes_i != logits_i:
            raise ValueError(
                f"{path}: image {image_id} has {boxes_i} boxes but {logits_i} objectness logits"
            )


def _check_ids(image_ids: list[int | str], path: str) -> None:
    """Raise ValueError if an image id occurs more than once."""
    # Detectron2 compares ids as text.
    if len(set(map(str, image_ids))) < len(image_ids):
        raise ValueError(f"{path}: an image id occurs more than once")


def _items(value: Any) -> list:
    """The items of a list, a tuple or an array that stands for one; a list is the same one."""
    value = to_plain(value)
    if isinstance(value, (list, tuple, np.ndarray)):
        return value if isinstance(value, list) else list(value)
    raise TypeError(f"a list was expected, not {type(value).__name__}")


def _plain_id(value: Any) -> int | str:
    """An image id as Python's own int or str."""
    value = plain_value(value)
    if not isinstance(value, (int, str)):
        raise TypeError(f"an image id is an integer or text, not {type(value).__name__}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise TypeError("an image id has more than 64 bits")
    return value


def _array(value: Any) -> np.ndarray:
    """Numbers of one image as float32."""
    value = to_plain(value)
    if isinstance(value, (list, tuple)):
        # NumPy would follow lists within lists however often they contain each other.
        rows = [row if isinstance(row, (list, tuple)) else (row,) for row in value]
        if not all(isinstance(item, (int, float, np.number)) for row in rows for item in row):
            raise TypeError("numbers were expected")
    elif not isinstance(value, np.ndarray):
        raise TypeError(f"numbers were expected, not {type(value).__name__}")
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
