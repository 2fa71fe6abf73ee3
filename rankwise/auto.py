"""From a model and rows to a verdict, a plan and its adapter, in the time that is given.

    1. speed: how many rows a run can have            (some seconds)
    2. pilot: the rates of rank 1 and rank 16, and how far seeds differ; on validation rows alone
    3. design: the study that fits the time that is left, declared in study.yaml before it runs
    4. study: an ordinary one, resumable
    5. the verdict, the plan, its adapter, the report

Everything lies in one folder. The same command there goes on where it was stopped; once the study is done, it
adds a further one with seeds of its own, whose verdict rests on those alone.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rankwise import designing, execution, reporting, rows, sizing, sources
from rankwise.aside import replacing
from rankwise.errors import RankwiseError
from rankwise.grid import Study, grid
from rankwise.recommend import Recommendation, recommend
from rankwise.run import mean_tokens
from rankwise.speed import measure
from rankwise.store import Store, read_json, write_json
from rankwise.study import open_study
from rankwise.tables import Results
from rankwise.workers import run_together

CLOSING_SECONDS = 45.0
"""Kept for the verdict and the report."""

Say = Callable[[str], None]
Watch = Callable[[], Any]
"""Makes a context of an observer, such as a progress bar."""


@dataclass(frozen=True)
class Task:
    """What was asked.

    Attributes:
        model, data: source strings.
        seconds: in all.
        folder: where everything goes.
        max_length: tokens of a row.
        say: tells the person a sentence.
        watch: makes the observer of the long parts.
    """

    model: str
    data: str
    seconds: float
    folder: Path
    max_length: int
    say: Say
    watch: Watch

    @property
    def results(self) -> Path:
        """The folder of the records."""
        return self.folder / "results"


def auto(task: Task, *, dry_run: bool = False) -> Recommendation | None:
    """Find the cheapest plan that is good enough, within the time; None for a dry run.

    Raises:
        RankwiseError: the model or the rows cannot be used, or the folder belongs to others.

    Cost: the time that was given, somewhat more where a grid of rates had to be extended.
    """
    began = time.monotonic()
    _belongs(task, dry_run)
    last = _last_study(task.folder)
    if last is not None and not _finished(task, last):
        task.say(f"going on with {last}")
        return _run_and_close(task, last)
    pilot = task.folder / "pilot.yaml"
    if dry_run:
        _dry(task, began)
        return None
    if not pilot.exists():
        _write(pilot, designing.pilot(task.model, task.data, _rows(task), task.max_length))
    piloted = _pilot(task, pilot)
    left = task.seconds - CLOSING_SECONDS - (time.monotonic() - began)
    path = _design(task, pilot, piloted, left, 1 if last is None else 2)
    return _run_and_close(task, path)


def source_of(text: str) -> str:
    """Return a source string for what a person gave: a path is told from a source by its missing scheme."""
    return text if re.match(r"(hf|pypi|file):", text) else f"file:{Path(text).resolve()}"


# --- the folder -----------------------------------------------------------------------------------


def _belongs(task: Task, dry_run: bool) -> None:
    """Refuse a folder that was begun with another model or other rows."""
    mine = {"model": task.model, "data": task.data, "max_length": task.max_length}
    path = task.folder / "asked.json"
    if path.exists():
        found = read_json(path, tuple(mine), "Choose another folder with --out.")
        if found != mine:
            differs = ", ".join(f"{key} {found[key]!r}" for key in mine if found[key] != mine[key])
            raise RankwiseError(f"{task.folder} was begun with {differs}; choose another folder with --out.")
    elif not dry_run:
        task.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, mine)


def _last_study(folder: Path) -> Path | None:
    found = sorted(folder.glob("study-*.yaml"), key=lambda path: int(path.stem.split("-")[1]))
    return found[-1] if found else None


def _finished(task: Task, path: Path) -> bool:
    store = Store(task.results, yaml.safe_load(path.read_text())["name"])
    if not (store.folder / "study.json").exists():
        return False
    results = Results(store)
    wanted = results.config.seeds.reporting
    arms = results.config.arms
    lost = [arm for arm in arms if results.index["rates"][arm]["rate"] is None]
    return not results.index["tuning_unfinished"] and all(
        len(results.of(arm)) == wanted for arm in arms if arm not in lost
    )


def _write(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text)


# --- speed and pilot --------------------------------------------------------------------------------


def _rows(task: Task) -> dict[str, int]:
    """Return how many rows go where, by a speed that is measured now."""
    usable = _usable(task)
    with _scratch(task, usable) as study:
        planned = execution.first_training(grid(study), study.store)
        assert planned is not None  # a pilot in an empty folder has its runs before it
        speed = measure(study, planned, lambda rate: 2).tokens_per_second
        tokens = mean_tokens(study.context)
    found = sizing.rows_for(task.seconds, speed, tokens, usable)
    task.say(
        f"{speed:,.0f} training tokens/s, {tokens:.0f} tokens a row: {found['train']} training rows, "
        f"{found['validation']} to choose rates, {found['test']} to test, {found['reserved']} reserved"
    )
    return found


def _usable(task: Task) -> int:
    """Count the rows that can be used, near-duplicates once; some may yet be rejected with the tokens."""
    found = rows.read_rows(sources.fetch(task.data, kind="data").path)
    return int(0.97 * len({row.key for row in found.rows}))


@contextmanager
def _scratch(task: Task, usable: int) -> Iterator[Study]:
    """Yield a small pilot, opened beside the folder; nothing of it stays."""
    from tempfile import TemporaryDirectory

    few = sizing.rows_for(60, 1.0, 1e9, usable)  # the least that there is
    with TemporaryDirectory(prefix="rankwise-") as folder:
        path = Path(folder) / "speed.yaml"
        path.write_text(designing.pilot(task.model, task.data, few, task.max_length))
        yield open_study(path, Path(folder) / "results")


@dataclass(frozen=True)
class _Piloted:
    rates: dict[int, float]
    sd: float
    gain: float
    price: sizing.Price
    runs: int


def _pilot(task: Task, path: Path) -> _Piloted:
    """Run the pilot (or what is left of it) and return what it told; its cost is kept for later calls."""
    study = open_study(path, task.results)
    before = _tuned(study)
    began = time.monotonic()
    with task.watch() as observer:
        run_together(study, observer)
    spent = time.monotonic() - began
    study = execution.settled(study)
    results = Results(study.store)
    done = _tuned(study)
    cost = task.folder / "pilot.json"
    if done - before >= done // 2 or not cost.exists():  # a few runs tell no speed
        write_json(cost, {"seconds_per_tuning_run": spent / max(1, done - before)})
    tuning = float(read_json(cost, ("seconds_per_tuning_run",), "Delete it.")["seconds_per_tuning_run"])
    price = sizing.Price(tuning, tuning * designing.reporting_over_tuning(study))
    rates, sd, gain = designing.told(results)
    return _Piloted(rates, sd, gain, price, done)


def _tuned(study: Study) -> int:
    """Count the tuning runs that are done."""
    return sum(p.role == "tuning" and study.store.has(p.run_id) for p in grid(study).runs)


def _design(task: Task, pilot: Path, found: _Piloted, left: float, which: int) -> Path:
    """Write the study that fits the time that is left, and say what it will be able to show."""
    first = 0
    while (task.folder / f"study-{which}.yaml").exists():
        which += 1
    if which > 1:
        before = yaml.safe_load((task.folder / f"study-{which - 1}.yaml").read_text())["seeds"]
        first = before.get("first", 0) + before["reporting"]
    design = sizing.choose(left, found.price, found.runs)
    margin = designing.MARGIN * found.gain
    path = task.folder / f"study-{which}.yaml"
    _write(path, designing.study(pilot, which, design, found.rates, first))
    ladders = 2 if design.spectral else 1
    lines = [
        f"pilot: best rates {', '.join(f'{rate:g} at r={rank}' for rank, rate in found.rates.items())}",
        f"study: {design.arms} plans x {design.seeds} seeds, {design.runs} runs, about "
        f"{design.seconds / 60:.0f} min; declared in {path}",
        *sizing.outlook(design.seeds, ladders, found.sd, margin),
        *designing.limits(design, pilot, left),
    ]
    for line in lines:
        task.say(line)
    return path


# --- the study and what comes of it ---------------------------------------------------------------


def _run_and_close(task: Task, path: Path) -> Recommendation:
    study = open_study(path, task.results)
    with task.watch() as observer:
        run_together(study, observer)
    results = Results(Store(task.results, study.config.name))
    answer = recommend(results)
    reporting.write_all(path, task.results, folder=task.folder / "report", pictures=False)
    _hand_out(task, results, answer)
    return answer


def _hand_out(task: Task, results: Results, answer: Recommendation) -> None:
    """Write the plan, its adapter and the answer; the baseline's where nothing was shown."""
    arm = answer.chosen or str(results.config.baseline)
    done = {s: r for s, r in sorted(results.of(arm).items()) if r["status"] == "done"}
    write_json(task.folder / "answer.json", answer.as_dict() | {"handed_out": arm if done else None})
    if not done:
        task.say(f"no run of {arm} ended well, so there is no plan to hand out.")
        return
    source = results.store.path(next(iter(done.values()))["run_id"])
    shutil.copyfile(source / "plan.json", task.folder / "plan.json")
    aside = task.folder / ".adapter"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source / "adapter", aside)
    shutil.rmtree(task.folder / "adapter", ignore_errors=True)
    aside.rename(task.folder / "adapter")
    why = "" if answer.chosen else " (by default: nothing smaller or other was shown to be good enough)"
    task.say(
        f"plan: {task.folder / 'plan.json'}, that of {arm}{why}; adapter: {task.folder / 'adapter'}, trained "
        f"on {results.config.data.train} rows with seed {next(iter(done))}"
    )
    task.say(f"report: {task.folder / 'report' / 'report.html'}; all of it: {task.folder}")


def _dry(task: Task, began: float) -> None:
    """Say what would be done and what it would take; run and write nothing."""
    counts = _rows(task)
    pilot = len(sizing.PILOT_RANKS) * (len(sizing.PILOT_RATES) + 1) * sizing.PILOT_SEEDS
    a_run = 0.75 * task.seconds / (48 if task.seconds < 1800 else 80)
    price = sizing.Price(0.8 * a_run, a_run)
    left = task.seconds - CLOSING_SECONDS - pilot * price.tuning - (time.monotonic() - began)
    design = sizing.choose(left, price, pilot)
    task.say(
        f"pilot: ranks {' and '.join(map(str, sizing.PILOT_RANKS))} at {len(sizing.PILOT_RATES)} rates or "
        f"more, {sizing.PILOT_SEEDS} seeds: about {pilot * price.tuning / 60:.0f} min"
    )
    task.say(
        f"study, if runs take what was measured: {design.arms} plans x {design.seeds} seeds, about "
        f"{design.seconds / 60:.0f} min; what it can show depends on the spread that the pilot sees"
    )
    task.say(json.dumps({"rows": counts, "design": design.__dict__}))
