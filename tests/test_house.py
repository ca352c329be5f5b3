"""The house keeps its order: which room may import which, read from the imports themselves."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "d2proposals"

PAPERS = ("deepmask", "detectornet", "sc_rpn", "spop", "zip_rpn")
# From the ground up: a room imports rooms of the rows before its own, and no other of its row.
FLOORS = (
    ("config", "files"),
    ("proposals",),
    ("backbones", "data"),
    ("evaluation",),
    ("pictures",),
    (*PAPERS, "engine"),
    ("deployment",),
    ("model_zoo",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, as "room.module"."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # ``from . import head`` may name modules or what __init__ has.
            names = [module, *(f"{module}.{item.name}" for item in node.names)]
        else:
            continue
        found |= {name.removeprefix("d2proposals.") for name in names if "d2proposals." in name}
    return {name for name in found if is_module(name)}


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def modules() -> dict[str, Path]:
    """All modules of the package but its own ``__init__``, as "room.module"."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    names = {".".join(relative.parts): path for path, relative in paths.items()}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    return {name: path for name, path in names.items() if name != "__init__"}


def test_every_room_has_its_floor():
    rooms = {name.split(".")[0] for name in modules()}
    assert rooms == set(FLOOR_OF)


@pytest.mark.parametrize("room", FLOOR_OF)
def test_arrows_point_down(room):
    """Of the papers' rooms, none imports another, since all are on one floor."""
    for name, path in modules().items():
        if name.split(".")[0] != room:
            continue
        for target in imported_modules(path):
            other = target.split(".")[0]
            assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{name} imports {target}"


def test_no_circle_within_the_rooms():
    graph = {
        name: {target for target in imported_modules(path) if target != name}
        for name, path in modules().items()
        # A room's __init__ imports its modules, which import the room on their way.
        if path.name != "__init__.py"
    }
    graph = {name: {x for x in targets if x in graph} for name, targets in graph.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert sorted(order) == sorted(graph)


def commands() -> list[Path]:
    return sorted(
        [ROOT / "train_net.py", *(ROOT / "dev" / f"{x}.py" for x in ("quickstart", "gpu_checks"))]
        + list((ROOT / "tools").glob("*.py"))
        + list((ROOT / "demo").glob("*.py"))
    )


@pytest.mark.parametrize("path", commands(), ids=lambda path: path.stem)
def test_commands_wait_quietly_from_before_torch_is_loaded(path):
    text = path.read_text()
    setting = 'os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")\n'
    assert setting in text
    before = text[: text.index(setting)]
    imported = re.findall(r"^(?:from|import) (\w+)", before, re.MULTILINE)
    assert not {"torch", "detectron2", "d2proposals", "train_net"} & set(imported)
