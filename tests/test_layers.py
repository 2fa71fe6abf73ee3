"""A file imports only from rooms above it, and the rooms that only compute load neither torch nor Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rankwise"
ORDER = """
    errors aside markdown config seeds stats resampling power ladder selection store tables contrasts
    figures figuretables budget plans savings advice recommend tracking report sizing evidence inventory
    strategies cached package_index downloads sources studyfaults studyfile datasizes paper memorybank
    workspace machine models rows data datacard studydata lowrank adapters rankuse engine generation
    checkpoint train evaluate probes methods runconfig run grid speed execution observer reporting study
    worker workers designing auto borrowed calibration explaining agreement measuring planning exports
    exporting terminal doctor cli __init__ __main__
""".split()
"""From the top down; a folder is one room. New files find their place here."""

TORCH_FREE = [
    "config", "studyfile", "budget", "stats", "resampling", "power", "ladder", "store", "selection",
    "tables", "contrasts", "figures", "figuretables", "plans", "evidence", "strategies",
    "calibration", "explaining", "agreement", "planning", "savings", "advice", "recommend",
    "tracking", "report", "datasizes", "sizing", "paper", "memorybank", "workspace",
]  # fmt: skip


def room(module: str) -> str:
    """`rankwise.engine.plain` lies in the room `engine`."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(text: str, module: str) -> set[str]:
    """The rooms that a file's import statements name, those within functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute here"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= parts if node.module == "rankwise" else {node.module or ""}
    return {room(name) for name in names if name.split(".")[0] == "rankwise"} - {room(module)}


FILES = {
    ".".join(["rankwise", *path.relative_to(ROOT).with_suffix("").parts]).replace(".__init__", ""): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"
} | {"rankwise": ROOT / "__init__.py"}


def test_the_order_names_every_room_once():
    assert sorted(ORDER) == sorted({room(module) for module in FILES})


@pytest.mark.parametrize("module", FILES)
def test_imports_point_upwards(module: str):
    allowed = ORDER[: ORDER.index(room(module))]
    below = imported(FILES[module].read_text(), module) - set(allowed)
    assert not below, f"{module} imports from {sorted(below)}, which lie below it"


def test_the_rule_sees_every_form_of_import():
    text = (
        "import rankwise.run\nfrom rankwise import study, errors\nfrom rankwise.engine.plain import score\n"
        "def late():\n    from rankwise.tables import Results\nimport torch, rankwise_other\n"
        "from rankwise.stats import holm\n"
    )
    assert imported(text, "rankwise.stats") == {"run", "study", "errors", "engine", "tables"}


def test_rooms_that_only_compute_load_no_torch():
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE}:\n"
        "    importlib.import_module('rankwise.' + name)\n"
        "    print(name, *sorted({'torch', 'ray', 'transformers', 'peft'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines() == TORCH_FREE
