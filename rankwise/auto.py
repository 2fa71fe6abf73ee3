"""From a model and rows to a verdict, a plan and its adapter, in the time that is given.

    1. speed: how many rows a run can have            (some seconds)
    2. pilot: the rates of rank 1 and rank 16, and how far seeds differ; on validation rows alone
    3. design: the study that fits the time that is left, declared in study.yaml before it runs
    4. study: an ordinary one, resumable
    5. the verdict, the plan, its adapter, the report

Everything lies in one folder. The same command there goes on where it was stopped; once the study is closed,
which its answer.json marks, it adds a further one with seeds of its own, whose verdict rests on those alone.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
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
from rankwise.savings import count
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
    unfinished = None if last is None or _finished(task, last) else last
    if dry_run:
        _dry(task, unfinished)
        return None
    if unfinished is not None:
        study = open_study(unfinished, task.results)
        task.say(f"going on with {unfinished}: {_still(task, study)}")
        return _run_and_close(task, study)
    pilot, speed = task.folder / "pilot.yaml", None
    if not pilot.exists():
        rows, _, speed = _rows(task)
        task.folder.mkdir(parents=True, exist_ok=True)
        write_json(task.folder / "asked.json", _asked(task))
        _write(pilot, designing.pilot(task.model, task.data, rows, task.max_length))
    study, told = _pilot(task, pilot, speed)
    left = task.seconds - CLOSING_SECONDS - (time.monotonic() - began)
    return _run_and_close(task, open_study(_design(task, study, told, left, last), task.results))


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
    """Whether a study's runs are all there and it was closed: its answer is what is written last."""
    name = read_study(path).config.name
    store = Store(task.results, name)
    if _closed(task) != name or not (store.folder / "study.json").exists():
        return False
    results = Results(store)
    arms = [arm for arm in results.config.arms if not hopeless(results.index["rates"][arm])]
    wanted = results.config.seeds.reporting
    return not results.index["tuning_unfinished"] and all(len(results.of(arm)) == wanted for arm in arms)


def _closed(task: Task) -> str | None:
    """Return the study whose answer lies in the folder."""
    path = task.folder / "answer.json"
    remedy = "Delete it: the same command writes it anew."
    return str(read_json(path, ("study",), remedy)["study"]) if path.exists() else None


def _write(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text)


# --- speed and pilot --------------------------------------------------------------------------------


def _rows(task: Task) -> tuple[dict[str, int], float, float]:
    """Return how many rows go where, their mean tokens, and tokens/s: a speed that is measured now."""
    with _scratch(task) as study:
        speed, tokens = _speed(study), mean_tokens(study.context)
        usable = sum(map(len, dataclasses.astuple(study.context.prepared.splits)))
    found = sizing.rows_for(task.seconds, speed, tokens, usable)
    task.say(f"{speed:,.0f} training tokens/s, {tokens:.0f} tokens a row: {_counted(found)}")
    return found, tokens, speed


def _speed(study: Study) -> float:
    """Return training tokens/s of all the study's processes: by its records, else measured now."""
    known = designing.speed(study)
    if known is not None:
        return known
    planned = next(run for run in grid(study).runs if run.role != "untouched")
    return designing.processes(study) * measure(study, planned, lambda rate: 2).tokens_per_second


def _counted(rows: Mapping[str, int]) -> str:
    return (
        f"{rows['train']} training rows, {rows['validation']} to choose rates, {rows['test']} to test, "
        f"{rows['reserved']} reserved"
    )


@contextmanager
def _scratch(task: Task) -> Iterator[Study]:
    """Yield the smallest pilot, opened beside the folder; nothing of it stays."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="rankwise-") as folder:
        path = Path(folder) / "speed.yaml"
        path.write_text(designing.pilot(task.model, task.data, sizing.LEAST, task.max_length))
        yield open_study(path, Path(folder) / "results")


def _pilot(task: Task, path: Path, speed: float | None) -> tuple[Study, designing.Told]:
    """Run the pilot, or what is left of it, and return what it told; `speed` if it was just measured."""
    study = open_study(path, task.results)
    if speed is None:
        task.say(_as_before(study))
    works = designing.left(study)
    takes = designing.duration(study, works, speed or _speed(study)) if works else 0.0
    for line in _pilot_price(task, len(works), takes):
        task.say(line)
    with task.watch() as observer:
        run_together(study, observer)
    return execution.settled(study), designing.told(Results(study.store))


def _as_before(pilot: Study) -> str:
    counts = _counted(_rows_of(pilot))
    return f"the rows and settings are those of {pilot.file.path}, whatever the time now given: {counts}"


def _rows_of(study: Study) -> dict[str, int]:
    return {part: getattr(study.config.data, part) for part in sizing.LEAST}


def _pilot_price(task: Task, runs: int, seconds: float) -> list[str]:
    """Return in sentences what is left of the pilot and what that takes."""
    if not runs:
        return ["pilot: all its runs are there"]
    lines = [
        f"pilot: ranks {' and '.join(map(str, sizing.PILOT_RANKS))} at {len(sizing.PILOT_RATES)} rates or "
        f"more, {sizing.PILOT_SEEDS} seeds: some {count(runs, 'run')} to do, about {_span(seconds)}"
    ]
    if not _fits(task, seconds):
        lines.append(
            f"The pilot alone does not fit the {_span(task.seconds)} given. It runs all the same, and a "
            "study after it; both can be stopped and resumed. A smaller model or a lower --max-length takes "
            "less."
        )
    return lines


def _fits(task: Task, seconds: float) -> bool:
    return seconds + CLOSING_SECONDS <= task.seconds


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _design(task: Task, pilot: Study, told: designing.Told, left: float, last: Path | None) -> Path:
    """Write the study that fits the time that is left, and say what it will be able to show."""
    before = None if last is None else read_study(last).config
    which = 1 if last is None else int(last.stem.partition("-")[2]) + 1
    first = 0 if before is None else before.seeds.first + before.seeds.reporting
    design = sizing.choose(left, designing.price(pilot, Results(pilot.store), told.tried))
    choice = execution.kept(pilot.store)
    if choice is not None:  # threads are part of a run's name: with others the pilot's runs would not count
        folder = task.results / f"study-{which}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / execution.FILE, read_json(pilot.store.folder / execution.FILE, (), "Delete it."))
    path = task.folder / f"study-{which}.yaml"
    _write(path, designing.study(task.folder / "pilot.yaml", which, design, first))
    lines = [
        f"pilot: best rates {', '.join(f'{rate:g} at r={rank}' for rank, rate in told.rates.items())}",
        f"study: {design.arms} plans x {design.seeds} seeds, {design.runs} runs, about "
        f"{_span(design.seconds)}; declared in {path}",
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


def _still(task: Task, study: Study) -> str:
    """Return what is left of a declared study, and plainly where that exceeds the time now given."""
    works = designing.left(study)
    if not works:
        return "its runs are all there; the verdict, the plan, its adapter and the report are left to write"
    takes = designing.duration(study, works, _speed(study))
    runs = ("some " if grid(study).unfinished else "") + count(len(works), "run")
    said = f"{runs} left to do, about {_span(takes)}"
    if _fits(task, takes):
        return said
    return (
        f"{said}. With the report that exceeds the {_span(task.seconds)} now given: the study keeps the size "
        "it was declared with, as changing it would make it exploratory. It can be stopped and resumed."
    )


def _run_and_close(task: Task, study: Study) -> Recommendation:
    with task.watch() as observer:
        run_together(study, observer)
    results = Results(Store(task.results, study.config.name))
    answer = recommend(results)
    reporting.write_all(study.file.path, task.results, folder=task.folder / "report", pictures=False)
    _hand_out(task, results, answer)
    return answer


def _hand_out(task: Task, results: Results, answer: Recommendation) -> None:
    """Write the plan, its adapter and the answer; the baseline's where nothing was shown.

    The answer is taken away first and written last, so that where it lies it is that of the plan beside it,
    and its study needs nothing more.
    """
    arm = answer.chosen or str(results.config.baseline)
    done = {s: r for s, r in sorted(results.of(arm).items()) if r["status"] == "done"}
    file = task.folder / "answer.json"
    file.unlink(missing_ok=True)
    if done:
        _copy(results.store.path(next(iter(done.values()))["run_id"]), task.folder)
    write_json(file, answer.as_dict() | {"handed_out": arm if done else None})
    if not done:
        task.say(f"no run of {arm} ended well, so there is no plan to hand out.")
        return
    why = "" if answer.chosen else " (by default: nothing smaller or other was shown to be good enough)"
    task.say(
        f"plan: {task.folder / 'plan.json'}, that of {arm}{why}; adapter: {task.folder / 'adapter'}, trained "
        f"on {results.config.data.train} rows with seed {next(iter(done))}"
    )
    task.say(f"report: {task.folder / 'report' / 'report.html'}; all of it: {task.folder}")


def _copy(run: Path, folder: Path) -> None:
    """Put a run's plan and adapter into a folder, in the place of those that lie there."""
    with replacing(folder / "plan.json") as aside:
        shutil.copyfile(run / "plan.json", aside)
    aside = folder / ".adapter"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(run / "adapter", aside)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    aside.rename(folder / "adapter")


# --- without running --------------------------------------------------------------------------------


def _dry(task: Task, unfinished: Path | None) -> None:
    """Say what would be done and what it would take; run and write nothing."""
    if unfinished is not None:
        still = _still(task, open_study(unfinished, task.results))
        task.say(f"{unfinished} is not finished: the command without --dry-run goes on with it: {still}")
        return
    if (task.folder / "pilot.yaml").exists():
        rows, price, runs, seconds = _begun(task)
    else:
        rows, tokens, speed = _rows(task)
        price = sizing.price_of(rows, tokens, speed)
        runs, seconds = sizing.pilot_takes(price)
    for line in _pilot_price(task, runs, seconds):
        task.say(line)
    left = task.seconds - CLOSING_SECONDS - seconds
    design = sizing.choose(left, price)
    task.say(
        f"study, if runs take what was measured: {design.arms} plans x {design.seeds} seeds, {design.runs} "
        f"runs, about {_span(design.seconds)}; what it can show depends on the spread that the pilot sees"
    )
    for line in designing.limits(design, rows["train"], left):
        task.say(line)


def _begun(task: Task) -> tuple[dict[str, int], sizing.Price, int, float]:
    """Return the rows of the pilot in the folder, the price of runs, and the runs and seconds left of it."""
    study = open_study(task.folder / "pilot.yaml", task.results)
    task.say(_as_before(study))
    now, rows, works, speed = grid(study), _rows_of(study), designing.left(study), _speed(study)
    price = sizing.price_of(rows, mean_tokens(study.context), speed)
    tried = max(len(found["grid"]) for found in now.rates.values())
    price = dataclasses.replace(price, rates=max(tried, price.rates) if now.unfinished else tried)
    return rows, price, len(works), designing.duration(study, works, speed)
