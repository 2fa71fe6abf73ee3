"""How a study's runs are spread over the processor: how many processes, each with how many threads.

Small work between the matrix products does not gain from threads, so several processes with few threads each
often do more in an hour than one with all. Which is faster is measured. Threads decide a run's last bits and
are part of its name, so the choice is made once per study and kept in `results/<study>/execution.json`;
processes are not, and follow from the machine at hand each time. The most that worked at a time in any
sitting stand there too, as `most_processes`, for whoever compares times.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from rankwise import machine
from rankwise.config import MOST_PROCESSES, digest
from rankwise.errors import RankwiseError
from rankwise.grid import Grid, Planned, Study, grid, run_config
from rankwise.run import TRAIN_COST, work_of
from rankwise.speed import NoSpeed, Speed, measure, shape, steps_for_window
from rankwise.store import Store, read_json, write_json
from rankwise.train import Diverged

Together = Callable[[Planned, int, int, int], Speed]
"""Measures (run, processes, threads, steps) at the same time; may raise `NoSpeed`."""

SMALL_STUDY_SECONDS = 120.0
"""Work shorter than this is not shared: starting and measuring a second process takes about 10 s on 2 cores
(an import and a load of 6 s, a measurement of 4 s), and the gain that was measured is 8 to 20 %."""

PROBE_SECONDS = 60.0
"""No further number of processes is tried after this; with 2 cores there is only one to try."""

MARGIN = 1.03
"""Several processes must be faster than one by this factor: less is noise, and one process is simpler."""

MEMORY_SHARE = 0.8
"""Share of the free memory that all processes together may take."""

FILE = "execution.json"
REMEDY = "Delete it to have processes and threads chosen anew; finished runs keep their threads."


@dataclass(frozen=True)
class Choice:
    """Processes and threads, the reason in words, what was measured, and the study that it was made for.

    `most_processes` is how many worked at a time in any sitting: runs that share a machine take longer.
    """

    processes: int
    threads: int
    why: str
    measured: tuple[Speed, ...] = ()
    study: str = ""
    most_processes: int = 0

    @property
    def compared(self) -> bool:
        """Whether several ways were measured."""
        return len(self.measured) > 1

    def __str__(self) -> str:
        return f"{shape(self.processes, self.threads)}: {self.why}"


# --- what was chosen before ---------------------------------------------------------------------


def kept(store: Store) -> Choice | None:
    """Return the study's choice as it was kept, or None.

    Raises:
        RankwiseError: when the file was edited or damaged by hand.
    """
    path = store.folder / FILE
    if not path.exists():
        return None
    found = read_json(path, ("processes", "threads", "why", "measured", "study"), REMEDY)
    try:
        measured = tuple(Speed(**speed) for speed in found["measured"])
        most = found.get("most_processes", found["processes"])  # older files have the choice alone
        counts = [found["processes"], found["threads"], most]
        counts += [count for speed in measured for count in (speed.processes, speed.threads)]
        if any(type(count) is not int or not 1 <= count <= 1024 for count in counts):
            raise TypeError("processes and threads are whole numbers from 1 to 1024")
        if any(not speed.tokens_per_second > 0 or speed.peak_bytes < 0 for speed in measured):
            raise TypeError("a measured speed is a number above 0")
    except TypeError as error:
        raise RankwiseError(f"{path} is damaged: {error}. {REMEDY}") from None
    said = (str(found["why"]), measured, str(found["study"]))
    return Choice(found["processes"], found["threads"], *said, most_processes=most)


def keep(study: Study, choice: Choice) -> None:
    """Write the study's choice, with what was measured and on which machine."""
    about = {
        "processes": choice.processes,
        "most_processes": choice.most_processes,
        "threads": choice.threads,
        "why": choice.why,
        "measured": [asdict(speed) for speed in choice.measured],
        "study": _name(study),
        "machine": machine.describe(study.context.device, choice.threads),
    }
    write_json(study.store.folder / FILE, about)


def keep_most(store: Store, processes: int) -> None:
    """Change the most processes of any sitting in what is kept, and nothing else of it."""
    path = store.folder / FILE
    write_json(path, read_json(path, (), REMEDY) | {"most_processes": processes})


def bound_threads(study: Study) -> int | None:
    """Return the threads that this study's runs must have, or None while that is free.

    The study file comes first, then the kept choice, then records of the study that were made before there
    was one. A choice that was made without comparing (for a trial with few rows, say) binds the study as it
    was then, and any study that its records belong to.
    """
    if study.config.train.threads is not None:
        return study.config.train.threads
    choice = kept(study.store)
    if choice is not None and (choice.compared or choice.study == _name(study)):
        return choice.threads
    return _threads_of_records(study)


def settled(study: Study) -> Study:
    """Return the study with the threads that its runs must have, if any are bound."""
    threads = bound_threads(study)
    return study if threads is None else with_threads(study, threads)


def with_threads(study: Study, threads: int) -> Study:
    """Return the study with this many threads, and set them."""
    torch.set_num_threads(threads)
    return replace(study, context=replace(study.context, threads=threads))


def _name(study: Study) -> str:
    return digest(study.config.model_dump(mode="json"))


def _threads_of_records(study: Study) -> int | None:
    """Return the threads that most of the study's present runs were recorded with."""
    found = set()
    for path in study.store.runs.glob("*/config.json"):
        try:
            found.add(int(json.loads(path.read_text())["threads"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged by hand: whoever needs that record says so
    hits: Counter[int] = Counter()
    for threads in sorted(found):
        runs = {p.run_id for p in grid(replace(study, context=replace(study.context, threads=threads))).runs}
        hits[threads] = sum(map(study.store.has, runs))
    return max(hits, key=lambda threads: hits[threads]) if any(hits.values()) else None


# --- the choice -------------------------------------------------------------------------------------


def choose(study: Study, asked: int | None, together: Together) -> Choice:
    """Choose processes and threads for what is pending.

    Args:
        study: opened, its store too.
        asked: the number of processes that the person wants; None leaves it to this function.
        together: see `Together`.
    """
    cores, bound = machine.cores(), bound_threads(study)
    threads = bound or max(1, cores // (asked or 1))
    if asked is not None:
        return Choice(asked, threads, "as --processes says")
    if study.context.device != "cpu":
        return Choice(1, threads, "the GPU does the work")
    study = with_threads(study, threads)  # threads are part of a run's name: without them all would seem free
    now = grid(study)
    states = [study.store.state(planned.run_id) for planned in now.pending(study.store)]
    free, busy = states.count("pending"), states.count("running")
    most = min(MOST_PROCESSES, free, (cores // threads if bound else cores) - busy)
    planned = first_training(now, study.store)
    if most < 2 or planned is None:
        return Choice(1, threads, "nothing to share: one run is left" if free < 2 else "it takes every core")
    try:
        if bound:
            return _for_these_threads(study, planned, works(study, now), most)
        return _fastest(study, planned, works(study, now), most, together)
    except (NoSpeed, Diverged) as error:
        return Choice(1, threads, f"no speed could be measured ({error})")


def _for_these_threads(study: Study, planned: Planned, work: list[int], most: int) -> Choice:
    """Choose the number of processes where the threads of each are bound."""
    before, threads = kept(study.store), study.context.threads
    known = [speed for speed in before.measured if speed.threads == threads] if before else []
    speed = known[-1] if known else measure(study, planned, lambda rate: 0)
    measured = before.measured if before is not None and known else (speed,)
    if seconds(work, 1, speed.tokens_per_second / speed.processes) < SMALL_STUDY_SECONDS:
        return Choice(1, threads, "the work that is left is small", measured)
    processes = min(most, most_by_memory(speed.peak_bytes))
    if processes < most:
        return Choice(processes, threads, _no_room(speed.peak_bytes, processes + 1), measured)
    chosen = before is not None and before.compared and before.why
    return Choice(processes, threads, chosen or "the threads are set, and cores are free", measured)


def _fastest(study: Study, planned: Planned, work: list[int], most: int, together: Together) -> Choice:
    """Measure one process with all cores, then more with fewer each, as long as that is faster."""
    cores, began, steps = study.context.threads, time.perf_counter(), 0

    def steps_to_time(rate: float) -> int:
        nonlocal steps
        steps = 0 if seconds(work, 1, rate) < SMALL_STUDY_SECONDS else steps_for_window(study, planned, rate)
        return steps

    best = measure(study, planned, steps_to_time)
    if not steps:
        return Choice(1, cores, "the study is small", (best,))
    room = most_by_memory(best.peak_bytes)
    measured, why = [best], _no_room(best.peak_bytes, room + 1) if room < most else ""
    for count in candidates(cores, min(most, room)):
        try:
            measured.append(together(planned, count, cores // count, steps))
        except NoSpeed as error:
            why = str(error)
            break
        before = seconds(work, best.processes, best.tokens_per_second)
        if seconds(work, count, measured[-1].tokens_per_second) * MARGIN > before:
            break
        best = measured[-1]
        if time.perf_counter() - began > PROBE_SECONDS:
            break
    said = [f"{best.tokens_per_second:,.0f} tokens/s", *(str(m) for m in measured if m is not best), why]
    return Choice(best.processes, best.threads, "; ".join(filter(None, said)), tuple(measured))


def _no_room(peak_bytes: int, processes: int) -> str:
    return f"{processes} processes would need {processes * peak_bytes / 1e9:.1f} GB of memory"


# --- what is still to do --------------------------------------------------------------------------


def works(study: Study, now: Grid) -> list[int]:
    """Return the work of every pending run, and of the reporting runs that tuning will add (`work_of`)."""
    context, config = study.context, study.config
    pending = [work_of(planned.run, context) for planned in now.pending(study.store)]
    if now.unfinished:
        for arm in config.arms:
            later = work_of(run_config(study, arm, "reporting", 0, 1e-3), context)
            pending += [later] * config.seeds.reporting
    return pending


def first_training(now: Grid, store: Store) -> Planned | None:
    """Return the run that a measurement trains a little: the first pending one that trains."""
    return next((p for p in now.pending(store) if p.role != "untouched"), None)


def seconds(work: Sequence[int], processes: int, tokens_per_second: float) -> float:
    """Estimate the time of runs shared by processes that together train at this speed.

    Runs are not divided: each goes to the process that is free first, so the last may work alone.
    """
    ends = [0.0] * processes
    for units in work:
        first = ends.index(min(ends))
        ends[first] += units / TRAIN_COST * processes / tokens_per_second
    return max(ends)


def most_by_memory(peak_bytes: int) -> int:
    """Return how many processes of this peak fit in the share of memory that they may take."""
    room = machine.available_memory() + machine.resident_memory()  # this process is one of them
    return max(1, int(MEMORY_SHARE * room) // max(1, peak_bytes))


def candidates(cores: int, most: int) -> list[int]:
    """Return numbers of processes worth measuring: divisors of the cores, each well above the last."""
    found = [1]
    for count in range(2, min(cores, most) + 1):
        if cores % count == 0 and count >= 1.5 * found[-1]:
            found.append(count)
    return found[1:]
