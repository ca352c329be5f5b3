"""The rows of Tables III-VIII and the commands of docs/sc_rpn.md, read from the page."""

import re
import shlex

from tests.common import CONFIGS

PAGE = CONFIGS.parent / "docs" / "sc_rpn.md"


def node(text: str) -> list[str]:
    """``"KEY value; KEY value"`` below MODEL.SCRPN -> a list of overrides."""
    overrides = []
    for pair in filter(None, (p.strip() for p in text.split(";"))):
        key, value = pair.split(" ", 1)
        overrides += [f"MODEL.SCRPN.{key}", value]
    return overrides


def _pairs(words: list[str]) -> str:
    """``["KEY", "value", ...]`` -> ``"KEY value; ..."``."""
    assert len(words) % 2 == 0, words
    return "".join(f"{key} {value}; " for key, value in zip(words[::2], words[1::2], strict=True))


def read_sets(page: str) -> dict[str, str]:
    """The named sets of overrides: indented lines "W  (name)  KEY value ...", which may go on."""
    block = page.split("The sets\n\n")[1].split("\n\n")[0]
    words, name = {}, ""
    for line in block.splitlines():
        letter, text = re.fullmatch(r" {4}([A-Z ]) +(?:\(.*?\) +)?(\S.*)", line).groups()
        name = letter.strip() or name
        words.setdefault(name, []).extend(shlex.split(text))
    return {name: _pairs(pairs) for name, pairs in words.items()}


def read_rows(page: str, sets: dict[str, str]) -> dict[str, str]:
    """Overrides by table and row: a cell has sets, then keys and values in a code span.

    A set in parentheses gives two rows, without and with it. A span that ends in a key is followed
    by the values that give a row each.
    """
    rows = {}
    lines = page.split("| Table | Row | Overrides |\n")[1].split("\n\n")[0].splitlines()[1:]
    for line in lines:
        tables, row, cell = (x.strip() for x in line.strip("|").split("|"))
        row = re.sub(r" \(.*\)", "", row)
        letters, span, values = re.fullmatch(r"([^`]*)(?:`([^`]*)`(.*))?", cell).groups()
        words = shlex.split(span or "")
        cases = {"": words}
        if len(words) % 2:
            cases = {f" {x.strip()}": [*words, x.strip()] for x in values.split(",")}
        chosen = "".join(sets[x] for x in letters.split() if x in sets)
        optional = "".join(sets[x[1]] for x in letters.split() if x[0] == "(")
        for table in tables.split(", "):
            for case, words_of_case in cases.items():
                text = chosen + _pairs(words_of_case)
                rows[f"{table} {row}{case}"] = text
                if optional:
                    rows[f"{table} {row}{case}, without SADS"] = optional + text
    return rows


def read_commands(page: str) -> list[list[str]]:
    """Arguments of each command that trains or tests: configuration file and overrides."""
    commands = []
    for line in page.replace("\\\n", " ").splitlines():
        found = re.match(r" {4}python train_net.py --config-file (\S+)(.*)", line)
        if found:
            words = shlex.split(found[2], comments=True)
            commands.append([found[1], *(x for x in words if x != "--eval-only")])
    return commands


_TEXT = PAGE.read_text()
SETS = read_sets(_TEXT)
WITHOUT_SADS, WITHOUT_MASK, SMOOTH_L1 = (SETS[name] for name in "WMS")
BOX = "REPRESENTATION box; "
ROWS = read_rows(_TEXT, SETS)
COMMANDS = read_commands(_TEXT)
