"""The page's tables, as cells of text: the arms, the declared contrasts, the ladders' plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankwise.advice import Recommendation
from rankwise.contrasts import contrast_rows, margin_words
from rankwise.figuretables import loss_points
from rankwise.report.columns import NOTHING, ladder_rows
from rankwise.report.details import budget_of, ends
from rankwise.report.traces import FAILED, form, interval
from rankwise.tables import ArmRow, Results, arm_rows


@dataclass(frozen=True)
class Lines:
    """A table as text.

    Attributes:
        columns: heading, and what it means.
        numeric: which columns are numbers, and stand at the right.
        rows: place of the arm in the study (None for the untouched model), and cells.
        shared: what every line has in common and no column shows.
    """

    columns: list[tuple[str, str]]
    numeric: list[bool]
    rows: list[tuple[int | None, list[str]]]
    shared: str = ""


ResultColumn = tuple[str, str, bool, Callable[[ArmRow], str]]
"""Heading, what it means, whether it is a number, and the cell of a row."""
MEASURED: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "forgetting": ("forgetting", "loss on general text, minus the untouched model's", "{:+.4f}".format),
    "rouge_l": ("ROUGE-L", "of greedy answers against the references", "{:.3f}".format),
    "chrf": ("chrF", "of greedy answers against the references", "{:.1f}".format),
    "rank_used": ("rank used", "share of the units that hold 90 % of the update's energy", "{:.0%}".format),
    "seconds_to_baseline": (
        "s to base",
        "training until the loss that the baseline ends at",
        "{:.0f}".format,
    ),
    "adapter_bytes": ("MB", "size of the adapter's file", lambda size: f"{size / 1e6:.1f}"),
}
"""What only some studies measure: field of a row, heading, meaning, form. Shown where an arm has it."""
SHARED = ("scale", "rate", "seeds")
"""Columns that become a sentence below the table when every arm has the same."""


def result_lines(results: Results) -> Lines:
    """Return the arms' table, and the untouched model as its last line."""
    rows = arm_rows(results)
    intervals = {p.arm: interval(p.low, p.high) for p in loss_points(results)}
    columns: list[ResultColumn] = [
        ("arm", "name in the study; * other parameters than the baseline's budget", False,
         lambda row: row.arm + ("" if row.equal_budget or row.parameters is None else " *")),
        ("loss", "mean test loss, nats per response token", True, lambda row: form(row.loss)),
        ("95 % interval", "t-interval of the mean loss", True, lambda row: intervals.get(row.arm, NOTHING)),
        ("sd", "standard deviation of the loss over seeds", True, lambda row: form(row.loss_sd)),
        ("gain", "loss of the untouched model minus the arm's", True, lambda row: form(row.gain)),
        ("seeds", "reporting seeds done of those wanted", True,
         lambda row: f"{row.done}/{row.wanted}" + (f", {row.failed} failed" if row.failed else "")),
        ("parameters", "trainable, fewest to most over seeds", True,
         lambda row: ends(row.parameters) or NOTHING),
        ("budget", "trainable parameters as the study states them", False,
         lambda row: budget_of(results, row.arm)),
        ("ranks", "lowest to highest over modules and seeds", False, lambda row: ends(row.ranks) or NOTHING),
        ("scale", "scale rule", False, lambda row: row.scale),
        ("rate", "learning rate", True, lambda row: form(row.rate, "g")),
        ("ppl", "perplexity", True, lambda row: form(row.perplexity, "#.4g")),
        ("right", "share of response tokens predicted right", True,
         lambda row: form(row.token_accuracy, ".1%")),
        ("bits/B", "bits per byte of the responses", True, lambda row: form(row.bits_per_byte, ".3f")),
        ("tok/s", "training tokens per second", True, lambda row: form(row.tokens_per_second, ".0f")),
        ("GB", "peak memory", True,
         lambda row: form(None if row.peak_bytes is None else row.peak_bytes / 1e9, ".1f")),
    ]  # fmt: skip
    columns += _further(rows)
    cells = {column[0]: [column[3](row) for row in rows] for column in columns}
    shared = [name for name in SHARED if len(rows) > 1 and len(set(cells[name])) == 1]
    kept = [column for column in columns if column[0] not in shared]
    lines: list[tuple[int | None, list[str]]] = [
        (i, [cells[column[0]][i] for column in kept]) for i in range(len(rows))
    ]
    untouched = {"arm": "untouched model", "loss": form(results.untouched())}
    lines.append((None, [untouched.get(column[0], "") for column in kept]))
    return Lines(
        [(heading, title) for heading, title, _, _ in kept], [numeric for _, _, numeric, _ in kept], lines,
        ", ".join(f"{name} {cells[name][0]}" for name in shared),
    )  # fmt: skip


def _further(rows: Sequence[ArmRow]) -> list[ResultColumn]:
    """Return what was measured beyond the usual, as columns after the usual ones."""
    return [
        (heading, title, True, _cell(name, write))
        for name, (heading, title, write) in MEASURED.items()
        if any(getattr(row, name) is not None for row in rows)
    ]


def _cell(name: str, write: Callable[[float], str]) -> Callable[[ArmRow], str]:
    return lambda row: NOTHING if getattr(row, name) is None else write(getattr(row, name))


def contrast_lines(results: Results) -> Lines:
    """Return the declared contrasts; no line where none is declared."""
    place = {arm: i for i, arm in enumerate(results.config.arms)}
    columns = [
        ("arm", ""), ("against", ""), ("verdict", "what may be said"),
        ("difference", "loss of the arm minus the other"),
        ("95 % interval", "paired t-interval, which decides"),
        ("bootstrap", "95 %, of new seeds and new test rows"),
        ("p Holm", "paired t-test, adjusted for all contrasts"),
        ("p flip", "exact sign-flip test"), ("could see", "difference found in 80 of 100 such studies"),
    ]  # fmt: skip
    lines: list[tuple[int | None, list[str]]] = []
    rows = contrast_rows(results)
    for row in rows:
        p = row.paired
        numbers = [
            form(p.mean if p else None, "+.4f"), interval(p.low, p.high, "+.4f") if p else NOTHING,
            interval(*row.bootstrap, "+.4f") if row.bootstrap else NOTHING,
            form(row.p_holm, ".3f"), form(p.p_sign_flip if p else None, ".3f"),
            form(p.detectable if p else None),
        ]  # fmt: skip
        lines.append((place[row.arm], [row.arm, row.against, row.verdict, *numbers]))
    return Lines(columns, [False] * 3 + [True] * 6, lines, margin_words(results) if rows else "")


def ladder_lines(answer: Recommendation) -> Lines:
    """Return the plans of the study's ladders, each ladder's from the fewest parameters."""
    place = {arm: i for i, arm in enumerate(answer.results.config.arms)}
    columns = [
        ("plan", "name of the arm"), ("ladder", "as declared"),
        ("shown", "whether it is shown to lose less than the margin against every plan of the ladder"),
        ("parameters", "trained, mean over seeds"), ("loss", "mean test loss, nats per response token"),
        ("to largest", "mean loss minus that of the ladder's largest plan, over the seeds of both"),
        ("hardest rival", "the plan of the ladder that this one is hardest to call no worse than"),
        ("at most", "upper bound of the loss minus that rival's, one-sided, at the level"),
        ("level", "of the test; the ladders' tests together stay within 5 %"),
        (FAILED, "of the arm; in no mean"),
    ]  # fmt: skip
    lines: list[tuple[int | None, list[str]]] = [
        (place[row.plan], [
            row.plan, row.ladder, row.shown + ", the cheapest" * row.chosen, form(row.parameters, ",d"),
            form(row.loss), form(row.difference, "+.4f"), row.hardest_rival or NOTHING,
            form(row.upper_bound, "+.4f"),
            NOTHING if row.level is None else f"{100 * row.level:.2f} %", str(row.failed),
        ]) for row in ladder_rows(answer)
    ]  # fmt: skip
    said = margin_words(answer.results)
    return Lines(columns, [False] * 3 + [True] * 3 + [False] + [True] * 3, lines, said)
