"""The README says what is so: its commands are the program's, its tree names every file, its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from rankwise.cli import app
from rankwise.config import StudyConfig
from rankwise.planning import plan_from_source
from rankwise.strategies import STRATEGIES, Strategy
from rankwise.studyfile import read_study

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> set[str]:
    """Every command of the program, such as "study run"."""
    found = set()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}" for sub in inner} if inner else {name}
    return found


def test_the_table_of_commands_is_the_programs() -> None:
    rows = re.findall(r"^\| `rankwise ([a-z]+(?: [a-z]+)?)", README, flags=re.MULTILINE)
    assert set(rows) == commands()


def test_the_tree_names_every_file() -> None:
    tree = README.split("## The tree")[1]
    # strategies/ is one file per method
    rooms = ("engine", "figures", "report", "probes", "methods", "exports", "cli", "memorybank")
    folders = [ROOT / "rankwise", *(ROOT / "rankwise" / name for name in rooms)]
    files = {p.name for folder in folders for p in folder.glob("*.py") if not p.name.startswith("__")}
    named = set(re.findall(r"([a-z_]+\.py)", tree))
    assert files == named & files, f"missing in the tree: {sorted(files - named)}"
    assert named <= files, f"in the tree but not on disk: {sorted(named - files)}"


def test_the_plan_goes_into_peft_as_the_readme_says(tiny_model: Path, workdir: Path) -> None:
    plan = plan_from_source(
        f"file:{tiny_model}", "linear_decay", budget="r=2", match="budget", targets=None, scale="constant:2",
        options=["base=4", "min=1"],
    ).plan  # fmt: skip
    plan.save(workdir / "plan.json")
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "lora_config" in block
    )
    names: dict = {}
    exec(code, names)
    assert names["config"].lora_dropout == 0.05
    assert names["config"].rank_pattern


def test_the_strategy_of_the_readme_works(tiny_model: Path, monkeypatch) -> None:
    code = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def targets" in b)
    mine: dict = {}
    exec(code, mine)
    line = re.search(r'"value_heavy": Strategy\("targets", mine\.targets, (\{.*?\}), "(.*?)"\)', README)
    assert line is not None
    one = Strategy("targets", mine["targets"], {"base": 8}, line[2])
    monkeypatch.setitem(STRATEGIES, "value_heavy", one)
    found = plan_from_source(
        f"file:{tiny_model}", "value_heavy", budget=None, match="none", targets=None, scale="constant:2",
        options=None,
    ).plan  # fmt: skip
    ranks = {m.part: found.ranks[m.name] for m in found.modules}
    assert ranks["v"] == ranks["o"] == 16 and ranks["q"] == ranks["up"] == 8


def test_every_shipped_study_is_sound() -> None:
    for path in (ROOT / "studies").glob("*.yaml"):
        config = read_study(path).config
        assert isinstance(config, StudyConfig) and config.name == path.stem
