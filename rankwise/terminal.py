"""What the command line prints: tables, the live progress of a study, errors. All text is escaped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table
from rich.text import Text

from rankwise.grid import Grid, Planned, Study, grid
from rankwise.run import work_of
from rankwise.store import Store
from rankwise.study import Observer
from rankwise.tables import (
    ArmRow,
    ContrastRow,
    Results,
    arm_rows,
    captions,
    contrast_rows,
    design_warnings,
    state_counts,
)

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def number(value: float | None, form: str = ".4f") -> str:
    """Format a number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def result_table(results: Results) -> Table:
    """Return the arms' table with its captions below."""
    table = Table(title=escape(results.config.name), caption=escape("\n".join(captions(results))))
    table.caption_justify = "left"
    for heading in ("arm", "ranks", "scale"):
        table.add_column(heading)
    for heading in (
        "parameters",
        "rate",
        "seeds",
        "test loss",
        "sd",
        "ppl",
        "gain",
        "accuracy",
        "tok/s",
        "GB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in arm_rows(results):
        table.add_row(*(escape(cell) for cell in _cells(row)))
    untouched = results.untouched()
    table.add_row("untouched model", *[""] * 5, number(untouched))
    return table


def _cells(row: ArmRow) -> list[str]:
    seeds = f"{row.done}/{row.wanted}" + (f", {row.failed} failed" if row.failed else "")
    return [
        row.arm + ("" if row.equal_budget else " *"),
        row.ranks,
        row.scale,
        number(row.parameters, ",d"),
        number(row.rate, "g"),
        seeds,
        number(row.loss),
        number(row.loss_sd),
        number(row.perplexity, ".3f"),
        number(row.gain),
        number(row.token_accuracy, ".1%"),
        number(row.tokens_per_second, ".0f"),
        number(None if row.peak_bytes is None else row.peak_bytes / 1e9, ".1f"),
    ]


def contrast_table(results: Results) -> Table:
    """Return the declared contrasts, one a line."""
    table = Table(title="declared contrasts: difference in test loss, arm minus the other")
    for heading in ("arm", "against"):
        table.add_column(heading)
    for heading in ("difference", "95 % interval", "p (Holm)", "p (sign flip)", "margin"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for row in contrast_rows(results):
        table.add_row(*(escape(cell) for cell in _contrast_cells(row)))
    return table


def _contrast_cells(row: ContrastRow) -> list[str]:
    p = row.paired
    return [
        row.arm,
        row.against,
        number(p.mean, "+.4f") if p else "-",
        f"{p.low:+.4f} to {p.high:+.4f}" if p else "-",
        number(row.p_holm, ".3f"),
        number(p.p_sign_flip, ".3f") if p else "-",
        number(row.margin),
        row.verdict,
    ]


class StudyProgress(Observer):
    """A study's progress: a live bar and table on a terminal, one line per run elsewhere."""

    def __init__(self) -> None:
        self.live_terminal = err.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            Remaining(elapsed_when_finished=False),
            console=err,
        )
        self.task = self.bar.add_task("study", total=None)
        self.live = Live(console=err, refresh_per_second=4, transient=True)
        self.began: dict[str, float] = {}
        self.counts = (0, 0)
        self.done: dict[str, int] = {}
        self.wanted: dict[str, int] = {}
        self.worked = 0

    def __enter__(self) -> StudyProgress:
        if self.live_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live_terminal:
            self.live.stop()

    def grid(self, grid: Grid, store: Store, work: dict[str, int]) -> None:
        """Take in a (possibly longer) list of runs."""
        names = {p.run_id: p for p in grid.runs}
        finished = {run_id for run_id in names if store.has(run_id)}
        self.counts = (len(finished), len(names))
        self.done, self.wanted = {}, {}
        for run_id, planned in names.items():
            label = f"{planned.arm} ({planned.role})"
            self.wanted[label] = self.wanted.get(label, 0) + 1
            self.done[label] = self.done.get(label, 0) + (run_id in finished)
        left = sum(work[run_id] for run_id in names if run_id not in finished)
        self.bar.update(self.task, total=self.worked + left, completed=self.worked)
        if not self.live_terminal and left:
            more = ", more once learning rates are tuned" if grid.unfinished else ""
            err.print(f"{len(finished)} of {len(names)} runs done{more}")
        self._draw()

    def started(self, planned: Planned, work: int) -> None:
        """Note a run's start."""
        self.began[planned.run_id] = time.perf_counter()
        self.bar.update(self.task, description=escape(f"{planned.arm} seed {planned.seed}"))
        self.target = self.worked + work
        self._draw()

    def work(self, units: int) -> None:
        """Advance the bar."""
        self.worked += units
        self.bar.update(self.task, completed=self.worked)
        self._draw()

    def finished(self, planned: Planned, status: str) -> None:
        """Note a run's end."""
        self.worked = self.target
        self.bar.update(self.task, completed=self.worked)
        self.counts = (self.counts[0] + 1, self.counts[1])
        label = f"{planned.arm} ({planned.role})"
        self.done[label] = self.done.get(label, 0) + 1
        seconds = time.perf_counter() - self.began[planned.run_id]
        rate = "" if planned.rate is None else f", rate {planned.rate:g}"
        place = f"[{self.counts[0]}/{self.counts[1]}]"
        text = f"{place} {label} seed {planned.seed}{rate}: {status}, {seconds:.0f} s"
        if not self.live_terminal:
            err.print(Text(text + self._eta()))
        self._draw()

    def waiting(self, runs: int) -> None:
        """Note that the rest is in other processes' hands."""
        self.bar.update(self.task, description=f"waiting for another process ({runs} runs)")
        self._draw()

    def _eta(self) -> str:
        left = self.bar.tasks[0].time_remaining
        if not left:
            return ""
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"

    def _draw(self) -> None:
        if self.live_terminal:
            table = Table(box=None, pad_edge=False)
            table.add_column("arm")
            table.add_column("runs", justify="right")
            for label, wanted in self.wanted.items():
                table.add_row(escape(label), f"{self.done.get(label, 0)}/{wanted}")
            self.live.update(Group(table, self.bar))


def print_results(store: Store, study: Path) -> int:
    """Print the tables and where everything lies; return the number of failed runs."""
    results = Results(store)
    out.print(result_table(results))
    if results.config.contrasts:
        out.print(contrast_table(results))
    out.print(
        f"records: {store.folder}/runs/  index: {store.folder / 'study.json'}", markup=False, soft_wrap=True
    )
    return len(results.failures())


def print_status(store: Store, study: Path) -> None:
    """Print runs by state and the results so far."""
    results = Results(store)
    table = Table(title=f"runs of {escape(results.config.name)}")
    states = ("done", "failed", "running", "pending")
    table.add_column("role")
    for state in states:
        table.add_column(state, justify="right")
    for role, counts in state_counts(results).items():
        table.add_row(role, *(str(counts.get(state, 0)) for state in states))
    out.print(table)
    print_results(store, study)


def print_design(study: Study) -> None:
    """Print what a valid study will do and what it can and cannot answer."""
    config, context = study.config, study.context
    now = grid(study)
    pending = now.pending(study.store)
    tokens = sum(work_of(p.run, context) for p in pending)
    out.print(f"{study.file.path}: valid", markup=False, soft_wrap=True)
    out.print(
        f"model: {config.model} ({context.inventory.base_parameters:,} parameters)",
        markup=False,
        soft_wrap=True,
    )
    splits = context.prepared.splits
    out.print(
        f"rows: train {config.data.train} of a pool of {len(splits.pool)}, validation "
        f"{len(splits.validation)}, test {len(splits.test)}, reserved {len(splits.reserved)}"
    )
    out.print(
        f"runs: {len(now.runs)} known, {len(pending)} pending ({tokens:,} forward token passes)"
        + (", reporting runs follow the tuning" if now.unfinished else "")
    )
    for notice in (*design_warnings(config), *context.base.notices, *context.inventory.notices):
        out.print(f"note: {notice}", markup=False, soft_wrap=True)
