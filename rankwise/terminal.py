"""What the command line prints: tables, and the live progress of a study.

Names and values are shown as they are: neither markup nor control characters in them are obeyed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import markup
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

from rankwise.contrasts import ContrastRow, contrast_rows, margin_words
from rankwise.errors import visible
from rankwise.observer import Observer
from rankwise.store import Store
from rankwise.tables import ArmRow, Results, arm_rows, captions, design_warnings, state_counts

if TYPE_CHECKING:
    from rankwise.config import StudyConfig
    from rankwise.grid import Grid, Planned, Study

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def escape(text: str) -> str:
    """Return text that rich and the terminal show as it is."""
    return markup.escape(visible(text))


def say(text: str, to: Console = out) -> None:
    """Print text as it is, one line of the text on one line."""
    to.print("\n".join(map(visible, text.split("\n"))), markup=False, soft_wrap=True)


def number(value: float | None, form: str = ".4f") -> str:
    """Format a number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def span(ends: tuple[int, int] | None) -> str:
    """Format "8", or "4-16" where the ends differ."""
    if ends is None:
        return "-"
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,}-{ends[1]:,}"


COLUMNS: dict[str, Callable[[ArmRow], str]] = {
    "arm": lambda row: row.arm + (" *" if row.other_budget else ""),
    "ranks": lambda row: span(row.ranks),
    "scale": lambda row: row.scale,
    "parameters": lambda row: span(row.parameters),
    "rate": lambda row: number(row.rate, "g"),
    "seeds": lambda row: f"{row.done}/{row.wanted}" + (f", {row.failed} failed" if row.failed else ""),
    "loss": lambda row: number(row.loss),
    "sd": lambda row: number(row.loss_sd),
    "ppl": lambda row: number(row.perplexity, "#.4g"),
    "gain": lambda row: number(row.gain),
    "right": lambda row: number(row.token_accuracy, ".1%"),
    "bits/B": lambda row: number(row.bits_per_byte, ".3f"),
    "forgets": lambda row: number(row.forgetting, "+.4f"),
    "ROUGE-L": lambda row: number(row.rouge_l, ".3f"),
    "chrF": lambda row: number(row.chrf, ".1f"),
    "used": lambda row: number(row.rank_used, ".0%"),
    "tok/s": lambda row: number(row.tokens_per_second, ".0f"),
    "GB": lambda row: number(None if row.peak_bytes is None else row.peak_bytes / 1e9, ".1f"),
}
SHARED = ("scale", "rate", "seeds")
"""Columns that become a line below the table when every arm has the same."""
MEASURED = ("forgets", "ROUGE-L", "chrF", "used")
"""Columns of what only some studies and newer records measure; they are not shown where nothing was."""
SPARED = ("right", "bits/B", "GB", *MEASURED)
"""Columns that a narrow terminal does without; the records have them."""


def result_table(results: Results) -> Table:
    """Return the arms' table: means over seeds, test loss in nats per response token; captions below."""
    rows = arm_rows(results)
    cells = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    shared = [name for name in SHARED if len(set(cells[name])) == 1]
    lines = [f"every arm: {', '.join(f'{name} {cells[name][0]}' for name in shared)}"] if shared else []
    table = Table(title=escape(f"{results.config.name}: test loss"), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption = "\n".join(map(escape, lines + captions(results)))
    table.caption_justify = "left"
    empty = [name for name in MEASURED if set(cells[name]) == {"-"}]
    left_out = [*shared, *empty] if out.width >= 100 else [*shared, *SPARED]
    shown = [name for name in COLUMNS if name not in left_out]
    for name in shown:
        table.add_column(
            name, justify="left" if name in ("arm", "ranks", "scale") else "right", overflow="fold"
        )
    for index in range(len(rows)):
        table.add_row(*(escape(cells[name][index]) for name in shown))
    before = results.untouched_metrics()
    untouched = {
        "arm": "untouched model",
        "loss": number(results.untouched()),
        "ROUGE-L": number(before.get("generation_rouge_l"), ".3f"),
        "chrF": number(before.get("generation_chrf"), ".1f"),
    }
    table.add_row(*(untouched.get(name, "") for name in shown))
    return table


def contrast_table(results: Results) -> Table:
    """Return the declared contrasts, one a line: test loss of an arm minus that of another."""
    rows = contrast_rows(results)
    table = Table(title="declared contrasts: test loss, arm - other", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    cells = {name: [cell(row) for row in rows] for name, cell in CONTRASTS.items()}
    if out.width < 100:
        del cells["bootstrap"]  # the report has it
    for name in cells:
        number_like = name not in ("arm", "other")
        table.add_column(
            name, justify="right" if number_like else "left", no_wrap=number_like, overflow="fold"
        )
    for place in range(len(rows)):
        table.add_row(*(escape(found[place]) for found in cells.values()))
    lines = [f"{row.arm} against {row.against}: {row.verdict}" for row in rows]
    if rows and (margin := margin_words(results)):
        lines.append(f"{margin}; p flip: the exact sign-flip test")
        if "bootstrap" in cells:
            lines.append("the paired t-interval decides; bootstrap: 95 %, of new seeds and new test rows")
    table.caption = "\n".join(map(escape, lines))
    table.caption_justify = "left"
    return table


def _ends(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:+.4f} {ends[1]:+.4f}"


CONTRASTS: dict[str, Callable[[ContrastRow], str]] = {
    "arm": lambda row: row.arm,
    "other": lambda row: row.against,
    "difference": lambda row: number(row.paired.mean if row.paired else None, "+.4f"),
    "95 % interval": lambda row: _ends((row.paired.low, row.paired.high) if row.paired else None),
    "bootstrap": lambda row: _ends(row.bootstrap),
    "p Holm": lambda row: number(row.p_holm, ".3f"),
    "p flip": lambda row: number(row.paired.p_sign_flip if row.paired else None, ".3f"),
}


@dataclass
class Going:
    """A run under way in some process: since when, and how much of its work is done."""

    planned: Planned
    began: float
    done: int = 0


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
            speed_estimate_period=900,  # seconds: a run works in bursts, between loading and scoring
        )
        self.task = self.bar.add_task("study", total=None)
        self.live = Live(console=err, refresh_per_second=4, transient=True)
        self.runs: dict[str, Planned] = {}
        self.work_of: dict[str, int] = {}
        self.before: set[str] = set()  # runs that had ended when they were first heard of
        self.ended: set[str] = set()
        self.going: dict[str, Going] = {}
        self.said = (0, 0)  # runs done and known, as they were last printed

    def __enter__(self) -> StudyProgress:
        if self.live_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live_terminal:
            self.live.stop()

    def grid(self, grid: Grid, store: Store, work: dict[str, int]) -> None:
        """Take in a (possibly longer) list of runs."""
        known, self.runs = self.runs.keys(), {p.run_id: p for p in grid.runs}
        self.work_of |= work
        recorded = {run_id for run_id in self.runs if store.has(run_id)}
        self.before |= recorded - known - self.ended
        self.ended |= recorded
        counts = len(self.ended & self.runs.keys()), len(self.runs)
        if not self.live_terminal and counts[0] < counts[1] and counts != self.said:
            more = ", more once learning rates are tuned" if grid.unfinished else ""
            say(f"{counts[0]} of {counts[1]} runs done{more}", err)
        self.said = counts
        self._draw()

    def started(self, planned: Planned, work: int) -> None:
        """Note a run's start."""
        self.work_of[planned.run_id] = work
        self.going[planned.run_id] = Going(planned, time.perf_counter())
        self._draw()

    def work(self, planned: Planned, units: int) -> None:
        """Advance the bar."""
        if planned.run_id in self.going:
            self.going[planned.run_id].done += units
        self._draw()

    def finished(self, planned: Planned, status: str) -> None:
        """Note a run's end."""
        went = self.going.pop(planned.run_id)
        self.ended.add(planned.run_id)
        self._draw()
        rate = "" if planned.rate is None else f", rate {planned.rate:g}"
        self.said = len(self.ended & self.runs.keys()), len(self.runs)
        place = f"[{self.said[0]}/{self.said[1]}] " if self.runs else ""
        label = f"{planned.arm} ({planned.role})"
        seconds = time.perf_counter() - went.began
        if not self.live_terminal:
            say(f"{place}{label} seed {planned.seed}{rate}: {status}, {seconds:.0f} s{self._eta()}", err)

    def waiting(self, runs: int) -> None:
        """Note that the rest is in other processes' hands."""
        if not self.going:
            self.bar.update(self.task, description=f"waiting for another process ({runs} runs)")
        self._draw()

    def note(self, text: str) -> None:
        """Print a sentence, above the bar where there is one."""
        say(text, err)

    def _eta(self) -> str:
        left = self.bar.tasks[0].time_remaining
        if not left:
            return ""
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"

    def _draw(self) -> None:
        total = sum(self.work_of[run_id] for run_id in self.runs.keys() - self.before)
        worked = sum(self.work_of[run_id] for run_id in self.ended - self.before)
        for run_id, run in self.going.items():
            worked += 0 if run_id in self.ended else min(run.done, self.work_of[run_id])
        self.bar.update(self.task, total=total or None, completed=worked)
        if self.going:
            at_work = ", ".join(f"{run.planned.arm} seed {run.planned.seed}" for run in self.going.values())
            self.bar.update(self.task, description=escape(at_work))
        if not self.live_terminal:
            return
        table = Table(box=None, pad_edge=False)
        table.add_column("arm")
        table.add_column("runs", justify="right")
        wanted = Counter(f"{run.arm} ({run.role})" for run in self.runs.values())
        done = Counter(f"{r.arm} ({r.role})" for run_id, r in self.runs.items() if run_id in self.ended)
        for label, count in wanted.items():
            table.add_row(escape(label), f"{done[label]}/{count}")
        self.live.update(Group(table, self.bar))


def print_results(store: Store) -> int:
    """Print the tables and where everything lies; return how many results are lost to failed runs."""
    results = Results(store)
    out.print(result_table(results))
    if results.config.contrasts:
        out.print(contrast_table(results))
    say(f"records: {store.folder}/runs/  index: {store.folder / 'study.json'}")
    return results.lost()


def print_status(store: Store, config: StudyConfig) -> None:
    """Print runs by state and the results so far."""
    results = Results(store)
    if config != results.config:
        say("note: the study has changed since its last run; what follows is as of that run", err)
    table = Table(title=f"runs of {escape(results.config.name)}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    states = ("done", "failed", "running", "pending")
    table.add_column("arm (role)")
    for state in states:
        table.add_column(state, justify="right")
    for label, counts in state_counts(results).items():
        table.add_row(escape(label), *(str(counts.get(state, 0)) for state in states))
    out.print(table)
    print_results(store)


def print_design(study: Study) -> None:
    """Print what a valid study will do and what it can and cannot answer."""
    from rankwise.grid import grid  # here, as these load PyTorch and the tables above need none
    from rankwise.run import work_of

    config, context = study.config, study.context
    now = grid(study)
    pending = now.pending(study.store)
    tokens = sum(work_of(p.run, context) for p in pending)
    say(f"{study.file.path}: valid")
    say(f"model: {config.model} ({context.inventory.base_parameters:,} parameters)")
    splits = context.prepared.splits
    say(
        f"rows: train {config.data.train} of a pool of {len(splits.pool)}, validation "
        f"{len(splits.validation)}, test {len(splits.test)}, reserved {len(splits.reserved)}"
    )
    say(
        f"runs: {len(now.runs)} known, {len(pending)} pending ({tokens:,} forward token passes)"
        + (", reporting runs follow the tuning" if now.unfinished else "")
    )
    for notice in (*design_warnings(config), *context.notices):
        say(f"note: {notice}")
