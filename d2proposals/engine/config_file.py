"""What is wrong with a configuration file whose form Detectron2 does not check.

It takes for granted that a file holds keys and values, that a node is one, and that ``_BASE_`` is
the path of another file.
"""

import os
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

_BASE = "_BASE_"


def fault_of_form(path: str, cfg: CfgNode) -> str | None:
    """Say what is wrong with the form of a file or of one that it is based on.

    Args:
        path: of a file in YAML.
        cfg: with the nodes that there are.

    Returns:
        the end of a sentence that begins with the file's name; None where the form is right.
    """
    return _fault(path, cfg, ())


def _fault(path: str, cfg: CfgNode, based_on_it: tuple[str, ...]) -> str | None:
    """As :func:`fault_of_form`; ``based_on_it`` are the files that led to this one."""
    real = os.path.realpath(path)
    if real in based_on_it:
        return f"{_BASE} leads back to {path}, which is based on itself."
    where = f"its {_BASE} {path}" if based_on_it else "it"
    try:
        with PathManager.open(path, "r") as file:
            content = yaml.safe_load(file)
    except (OSError, yaml.YAMLError):
        return None  # which is no matter of the form
    if not isinstance(content, dict):
        return f"{where} needs KEY: value lines, and {_found(content)}."
    bases = content.pop(_BASE, [])
    bases = bases if isinstance(bases, list) else [bases]
    for base in bases:
        if not isinstance(base, str):
            return f"{_BASE} of {path} is the path of a file or a list of them, not {base!r}."
    if (key := _no_node(content, cfg)) is not None:
        return f"in {path} {key} is no value but a node: give it keys, or leave it out."
    faults = (_fault(_next_to(path, base), cfg, (*based_on_it, real)) for base in bases)
    return next((fault for fault in faults if fault), None)


def _found(content: Any) -> str:
    return "is empty" if content is None else f"has a {type(content).__name__}"


def _no_node(content: dict[str, Any], cfg: CfgNode, prefix: str = "") -> str | None:
    """The first key that the configuration has a node for and the file something else."""
    for key, value in content.items():
        node = cfg.get(key)
        if not isinstance(node, CfgNode):
            continue
        if not isinstance(value, dict):
            return f"{prefix}{key}"
        if (found := _no_node(value, node, f"{prefix}{key}.")) is not None:
            return found
    return None


def _next_to(path: str, base: str) -> str:
    """The file that ``_BASE_`` names, from the folder of the file that has it."""
    base = os.path.expanduser(base) if base.startswith("~") else base
    is_whole = base.startswith(("/", "https://", "http://"))
    return base if is_whole else os.path.join(os.path.dirname(path), base)
