"""Run-length encodings of foreign files, checked before pycocotools reads them.

pycocotools trusts an encoding: one whose runs are longer than its image makes it write beyond its
memory. An encoding is a text of groups of 6 bits, "0" and the 63 characters after it. Each group
has 5 bits of a number, the lowest first, and a bit that says whether another group follows; the
highest of the number's bits is its sign. From the fourth number on it is the difference from the
number two places before. The numbers are the lengths of the runs.
"""

import ast
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

# pycocotools counts pixels with 32 bits.
_MAX_PIXELS = 2**31 - 1
_MAX_GROUPS = 7  # of 5 bits, for a number of 32
# Encodings that are checked together: array operations are long, memory is small.
_BYTES_TOGETHER = 1 << 18


def check_size(size: Any) -> tuple[int, int]:
    """(height, width) of an encoding's ``size``.

    Raises:
        ValueError: unless it is two positive integers, of not too large an image.
    """
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError("the size of a mask must be [height, width]")
    if not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > _MAX_PIXELS:
        raise ValueError("the size of a mask must be two positive integers of a possible image")
    return size[0], size[1]


def make_encodings(counts: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Masks as pycocotools has them, out of what a file says.

    Args:
        counts: of each mask: text or bytes, or a list of lengths of runs (uncompressed).
        sizes: (height, width) of each mask, as of ``check_size``.

    Returns:
        Encodings with ``size`` and ``counts`` in bytes, whose runs fill their image exactly.

    Raises:
        ValueError: for the first mask whose runs do not.
    """
    encodings = [_make_encoding(*pair) for pair in zip(counts, sizes, strict=True)]
    check_encodings(encodings)
    return encodings


def is_text_of_bytes(counts: Any) -> bool:
    """Whether counts are what ``str`` makes of bytes, ``"b'...'"``: no encoding has that mark."""
    return isinstance(counts, str) and counts[:2] in ("b'", 'b"') and counts[-1] == counts[1]


def _make_encoding(counts: Any, size: tuple[int, int]) -> dict[str, Any]:
    if is_text_of_bytes(counts):
        try:
            counts = ast.literal_eval(counts)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError("the counts of a mask are no text of bytes") from None
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode("ascii")
    elif isinstance(counts, list):
        if not all(type(length) is int and length >= 0 for length in counts):
            raise ValueError("the counts of a mask must be lengths of runs")
        if sum(counts) != size[0] * size[1]:
            raise ValueError(f"the runs of a mask do not fill its size {size[0]} x {size[1]}")
        return mask_util.frPyObjects({"size": list(size), "counts": counts}, *size)
    if not isinstance(counts, bytes):
        raise ValueError("the counts of a mask must be text or a list of lengths of runs")
    return {"size": list(size), "counts": counts}


def check_encodings(encodings: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a compressed encoding whose runs do not fill its image."""
    begins_with = np.cumsum([0, *(len(item["counts"]) for item in encodings)])[:-1]
    parts = np.flatnonzero(np.diff(begins_with // _BYTES_TOGETHER, prepend=-1)).tolist()
    for start, end in itertools.pairwise([*parts, len(encodings)]):
        _check_encodings(encodings[start:end])


def _check_encodings(encodings: Sequence[dict[str, Any]]) -> None:
    """The same for one encoding at least; takes some seventy times the memory of the counts."""
    lengths = np.array([len(item["counts"]) for item in encodings])
    codes = np.frombuffer(b"".join(item["counts"] for item in encodings), np.uint8)
    codes = codes.astype(np.int64) - ord("0")
    wrong = "has counts that are not of pycocotools' form"
    if (lengths == 0).any() or ((codes < 0) | (codes > 63)).any():
        raise ValueError(f"a mask {wrong}")
    # A number ends at a group that has no bit for another; each mask ends with one.
    is_last = codes < 32
    ends = np.cumsum(lengths)
    if not is_last[ends - 1].all():
        raise ValueError(f"a mask {wrong}: they are cut off")
    stops = np.flatnonzero(is_last)
    starts = np.concatenate([[0], stops[:-1] + 1])
    num_groups = stops - starts + 1
    if num_groups.max() > _MAX_GROUPS:
        raise ValueError(f"a mask {wrong}: a number has more than 32 bits")
    place = np.arange(len(codes)) - np.repeat(starts, num_groups)
    numbers = np.add.reduceat((codes & 31) << (5 * place), starts)
    is_negative = (codes[stops] & 16) > 0
    numbers -= np.where(is_negative, np.int64(1) << (5 * num_groups), 0)
    mask_of = np.repeat(np.arange(len(lengths)), lengths)[stops]
    runs = _undo_differences(numbers, mask_of)
    if (runs < 0).any():
        raise ValueError(f"a mask {wrong}: a run has a negative length")
    filled = np.bincount(mask_of, runs, minlength=len(lengths))
    for index in np.flatnonzero(
        filled != [item["size"][0] * item["size"][1] for item in encodings]
    ):
        height, width = encodings[index]["size"]
        raise ValueError(
            f"the runs of a mask fill {int(filled[index])} pixels instead of its {height} x {width}"
        )


def _undo_differences(numbers: np.ndarray, mask_of: np.ndarray) -> np.ndarray:
    """Lengths of runs from the numbers of all masks, which begin anew with each mask."""
    first = np.searchsorted(mask_of, mask_of)  # of each number's mask
    index = np.arange(len(numbers)) - first
    runs = numbers.copy()
    # The second, fourth, ... numbers are one chain of differences, the third, fifth, ... another;
    # the first number stands alone.
    for parity in (0, 1):
        chain = np.flatnonzero((index % 2 == parity) & (index > 0))
        if len(chain):
            total = np.cumsum(numbers[chain])
            begins = np.flatnonzero(np.diff(mask_of[chain], prepend=-1))
            before = np.concatenate([[0], total])[begins]
            runs[chain] = total - np.repeat(before, np.diff(np.append(begins, len(chain))))
    return runs
