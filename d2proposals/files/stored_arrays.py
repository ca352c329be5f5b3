"""Arrays and tensors in pickles and files of Torch7, built from their bytes.

No call that a file names is made.

NumPy's and torch's own functions trust the file's description of memory. What stands in for them
here takes a type, a shape and bytes from the file, and checks that they fit.
"""

import math
from typing import Any

import numpy as np


class RefusedError(Exception):
    """A file contains what is not needed of it, and what could do harm."""


class StoredDtype:
    """Stands in for ``numpy.dtype``: the type of numbers, of text or of lists, never a structure.

    NumPy's own restoration trusts the file's description of the memory layout; this one takes
    from it the type's code and the byte order only.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str):
            raise TypeError("the type of an array is given by text")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufSUO":
            raise RefusedError(f"an array of the type {code}")

    def __setstate__(self, state: tuple) -> None:
        if isinstance(state[1], str) and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray:
    """Stands in for ``numpy.ndarray``: ``values`` holds the array once it is restored.

    An array of objects, such as arrays of several lengths, comes as the list of them.
    """

    values: np.ndarray | list

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran_order, data = state
        if dtype.dtype.kind == "O":
            if not isinstance(data, list) or not isinstance(shape, tuple) or len(shape) != 1:
                raise RefusedError("an array of objects that is no list of them")
            self.values = data
        else:
            self.values = decode(data, dtype, shape, "F" if is_fortran_order is True else "C")


class StoredStorage:
    """Stands in for torch's storages: numbers that tensors are views of, filled when they are read.

    Attributes:
        code: of NumPy's type; "bfloat16", which NumPy lacks, is known, too.
        number: of the numbers.
    """

    def __init__(self, code: str, number: int) -> None:
        if type(number) is not int or not 0 <= number < 2**40:
            raise TypeError("the size of a storage is a whole number")
        self.code, self.number = code, number
        self._data: bytes | None = None

    @property
    def num_bytes(self) -> int:
        return self.number * (2 if self.code == "bfloat16" else np.dtype(self.code).itemsize)

    def fill(self, data: bytes) -> None:
        """Give the storage its bytes, little end first."""
        if len(data) != self.num_bytes:
            raise EOFError(f"a storage of {self.num_bytes} bytes has {len(data)}")
        self._data = data

    def numbers(self) -> np.ndarray:
        """All of them, in one row."""
        if self._data is None:
            raise EOFError("a storage without bytes")
        if self.code != "bfloat16":
            return np.frombuffer(self._data, self.code)
        # The upper half of a float of 32 bits.
        return (np.frombuffer(self._data, "<u2").astype("<u4") << 16).view("<f4")


class StorageType:
    """Stands in for torch's classes of storages, which its pickles name but must not call."""

    def __init__(self, code: str) -> None:
        self.code = code


STORAGE_TYPES = {
    "DoubleStorage": StorageType("<f8"),
    "FloatStorage": StorageType("<f4"),
    "HalfStorage": StorageType("<f2"),
    "BFloat16Storage": StorageType("bfloat16"),
    "LongStorage": StorageType("<i8"),
    "IntStorage": StorageType("<i4"),
    "ShortStorage": StorageType("<i2"),
    "CharStorage": StorageType("|i1"),
    "ByteStorage": StorageType("|u1"),
    "BoolStorage": StorageType("|b1"),
}


def decode(data: Any, dtype: StoredDtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """An array out of the bytes of a pickle (text under Python 2)."""
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def new_array(*_: Any) -> StoredArray:
    """Stands in for the function with which NumPy's pickles make an array to be filled."""
    return StoredArray()


def array_of_buffer(
    data: Any, dtype: StoredDtype, shape: tuple[int, ...], order: str, *_: Any
) -> StoredArray:
    """Stands in for the function with which NumPy's pickles of protocol 5 make an array."""
    array = StoredArray()
    array.values = decode(data, dtype, shape, order)
    return array


def new_scalar(dtype: StoredDtype, data: Any) -> np.generic:
    """Stands in for the function with which NumPy's pickles make a number of its own types."""
    if dtype.dtype.kind == "O":
        raise RefusedError("a number that is an object")
    return decode(data, dtype, (1,), "C")[0]


class StoredTensor:
    """Stands in for ``torch.Tensor``: a view of a storage, which may be filled later.

    Raises:
        RefusedError, TypeError: unless it lies within its storage.
    """

    def __init__(self, storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> None:
        if not isinstance(storage, StoredStorage):
            raise TypeError("a tensor without storage")
        self._storage, self._offset = storage, offset
        self._size, self._stride = tuple(size), tuple(stride)
        whole = (offset, *self._size, *self._stride)
        if len(self._size) != len(self._stride) or not all(
            type(x) is int and 0 <= x < 2**40 for x in whole
        ):
            raise TypeError("a tensor's size and stride are whole numbers")
        if math.prod(self._size) > storage.number:
            # A repeated number could otherwise be a terabyte of them.
            raise RefusedError("a tensor of more numbers than its storage has")
        last = sum((n - 1) * step for n, step in zip(self._size, self._stride, strict=True))
        if math.prod(self._size) and offset + last >= storage.number:
            raise TypeError("a tensor reaches beyond its storage")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self._size

    @property
    def values(self) -> np.ndarray:
        """The tensor as an array of its own."""
        numbers = self._storage.numbers()
        if not math.prod(self._size):
            return np.zeros(self._size, numbers.dtype)
        steps = [step * numbers.itemsize for step in self._stride]
        view = np.lib.stride_tricks.as_strided(numbers[self._offset :], self._size, steps)
        return view.copy()


def same_tensor(tensor: Any, *_: Any) -> Any:
    """Stands in for the function with which torch's pickles make a parameter of a tensor."""
    return tensor
