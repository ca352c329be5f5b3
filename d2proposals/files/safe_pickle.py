"""Pickles of arrays and tensors, read without running any code of them.

A pickle is a program that its reader runs. The reader here knows the few names that a file of
proposals contains and builds the arrays itself from their bytes. What a hostile file could still do
with these names it refuses: set attributes of anything but the stand-ins' instances, use keys whose
hash takes forever, and address a memo of a terabyte, which Python's reader in C would allocate.
"""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

from detectron2.structures import BoxMode

from .stored_arrays import (
    STORAGE_TYPES,
    RefusedError,
    StorageType,
    StoredArray,
    StoredDtype,
    StoredStorage,
    StoredTensor,
    array_of_buffer,
    new_array,
    new_scalar,
    same_tensor,
)
from .unread_formats import what_it_is

# With this number torch's files begin that are no ZIP archives.
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C


def load_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle of plain containers, numbers, text and arrays.

    Files of every protocol and of Python 2 are read. ``InstanceData`` of mmdetection comes as a
    dictionary of its fields.

    Args:
        path: of the file.

    Returns:
        the content, arrays as ``numpy.ndarray``, those of objects as a list.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line, if the file is damaged or refers to any other name.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no proposal file at {path}")
    with open(path, "rb") as file:
        return _checked(lambda: _PlainUnpickler(file, encoding="latin1").load(), file, path)


def load_with_tensors(file: IO[bytes], path: str | os.PathLike) -> Any:
    """Read a pickle that may have torch's tensors in it, or a file of ``torch.save``.

    Args:
        file: open for reading, at its beginning, and seekable.
        path: named in errors.

    Returns:
        the content as of :func:`load_pickle`, tensors as arrays; Detectron2's ``Instances`` and
        ``Boxes`` as dictionaries of their fields.

    Raises:
        ValueError: as :func:`load_pickle`.
    """

    def load() -> Any:
        is_archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if is_archive:
            return _load_archive(file)
        content = _TensorUnpickler(file, encoding="latin1").load()
        return _load_rest(file) if content == _TORCH_MAGIC else content

    return _checked(load, file, path)


def to_plain(value: Any) -> Any:
    """What a stored value stands for: an array, a dictionary of fields, or the value itself."""
    if isinstance(value, (StoredArray, StoredTensor)):
        return value.values
    if isinstance(value, StoredFields):
        return value.fields
    return value


def taken(items: list[Any]) -> Iterator[Any]:
    """The items of a list from first to last; none is left in it, and in memory, afterwards."""
    items.reverse()
    while items:
        yield items.pop()


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def _checked(load: Callable[[], Any], file: IO[bytes], path: str | os.PathLike) -> Any:
    """What ``load`` reads of a file, or ValueError in one line."""
    try:
        return to_plain(load())
    # A damaged pickle makes the unpickler raise almost any exception.
    except Exception as error:
        file.seek(0)
        known = what_it_is(file.read(4096))
        if isinstance(error, _UnknownArchiveError):
            known = known or "a ZIP archive, but not one of torch.save; unpack it"
        if known:
            raise ValueError(f"{path} is not read: it is {known}") from error
        if isinstance(error, RefusedError):
            raise ValueError(
                f"{path} is not read: it contains {error}, which no proposal file needs and which "
                "could run code"
            ) from error
        raise ValueError(
            f"{path} is truncated, damaged or not a pickle ({one_line(error)}); write it again"
        ) from error


class _UnknownArchiveError(Exception):
    """A ZIP archive is whole, but none of torch's."""


def _load_archive(file: IO[bytes]) -> Any:
    """The content of a file of ``torch.save``: a ZIP archive of a pickle and storages."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        root = next((name for name in entries if name.endswith("/data.pkl")), None)
        if root is None:
            raise _UnknownArchiveError
        folder = root.removesuffix("data.pkl")

        def read(name: str) -> bytes:
            # torch compresses nothing; what is compressed may be a terabyte of zeros.
            if entries[name].compress_type != zipfile.ZIP_STORED:
                raise RefusedError("a compressed storage")
            return archive.read(name)

        unpickler = _TensorUnpickler(io.BytesIO(read(root)), encoding="latin1")
        unpickler.fill_storage = lambda key, storage: storage.fill(read(f"{folder}data/{key}"))
        return unpickler.load()


def _load_rest(file: IO[bytes]) -> Any:
    """The content of an older file of ``torch.save``, or of a storage in a pickle, read from
    behind its magic number on."""
    for _ in ("version", "sizes of types"):
        _TensorUnpickler(file).load()
    storages: dict[str, StoredStorage] = {}
    unpickler = _TensorUnpickler(file, encoding="latin1")
    unpickler.fill_storage = storages.__setitem__
    content = unpickler.load()
    for key in _TensorUnpickler(file).load():
        (number,) = struct.unpack("<q", file.read(8))
        if number != storages[key].number:
            raise EOFError("a storage of another size than the pickle says")
        storages[key].fill(file.read(storages[key].num_bytes))
    return content


def _storage_of_bytes(data: bytes) -> StoredStorage:
    """Stands in for the function with which torch's tensors bring their storage into a pickle."""
    file = io.BytesIO(data)
    if _TensorUnpickler(file).load() != _TORCH_MAGIC:
        raise TypeError("a storage that torch has not written")
    return _load_rest(file)


class StoredFields:
    """Stands in for mmdetection's ``InstanceData`` and Detectron2's ``Instances`` and ``Boxes``:
    ``fields`` holds what is in it, by name."""

    fields: dict[str, Any]

    def __setstate__(self, state: dict) -> None:
        if not isinstance(state, dict):
            raise TypeError("an object without fields")
        # Those of ``Instances`` have a dictionary of their own.
        state = state["_fields"] if isinstance(state.get("_fields"), dict) else state
        # As they are: the storages of tensors may not be filled yet.
        self.fields = {name: value for name, value in state.items() if not name.startswith("_")}


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


def _box_mode_by_name(cls: Any, name: Any) -> BoxMode:
    """Stands in for ``getattr``, by which some versions of Python store an enumeration's member."""
    if cls is not _box_mode or not isinstance(name, str) or name not in BoxMode.__members__:
        raise RefusedError("an attribute of something other than BoxMode")
    return BoxMode[name]


def _reconstruct(cls: Any, *_: Any) -> Any:
    """Stands in for the function with which old protocols make an object to be filled."""
    if cls is not StoredFields:
        raise RefusedError("an object of an unknown class")
    return StoredFields()


def _object() -> None:
    """Stands in for ``object``, which old protocols name but nothing uses."""


_KNOWN_NAMES = {
    ("copyreg", "_reconstructor"): _reconstruct,
    ("copy_reg", "_reconstructor"): _reconstruct,
    ("_codecs", "encode"): _latin1_bytes,
    ("collections", "OrderedDict"): _new_dict,
    ("detectron2.structures.boxes", "BoxMode"): _box_mode,
    ("numpy", "dtype"): StoredDtype,
    ("numpy", "ndarray"): StoredArray,
}
for _builtins in ("__builtin__", "builtins"):
    _KNOWN_NAMES[_builtins, "bytes"] = _no_bytes
    _KNOWN_NAMES[_builtins, "getattr"] = _box_mode_by_name
    _KNOWN_NAMES[_builtins, "set"] = _no_set
    _KNOWN_NAMES[_builtins, "object"] = _object
# NumPy 2 renamed its inner package; files of either are read under either.
for _core in ("numpy.core", "numpy._core"):
    _KNOWN_NAMES[f"{_core}.multiarray", "_reconstruct"] = new_array
    _KNOWN_NAMES[f"{_core}.multiarray", "scalar"] = new_scalar
    _KNOWN_NAMES[f"{_core}.numeric", "_frombuffer"] = array_of_buffer
for _module in ("mmengine.structures.instance_data", "mmengine.data.instance_data"):
    _KNOWN_NAMES[_module, "InstanceData"] = StoredFields

# What tensors need besides; Detectron2's files for training may not have them.
_TENSOR_NAMES = {
    ("torch._utils", "_rebuild_tensor"): StoredTensor,
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor,
    ("torch._utils", "_rebuild_parameter"): same_tensor,
    ("torch.storage", "_load_from_bytes"): _storage_of_bytes,
    ("torch", "Size"): tuple,
    ("detectron2.structures.instances", "Instances"): StoredFields,
    ("detectron2.structures.boxes", "Boxes"): StoredFields,
    **{("torch", name): storage_type for name, storage_type in STORAGE_TYPES.items()},
}

_FILLED = (StoredArray, StoredDtype, StoredFields)
_PLAIN_KEYS = (str, int, bytes)


# Python's own reader, not the one in C: its memo is a dictionary, and its steps can be checked.
class _PlainUnpickler(pickle._Unpickler):
    """An unpickler in which only ``_KNOWN_NAMES`` exist."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN_NAMES[module, name]
        except KeyError:
            raise RefusedError(f"the name {module}.{name}") from None

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _FILLED):
            raise RefusedError("attributes of an unknown object")
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
            raise RefusedError("keys that are neither text nor integers")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_sets
    dispatch[pickle.FROZENSET[0]] = load_frozenset


class _TensorUnpickler(_PlainUnpickler):
    """An unpickler that knows tensors, too.

    Attributes:
        fill_storage: is called with the key of each storage that the pickle names, and with the
            storage, to be filled then or later.
    """

    fill_storage: Callable[[str, StoredStorage], None] | None = None

    def __init__(self, file: IO[bytes], **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self._storages: dict[str, StoredStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _TENSOR_NAMES:
            return _TENSOR_NAMES[module, name]
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> StoredStorage:
        """A storage that lies beside the pickle: ("storage", type, key, device, number, ...)."""
        if self.fill_storage is None:
            raise RefusedError("a reference to something beside it")
        _, storage_type, key, _, number = pid[:5]
        if not isinstance(storage_type, StorageType) or not isinstance(key, str):
            raise TypeError("a storage of an unknown type")
        if key not in self._storages:
            self._storages[key] = StoredStorage(storage_type.code, number)
            self.fill_storage(key, self._storages[key])
        return self._storages[key]
