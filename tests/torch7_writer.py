"""Files of Torch7, written as its own File:writeObject does, in binary and in ASCII."""

import struct

import numpy as np

NAMES = {"|u1": "Byte", "|i1": "Char", "<i2": "Short", "<i4": "Int", "<i8": "Long",
         "<f2": "Half", "<f4": "Float", "<f8": "Double"}  # fmt: skip


class Storage:
    """Numbers that tensors share."""

    def __init__(self, values, prefix=""):
        self.values = np.asarray(values)
        self.name = NAMES[self.values.dtype.newbyteorder("<").str]
        # cutorch has no "torch.CudaFloatTensor".
        self.name = prefix + (self.name if (prefix, self.name) != ("Cuda", "Float") else "")


class Tensor:
    """A view of a storage; all of an array in one piece by default."""

    def __init__(self, storage, size=None, stride=None, offset=0):
        if not isinstance(storage, Storage):
            array = np.ascontiguousarray(storage)
            size, storage = array.shape, Storage(array.ravel())
            stride = [x // array.itemsize for x in array.strides]
        self.storage, self.size, self.stride, self.offset = storage, size, stride, offset
        self.name = storage.name


class Object:
    """Of a class, with fields."""

    def __init__(self, class_name, **fields):
        self.class_name, self.fields = class_name, fields


class Raw:
    """Integers in the place of an object."""

    def __init__(self, *integers):
        self.integers = integers


class Writer:
    """Collects the bytes of one object."""

    def __init__(self, ascii_=False, versions=True):
        self.ascii, self.versions = ascii_, versions
        self.data, self.indices, self.alive = bytearray(), {}, []

    def numbers(self, code, values):
        values = list(values)
        if not self.ascii:
            self.data += struct.pack(f"<{len(values)}{code}", *values)
        elif values:
            form = {"d": "%.17g", "f": "%.9g", "e": "%.9g"}.get(code, "%d")
            self.data += " ".join(form % x for x in values).encode() + b"\n"

    def characters(self, data):
        self.data += data + (b"\n" if self.ascii and data else b"")

    def text(self, text):
        data = text.encode("latin1")
        self.numbers("i", [len(data)])
        self.characters(data)

    def write(self, value):
        if value is None:
            self.numbers("i", [0])
        elif isinstance(value, Raw):
            self.numbers("i", value.integers)
        elif isinstance(value, bool):
            self.numbers("i", [5])
            self.numbers("i", [value])
        elif isinstance(value, (int, float)):
            self.numbers("i", [1])
            self.numbers("d", [value])
        elif isinstance(value, str):
            self.numbers("i", [2])
            self.text(value)
        else:
            self.referenced(value)
        return self

    def referenced(self, value):
        self.numbers("i", [3 if isinstance(value, (dict, list)) else 4])
        known = id(value) in self.indices
        index = self.indices.setdefault(id(value), len(self.indices) + 1)
        self.alive.append(value)
        self.numbers("i", [index])
        if known:
            return
        if isinstance(value, (dict, list)):
            self.table(value)
            return
        if self.versions:
            self.text("V 1")
        if isinstance(value, Object):
            self.text(value.class_name)
            self.write(value.fields)
        elif isinstance(value, Storage):
            self.text(f"torch.{value.name}Storage")
            self.numbers("q", [len(value.values)])
            if value.values.itemsize == 1:
                self.characters(value.values.tobytes())
            elif not self.ascii:
                self.data += value.values.tobytes()
            else:
                self.numbers(value.values.dtype.char, value.values.tolist())
        else:
            self.text(f"torch.{value.name}Tensor")
            self.numbers("i", [len(value.size)])
            self.numbers("q", value.size)
            self.numbers("q", value.stride)
            self.numbers("q", [value.offset + 1])
            self.write(value.storage)

    def table(self, value):
        pairs = value if isinstance(value, dict) else dict(enumerate(value, 1))
        self.numbers("i", [len(pairs)])
        for key, item in pairs.items():
            self.write(key)
            self.write(item)


def torch7_bytes(value, **settings):
    return bytes(Writer(**settings).write(value).data)
