"""The tables of a study as named, typed columns: what the page shows and what is exported."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rankwise.advice import Recommendation
from rankwise.contrasts import ContrastRow, contrast_rows
from rankwise.figures.rows import Cost
from rankwise.figuretables import cost_rows, failed_runs, loss_points, rate_points, strategy_of
from rankwise.recommend import recommend
from rankwise.stats import Paired
from rankwise.tables import ArmRow, Results, arm_rows

Kind = Literal["text", "whole", "number", "flag"]
NOTHING = "–"  # noqa: RUF001 (a dash where there is nothing to show)
KINDS: dict[Any, Kind] = {str: "text", int: "whole", float: "number", bool: "flag"}
FORMS = {
    "rate": "g", "perplexity": "#.4g", "token_accuracy": ".4f", "bits_per_byte": ".4f", "p": ".3g",
    "p_holm": ".3g", "p_sign_flip": ".3g", "tokens_per_second": ".0f", "difference": "+.4f",
    "upper_bound": "+.4f", "level": "g",
}  # fmt: skip
"""How a number is written in LaTeX and Markdown, by column; others as `.4f`, or `.1f` for seconds."""


@dataclass(frozen=True)
class Column:
    """A column: its name in every format, and the kind of its values (None stands for a missing one)."""

    name: str
    kind: Kind

    def shown(self, value: Any) -> str:
        """Return a value as people read it; unescaped."""
        if value is None:
            return NOTHING
        if self.kind == "flag":
            return "yes" if value else "no"
        if self.kind == "whole":
            return f"{value:,}"
        if self.kind == "number":
            seconds = self.name.endswith(("seconds", "_time"))
            return format(value, FORMS.get(self.name, ".1f" if seconds else ".4f"))
        return str(value)


@dataclass(frozen=True)
class Table:
    """A table of a study.

    Attributes:
        name: of its files.
        caption: what it holds, one sentence.
        columns: in order.
        rows: values, one per column.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]


Field = tuple[Column, Callable[[Any], Any]]


def _fields(row: type[Any], leave: Sequence[str] = ()) -> list[Field]:
    """Return a dataclass's fields as columns; a pair of numbers makes two, its ends."""
    hints, found = typing.get_type_hints(row), []
    for field in dataclasses.fields(row):
        if field.name not in leave:
            found += _columns(field.name, hints[field.name])
    return found


def _columns(name: str, hint: Any) -> list[Field]:
    kinds = [hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(kinds[0]) is not tuple:
        return [(Column(name, KINDS[kinds[0]]), _taken(name))]
    kind = KINDS[typing.get_args(kinds[0])[0]]
    return [
        (Column(f"{end}_{name}", kind), _end(name, place)) for place, end in enumerate(("lowest", "highest"))
    ]


def _end(name: str, place: int) -> Callable[[Any], Any]:
    """Return what takes one end of a row's pair, or None where the row has none."""
    return lambda row: (getattr(row, name) or (None, None))[place]


def _taken(name: str) -> Callable[[Any], Any]:
    return lambda row: getattr(row, name)


def _table(name: str, caption: str, fields: Sequence[Field], rows: Sequence[Any]) -> Table:
    values = tuple(tuple(_known(value(row)) for _, value in fields) for row in rows)
    return Table(name, caption, tuple(column for column, _ in fields), values)


def _known(value: Any) -> Any:
    """Return None for a number that is none: past 20 seeds there is no exact sign-flip p."""
    return None if isinstance(value, float) and math.isnan(value) else value


def tables(results: Results) -> list[Table]:
    """Return every table of a study, as far as its records go.

    Returns:
        arms: means over the reporting seeds, as `tables.arm_rows` makes them, with the 95 % interval.
        contrasts: the declared ones, with what may be said of them.
        ladders: their plans, and how the tests of them ended; only of a study that declares some.
        learning_rates: each rate that was tried, on validation.
        costs: what a run of each arm took.
        runs: every run of the index with all its metrics.
    """
    ladders = [_ladders(results)] if results.config.ladders else []
    return [
        _arms(results), _contrasts(results), *ladders, _rates(results), _costs(results), runs_table(results)
    ]  # fmt: skip


def _arms(results: Results) -> Table:
    points = {point.arm: point for point in loss_points(results)}
    arms = results.config.arms
    fields = _fields(ArmRow)
    own: list[Field] = [
        (Column("strategy", "text"), lambda row: arms[row.arm].strategy),
        (Column("budget", "text"), lambda row: _text(arms[row.arm].budget)),
    ]
    interval: list[Field] = [
        (Column("loss_low", "number"), lambda row: points[row.arm].low if row.arm in points else None),
        (Column("loss_high", "number"), lambda row: points[row.arm].high if row.arm in points else None),
    ]
    place = next(i for i, (column, _) in enumerate(fields) if column.name == "loss_sd")
    fields = [*fields[:1], *own, *fields[1:place], *interval, *fields[place:]]
    return _table("arms", "Means over the reporting seeds, with 95 % t-intervals of the loss.", fields,
                  arm_rows(results))  # fmt: skip


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _contrasts(results: Results) -> Table:
    paired: list[Field] = [
        (column, lambda row, take=take: None if row.paired is None else take(row.paired))  # type: ignore[misc]
        for column, take in _fields(Paired)
    ]
    fields = _fields(ContrastRow, leave=("paired",))
    return _table("contrasts", "The declared contrasts: primary metric of the arm minus that of the other.",
                  [*fields[:2], *paired, *fields[2:]], contrast_rows(results))  # fmt: skip


@dataclass(frozen=True)
class LadderRow:
    """One plan of a ladder, as every table of them shows it; None where there is nothing to show.

    Attributes:
        ladder, plan: their names.
        parameters: trained, the mean over seeds.
        loss: the mean over the finished reporting runs.
        failed: reporting runs that are in no mean.
        difference: mean loss minus that of the ladder's largest plan.
        hardest_rival: the plan that this one is hardest to call no worse than.
        upper_bound: of the difference to it, one-sided, at `level`.
        level: of the test.
        shown: whether it is shown to lose less than the margin against every plan of the ladder, in words.
        chosen: whether it is the cheapest of the ladder that is.
    """

    ladder: str
    plan: str
    parameters: int | None
    loss: float | None
    failed: int
    difference: float | None
    hardest_rival: str | None
    upper_bound: float | None
    level: float | None
    shown: str
    chosen: bool


def ladder_rows(answer: Recommendation) -> list[LadderRow]:
    """Return the ladders' plans, each ladder's from the fewest parameters."""
    words = {True: "yes", False: "no", None: "not tested"}
    return [
        LadderRow(
            ladder=found.name,
            plan=rung.arm,
            parameters=rung.parameters,
            loss=rung.loss,
            failed=failed_runs(answer.results, rung.arm),
            difference=rung.difference,
            hardest_rival=rung.rival,
            upper_bound=rung.rival_bound,
            level=rung.level,
            shown=words[rung.passed],
            chosen=rung.arm == found.chosen,
        )
        for found in answer.ladders
        for rung in found.rungs
    ]


def _ladders(results: Results) -> Table:
    caption = "The ladders' plans: what they cost and lose, and how their tests against each other ended."
    return _table("ladders", caption, _fields(LadderRow), ladder_rows(recommend(results)))


def _rates(results: Results) -> Table:
    names: dict[str, Kind] = {"arm": "text", "strategy": "text", "x": "number", "mean": "number",
                              "low": "number", "high": "number", "chosen": "flag"}  # fmt: skip
    fields: list[Field] = [
        (Column("rate" if name == "x" else name, kind), _taken(name)) for name, kind in names.items()
    ]
    diverged: Field = (Column("diverged", "flag"), lambda row: row.mean is None)
    caption = "Validation loss of each learning rate that was tried: mean and range over the tuning seeds."
    return _table("learning_rates", caption, [*fields, diverged], rate_points(results))


def _costs(results: Results) -> Table:
    caption = "Mean seconds of a finished run, and the highest peak of memory."
    return _table("costs", caption, _fields(Cost), cost_rows(results))


def runs_table(results: Results) -> Table:
    """Return one line per run of the index; the state of a run without a record is "missing"."""
    infos = {run_id: _numbers(record["train_info"]) for run_id, record in results.records.items()}
    names = sorted({name for info in infos.values() for name in info})
    fixed: dict[str, Kind] = {"run_id": "text", "arm": "text", "strategy": "text", "role": "text",
                              "seed": "whole", "rate": "number", "state": "text", "failed_at": "whole",
                              "reason": "text"}  # fmt: skip
    columns = [Column(name, kind) for name, kind in fixed.items()]
    columns += [Column(name, _kind_of([info.get(name) for info in infos.values()])) for name in names]
    rows = []
    for run in results.index["runs"]:
        record, info = results.records.get(run["run_id"]), infos.get(run["run_id"], {})
        failure = (record or {}).get("failure") or {}
        arm = run["arm"]
        known = [run["run_id"], arm, strategy_of(results, arm) if arm in results.config.arms else None]
        known += [run["role"], run["seed"], run["rate"], record["status"] if record else "missing"]
        rows.append((*known, failure.get("step"), failure.get("reason"), *(info.get(n) for n in names)))
    caption = "Every run that the study's index names, with all its metrics."
    return Table("runs", caption, tuple(columns), tuple(rows))


def _numbers(info: dict[str, Any]) -> dict[str, float]:
    """Return the metrics and the other plain numbers of a run's `train_info`."""
    plain = {**{k: v for k, v in info.items() if k != "metrics"}, **info.get("metrics", {})}
    return {k: v for k, v in plain.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _kind_of(values: Sequence[Any]) -> Kind:
    return "whole" if all(isinstance(value, int) for value in values if value is not None) else "number"
