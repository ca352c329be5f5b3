"""Files of Torch7: written here in the format, read back; damaged and hostile ones are refused."""

import struct
import tracemalloc

import numpy as np
import pytest

from d2proposals.files.torch7_file import TorchObject, load_torch7
from tests.torch7_writer import Object, Raw, Storage, Tensor, torch7_bytes


@pytest.fixture
def load(tmp_path):
    def load(content, classes=(), **settings):
        path = tmp_path / "model.t7"
        data = content if isinstance(content, bytes) else torch7_bytes(content, **settings)
        path.write_bytes(data)
        return load_torch7(path, classes)

    return load


def test_bytes_by_hand(load):
    # {"a" = 1.5, [1] = true}, as torch.save writes it on a 64-bit machine, and in ASCII.
    binary = struct.pack("<iii", 3, 1, 2)
    binary += struct.pack("<ii", 2, 1) + b"a" + struct.pack("<id", 1, 1.5)
    binary += struct.pack("<id", 1, 1.0) + struct.pack("<ii", 5, 1)
    assert load(binary) == {"a": 1.5, 1: True}
    assert load(b"3\n1\n2\n2\n1\na\n1\n1.5\n1\n1\n5\n1\n") == {"a": 1.5, 1: True}
    # torch.FloatTensor({{1, 2, 3}, {4, 5, 6}}):t(), 3 x 2 with the strides 1 and 3.
    text = b"4\n1\n3\nV 1\n17\ntorch.FloatTensor\n2\n3 2\n1 3\n1\n"
    text += b"4\n2\n3\nV 1\n18\ntorch.FloatStorage\n6\n1 2 3 4 5 6\n"
    values = load(text).values
    assert values.dtype == np.float32 and values.tolist() == [[1, 4], [2, 5], [3, 6]]


@pytest.mark.parametrize("ascii_", [False, True])
@pytest.mark.parametrize("value", [None, True, False, 0.1, -1e300, float("inf"), "", "né\n 1"])
def test_plain_values(load, value, ascii_):
    assert load([value, {"x": [value]}], ascii_=ascii_) == {1: value, 2: {"x": {1: value}}}


@pytest.mark.parametrize("ascii_", [False, True])
@pytest.mark.parametrize("prefix", ["", "Cuda"])
@pytest.mark.parametrize("code", ["u1", "i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8"])
def test_tensors_of_every_type(load, code, prefix, ascii_):
    values = np.array([[0, 1, 100], [7, 32, 10]]).astype(code)  # 10 is the end of a line, too
    storage = Storage(values.ravel(), prefix)
    read = load([Tensor(storage, (2, 3), (3, 1)), storage], ascii_=ascii_)
    assert read[1].values.dtype == values.dtype and read[1].values.tolist() == values.tolist()
    assert read[2].numbers().tolist() == values.ravel().tolist()


@pytest.mark.parametrize("ascii_", [False, True])
@pytest.mark.parametrize("versions", [False, True])
def test_views_of_a_shared_storage_and_one_object_in_several_places(load, ascii_, versions):
    storage = Storage(np.arange(12.0))
    part, table = Tensor(storage, (2, 3), (1, 4), offset=1), {"x": 1.0}
    content = [part, Tensor(storage, (3,), (4,), offset=3), part, table, table]
    read = load(content, ascii_=ascii_, versions=versions)
    assert read[1].values.tolist() == [[1, 5, 9], [2, 6, 10]]
    assert read[2].values.tolist() == [3, 7, 11]
    assert read[1] is read[3] and read[4] is read[5]


def test_a_tensor_of_nothing_and_one_that_repeats_no_number(load):
    empty = Tensor(Storage(np.zeros(0, np.float32)), (), ())
    assert load(empty).values.shape == (0,)
    without_storage = struct.pack("<iii", 4, 1, 17) + b"torch.FloatTensor"
    without_storage += struct.pack("<iqi", 0, 1, 0)
    assert load(without_storage).values.shape == (0,)
    one = Tensor(Storage(np.ones(2)), (1, 2), (0, 1))
    assert load(one).values.tolist() == [[1, 1]]


@pytest.mark.parametrize("ascii_", [False, True])
def test_objects_of_named_classes(load, ascii_):
    linear = Object("nn.Linear", weight=Tensor(np.eye(2)), train=False)
    read = load([linear, linear], ["nn.Linear"], ascii_=ascii_)
    assert isinstance(read[1], TorchObject) and read[1] is read[2]
    assert read[1].class_name == "nn.Linear" and set(read[1].fields) == {"weight", "train"}


def test_circles_end(load):
    table, thing = {}, Object("nn.Sequential")
    table["itself"], thing.fields["parent"] = table, thing
    read = load([table, thing], ["nn.Sequential"])
    assert read[1]["itself"] is read[1] and read[2].fields["parent"] is read[2]


def nested(depth):
    return [nested(depth - 1)] if depth else 1.0


def test_depth_is_bounded(load):
    assert load(nested(99))[1]
    with pytest.raises(ValueError, match="more than 100 objects within each other"):
        load(nested(150))
    with pytest.raises(ValueError, match="more than 100 objects within each other"):
        # A table as the key of a table as the key ...
        load(b"".join(struct.pack("<iii", 3, index, 1) for index in range(10**4)))


@pytest.mark.parametrize("ascii_", [False, True])
def test_a_file_that_is_cut_off_anywhere(load, ascii_):
    content = [Object("nn.Linear", weight=Tensor(np.arange(3.0)), name="fc"), True]
    data = torch7_bytes(content, ascii_=ascii_)
    assert load(data, ["nn.Linear"])
    # The end of the last line is all that may be missing.
    for length in range(len(data) - ascii_):
        with pytest.raises(ValueError, match=r"model\.t7 is (cut off|not read)") as error:
            load(data[:length], ["nn.Linear"])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [6, 7, 8])
def test_functions_are_refused(load, kind):
    with pytest.raises(ValueError, match="a function, which is code of Lua"):
        load(["x", Raw(kind, 1, 4, 0)])


@pytest.mark.parametrize(
    "content, message",
    [
        (Object("nn.LSTM"), "an object of the class 'nn.LSTM', which is not known"),
        (Object("tds.Hash"), "'tds.Hash'"),
        (Object("torch.FloatTensorX"), "'torch.FloatTensorX'"),
        (Raw(9), "9 is no type|begins with no type"),
        ([Raw(9)], "9 is no type of an object"),
        ({0.5: 1}, "a table with the key 0.5"),
        ({float("nan"): 1}, "a table with the key nan"),
        ({2.0**61 - 1: 1}, "a table with the key 2.3"),
        ([Raw(3, 5, 1, 5, 1, 0)], "keys other than text"),
        ([Raw(3, 5, -1)], "a table of -1 pairs"),
        ([Raw(2, -3)], "-3 bytes announced"),
        ([Raw(2, 2**31 - 1)], "2147483647 bytes announced where 0 are left"),
        (Tensor(Storage(np.ones(4)), (2, 2), (2, 2)), "reaches beyond its storage"),
        (Tensor(Storage(np.ones(4)), (4,), (1,), offset=1), "reaches beyond its storage"),
        (Tensor(Storage(np.ones(4)), (4,), (1,), offset=-1), "whole numbers"),
        (Tensor(Storage(np.ones(4)), (2,), (-1,), offset=1), "whole numbers"),
        (Tensor(Storage(np.ones(4)), (-1, -4), (1, 1)), "whole numbers"),
        (Tensor(Storage(np.ones(4)), (2**30, 2**30), (0, 0)), "more numbers than its storage"),
        (Tensor(Storage(np.ones(4)), (5,), (0,)), "more numbers than its storage"),
        (Tensor(Storage(np.ones(4)), (1,) * 17, (1,) * 17), "a tensor of 17 dimensions"),
        (b"PK\x03\x04", "PyTorch, not Torch7"),
        (b"\x80\x02", "PyTorch, not Torch7"),
        (b"", "begins with no type"),
        (b"<html>", "begins with no type"),
        (b"4\n1\n18\ntorch.FloatStorage\n3\n1 2\n", "2 numbers instead of 3"),
        (b"4\n1\n18\ntorch.FloatStorage\n2\n1 x\n", "could not convert"),
        (b"3\nx\n", "invalid literal"),
    ],
)  # fmt: skip
def test_what_is_refused_or_makes_no_sense(load, content, message):
    with pytest.raises(ValueError, match=message):
        load(content)


@pytest.mark.parametrize("number", [2**62, 2**38, 10**6, -1])
@pytest.mark.parametrize("ascii_", [False, True])
def test_nothing_is_allocated_that_the_file_has_no_bytes_for(load, number, ascii_):
    name = "torch.DoubleStorage"
    data = struct.pack("<iii", 4, 1, len(name)) + name.encode() + struct.pack("<q", number)
    if ascii_:
        data = f"4\n1\n{len(name)}\n{name}\n{number}\n1 2 3\n".encode()
    tracemalloc.start()
    with pytest.raises(ValueError, match="cut off"):
        load(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("storage", [Storage(np.ones(4, np.float32)), {"x": 1.0}])
def test_a_tensor_over_something_other_than_a_storage_of_its_type(load, storage):
    tensor = Tensor(Storage(np.ones(4)), (4,), (1,))
    tensor.storage = storage
    with pytest.raises(ValueError, match="other than a storage of its type"):
        load(tensor)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_torch7(tmp_path / "none.t7", ())
