"""The variants of Fig. 8 and the building blocks of Fig. 10, overrides read from docs/spop.md."""

import re
import shlex

from tests.common import ROOT

_ROW = re.compile(r"^\| (8, 9|10) \| ([^|(]+?)(?: \(.*\))? \| (?:`(.*)`|none) \|$", re.MULTILINE)


def read_rows(figure: str) -> dict[str, list[str]]:
    """The overrides of the rows of a figure, by name."""
    text = (ROOT / "docs" / "spop.md").read_text(encoding="utf-8")
    rows = {}
    for number, name, cell in _ROW.findall(text):
        words = shlex.split(cell)
        keys = [f"MODEL.SPOP.{key}" for key in words[::2]]
        if number == figure:
            rows[name] = [x for pair in zip(keys, words[1::2], strict=True) for x in pair]
    return rows


VARIANTS = read_rows("8, 9")
BUILDING_BLOCKS = read_rows("10")
