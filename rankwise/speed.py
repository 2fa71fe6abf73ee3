"""How fast a run trains here: a few steps of it, measured aside and without a trace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankwise import machine
from rankwise.data import Example, training_rows
from rankwise.engine.batches import optimizer_steps
from rankwise.grid import Planned, Study
from rankwise.methods.session import adapted
from rankwise.run import session_for
from rankwise.train import train_adapters

WINDOW_SECONDS = 2.5
"""Least time that a speed is taken over, after a first step that warms up."""

PROBE_TOKENS = 512
"""Most tokens of a measured step, so that a measurement stays short where a study's steps are long."""

WARM_TOKENS = 256
"""Most tokens of the first step, which is not timed with the rest (one row at least)."""

MOST_STEPS = 64
"""Of a measurement."""


class NoSpeed(Exception):
    """Processes that should have been measured together did not get there; the text says why."""


@dataclass(frozen=True)
class Speed:
    """What training gave: the speed of all processes together, the peak memory that each will need."""

    processes: int
    threads: int
    tokens_per_second: float
    peak_bytes: int

    def __str__(self) -> str:
        return f"{shape(self.processes, self.threads)} {self.tokens_per_second:,.0f} tokens/s"


def shape(processes: int, threads: int) -> str:
    """Return words such as "2 processes x 1 thread"."""
    plural = ("process" if processes == 1 else "processes", "thread" if threads == 1 else "threads")
    return f"{processes} {plural[0]} x {threads} {plural[1]}"


class _Enough(Exception):
    """The measurement has its steps."""


def measure(study: Study, planned: Planned, steps_to_time: Callable[[float], int]) -> Speed:
    """Train a run a little, aside and without a trace, and return this process's speed.

    Args:
        study: its threads are those that are set.
        planned: a run of the study that trains.
        steps_to_time: hears the tokens/s of the step that warms up, and returns how many steps to time after
            it; 0 leaves it at the first. Other processes can be waited for in it.

    The peak memory is what the process held before, and what the steps added in proportion to their tokens:
    a study's steps may be larger than the ones measured.
    """
    whole = _steps(study, planned)
    few = [_first_rows(step, PROBE_TOKENS) for step in whole]
    steps = [_first_rows(whole[0], WARM_TOKENS), *(few[i % len(few)] for i in range(MOST_STEPS + 1))]
    sizes = [_tokens(step) for step in steps]
    wanted, began, rate = 1, time.perf_counter(), 0.0

    def on_step(entry: dict[str, Any]) -> None:
        nonlocal wanted, began, rate
        now, done = time.perf_counter(), entry["step"] + 1
        if done == 1:
            rate = sizes[0] / entry["seconds"]
            wanted = 1 + min(MOST_STEPS, steps_to_time(rate))
            began = time.perf_counter()
        elif done == wanted:
            rate = sum(sizes[1:done]) / (now - began)
        if done == wanted:
            raise _Enough

    machine.reset_peak_memory(study.context.device)
    before = machine.resident_memory()
    _train_aside(study, planned, steps, on_step)
    peak = machine.peak_memory(study.context.device)["process_peak_bytes"]
    at_once = min(planned.run.train.micro_tokens, max(map(_tokens, whole)))
    peak = before + int(max(0, peak - before) * max(1.0, at_once / max(sizes[:wanted])))
    return Speed(1, study.context.threads, rate, peak)


def _steps(study: Study, planned: Planned) -> list[list[Example]]:
    rows = training_rows(study.context.prepared, planned.run.seed, planned.run.train_rows)
    return optimizer_steps(rows, planned.run.train, planned.run.seed)


def _tokens(rows: Iterable[Example]) -> int:
    return sum(len(row.input_ids) for row in rows)


def _train_aside(
    study: Study,
    planned: Planned,
    steps: Sequence[Sequence[Example]],
    on_step: Callable[[dict[str, Any]], None],
) -> None:
    """Train the run's adapters through these steps, or until `on_step` has enough; keep nothing.

    The rate is next to nothing, as no speed depends on it and no step may diverge.
    """
    context, run = study.context, planned.run
    try:
        with TemporaryDirectory(prefix="rankwise-") as folder:
            session = session_for(run, context, Path(folder))
            with adapted(session, session.plan) as model:
                train_adapters(
                    model, steps, run.train, rate=1e-9, seed=run.seed, folder=Path(folder),
                    engine=context.engine, checkpoint_seconds=math.inf, on_step=on_step,
                )  # fmt: skip
    except _Enough:
        pass


def _first_rows(step: Iterable[Example], tokens: int) -> list[Example]:
    """Return the step's first rows, at least one, as far as they stay within so many tokens."""
    rows: list[Example] = []
    for row in step:
        if rows and _tokens(rows) + len(row.input_ids) > tokens:
            break
        rows.append(row)
    return rows


def steps_for_window(study: Study, planned: Planned, rate: float) -> int:
    """Return how many measured steps fill the window at this speed; two at least."""
    sizes = [_tokens(_first_rows(step, PROBE_TOKENS)) for step in _steps(study, planned)]
    mean = sum(sizes) / len(sizes)
    return min(MOST_STEPS, max(2, math.ceil(WINDOW_SECONDS * rate / mean)))
