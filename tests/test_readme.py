"""The commands of README.md and the pages can be run as they stand."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from d2proposals.engine import check_config, load_config
from tests.common import ROOT, forgotten_datasets

PAGES = [ROOT / "README.md", ROOT / "MODEL_ZOO.md", *sorted((ROOT / "docs").glob("*.md"))]

# Those that take a configuration or say what they parse by build_parser().
TOOLS = sorted(
    path.stem for path in (ROOT / "tools").glob("*.py") if "build_parser" in path.read_text()
)


def commands(program):
    """Commands of all pages that run ``python <program>``, without their comments."""
    pattern = re.compile(rf"^ {{4}}(?:\w+=\S+ )*python {re.escape(program)} (.*)$", re.MULTILINE)
    # Long commands go on after a backslash.
    texts = [page.read_text().replace("\\\n", " ") for page in PAGES]
    found = {line.split("  #")[0].strip() for text in texts for line in pattern.findall(text)}
    return sorted(found)


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", commands("train_net.py"))
def test_train_net_commands_name_files_and_keys_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = default_argument_parser().parse_args(shlex.split(command))
    with forgotten_datasets() as names:
        cfg = load_config(args)
        names += [name for name, *_ in cfg.DATASETS.COCO_FILES]
    check_config(cfg)
    assert Path(args.config_file).is_file() and cfg.OUTPUT_DIR.startswith("./output/")


@pytest.mark.parametrize(
    ("tool", "command"),
    [(tool, command) for tool in TOOLS for command in commands(f"tools/{tool}.py")],
)
def test_tool_commands_parse_and_name_configurations_that_exist(tool, command):
    arguments = shlex.split(command)
    # Overrides behind the options are what the parser does not know; flags are not.
    _, overrides = load_tool(tool).build_parser().parse_known_args(arguments)
    assert not [x for x in overrides if x.startswith("-")] and len(overrides) % 2 == 0
    for argument in arguments:
        if argument.startswith("configs/"):
            assert (ROOT / argument).is_file()


def anchors(page):
    """What links into a page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = [re.sub(r"[^\w -]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.slow
def test_quick_start_prints_its_table_and_draws_its_picture(tmp_path):
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    size = ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96", "SOLVER.MAX_ITER", "2"]
    output = tmp_path / "output"
    result = subprocess.run(
        [sys.executable, "dev/quickstart.py", *size, "OUTPUT_DIR", str(output)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    table = result.stdout[result.stdout.index("Average recall") :]
    for row in ("grid of 100 boxes", "ZIP, untrained", "ZIP, 2 iterations"):
        assert re.search(rf"^{row}( +\d+\.\d){{6}}$", table, re.MULTILINE), table
    assert "What to run next" in table
    assert (output / "proposals.png").stat().st_size > 10_000
    assert f"World size: {min(os.cpu_count(), 2)}" in (output / "log.txt").read_text()
