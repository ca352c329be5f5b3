"""Tests of files that are complete or absent."""

import errno
import os

import pytest

from d2proposals.engine.bad_input import explain_bad_input
from d2proposals.files.atomic_files import (
    atomic_write,
    check_output_file,
    check_output_folder,
    write_json,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == '{\n  "a": 1\n}\n' and os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("path", ["file/a.json", "folder", "file/nowhere/a.json", "a/" + "x" * 300])
def test_what_cannot_be_written_is_one_line(tmp_path, path):
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot be written") as error:
        write_json(tmp_path / path, {})
    assert explain_bad_input(error.value) == str(error.value)
    assert str(tmp_path / path) in str(error.value)
    assert not list(tmp_path.glob("**/*.tmp"))


def test_an_empty_path_is_one_line():
    with pytest.raises(OSError, match="^An empty path cannot be written") as error:
        write_json("", {})
    assert explain_bad_input(error.value) == str(error.value)


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(f"there/{name}.json")
    (tmp_path / "there" / "old.json").write_text("before")
    for name in ("old", "new"):
        write_json(tmp_path / name, 1)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "there" / f"{name}.json").read_text() == "1\n"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, 2)
    assert pipe.is_fifo() and os.read(reader, 9) == b"2\n"
    os.close(reader)
    assert len(os.listdir(tmp_path)) == 4 and len(os.listdir(tmp_path / "there")) == 2


def test_a_full_disk_is_named_with_the_file_and_others_errors_stay(tmp_path):
    for number, expected in [
        (errno.ENOSPC, "a.txt cannot be written (No space"),
        (errno.ENOENT, "gone"),
    ]:
        with pytest.raises(OSError) as error, atomic_write(tmp_path / "a.txt"):
            raise OSError(number, os.strerror(number), "gone")
        assert expected in str(error.value)
    assert os.listdir(tmp_path) == []


def test_output_folders_are_made_and_tried(tmp_path):
    check_output_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("here")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OSError, match="cannot be written"):
            check_output_folder(folder)


def test_a_file_to_come_is_tried_and_left_as_it_was(tmp_path):
    check_output_file(tmp_path / "folder" / "a.npz")
    assert list((tmp_path / "folder").iterdir()) == []
    (tmp_path / "a.npz").write_bytes(b"old")
    check_output_file(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == b"old"
    # As they are written: into a pipe, wherever it is, and where a link leads.
    check_output_file(os.devnull)
    (tmp_path / "link").symlink_to(tmp_path / "a.npz" / "b.npz")
    with pytest.raises(OSError, match="link cannot be written"):
        check_output_file(tmp_path / "link")
    with pytest.raises(OSError, match="folder cannot be written .it is a folder."):
        check_output_file(tmp_path / "folder")
    with pytest.raises(OSError, match="b.npz cannot be written"):
        check_output_file(tmp_path / "a.npz" / "b.npz")
