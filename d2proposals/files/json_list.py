"""The items of a long list in JSON, read one after the other.

``json.load`` has the whole text in memory, and everything that is in it, before the first item can
be looked at.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

# Characters that are read at once; a longer item is read nevertheless.
_CHARACTERS = 1 << 20

_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN = re.compile(r"[ \t\n\r]*([,\]])")


def list_items(
    text: TextIO, before: re.Pattern[str] = _SPACE, behind: re.Pattern[str] = _SPACE
) -> Iterator[Any]:
    """Items of a list, as ``json.load`` would parse them; in memory there are only a few at a time.

    Args:
        text: at its beginning.
        before, behind: what stands in front of the list and after it, all of the text but the list.
            What is in front is in the first ``_CHARACTERS``.

    Raises:
        json.JSONDecodeError: when it comes to what is no such list, perhaps after some items. Its
            position means nothing. Until then the text from the last item on is read into memory.
    """
    decode = json.JSONDecoder().raw_decode
    rest = text.read(_CHARACTERS)
    start = before.match(rest)
    at = start.end() if start else len(rest)
    if rest[at : at + 1] != "[":
        raise json.JSONDecodeError("No list", "", 0)
    at += 1
    is_first = True
    while True:
        at = _SPACE.match(rest, at).end()
        try:
            if is_first and rest[at : at + 1] == "]":
                at += 1
                break
            item, end = decode(rest, at)
            between = _BETWEEN.match(rest, end)
            if between is None:
                raise json.JSONDecodeError("Expecting ',' delimiter", "", 0)
        except json.JSONDecodeError:
            # The item, or what follows it, may go on in what is not yet read. Of an item that is
            # longer than that, twice as much is tried the next time.
            more = text.read(max(_CHARACTERS, len(rest) - at))
            if not more:
                raise
            rest, at = rest[at:] + more, 0
            continue
        yield item
        is_first = False
        at = between.end()
        if between[1] == "]":
            break
    if not behind.fullmatch(rest[at:] + text.read()):
        raise json.JSONDecodeError("Extra data", "", 0)
