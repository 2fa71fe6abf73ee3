"""`rankwise init`: a research folder in which every command works, or nothing; runs of some arms alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from rankwise.cli import app
from rankwise.errors import RankwiseError
from rankwise.memorybank import DOCUMENTS
from rankwise.observer import Observer
from rankwise.study import open_study, run_study
from rankwise.studyfile import read_study
from rankwise.workspace import FILES, PLACES, STUDY, create, program
from tests.conftest import rankwise, write_study
from tests.refusals import refused

TARGETS = ("study", "baselines", "adaptive", "report", "paper", "memory", "check")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a person does, and not as the make that may have started these tests would."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=folder, text=True, capture_output=True, timeout=300,
        env={**env, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_an_empty_folder_becomes_a_workspace(tmp_path: Path):
    """As a process, in the folder where one stands; and only what is told is there."""
    done = rankwise("init", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*FILES, *(f"{name}/README.md" for name in PLACES)}
    for name in PLACES:
        assert (tmp_path / name / "README.md").read_text().count("\n") == 1
    again = rankwise("init", ".", cwd=tmp_path)
    assert again.returncode == 2 and "new or empty folder" in again.stderr and "Traceback" not in again.stderr


def test_its_study_is_sound_and_a_newcomer_changes_two_lines(tmp_path: Path):
    create(tmp_path / "a" / "mine")
    path = tmp_path / "a" / "mine" / STUDY
    config = read_study(path).config
    assert config.name == "study" and len(config.pairs()) == 3
    text = path.read_text()
    own = re.sub(r"(?m)^(model:|  source:) \S+$", lambda m: f"{m[1]} file:../data/own", text)
    assert sum(a != b for a, b in zip(text.splitlines(), own.splitlines(), strict=True)) == 2
    path.write_text(own)
    changed = read_study(path).config
    assert changed.model == changed.data.source == "file:../data/own"
    places = [text.index(words) for words in ("# (1)", "\nmodel:", "# (2)", "\n  source:")]
    assert places == sorted(places)  # each line below what is said of it


def test_every_target_is_a_command_of_the_program(tmp_path: Path):
    create(tmp_path / "mine")
    known = typer.main.get_command(app)
    for target in TARGETS:
        said = make(tmp_path / "mine", "-n", target)
        assert said.returncode == 0, said.stderr
        called, name, *rest = shlex.split(said.stdout.strip())
        assert Path(called).name == "rankwise"
        command = known.commands[name]  # type: ignore[attr-defined]
        while hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(name, rest)  # raises where the command takes other arguments
    assert set(TARGETS) == set(re.findall(r"(?m)^([a-z]+):", (tmp_path / "mine" / "Makefile").read_text()))


def test_its_arms_are_those_of_its_makefile(tmp_path: Path):
    create(tmp_path)
    arms = read_study(tmp_path / STUDY).config.arms
    named = re.findall(r"(?:BASELINES|ADAPTIVE) \?= (\S+)", (tmp_path / "Makefile").read_text())
    assert sorted(",".join(named).split(",")) == sorted(arms)


def test_what_holds_something_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("full", "file", "dangling"):
        with pytest.raises(RankwiseError, match="new or empty folder"):
            create(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".hidden", "dangling", "file", "full"]


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_left_of_a_folder_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
):
    folder = tmp_path / "mine"
    if there:
        folder.mkdir()
    rename, calls = Path.rename, []

    def full(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == (4 if there else 1):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(RankwiseError, match="No space left"):
        create(folder)
    assert [path.name for path in tmp_path.rglob("*")] == (["mine"] if there else [])


@pytest.mark.skipif(shutil.which("latexmk") is None, reason="needs TeX: latexmk")
def test_its_paper_compiles_and_is_sound_before_anything_has_run(tmp_path: Path):
    create(tmp_path / "mine")
    done = make(tmp_path / "mine", "paper")  # the Makefile knows the program that made the folder
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mine" / "paper" / "build" / "main.pdf").read_bytes().startswith(b"%PDF")
    checked = rankwise("paper", "--check", cwd=tmp_path / "mine")
    assert checked.returncode == 0, checked.stdout


def test_the_makefile_calls_the_program_by_name_where_that_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = Path(sys.executable).with_name("rankwise")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == str(own)
    (tmp_path / "rankwise").symlink_to(own)
    assert program() == "rankwise"
    odd = tmp_path / "a $b" / "python"
    odd.parent.mkdir()
    odd.with_name("rankwise").touch()
    monkeypatch.setattr(sys, "executable", str(odd))
    assert program() == f"'{tmp_path}/a $$b/rankwise'"


# --- runs of some arms alone ------------------------------------------------------------------------


def test_make_baselines_does_the_baselines_alone_and_study_the_rest(workdir: Path, study_dict: dict):
    create(workdir / "mine")
    folder = workdir / "mine"
    (workdir / "rows.json").rename(folder / "studies" / "rows.json")
    write_study(folder / "studies", study_dict)
    done = make(folder, "baselines", "BASELINES=uniform")
    assert done.returncode == 0, done.stderr
    runs = folder / "results" / "tiny" / "runs"
    first = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert len(first) == 3  # the untouched model and two seeds
    names = [path.read_text() for path in runs.glob("*/result.json")]
    assert not [text for text in names if '"decay"' in text]
    assert make(folder, "adaptive", "ADAPTIVE=decay").returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert len(after) == 5 and first.items() <= after.items()
    listed = rankwise("paper", "--list", "paperRuns", cwd=folder)
    assert re.search(r"\\paperRuns +5 ", listed.stdout), "a paper that names no study is about all of them"
    assert make(folder, "memory").returncode == 0
    assert {path.stem for path in (folder / "memory").glob("*.md")} == {*DOCUMENTS, "README"}
    assert "memory/results.svg" in (folder / "README.md").read_text()
    assert "whole" in (folder / "memory" / "active-focus.md").read_text()


def test_some_arms_wait_for_the_rates_of_all(workdir: Path, study_dict: dict):
    """A grid is extended for every arm alike: one arm's tuning ends before its reporting may begin."""
    study_dict["train"]["learning_rates"] = [1e-2, 3e-2]
    study_dict["seeds"] = {"tuning": 1, "reporting": 1}
    path = write_study(workdir, study_dict)
    study = open_study(path, workdir / "results")
    index = run_study(replace(study, only=("uniform",)), Observer())
    assert index["tuning_unfinished"] and {run["arm"] for run in index["runs"]} == {
        "untouched",
        *study_dict["arms"],
    }
    done = {run["arm"]: run["role"] for run in index["runs"] if study.store.has(run["run_id"])}
    assert done == {"untouched": "untouched", "uniform": "tuning"}
    assert len(list(study.store.runs.iterdir())) == 3  # the untouched model and two rates
    whole = run_study(study, Observer())
    assert not whole["tuning_unfinished"] and all(study.store.has(run["run_id"]) for run in whole["runs"])


def test_arms_alone_in_two_processes(workdir: Path, study_dict: dict):
    study_dict["seeds"]["reporting"] = 4
    write_study(workdir, study_dict)
    done = rankwise("study", "run", "study.yaml", "--arms", "decay", "--processes", 2, cwd=workdir)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in workdir.glob("results/tiny/runs/*/result.json")]
    assert {record["run_info"]["experiment_name"] for record in records} == {"untouched", "decay"}
    assert len(records) == 5


def test_an_arm_that_the_study_lacks(workdir: Path, study_dict: dict):
    write_study(workdir, study_dict)
    refused(
        "study", "run", "study.yaml", "--arms", "uniform,decai", cwd=workdir, says=["Did you mean 'decay'"]
    )
