"""Items of a list in JSON, read some characters at a time."""

import io
import json
import re

import pytest

from d2proposals.files import json_list
from d2proposals.files.json_list import list_items

ITEMS = [{"a": [1, 2.5e3, {"b": ']}, {\\" \u00e9'}]}, -12, "x,]", [], {}, None, True, 3.25, [[[7]]]]


@pytest.mark.parametrize("characters", [3, 4, 5, 8, 1 << 20])
@pytest.mark.parametrize("layout", [{}, {"separators": (",", ":")}, {"indent": 3}])
def test_items_are_those_of_the_whole(monkeypatch, characters, layout):
    monkeypatch.setattr(json_list, "_CHARACTERS", characters)
    for items in (ITEMS, [], [[]], [1], list(range(100))):
        text = "\n " + json.dumps(items, **layout) + " \n\t"
        assert list(list_items(io.StringIO(text))) == items


@pytest.mark.parametrize("characters", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    "text",
    ["", " ", "[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1]]", "[1], [2]", "[1]\n[2]",
     "[1}", "[{\"a\": 1]", "[\"a]", "[nil]", "x[1]", "[01]"],
)  # fmt: skip
def test_what_is_no_list_is_an_error(monkeypatch, characters, text):
    monkeypatch.setattr(json_list, "_CHARACTERS", characters)
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(json.JSONDecodeError):
        list(list_items(io.StringIO(text)))


def test_a_list_within_something():
    before, behind = re.compile(r"\{\"a\": "), re.compile(r"\}\n")
    assert list(list_items(io.StringIO('{"a": [1, 2]}\n'), before, behind)) == [1, 2]
    for text in ('{"b": [1]}\n', '{"a": [1], "b": 2}\n', "[1]"):
        with pytest.raises(json.JSONDecodeError):
            list(list_items(io.StringIO(text), before, behind))


def test_little_is_read_before_the_first_item(monkeypatch):
    monkeypatch.setattr(json_list, "_CHARACTERS", 10)
    text = io.StringIO(json.dumps(list(range(1000))))
    assert next(list_items(text)) == 0 and text.tell() == 10
