"""Finished runs into an experiment tracker, after the fact and offline: records in, a Trackio folder out.

Trackio keeps a project in one SQLite file and shows it with `trackio show`, without an account or a network.
It reads where to write, and whether to send anything elsewhere, from environment variables when it is
imported. So it runs in a process of its own, with an environment that names the folder and nothing else.

What is written: settings, numbers and the reason of a failure; no row of data, no text of an answer.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.store import read_json
from rankwise.tables import Results

_ELSEWHERE = ("TRACKIO_", "SPACE_", "HF_TOKEN", "HF_HUB_")
"""Beginnings of environment variables that would make Trackio write to another place, or to the network."""


def export_runs(results: Results, folder: str | Path) -> int:
    """Add a study's finished runs, the failed ones included, to a Trackio folder.

    Runs that are there already are left alone; one that was run again since replaces what was there.

    Args:
        results: a study's index and records.
        folder: Trackio's, made if need be; the study is a project in it.

    Returns:
        How many runs were written.

    Raises:
        RankwiseError: Trackio is not installed, or it cannot write to the folder.

    Cost: 1 to 2 s to start, then about 40 ms a new run.
    """
    if importlib.util.find_spec("trackio") is None:
        raise RankwiseError(
            "runs are exported to Trackio, which is not installed: `pip install 'rankwise[track]'`, or "
            "`pip install trackio`."
        )
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise RankwiseError(f"a Trackio folder cannot be made at {folder}: a file is there. Choose another.")
    runs = [
        _run(results, planned) for planned in results.index["runs"] if planned["run_id"] in results.records
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_ELSEWHERE) and k != "SYSTEM"}
    environment |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "rankwise.tracking"],
        input=json.dumps({"project": project(results), "runs": runs}, allow_nan=False),
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if ended.returncode != 0:
        said = (ended.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RankwiseError(f"Trackio could not write to {folder}: {said}")
    return int(json.loads(ended.stdout.splitlines()[-1])["written"])


def project(results: Results) -> str:
    """Return the name of the study's project; Trackio drops dots from the names of its files."""
    return results.config.name.replace(".", "-")


def show_command(results: Results, folder: str | Path) -> str:
    """Return the command that opens Trackio's page on this machine."""
    where = shlex.quote(str(Path(folder).resolve()))
    return f"TRACKIO_DIR={where} trackio show --project {shlex.quote(project(results))}"


def _run(results: Results, planned: dict[str, Any]) -> dict[str, Any]:
    """Return one run as Trackio takes it: settings, and a line of numbers per step with a last one."""
    record = results.records[planned["run_id"]]
    info, failure = record["train_info"], record["failure"]
    steps = _steps(results.store.path(planned["run_id"]) / "metrics.jsonl")
    ended = datetime.fromisoformat(record["run_info"]["created_at"]).astimezone(UTC)
    last = info.get("steps") or (steps[-1]["step"] + 1 if steps else 0)
    lines = [{f"train/{k}": v for k, v in _numbers(step).items() if k != "step"} for step in steps]
    return {
        "id": f"{results.config.name}/{planned['run_id']}",
        "name": _name(planned),
        "config": _config(results, planned, record),
        "lines": [*lines, {f"final/{k}": v for k, v in _final(record).items()}],
        "steps": [*(step["step"] for step in steps), last],
        "times": [*_times(steps, ended - timedelta(seconds=info.get("evaluation_time") or 0)), _text(ended)],
        "failure": None if failure is None else f"failed at step {failure['step']}: {failure['reason']}",
    }


def _name(planned: dict[str, Any]) -> str:
    if planned["role"] == "tuning":
        return f"{planned['arm']} tuning rate {planned['rate']:g} seed {planned['seed']}"
    return f"{planned['arm']} seed {planned['seed']}"


def _config(results: Results, planned: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return the run's settings; those with an underscore are Trackio's own."""
    path = results.store.path(planned["run_id"]) / "config.json"
    settings = read_json(path, (), f"Delete the folder {path.parent} to run it again.")
    described = {name: planned[name] for name in ("arm", "role", "seed", "rate", "run_id")}
    return {
        **settings,
        **described,
        "study": results.config.name,
        "status": record["status"],
        "failure": record["failure"],
        "recorded": record["run_info"]["created_at"],
        "_Group": planned["arm"],
        "_Created": record["run_info"]["created_at"],
    }


def _final(record: dict[str, Any]) -> dict[str, float]:
    """Return the metrics at the end with what the run took; a failed one has nothing to compare with."""
    if record["status"] != "done":
        return {"failed": 1}
    info = record["train_info"]
    return {**_numbers(info), **_numbers(info["metrics"]), **_numbers(info.get("rank_use") or {})}


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """Return what is a finite number."""
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _steps(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line]


def _times(steps: list[dict[str, Any]], trained: datetime) -> list[str]:
    """Return when each step ended, counted back from the end of training by the steps' seconds."""
    left = 0.0
    found = []
    for step in reversed(steps):
        found.append(_text(trained - timedelta(seconds=left)))
        left += step.get("seconds") or 0.0
    return found[::-1]


def _text(time: datetime) -> str:
    return time.isoformat()


def write(project: str, runs: list[dict[str, Any]]) -> int:
    """Write runs with Trackio, in a process that has its environment; return how many were new or changed.

    Trackio's bulk interface, which its own importers use: a run is one transaction, so none is ever there in
    part, and steps keep the times that they had.
    """
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    try:
        known = {run.id: run for run in Api().runs(project)}
    except ValueError:  # no such project yet
        known = {}
    written = 0
    for run in runs:
        before = known.get(run["id"])
        if before is not None:
            if (before.config or {}).get("recorded") == run["config"]["recorded"]:
                continue
            before.delete()
        who = {"project": project, "run": run["name"], "run_id": run["id"]}
        if run["failure"] is not None:
            SQLiteStorage.bulk_alert(
                **who, titles=["run failed"], texts=[run["failure"]], levels=["error"],
                steps=run["steps"][-1:], timestamps=run["times"][-1:], alert_ids=[run["id"]],
            )  # fmt: skip
        SQLiteStorage.bulk_log(
            **who, metrics_list=run["lines"], steps=run["steps"], timestamps=run["times"],
            config=run["config"],
        )  # fmt: skip
        written += 1
    return written


if __name__ == "__main__":
    print(json.dumps({"written": write(**json.load(sys.stdin))}))
