"""Files that are whole but of a format that is not read: what they are, and what to do instead."""

# What to write instead of a file without a layout of its own.
_INSTEAD = (
    "write COCO results, a JSON list of {image_id, bbox [x, y, w, h], score}, or d2proposals' own "
    "JSON (docs/toolbox.md)"
)
_BY_FIRST_BYTES = (
    (b"\x1f\x8b", "compressed by gzip; unpack it (gunzip)"),
    (b"BZh", "compressed by bzip2; unpack it (bunzip2)"),
    (b"\xfd7zXZ", "compressed by xz; unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstandard; unpack it (unzstd)"),
    (b"\x93NUMPY", f"one array of NumPy (.npy), without image ids; {_INSTEAD}"),
    (b"\x89HDF", f"an HDF5 file, also what MATLAB 7.3 writes; {_INSTEAD}"),
    (b"MATLAB", f"a file of MATLAB (.mat); load it with scipy.io.loadmat and {_INSTEAD}"),
    (b"PAR1", f"a Parquet table; {_INSTEAD}"),
    (b"\x89PNG", "an image (PNG); Segment-Anything's masks are read as run-length encodings "
                 "(amg.py --convert-to-rle)"),
    (b"\xff\xd8\xff", "an image (JPEG); name a file of proposals"),
    (b"%PDF", "a PDF; name a file of proposals"),
    (b"SQLite", f"a database of SQLite; {_INSTEAD}"),
    (b"<", f"XML, perhaps annotations of PASCAL VOC, which are one file per image; {_INSTEAD}"),
)  # fmt: skip
# Separators of tables, by name.
_SEPARATORS = {",": "a table of text (CSV)", "\t": "a table of text", ";": "a table of text (CSV)"}


def what_it_is(head: bytes) -> str | None:
    """What a file is by its beginning, and what to do instead of giving it; None if unknown.

    Args:
        head: the first few kilobytes.

    Returns:
        Words that go behind "it is".
    """
    for first, name in _BY_FIRST_BYTES:
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(first):
            return name
    if head.startswith(b"PK"):
        # The first file in it has a name of NumPy's.
        is_numpy = b".npy" in head[:256]
        return f"an archive of NumPy (.npz), without a layout; {_INSTEAD}" if is_numpy else None
    return _what_text_is(head)


def _what_text_is(head: bytes) -> str | None:
    """What a text is; None for anything that is no text in lines of several words."""
    # The last line may be cut off, and with it a letter.
    whole_lines = head.rpartition(b"\n")[0] or head
    try:
        lines = whole_lines.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return None
    lines = [line for line in lines if line.strip()]
    if not lines or not all(letter.isprintable() or letter == "\t" for letter in lines[0]):
        return None
    for separator, name in _SEPARATORS.items():
        if separator in lines[0]:
            return f"{name}; {_INSTEAD}"
    if len(lines[0].split()) > 1:
        return f"a text, perhaps YOLO's labels, which are one file per image; {_INSTEAD}"
    return None
