"""The commands of a page below docs/, and how a test runs them."""

import re
import shlex

from detectron2.engine import default_argument_parser
from PIL import Image

import train_net
from tests.common import ROOT, run_tool


def read_commands(page: str) -> list[tuple[str, list[str]]]:
    """Program and arguments of each ``python`` command of a page, in its order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ {4}(?:\w+=\S+ )*python (\S+) (.*)$", text, re.MULTILINE)
    return [(program, shlex.split(line.split("  #")[0])) for program, line in lines]


def run_command(program: str, arguments: list[str]):
    """Run ``train_net.py`` or a command below ``tools/`` in this process; its results."""
    if program == "train_net.py":
        return train_net.main(default_argument_parser().parse_args(arguments))
    return run_tool(program.removeprefix("tools/").removesuffix(".py"), *arguments)


def run_page(commands, tiny, elsewhere, folder, images) -> list[str]:
    """Run a page's commands one after the other in a folder with small grey images.

    Args:
        commands: of :func:`read_commands`.
        tiny: from program and arguments to those that keep a run short.
        elsewhere: programs that other tests run.
        folder: where the images go.
        images: their names.

    Returns:
        The programs of all commands.
    """
    for name in images:
        Image.new("RGB", (64, 48), "gray").save(folder / name)
    for program, arguments in commands:
        if program not in elsewhere:
            run_command(program, tiny(program, arguments))
    return [program for program, _ in commands]
