"""Runs in a tracker are those of the records, each once, and nothing leaves the machine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankwise import tracking
from rankwise.errors import RankwiseError
from rankwise.store import Store
from rankwise.tables import Results
from rankwise.tracking import export_runs, show_command

needs_trackio = pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None,
    reason="Trackio is not installed: pip install 'rankwise[track]'",
)
SECRET = "a row of somebody's data"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Records of one untouched, one tuning, one finished and one failed run."""
    runs = [
        record(tmp_path, "untouched", "untouched", 0, None),
        record(tmp_path, "uniform", "tuning", 1000, 1e-3),
        record(tmp_path, "uniform", "reporting", 0, 1e-3),
        record(tmp_path, "uniform", "reporting", 1, 1e-3, failed=True),
        {"arm": "uniform", "role": "reporting", "seed": 2, "rate": 1e-3, "run_id": "pending"},
    ]
    index = {
        "config": {
            "name": "tiny.v2", "model": "file:m", "data": {"source": "file:rows.json", "train": 8},
            "train": {"step_examples": 4, "learning_rates": [1e-3, 3e-3]},
            "arms": {"uniform": {"strategy": "uniform", "budget": "r=2"}},
        },
        "resolved": {"notices": []}, "exploratory": False, "runs": runs, "rates": {"uniform": {"rate": 1e-3}},
    }  # fmt: skip
    (tmp_path / "tiny.v2" / "store.json").write_text('{"format": 1}')
    (tmp_path / "tiny.v2" / "study.json").write_text(json.dumps(index))
    return tmp_path


def record(
    folder: Path, arm: str, role: str, seed: int, rate: float | None, failed: bool = False
) -> dict[str, Any]:
    """Write a run's record: three steps of 10 seconds, a fourth that diverges where it fails."""
    name = f"{arm}-{role}-{seed}"
    place = folder / "tiny.v2" / "runs" / name
    place.mkdir(parents=True)
    steps = [{"step": step, "loss": 2.0 - step / 10, "seconds": 10.0, "note": SECRET} for step in range(3)]
    if failed:
        steps.append({"step": 3, "loss": float("nan"), "seconds": 10.0})
    if role != "untouched":
        (place / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    done = {"metrics": {"test_loss": 1.5}, "train_time": 30.0, "steps": 3, "rank_use": {"energy": 0.5}}
    result = {
        "run_id": name,
        "status": "failed" if failed else "done",
        "failure": {"step": 3, "reason": "the loss is not finite"} if failed else None,
        "run_info": {"created_at": "2026-11-25T04:01:00+0100"},
        "train_info": {"metrics": {}} if failed else {**done, "evaluation_time": 5.0},
    }
    (place / "result.json").write_text(json.dumps(result))
    (place / "config.json").write_text(json.dumps({"strategy": "uniform", "train": {"epochs": 1}}))
    (place / "examples.parquet").write_text(SECRET)
    return {"arm": arm, "role": role, "seed": seed, "rate": rate, "run_id": name}


def results(study: Path) -> Results:
    return Results(Store(study, "tiny.v2"))


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> config, lines and alerts of the runs, by Trackio itself, in a process whose folder this is."""
    code = (
        "import json, os, sys\n"
        "os.environ['TRACKIO_DIR'] = sys.argv[1]\n"
        "from trackio import Api\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "runs = list(Api().runs('tiny-v2'))\n"
        "assert len({run.name for run in runs}) == len(runs)\n"
        "print(json.dumps({run.name: {'config': run.config, 'alerts': run.alerts(),\n"
        "    'lines': SQLiteStorage.get_logs('tiny-v2', run.name, run_id=run.id)} for run in runs}))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(told.splitlines()[-1])


@needs_trackio
def test_every_finished_run_is_there_with_its_steps_and_its_end(study: Path, tmp_path: Path):
    assert export_runs(results(study), tmp_path / "out") == 4
    found = read(tmp_path / "out")
    names = ["uniform seed 0", "uniform seed 1", "uniform tuning rate 0.001 seed 1000", "untouched seed 0"]
    assert sorted(found) == names
    done = found["uniform seed 0"]
    wanted = {"arm": "uniform", "role": "reporting", "seed": 0, "rate": 1e-3, "status": "done"}
    assert wanted.items() <= done["config"].items() and done["config"]["train"] == {"epochs": 1}
    assert [line["step"] for line in done["lines"]] == [0, 1, 2, 3]
    assert [line.get("train/loss") for line in done["lines"]] == [2.0, 1.9, 1.8, None]
    last = done["lines"][-1]
    assert (last["final/test_loss"], last["final/train_time"], last["final/energy"]) == (1.5, 30.0, 0.5)
    times = [line["timestamp"] for line in done["lines"]]
    ends = ["03:00:35", "03:00:45", "03:00:55", "03:01:00"]  # 5 s of evaluation after the last step
    assert times == [f"2026-11-25T{end}+00:00" for end in ends]
    assert done["alerts"] == []


@needs_trackio
def test_a_failed_run_is_told_as_failed(study: Path, tmp_path: Path):
    export_runs(results(study), tmp_path / "out")
    failed = read(tmp_path / "out")["uniform seed 1"]
    assert failed["config"]["status"] == "failed"
    (alert,) = failed["alerts"]
    assert (alert["level"], alert["text"]) == ("error", "failed at step 3: the loss is not finite")
    assert "train/loss" not in failed["lines"][3], "no number for a step that has none"
    assert failed["lines"][-1]["final/failed"] == 1 and "final/test_loss" not in failed["lines"][-1]


@needs_trackio
def test_a_second_export_adds_only_what_is_new(study: Path, tmp_path: Path):
    export_runs(results(study), tmp_path / "out")
    before = read(tmp_path / "out")
    assert export_runs(results(study), tmp_path / "out") == 0
    assert read(tmp_path / "out") == before
    record(study, "uniform", "reporting", 2, 1e-3)
    index = json.loads((study / "tiny.v2" / "study.json").read_text())
    index["runs"][-1]["run_id"] = "uniform-reporting-2"
    (study / "tiny.v2" / "study.json").write_text(json.dumps(index))
    path = study / "tiny.v2" / "runs" / "uniform-reporting-1" / "result.json"  # this one was run again
    again = json.loads((path.parent.parent / "uniform-reporting-0" / "result.json").read_text())
    again["run_info"]["created_at"] = "2026-11-25T05:01:00+0100"
    path.write_text(json.dumps(again))
    assert export_runs(results(study), tmp_path / "out") == 2
    after = read(tmp_path / "out")
    assert len(after) == 5 and after["uniform seed 0"] == before["uniform seed 0"]
    mended = after["uniform seed 1"]
    assert (mended["config"]["status"], mended["alerts"]) == ("done", [])
    assert "final/failed" not in mended["lines"][-1]


@needs_trackio
def test_nothing_leaves_the_machine(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the environment asks of Trackio; a process that reaches for the network leaves a file."""
    block = tmp_path / "block"
    block.mkdir()
    (block / "sitecustomize.py").write_text(
        "import pathlib, socket\n"
        "def refuse(*a, **k):\n"
        f"    pathlib.Path({str(tmp_path / 'reached')!r}).write_text(repr(a))\n"
        "    raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    monkeypatch.syspath_prepend(block)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(block), *sys.path[1:]]))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID"):
        monkeypatch.setenv(name, "somebody/else")
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://example.com?write_token=t")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("SYSTEM", "spaces")
    assert export_runs(results(study), tmp_path / "out") == 4
    assert not (tmp_path / "reached").exists() and not (tmp_path / "elsewhere").exists()
    assert all(SECRET.encode() not in file.read_bytes() for file in (tmp_path / "out").rglob("*.db*"))


@needs_trackio
def test_a_folder_that_cannot_be_written_is_told(study: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tiny-v2.db").mkdir()
    with pytest.raises(RankwiseError, match=r"Trackio could not write to .*/out: "):
        export_runs(results(study), out)


def test_what_is_missing_is_told(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "file").write_text("")
    with pytest.raises(RankwiseError, match="a file is there"):
        export_runs(results(study), tmp_path / "file")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RankwiseError, match=r"pip install 'rankwise\[track\]'"):
        export_runs(results(study), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_that_shows_it(study: Path, tmp_path: Path):
    found = show_command(results(study), tmp_path / "my runs")
    assert found == f"TRACKIO_DIR='{tmp_path / 'my runs'}' trackio show --project tiny-v2"
