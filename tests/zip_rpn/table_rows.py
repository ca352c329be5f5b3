"""The rows of the paper's tables, as docs/zip.md has them: a configuration file and overrides."""

import re
import shlex
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser

from d2proposals.engine import load_config
from tests.common import CONFIGS

PAGE = CONFIGS.parent / "docs" / "zip.md"
_ROW = re.compile(
    r"^\| (?P<name>[^|]+) \| `(?P<file>[\w/]+\.yaml)` \|(?: `(?P<arguments>.*)`)? \|$"
)


@dataclass(frozen=True)
class Row:
    """A row of the page.

    Attributes:
        file: below configs/.
        arguments: what train_net.py gets behind the file.
    """

    file: str
    arguments: list[str]

    def config(self, *overrides) -> tuple[CfgNode, bool]:
        """The row's configuration, then overrides, on the CPU; and whether it is an evaluation."""
        args = default_argument_parser().parse_args(
            ["--config-file", str(CONFIGS / self.file), *self.arguments]
        )
        cfg = load_config(args)
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
        return cfg, args.eval_only


def read_rows() -> dict[str, Row]:
    """Rows by name, in the page's order."""
    rows = {}
    for match in filter(None, map(_ROW.match, PAGE.read_text().splitlines())):
        name = match["name"].strip()
        assert name not in rows, f"{PAGE} has two rows called {name}"
        rows[name] = Row(match["file"], shlex.split(match["arguments"] or ""))
    return rows
