"""Pickles of arrays, read without running any code of them.

A pickle is a program that its reader runs. The reader here knows the few names that a file of
proposals contains and builds the arrays itself from their bytes. What a hostile file could still do
with these names it refuses: set attributes of anything but the stand-ins' instances, use keys whose
hash takes forever, and address a memo of a terabyte, which Python's reader in C would allocate.
"""

import os
import pickle
from typing import IO, Any

import numpy as np
from detectron2.structures import BoxMode


def load_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle of plain containers, numbers, text and arrays.

    Files of every protocol and of Python 2 are read. ``InstanceData`` of mmdetection comes as a
    dictionary of its fields.

    Args:
        path: of the file.

    Returns:
        the content, arrays as ``numpy.ndarray``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line, if the file is damaged or refers to any other name.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no proposal file at {path}")
    with open(path, "rb") as file:
        return _load(file, path)


def to_plain(value: Any) -> Any:
    """What a stored value stands for: an array, a dictionary of fields, or the value itself."""
    if isinstance(value, _StoredArray):
        return value.values
    if isinstance(value, _StoredFields):
        return value.fields
    return value


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def _load(file: IO[bytes], path: str | os.PathLike) -> Any:
    try:
        return to_plain(_PlainUnpickler(file, encoding="latin1").load())
    except _RefusedError as error:
        raise ValueError(
            f"{path} is not read: it contains {error}, which no proposal file needs and which "
            "could run code"
        ) from error
    # A damaged pickle makes the unpickler raise almost any exception.
    except Exception as error:
        raise ValueError(
            f"{path} is truncated, damaged or not a pickle ({one_line(error)}); write it again"
        ) from error


class _RefusedError(Exception):
    """A pickle contains what a proposal file does not need."""


class _StoredDtype:
    """Stands in for ``numpy.dtype``: the type of numbers or of text, never a structure or object.

    NumPy's own restoration trusts the file's description of the memory layout; this one takes
    from it the type's code and the byte order only.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str):
            raise TypeError("the type of an array is given by text")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufSU":
            raise _RefusedError(f"an array of the type {code}")

    def __setstate__(self, state: tuple) -> None:
        if isinstance(state[1], str) and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _StoredArray:
    """Stands in for ``numpy.ndarray``: ``values`` holds the array once it is restored."""

    values: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran_order, data = state
        self.values = _decode(data, dtype, shape, "F" if is_fortran_order is True else "C")


class _StoredFields:
    """Stands in for mmdetection's ``InstanceData``: ``fields`` holds what is in it, by name."""

    fields: dict[str, Any]

    def __setstate__(self, state: dict) -> None:
        if not isinstance(state, dict):
            raise TypeError("InstanceData without fields")
        self.fields = {
            name: to_plain(value) for name, value in state.items() if not name.startswith("_")
        }


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


def _no_set(items: Any = ()) -> tuple:
    """Stands in for ``set``: the names of fields, which nothing here needs."""
    return ()


def _new_dict() -> dict:
    """Stands in for ``OrderedDict``; what is in it comes as for any dictionary."""
    return {}


def _box_mode(value: int) -> BoxMode:
    if type(value) is not int:
        raise TypeError("a BoxMode is given by an integer")
    return BoxMode(value)


def _reconstruct(cls: Any, *_: Any) -> Any:
    """Stands in for the function with which old protocols make an object to be filled."""
    if cls is not _StoredFields:
        raise _RefusedError("an object of an unknown class")
    return _StoredFields()


def _object() -> None:
    """Stands in for ``object``, which old protocols name but nothing uses."""


_KNOWN_NAMES = {
    ("copyreg", "_reconstructor"): _reconstruct,
    ("copy_reg", "_reconstructor"): _reconstruct,
    ("_codecs", "encode"): _latin1_bytes,
    ("collections", "OrderedDict"): _new_dict,
    ("detectron2.structures.boxes", "BoxMode"): _box_mode,
    ("numpy", "dtype"): _StoredDtype,
    ("numpy", "ndarray"): _StoredArray,
}
for _builtins in ("__builtin__", "builtins"):
    _KNOWN_NAMES[_builtins, "bytes"] = _no_bytes
    _KNOWN_NAMES[_builtins, "set"] = _no_set
    _KNOWN_NAMES[_builtins, "object"] = _object
# NumPy 2 renamed its inner package; files of either are read under either.
for _core in ("numpy.core", "numpy._core"):
    _KNOWN_NAMES[f"{_core}.multiarray", "_reconstruct"] = _new_array
    _KNOWN_NAMES[f"{_core}.multiarray", "scalar"] = _new_scalar
    _KNOWN_NAMES[f"{_core}.numeric", "_frombuffer"] = _array_of_buffer
for _module in ("mmengine.structures.instance_data", "mmengine.data.instance_data"):
    _KNOWN_NAMES[_module, "InstanceData"] = _StoredFields

_FILLED = (_StoredArray, _StoredDtype, _StoredFields)
_PLAIN_KEYS = (str, int, bytes)


# Python's own reader, not the one in C: its memo is a dictionary, and its steps can be checked.
class _PlainUnpickler(pickle._Unpickler):
    """An unpickler in which only ``_KNOWN_NAMES`` exist."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN_NAMES[module, name]
        except KeyError:
            raise _RefusedError(f"the name {module}.{name}") from None

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _FILLED):
            raise _RefusedError("attributes of an unknown object")
        state = self.stack.pop()
        self.stack[-1].__setstate__(state)

    def load_setitem(self) -> None:
        self._check_target(self.stack[-3], self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_target(self.metastack[-1][-1], self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_target({}, self.stack[::2])
        super().load_dict()

    def load_sets(self) -> None:
        """Sets are names of fields; hashing what else might be in them could take forever."""
        items = self.pop_mark()
        self._check_target({}, items)

    def load_frozenset(self) -> None:
        self.load_sets()
        self.append(frozenset())

    @staticmethod
    def _check_target(target: Any, keys: list) -> None:
        if type(target) is not dict or not all(type(key) in _PLAIN_KEYS for key in keys):
            raise _RefusedError("keys that are neither text nor integers")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_sets
    dispatch[pickle.FROZENSET[0]] = load_frozenset
