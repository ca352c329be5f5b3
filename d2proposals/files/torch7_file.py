"""Files of Torch7 (``torch.save`` of Lua), read without running any code of them.

Format: File.lua, generic/Storage.c, generic/Tensor.c and lib/TH/THDiskFile.c of torch/torch7. A
file is one object: its type (int), and

* a number (double), a boolean (int), text (its length and bytes), or nothing for nil;
* a table: its index, the number of its pairs, and keys and values, objects each;
* an object of a class: its index, "V 1" (absent in old files), the name of the class, and what the
  class writes: a tensor its sizes, strides and first element (counted from 1) and the storage as an
  object, a storage its numbers, all other classes here a table of their fields.

A table or object whose index was read before is the same one. The binary encoding has integers of 4
and longs of 8 bytes, little end first, as a 64-bit machine writes them; in ASCII each group of
numbers is a line, and text is followed by the end of one.

Functions, which are code of Lua, are refused, and so are classes that the caller does not name.
Nothing is allocated that the file does not have the bytes for.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .safe_pickle import one_line
from .stored_arrays import RefusedError, StoredStorage, StoredTensor

_NIL, _NUMBER, _STRING, _TABLE, _OBJECT, _BOOLEAN = range(6)
_FUNCTIONS = (6, 7, 8)

# Nested tables, objects and tensors: a ResNet has some 30, and Python's own limit is 1000 calls.
_MAX_DEPTH = 100
# Of a tensor.
_MAX_DIMENSIONS = 16
# Whole numbers beyond this are not exact in Lua.
_MAX_KEY = 2**53

# NumPy's type of the numbers of "torch.<name>Tensor" and "torch.<name>Storage".
_CODES = {
    "Byte": "|u1",
    "Char": "|i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
}
_CODES |= {f"Cuda{name}": code for name, code in _CODES.items() if name != "Float"}
_CODES["Cuda"] = "<f4"
_ARRAY_CLASS = re.compile(rf"torch\.(?P<name>{'|'.join(_CODES)})(?P<kind>Tensor|Storage)")


@dataclass(eq=False)
class TorchObject:
    """An object of a class other than tensors and storages.

    Attributes:
        class_name: such as "nn.Linear".
        fields: by name.
    """

    class_name: str
    fields: dict[Any, Any] = field(default_factory=dict)


def load_torch7(path: str | os.PathLike, classes: Collection[str]) -> Any:
    """Read a file of Torch7, in binary or in ASCII.

    Args:
        path: of the file.
        classes: names of the classes that it may have objects of, besides tensors and storages.

    Returns:
        The object: nil as None, tables as dictionaries (Lua's lists have the keys 1, 2, ...),
        objects as :class:`TorchObject`, tensors as ``StoredTensor``, whose ``values`` are an array,
        and storages as ``StoredStorage``. What is one object in the file is one here, so that there
        may be circles.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: in one line, if it is damaged or has anything else in it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path}; give the path of a .t7 file.")
    with open(path, "rb") as file:
        data = file.read()
    try:
        return _Reader(_source(data), classes).read()
    except RefusedError as error:
        raise ValueError(f"{path} is not read: it contains {error}.") from error
    # What does not fit raises by where it is noticed.
    except (EOFError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} is cut off, damaged or no file of Torch7 ({one_line(error)}); download it "
            "again."
        ) from error


class _Binary:
    """Numbers and text of a file in the binary encoding, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = memoryview(data), 0

    def _take(self, number: int) -> memoryview:
        end = self._position + number
        if number < 0 or end > len(self._data):
            rest = len(self._data) - self._position
            raise EOFError(f"{number} bytes announced where {rest} are left")
        taken, self._position = self._data[self._position : end], end
        return taken

    def integer(self) -> int:
        return struct.unpack("<i", self._take(4))[0]

    def longs(self, number: int) -> tuple[int, ...]:
        return struct.unpack(f"<{number}q", self._take(8 * number))

    def double(self) -> float:
        return struct.unpack("<d", self._take(8))[0]

    def text(self, number: int) -> str:
        return bytes(self._take(number)).decode("latin1")

    def fill(self, storage: StoredStorage) -> None:
        storage.fill(self._take(storage.num_bytes))


class _Ascii:
    """The same in ASCII."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def _line(self, number: int) -> list[bytes]:
        """The numbers on the next line; ``number`` of none is no line."""
        if number == 0:
            return []
        end = self._data.find(b"\n", self._position)
        if end < 0:
            raise EOFError("a line without an end")
        words = self._data[self._position : end].split()
        self._position = end + 1
        if len(words) != number:
            raise ValueError(f"a line has {len(words)} numbers instead of {number}")
        return words

    def integer(self) -> int:
        return int(self._line(1)[0])

    def longs(self, number: int) -> tuple[int, ...]:
        return tuple(int(word) for word in self._line(number))

    def double(self) -> float:
        return float(self._line(1)[0])

    def text(self, number: int) -> str:
        return self._bytes(number).decode("latin1")

    def _bytes(self, number: int) -> bytes:
        """As many bytes, and the end of the line behind them."""
        end = self._position + number
        if number < 0 or end > len(self._data):
            raise EOFError(f"{number} bytes announced where the file ends")
        taken = self._data[self._position : end]
        self._position = end + (number > 0)
        return taken

    def fill(self, storage: StoredStorage) -> None:
        # Bytes and characters stand as they are.
        if storage.num_bytes == storage.number:
            storage.fill(self._bytes(storage.number))
        else:
            words = np.array(self._line(storage.number), dtype=bytes)
            storage.fill(words.astype(storage.code).tobytes())


def _source(data: bytes) -> _Binary | _Ascii:
    """The file in the encoding that its first bytes are of: a type, from 0 to 8."""
    if re.match(rb"[\x00-\x08]\x00\x00\x00", data):
        return _Binary(data)
    if re.match(rb"[0-8]\n", data):
        return _Ascii(data)
    if data.startswith(b"PK") or data.startswith(b"\x80"):
        raise RefusedError("what PyTorch, not Torch7, has written")
    raise ValueError("it begins with no type of an object")


class _Reader:
    """Objects of a file."""

    def __init__(self, source: _Binary | _Ascii, classes: Collection[str]) -> None:
        self._source, self._classes = source, classes
        self._objects: dict[int, Any] = {}
        self._depth = 0

    def read(self) -> Any:
        """The next object, with all that is in it."""
        if self._depth > _MAX_DEPTH:
            raise RefusedError(f"more than {_MAX_DEPTH} objects within each other")
        self._depth += 1
        value = self._read_of_type(self._source.integer())
        self._depth -= 1
        return value

    def _read_of_type(self, kind: int) -> Any:
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            return self._source.double()
        if kind == _BOOLEAN:
            return self._source.integer() == 1
        if kind == _STRING:
            return self._text()
        if kind in _FUNCTIONS:
            raise RefusedError("a function, which is code of Lua")
        if kind not in (_TABLE, _OBJECT):
            raise ValueError(f"{kind} is no type of an object")
        index = self._source.integer()
        if index in self._objects:
            return self._objects[index]
        return self._table(index) if kind == _TABLE else self._object(index)

    def _text(self) -> str:
        return self._source.text(self._source.integer())

    def _table(self, index: int) -> dict:
        table: dict[Any, Any] = {}
        # Known from here on: a table may be in itself.
        self._objects[index] = table
        number = self._source.integer()
        if number < 0:
            raise ValueError(f"a table of {number} pairs")
        for _ in range(number):
            key = _checked_key(self.read())
            table[key] = self.read()
        return table

    def _object(self, index: int) -> Any:
        class_name = self._text()
        if re.fullmatch(r"V \d+", class_name):
            class_name = self._text()
        array = _ARRAY_CLASS.fullmatch(class_name)
        if array:
            read = self._tensor if array["kind"] == "Tensor" else self._storage
            self._objects[index] = read(_CODES[array["name"]])
            return self._objects[index]
        if class_name not in self._classes:
            raise RefusedError(f"an object of the class {class_name[:100]!r}, which is not known")
        value = self._objects[index] = TorchObject(class_name)
        fields = self.read()
        if not isinstance(fields, dict):
            raise TypeError(f"an object of the class {class_name} without fields")
        value.fields = fields
        return value

    def _tensor(self, code: str) -> StoredTensor:
        number = self._source.integer()
        if not 0 <= number <= _MAX_DIMENSIONS:
            raise RefusedError(f"a tensor of {number} dimensions")
        size, stride = self._source.longs(number), self._source.longs(number)
        (first,) = self._source.longs(1)
        storage = self.read()
        if storage is None or number == 0:
            nothing = StoredStorage(code, 0)
            nothing.fill(b"")
            return StoredTensor(nothing, 0, (0,), (1,))
        if not isinstance(storage, StoredStorage) or storage.code != code:
            raise TypeError("a tensor over something other than a storage of its type")
        return StoredTensor(storage, first - 1, size, stride)

    def _storage(self, code: str) -> StoredStorage:
        (number,) = self._source.longs(1)
        storage = StoredStorage(code, number)
        self._source.fill(storage)
        return storage


def _checked_key(key: Any) -> str | int:
    """A key of a table: text or a whole number, whose hashes take no time."""
    if isinstance(key, float):
        if not (key.is_integer() and abs(key) <= _MAX_KEY):
            raise RefusedError(f"a table with the key {key}")
        return int(key)
    if not isinstance(key, str):
        raise RefusedError("a table with keys other than text and whole numbers")
    return key
