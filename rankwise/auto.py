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

import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise import designing, execution, reporting, sizing, sources
from rankwise.aside import replacing
from rankwise.errors import RankwiseError
from rankwise.grid import Study, grid
from rankwise.recommend import Recommendation, recommend
from rankwise.run import mean_tokens
from rankwise.speed import measure
from rankwise.store import Store, read_json, write_json
from rankwise.study import open_study
from rankwise.studyfile import read_study
from rankwise.tables import Results, hopeless
from rankwise.workers import run_together

CLOSING_SECONDS = 45.0
"""Kept for the verdict and the report."""

NAME = re.compile(r"study-([0-9]+)\.yaml")

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
    _belongs(task)
    last = _last_study(task.folder)
    finished = last is None or _finished(task, last)
    if dry_run:
        _dry(task, None if finished else last)
        return None
    if last is not None and not finished:
        task.say(f"going on with {last}")
        return _run_and_close(task, last)
    pilot = task.folder / "pilot.yaml"
    if pilot.exists():
        task.say(f"the rows and settings are those of {pilot}, whatever the time now given")
    else:
        text = designing.pilot(task.model, task.data, _rows(task), task.max_length)
        task.folder.mkdir(parents=True, exist_ok=True)
        write_json(task.folder / "asked.json", _asked(task))
        _write(pilot, text)
    study, told = _pilot(task, pilot)
    left = task.seconds - CLOSING_SECONDS - (time.monotonic() - began)
    return _run_and_close(task, _design(task, study, told, left, last))


def source_of(text: str) -> str:
    """Return a source string for what a person gave: a path is told from a source by its missing scheme."""
    return text if re.match(r"(hf|pypi|file):", text) else f"file:{Path(text).resolve()}"


# --- the folder -----------------------------------------------------------------------------------


def _asked(task: Task) -> dict[str, Any]:
    return {"model": task.model, "data": task.data, "max_length": task.max_length}


def _belongs(task: Task) -> None:
    """Refuse a folder that was begun with another model or other rows, and sources that cannot be had."""
    mine, path = _asked(task), task.folder / "asked.json"
    if path.exists():
        found = read_json(path, tuple(mine), "Choose another folder with --out.")
        if found != mine:
            differs = ", ".join(f"{key} {found[key]!r}" for key in mine if found[key] != mine[key])
            raise RankwiseError(f"{task.folder} was begun with {differs}; choose another folder with --out.")
    for option, source in (("model", task.model), ("data", task.data)):
        try:
            sources.fetch(source, kind=option)  # type: ignore[arg-type]
        except RankwiseError as error:
            raise RankwiseError(f"--{option}: {error}") from None


def _last_study(folder: Path) -> Path | None:
    found = {int(m[1]): path for path in folder.glob("study-*.yaml") if (m := NAME.fullmatch(path.name))}
    return found[max(found)] if found else None


def _finished(task: Task, path: Path) -> bool:
    store = Store(task.results, read_study(path).config.name)
    if not (store.folder / "study.json").exists():
        return False
    results = Results(store)
    arms = [arm for arm in results.config.arms if not hopeless(results.index["rates"][arm])]
    wanted = results.config.seeds.reporting
    return not results.index["tuning_unfinished"] and all(len(results.of(arm)) == wanted for arm in arms)


def _write(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text)


# --- speed and pilot --------------------------------------------------------------------------------


def _rows(task: Task) -> dict[str, int]:
    """Return how many rows go where, by a speed that is measured now."""
    with _scratch(task) as study:
        planned = execution.first_training(grid(study), study.store)
        assert planned is not None  # a pilot in an empty folder has its runs before it
        speed = measure(study, planned, lambda rate: 2).tokens_per_second
        tokens = mean_tokens(study.context)
        usable = sum(map(len, dataclasses.astuple(study.context.prepared.splits)))
    found = sizing.rows_for(task.seconds, speed, tokens, usable)
    task.say(
        f"{speed:,.0f} training tokens/s, {tokens:.0f} tokens a row: {found['train']} training rows, "
        f"{found['validation']} to choose rates, {found['test']} to test, {found['reserved']} reserved"
    )
    return found


@contextmanager
def _scratch(task: Task) -> Iterator[Study]:
    """Yield the smallest pilot, opened beside the folder; nothing of it stays."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="rankwise-") as folder:
        path = Path(folder) / "speed.yaml"
        path.write_text(designing.pilot(task.model, task.data, sizing.LEAST, task.max_length))
        yield open_study(path, Path(folder) / "results")


def _pilot(task: Task, path: Path) -> tuple[Study, designing.Told]:
    """Run the pilot, or what is left of it, and return what it told."""
    study = open_study(path, task.results)
    with task.watch() as observer:
        run_together(study, observer)
    return execution.settled(study), designing.told(Results(study.store))


def _design(task: Task, pilot: Study, told: designing.Told, left: float, last: Path | None) -> Path:
    """Write the study that fits the time that is left, and say what it will be able to show."""
    before = None if last is None else read_study(last).config
    which = 1 if last is None else int(last.stem.partition("-")[2]) + 1
    first = 0 if before is None else before.seeds.first + before.seeds.reporting
    design = sizing.choose(left, designing.price(pilot, Results(pilot.store), told.tried))
    path = task.folder / f"study-{which}.yaml"
    _write(path, designing.study(task.folder / "pilot.yaml", which, design, first))
    choice = execution.kept(pilot.store)
    if choice is not None:  # threads are part of a run's name: with others the pilot's runs would not count
        folder = task.results / f"study-{which}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / execution.FILE, read_json(pilot.store.folder / execution.FILE, (), "Delete it."))
    lines = [
        f"pilot: best rates {', '.join(f'{rate:g} at r={rank}' for rank, rate in told.rates.items())}",
        f"study: {design.arms} plans x {design.seeds} seeds, {design.runs} runs, about "
        f"{design.seconds / 60:.0f} min; declared in {path}",
        *sizing.outlook(design, told.sd, designing.MARGIN * told.gain),
        *designing.limits(design, pilot.config.data.train, left),
    ]
    if first:
        lines.append(
            f"This is study {which} of these rows: its verdict rests on its own seeds, and each study errs "
            "with 5 % of its own. Going on until one says what was hoped for would be no evidence."
        )
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


def _dry(task: Task, unfinished: Path | None) -> None:
    """Say what would be done and what it would take; run and write nothing."""
    if unfinished is not None:
        task.say(
            f"{unfinished} is not finished: the command without --dry-run goes on with it. What is left:"
        )
        study = open_study(unfinished, task.results)
        left = sum(execution.works(study, grid(study)))
        task.say(f"{len(grid(study).pending(study.store))} runs or more, {left:,} forward passes of a token")
        return
    _rows(task)
    a_run = 0.75 * task.seconds / sizing.runs_for(task.seconds)
    price = sizing.Price(tuning=0.8 * a_run, reporting=a_run, probe=a_run)
    pilot = len(sizing.PILOT_RANKS) * price.rates * sizing.PILOT_SEEDS
    design = sizing.choose(task.seconds - CLOSING_SECONDS - pilot * price.tuning, price)
    task.say(
        f"pilot: ranks {' and '.join(map(str, sizing.PILOT_RANKS))} at {len(sizing.PILOT_RATES)} rates or "
        f"more, {sizing.PILOT_SEEDS} seeds: about {pilot * price.tuning / 60:.0f} min"
    )
    task.say(
        f"study, if runs take what was measured: {design.arms} plans x {design.seeds} seeds, about "
        f"{design.seconds / 60:.0f} min; what it can show depends on the spread that the pilot sees"
    )
