"""Killed at any moment, a study goes on with the same command and ends with the same numbers.

The processes are real ones, killed with SIGKILL. Twenty moments: most drawn over the whole of the work,
the rest aimed at the import, the evaluation, the writing of a record and its rename.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from rankwise import adapters
from rankwise.engine.batches import optimizer_steps
from rankwise.observer import Observer
from rankwise.store import Store
from rankwise.study import run_study
from rankwise.train import StepLog, Trained, train_adapters
from tests.conftest import alpaca_rows, byte_tokenizer, tiny_llama
from tests.forked import Forked
from tests.parts import ADAPTER, RECORD, hand_rows, opened, plan_of, records_of, train_config

STEPS = 16  # of every run: 2 epochs over 32 rows, 4 at a time
STUDY = {
    "name": "tiny",
    "model": "file:model",
    "data": {
        "source": "file:rows.json", "train": 32, "validation": 20, "test": 60, "reserved": 4,
        "max_length": 128,
    },
    "train": {
        "step_examples": 4, "epochs": 2, "micro_tokens": 300, "learning_rates": [1e-2, 3e-2, 1e-1],
        "dropout": 0.1, "dtype": "fp32", "device": "cpu", "threads": 1,
    },
    "seeds": {"tuning": 1, "reporting": 4},
    "baseline": "uniform",
    "contrasts": ["decay"],
    "arms": {
        "uniform": {"strategy": "uniform", "budget": "r=2"},
        "decay": {"strategy": "linear_decay", "base": 4, "min": 1, "budget": "r=2"},
        "mlp": {"strategy": "mlp_only", "budget": "r=2"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows and a study file; every test has a results folder of its own in it."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_llama().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps(alpaca_rows(200)))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return folder


COMMAND = ["study", "run", "study.yaml", "--checkpoint-seconds", "0", "--results"]


def start(folder: Path, results: str) -> Forked:
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return Forked([*COMMAND, results], folder, env)


def wait_for_work(process: Forked) -> float:
    """Return when the study begins to work, past the loading."""
    while "runs done" not in process.err.read_text():
        assert process.poll() is None, "the study ended before it began"
        time.sleep(0.005)
    return time.perf_counter()


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> tuple[dict, float]:
    """The records of a study that nobody disturbed, and the seconds that its work took."""
    process = start(folder, "whole")
    begun = wait_for_work(process)
    process.communicate()
    assert process.returncode == 0
    return records_of(Store(folder / "whole", "tiny")), time.perf_counter() - begun


# --- what must hold after every kill ------------------------------------------------------------


def check_records(results: Path, seen: dict[str, tuple]) -> None:
    """Every folder under runs/ is a complete record, and the ones seen before are the same files."""
    for run in (results / "tiny" / "runs").glob("*"):
        files = {str(f.relative_to(run)) for f in run.rglob("*") if f.is_file()}
        role = json.loads((run / "config.json").read_text())["role"]
        wanted = RECORD[role] | (ADAPTER if role != "untouched" else set())
        assert wanted <= files, f"{run.name} ({role}) lacks {wanted - files}"
        assert json.loads((run / "result.json").read_text())["status"] == "done"
        stats = [(run / name).stat() for name in sorted(wanted)]
        identity = tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in stats)
        assert seen.setdefault(run.name, identity) == identity, f"{run.name} was written again"
    assert seen.keys() == {run.name for run in (results / "tiny" / "runs").glob("*")}


def fresh(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime > since
    except FileNotFoundError:
        return False


def evaluating(results: Path, since: float) -> bool:
    """All steps of a run are done, its scores are not yet written."""
    for log in results.glob(".partial/*/metrics.jsonl"):
        if fresh(log, since) and log.read_text().count("\n") == STEPS:
            return not any(log.parent.glob("record/*.parquet"))
    return False


def recording(results: Path, since: float) -> bool:
    """The record is being written."""
    return any(fresh(f, since) for f in results.glob(".partial/*/record/adapter/adapter_config.json"))


def renaming(results: Path, since: float) -> bool:
    """The record is complete and about to be renamed."""
    return any(fresh(f, since) for f in results.glob(".partial/*/record/result.json"))


def renamed(results: Path, since: float) -> bool:
    """A record has just come into place; its partial folder may be there still."""
    return any(fresh(f, since) for f in results.glob("tiny/runs/*/result.json"))


Moment = float | Callable[[Path, float], bool]


def kill_at(process: Forked, moment: Moment, results: Path) -> bool:
    """Kill the process at a moment of its work; return False if it ended first."""
    since = time.time()
    begun = wait_for_work(process)
    while process.poll() is None:
        if moment(results, since) if callable(moment) else time.perf_counter() - begun >= moment:
            process.kill()
            break
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_twenty_kills_change_nothing(folder: Path, uninterrupted: tuple[dict, float]):
    wanted, work = uninterrupted
    results = folder / "killed"
    draw = random.Random(20)
    cuts = sorted(draw.uniform(0, 0.8 * work) for _ in range(11))
    drawn: list[Moment] = [b - a for a, b in zip([0.0, *cuts], cuts, strict=False)]
    aimed: list[Moment] = [evaluating, evaluating, recording, recording, renaming, renaming, renamed, renamed]
    moments = drawn + aimed
    draw.shuffle(moments)

    importing = subprocess.Popen([sys.executable, "-m", "rankwise", *COMMAND, "killed"], cwd=folder)
    time.sleep(draw.uniform(0.5, 2))
    importing.kill()
    importing.wait()
    seen: dict[str, tuple] = {}
    kills, unfinished = 1, 0
    for moment in moments:
        landed = kill_at(start(folder, "killed"), moment, results)
        check_records(results, seen)
        kills += landed
        unfinished += any((results / ".partial").iterdir())
        if not landed:
            break
    assert kills >= 18, "the study ended too early for this test to say much"
    assert unfinished >= 10, "most kills must land inside a run"

    process = start(folder, "killed")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    check_records(results, seen)
    found = records_of(Store(results, "tiny"))
    assert found.keys() == wanted.keys()
    for run_id, record in wanted.items():
        for part, value in record.items():
            assert found[run_id][part] == value, (run_id, record["config"]["role"], part)
    assert list((results / ".partial").iterdir()) == []


@pytest.mark.slow
def test_two_processes_share_a_study(folder: Path, uninterrupted: tuple[dict, float]):
    wanted, _ = uninterrupted
    both = [start(folder, "shared") for _ in range(2)]
    texts = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    done = [sum(": done," in line for line in text.splitlines()) for text in texts]
    assert sum(done) == len(wanted), "each run is done exactly once"
    assert min(done) >= 3, "both must have worked"
    assert records_of(Store(folder / "shared", "tiny")) == wanted
    assert list((folder / "shared" / ".partial").iterdir()) == []


# --- within a process, step by step ---------------------------------------------------------------


class Stopped(Exception):
    pass


def train(folder: Path, stop: int | None, checkpoint_seconds: float) -> tuple[Trained, dict, list]:
    """Train a GPT-2 with dropout of its own and on its adapters; stop while step `stop` is being logged."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.1, n_positions=64)
    model = GPT2LMHeadModel(config)
    adapted = adapters.attach(model, plan_of(model, budget="r=3"), seed=4, dropout=0.3)
    settings = train_config(epochs=3)
    torch.manual_seed(random.randrange(2**31))  # what was drawn before must not matter

    def on_step(entry: dict) -> None:
        if entry["step"] == stop:
            raise Stopped

    steps = optimizer_steps(hand_rows(14), settings, seed=4)
    assert len(steps) == 12
    trained = train_adapters(
        adapted, steps, settings, rate=1e-2, seed=4, folder=folder, on_step=on_step,
        checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    tensors = {n: p.detach().numpy().tobytes() for n, p in adapters.adapter_tensors(adapted).items()}
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return trained, tensors, [{k: v for k, v in entry.items() if k != "seconds"} for entry in log]


@pytest.mark.parametrize("stops", [[0], [1], [5], [11], [3, 3, 4, 9]], ids=str)
@pytest.mark.parametrize("checkpoint_seconds", [0, 1e9], ids=["each-step", "no-checkpoint"])
def test_training_resumes_bit_for_bit(stops: list[int], checkpoint_seconds: float, tmp_path: Path):
    whole, tensors, log = train(tmp_path_made(tmp_path / "whole"), None, checkpoint_seconds)
    again = tmp_path_made(tmp_path / "again")
    for stop in stops:
        with pytest.raises(Stopped):
            train(again, stop, checkpoint_seconds)
    resumed, tensors_again, log_again = train(again, None, checkpoint_seconds)
    assert [entry["step"] for entry in log] == list(range(12)) and log_again == log
    assert tensors_again == tensors
    for field in ("steps", "tokens", "label_tokens", "final_loss"):
        assert getattr(resumed, field) == getattr(whole, field)


def tmp_path_made(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_step_log_is_never_cut_in_place(tmp_path: Path):
    log = StepLog(tmp_path / "metrics.jsonl")
    log.keep(0)
    for step in range(5):
        log.append({"step": step})
    log.close()
    with log.path.open() as old:  # what a kill during the cut would leave behind
        log.keep(3)
        log.close()
        assert len(old.readlines()) == 5 and len(log.path.read_text().splitlines()) == 3
    assert log.last == {"step": 2}


def test_what_a_kill_after_the_rename_leaves_is_swept(workdir: Path, study_dict: dict):
    """The record is in place, the partial folder not yet removed; a killed adoption leaves a copy."""
    study = opened(workdir, study_dict)
    run_study(study, Observer())
    run_id = next(study.store.runs.iterdir()).name
    for name in (run_id, f"{run_id}.adopt-1"):
        (workdir / "results" / ".partial" / name / "record").mkdir(parents=True)
    (workdir / "results" / ".partial" / "another" / "record").mkdir(parents=True)
    with study.store.claim(run_id):
        run_study(study, Observer())
        assert study.store.partial(run_id).is_dir(), "it may belong to the holder of the claim"
    run_study(study, Observer())
    assert [f.name for f in (workdir / "results" / ".partial").iterdir()] == ["another"]
