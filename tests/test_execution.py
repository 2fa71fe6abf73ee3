"""Processes and threads: how they are chosen and kept, and that sharing the runs changes no number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from rankwise import execution, machine, workers
from rankwise.errors import RankwiseError
from rankwise.grid import Grid, Planned, Study, grid
from rankwise.observer import Observer
from rankwise.speed import NoSpeed, Speed
from rankwise.store import Store
from rankwise.study import prepare, run_study
from rankwise.terminal import StudyProgress
from rankwise.train import Diverged
from tests.conftest import rankwise, write_study
from tests.parts import opened, records_of

GB = 10**9


def free_threads(study: dict) -> dict:
    """The study without its number of threads, so that there is something to choose."""
    return study | {"train": {k: v for k, v in study["train"].items() if k != "threads"}}


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, 10 GB, and no study too small to be shared."""
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "available_memory", lambda: 10 * GB)
    monkeypatch.setattr(machine, "resident_memory", lambda: 0)
    monkeypatch.setattr(execution, "SMALL_STUDY_SECONDS", 0.0)


def speeds(monkeypatch: pytest.MonkeyPatch, one: float, peak: int = GB) -> None:
    """Let one process train at this speed."""

    def measure(study: Study, planned: Planned, steps_to_time: Callable[[float], int]) -> Speed:
        steps_to_time(one)
        return Speed(1, study.context.threads, one, peak)

    monkeypatch.setattr(execution, "measure", measure)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The worker processes that it has, the tests' own fork server left out."""
    return [child for child in process.children() if "rankwise.worker" in child.cmdline()]


def together(speed: float) -> execution.Together:
    return lambda planned, processes, threads, steps: Speed(processes, threads, speed, GB)


def unwanted(*arguments: Any) -> Speed:
    raise AssertionError("nothing had to be measured")


def ready(folder: Path, study: dict) -> Study:
    found = opened(folder, study)
    prepare(found)
    return found


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("two", "wanted"), [(130.0, (2, 1)), (101.0, (1, 2)), (80.0, (1, 2))])
def test_the_faster_way_is_chosen(
    workdir: Path,
    study_dict: dict,
    two_cores: None,
    monkeypatch: pytest.MonkeyPatch,
    two: float,
    wanted: tuple,
):
    study_dict["seeds"]["reporting"] = 8
    speeds(monkeypatch, 100.0)
    choice = execution.choose(ready(workdir, free_threads(study_dict)), None, together(two))
    assert (choice.processes, choice.threads) == wanted and choice.compared
    assert [speed.tokens_per_second for speed in choice.measured] == [100.0, two]
    assert "100 tokens/s" in str(choice) and f"{two:.0f} tokens/s" in str(choice)


def test_a_run_that_is_left_over_works_alone():
    assert execution.seconds([300, 300], 1, 100.0) == 2.0
    assert execution.seconds([300, 300], 2, 125.0) == 1.6
    assert execution.seconds([300, 300, 300], 2, 125.0) == 3.2, "slower than the 3.0 s of one process"


def test_small_work_is_not_shared(workdir: Path, study_dict: dict, two_cores: None, monkeypatch):
    monkeypatch.setattr(execution, "SMALL_STUDY_SECONDS", 1e6)
    speeds(monkeypatch, 100.0)
    study = ready(workdir, free_threads(study_dict))
    choice = execution.choose(study, None, unwanted)
    assert (choice.processes, choice.threads, choice.compared) == (1, 2, False)
    threads_set = ready(workdir, study_dict)
    assert execution.choose(threads_set, None, unwanted).processes == 1


@pytest.mark.parametrize("free", [True, False], ids=["free", "threads-set"])
def test_memory_bounds_the_processes(
    workdir: Path, study_dict: dict, two_cores: None, monkeypatch, free: bool
):
    speeds(monkeypatch, 100.0, peak=int(4.1 * GB))
    study = ready(workdir, free_threads(study_dict) if free else study_dict)
    choice = execution.choose(study, None, unwanted)
    assert choice.processes == 1 and "2 processes would need 8.2 GB" in choice.why
    speeds(monkeypatch, 100.0, peak=int(3.9 * GB))
    assert execution.choose(study, None, together(150.0)).processes == 2


def test_what_leaves_nothing_to_choose(workdir: Path, study_dict: dict, two_cores: None, monkeypatch):
    study = ready(workdir, free_threads(study_dict))
    on_gpu = replace(study, context=replace(study.context, device="cuda"))
    assert execution.choose(on_gpu, None, unwanted).processes == 1
    first, *others = [planned.run_id for planned in grid(study).runs]
    with_claims = [study.store.claim(run_id) for run_id in others]
    for claim in with_claims:
        assert claim.__enter__()
    choice = execution.choose(study, None, unwanted)
    assert (choice.processes, choice.threads) == (1, 2), f"only {first} is in nobody's hands"
    for claim in with_claims:
        claim.__exit__(None, None, None)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    choice = execution.choose(study, None, unwanted)
    assert (choice.processes, choice.threads) == (1, 1)


@pytest.mark.parametrize("error", [NoSpeed("a worker ended"), Diverged(0, "the loss is nan", None)])
def test_a_measurement_that_fails_leaves_one_process(
    workdir: Path, study_dict: dict, two_cores: None, monkeypatch, error: Exception
):
    def fails(*arguments: Any) -> Speed:
        raise error

    speeds(monkeypatch, 100.0)
    choice = execution.choose(ready(workdir, free_threads(study_dict)), None, fails)
    assert (choice.processes, choice.threads) == (1, 2) and str(error) in choice.why


def test_many_cores_are_divided_step_by_step():
    assert execution.candidates(2, 64) == [2]
    assert execution.candidates(12, 64) == [2, 3, 6, 12] and execution.candidates(12, 4) == [2, 3]
    assert execution.candidates(1, 64) == [] and execution.candidates(7, 64) == [7]


# --- kept -------------------------------------------------------------------------------------------


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.heard: list[tuple[str, str]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def started(self, planned: Planned, work: int) -> None:
        self.heard.append(("started", planned.run_id))

    def finished(self, planned: Planned, status: str) -> None:
        self.heard.append((status, planned.run_id))


class FakeCrew:
    def __init__(self, measure: Callable[..., Speed]) -> None:
        self.measure, self.observer = measure, Notes()


def settle(study: Study, asked: int | None, measure: Callable[..., Speed]) -> tuple[Any, list[str]]:
    crew = FakeCrew(measure)
    return workers.settle(study, asked, crew), crew.observer.notes  # type: ignore[arg-type]


def test_the_choice_is_kept_and_names_stay(workdir: Path, study_dict: dict, two_cores: None, monkeypatch):
    study_dict = free_threads(study_dict)
    speeds(monkeypatch, 100.0)
    choice, notes = settle(ready(workdir, study_dict), None, together(130.0))
    assert (choice.processes, choice.threads) == (2, 1)
    assert notes == ["2 processes x 1 thread: 130 tokens/s; 1 process x 2 threads 100 tokens/s"]
    file = workdir / "results" / "tiny" / "execution.json"
    text = json.loads(file.read_text())
    assert text["most_processes"] == 2 and text["machine"]["processor"] == machine.processor()

    monkeypatch.setattr(execution, "measure", unwanted)
    again = ready(workdir, study_dict)
    names = {planned.run_id for planned in grid(again).runs}
    assert again.context.threads == 1, "every command that opens the study has the kept threads"
    for asked, processes in ((None, 2), (1, 1), (2, 2), (None, 2)):
        choice, _ = settle(again, asked, unwanted)
        assert (choice.processes, choice.threads) == (processes, 1)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    more = ready(workdir, study_dict | {"seeds": {"tuning": 0, "reporting": 5}})
    choice, _ = settle(more, None, unwanted)
    assert (choice.processes, choice.threads) == (8, 1), "another machine: the threads stay"
    assert names < {planned.run_id for planned in grid(more).runs}
    assert json.loads(file.read_text()) == text | {"most_processes": 8}


def test_records_from_before_keep_their_threads(
    workdir: Path, study_dict: dict, two_cores: None, monkeypatch
):
    study_dict = free_threads(study_dict)
    older = opened(workdir, study_dict)
    run_study(execution.with_threads(older, 3), Observer())
    records = workdir / "results" / "tiny" / "runs"
    names = {folder.name for folder in records.iterdir()}
    assert not (workdir / "results" / "tiny" / "execution.json").exists()

    now = ready(workdir, study_dict | {"seeds": {"tuning": 0, "reporting": 3}})
    assert now.context.threads == 3 and names < {p.run_id for p in grid(now).runs}
    choice, _ = settle(now, None, unwanted)
    assert (choice.processes, choice.threads) == (1, 3)
    other = opened(workdir, study_dict | {"scale": {"rule": "constant", "value": 1}, "targets": "mlp"})
    assert other.context.threads == 3, "the untouched model's record is of this study too"
    (records.parent / "execution.json").unlink()
    assert opened(workdir, study_dict | {"data": study_dict["data"] | {"test": 5}}).context.threads == 2


def test_the_study_files_threads_come_first(workdir: Path, study_dict: dict, two_cores: None, monkeypatch):
    speeds(monkeypatch, 100.0)
    settle(ready(workdir, free_threads(study_dict)), None, together(130.0))
    study_dict["train"]["threads"] = 2
    study = ready(workdir, study_dict)
    assert study.context.threads == 2
    assert settle(study, None, unwanted)[0].processes == 1
    study_dict["train"]["threads"] = 1
    assert settle(ready(workdir, study_dict), None, unwanted)[0].processes == 2


def test_a_trial_does_not_bind_the_study(workdir: Path, study_dict: dict, two_cores: None, monkeypatch):
    study_dict = free_threads(study_dict)
    trial = study_dict | {"data": study_dict["data"] | {"test": 5}}
    assert settle(ready(workdir, trial), 2, unwanted)[0].threads == 1
    assert opened(workdir, trial).context.threads == 1
    assert opened(workdir, study_dict).context.threads == 2, "none of its runs has a record"


@pytest.mark.parametrize(
    "change", [{"threads": 0}, {"threads": "two"}, {"measured": [{"speed": 1}]}, {"measured": None}, None]
)
def test_a_damaged_choice_is_told(workdir: Path, study_dict: dict, change: dict | None):
    study = ready(workdir, study_dict := free_threads(study_dict))
    settle(study, 2, unwanted)
    file = workdir / "results" / "tiny" / "execution.json"
    file.write_text("{" if change is None else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RankwiseError, match=r"execution\.json .*Delete it"):
        opened(workdir, study_dict)


# --- real processes ---------------------------------------------------------------------------------


class Waits(Notes):
    """Begins its own work once the worker has done a run, which a study this small would not leave it."""

    def grid(self, grid: Grid, store: Store, work: dict[str, int]) -> None:
        until = time.monotonic() + 120
        while not any(store.runs.iterdir()) and time.monotonic() < until:
            time.sleep(0.01)


@pytest.mark.slow
def test_sharing_changes_no_number(workdir: Path, study_dict: dict):
    alone = opened(workdir, study_dict, results="alone")
    run_study(alone, Observer())
    shared, observer = opened(workdir, study_dict, results="shared"), Waits()
    index = workers.run_together(shared, observer, processes=2)
    assert records_of(shared.store) == records_of(alone.store)
    names = [planned.run_id for planned in grid(shared).runs]
    assert sorted(observer.heard) == sorted([(e, n) for n in names for e in ("started", "done")])
    assert len(index["runs"]) == len(names) and index["tuning_unfinished"] is False
    assert workers_of(psutil.Process()) == [] and list((workdir / "shared" / ".partial").iterdir()) == []


@pytest.mark.slow
def test_processes_are_measured_together(workdir: Path, study_dict: dict):
    study = ready(workdir, study_dict)
    before = {name: p.clone() for name, p in study.context.base.model.named_parameters()}
    planned = execution.first_training(grid(study), study.store)
    assert planned is not None and planned.role == "reporting"
    with workers.Crew(study, (), Observer()) as crew:
        found = crew.measure(planned, 2, 1, 3)
        assert (found.processes, found.threads) == (2, 1)
        assert found.tokens_per_second > 0 and found.peak_bytes > 10**8
        path = write_study(workdir, study_dict | {"margin": 0.2})
        assert path == study.file.path
        with pytest.raises(NoSpeed, match=r"worker process 3 ended: .*changed"):
            crew.measure(planned, 3, 1, 3)
        assert crew.members == []
    after = study.context.base.model.named_parameters()
    assert all((before[name] == parameter).all() for name, parameter in after)
    assert list((workdir / "results" / ".partial").iterdir()) == [] and workers_of(psutil.Process()) == []


def test_a_worker_that_cannot_start_is_told(workdir: Path, study_dict: dict, monkeypatch):
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    study, observer = opened(workdir, study_dict), Notes()
    monkeypatch.setattr(observer, "grid", lambda *about: time.sleep(0.5))
    workers.run_together(study, observer, processes=2)
    assert any("worker process 2 ended: exit code 1" in note for note in observer.notes)
    assert grid(study).pending(study.store) == []


# --- as commands --------------------------------------------------------------------------------------


def start(folder: Path) -> subprocess.Popen[str]:
    command = ["study", "run", "study.yaml", "--processes", "2", "--checkpoint-seconds", "0"]
    return subprocess.Popen(
        [sys.executable, "-m", "rankwise", *command], cwd=folder, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "200"},
        start_new_session=True,
        # a shell's background job ignores SIGINT, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def both_at_work(process: subprocess.Popen[str], folder: Path) -> psutil.Process:
    """Wait until two runs are being trained at once; return the worker."""
    until, since = time.monotonic() + 120, time.time()
    while time.monotonic() < until and process.poll() is None:
        logs = list((folder / "results" / ".partial").glob("*/metrics.jsonl"))
        if sum(log.exists() and log.stat().st_mtime > since for log in logs) > 1:
            return workers_of(psutil.Process(process.pid))[0]
        time.sleep(0.02)
    raise AssertionError("two runs were never under way at once")


@pytest.mark.slow
def test_no_worker_outlives_the_command(workdir: Path, study_dict: dict):
    study_dict["train"] |= {"epochs": 50}
    study_dict["seeds"]["reporting"] = 3
    path = write_study(workdir, study_dict)
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = start(workdir)
        worker = both_at_work(process, workdir)
        # a terminal's Ctrl-C reaches the whole group; a kill reaches the command alone
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code, errors
        psutil.wait_procs([worker], timeout=5)
        assert not worker.is_running(), number
    assert "stopped" in errors and "Traceback" not in errors

    process = start(workdir)
    worker = both_at_work(process, workdir)
    worker.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "worker process 2 ended: killed by SIGKILL; its run is taken over" in errors
    study = opened(workdir, study_dict)
    assert study.file.path == path and grid(study).pending(study.store) == []
    alone = opened(workdir, study_dict, results="alone")
    run_study(alone, Observer())
    assert records_of(study.store) == records_of(alone.store)


@pytest.mark.parametrize("value", ["0", "-1", "65", "2.0", "many", ""])
def test_a_wrong_number_of_processes_is_refused(workdir: Path, study_dict: dict, value: str):
    write_study(workdir, study_dict)
    found = rankwise("study", "run", "study.yaml", f"--processes={value}", cwd=workdir)
    assert found.returncode == 2 and not (workdir / "results").exists()
    assert found.stderr == (
        f"rankwise: --processes must be auto or a whole number from 1 to 64; got {value!r}.\n"
    )


# --- what is shown --------------------------------------------------------------------------------------


def test_progress_counts_the_runs_of_all_processes(workdir: Path, study_dict: dict, capsys):
    study, progress = ready(workdir, study_dict), StudyProgress()
    now = grid(study)
    first, second, *_ = now.runs
    progress.grid(now, study.store, dict.fromkeys((p.run_id for p in now.runs), 10))
    for planned in (first, second):
        progress.started(planned, 10)
        progress.work(planned, 4)
    task = progress.bar.tasks[0]
    assert (task.completed, task.total) == (8, 10 * len(now.runs))
    progress.finished(second, "done")
    progress.work(first, 3)
    assert task.completed == 17
    progress.finished(first, "done")
    assert task.completed == 20
    for _ in range(3):  # while it waits for a worker
        progress.grid(now, study.store, {})
    said = capsys.readouterr().err
    assert said.count("runs done") == 1
    assert f"[1/{len(now.runs)}] {second.arm}" in said and f"[2/{len(now.runs)}] {first.arm}" in said
