"""Why every module of a plan got the rank that it got, read from the plan alone."""

from __future__ import annotations

import math
import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from rankwise.budget import scale_factor
from rankwise.errors import visible
from rankwise.plans import PlanModule, RankPlan
from rankwise.strategies import STRATEGIES


@dataclass(frozen=True)
class Reason:
    """Why one module has its rank.

    Attributes:
        name: of the module.
        rank: what it got.
        share: its parameters as a share of the budget, of the plan's where there is no budget.
        value: what the rank was decided on: the gain per parameter of its last unit bought (of its first unit
            at rank 0), or the wanted rank; None where the plan does not hold it.
        text: a sentence.
    """

    name: str
    rank: int
    share: float
    value: float | None
    text: str


@dataclass(frozen=True)
class Explanation:
    """A plan's reasons, module by module; `print` shows them as text, rich as a table.

    Attributes:
        title: strategy, model and parameters.
        column: what `Reason.value` is here.
        notes: what holds for the whole plan: the formula, the probe and its cost, the cut-off.
        reasons: in model order.
    """

    title: str
    column: str
    notes: tuple[str, ...]
    reasons: tuple[Reason, ...]

    def __getitem__(self, name: str) -> Reason:
        """Return the reason of the module of that full name; KeyError if there is none."""
        return {reason.name: reason for reason in self.reasons}[name]

    def table(self) -> Table:
        """Return the reasons as a table, the notes below it."""
        table = Table(title=escape(visible(self.title)), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        shared = _shared_beginning([reason.name for reason in self.reasons])
        notes = [*self.notes, *([f"every name begins with {shared}"] if shared else [])]
        table.caption, table.caption_justify = "\n".join(escape(visible(note)) for note in notes), "left"
        table.add_column("module", no_wrap=True)
        for heading in ("rank", "share", self.column):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("why", overflow="fold")
        for reason in self.reasons:
            name, *cells = _cells(reason)
            table.add_row(*(escape(visible(cell)) for cell in (name[len(shared) :], *cells)))
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        rows = [
            f"{name}: rank {rank} ({share}): {why}" for name, rank, share, _, why in map(_cells, self.reasons)
        ]
        return "\n".join(map(visible, [self.title, *self.notes, *rows]))


def _shared_beginning(names: Sequence[str]) -> str:
    """Return what all names begin with, up to a dot; nothing for a single name."""
    shared = os.path.commonprefix(names) if len(names) > 1 else ""  # noqa: RUF071 (it need be no path)
    return shared[: shared.rfind(".") + 1]


def explain(plan: RankPlan) -> Explanation:
    """Say per module why it got what it got.

    Works on what `rankwise.plan`, `rankwise plan` and every study's `plan.json` keep; a plan made before
    values were kept is shown with its ranks and shares, and a note says what is missing.

    Args:
        plan: from anywhere; nothing else is read.

    Returns:
        A reason for every module; see `Explanation`.
    """
    values = plan.provenance.get("values")
    kind = plan.provenance.get("valued_as")
    if isinstance(values, Mapping) and set(values) == set(plan.ranks):
        column, notes, told = (_of_gains if kind == "gains" else _of_targets)(plan, values)
    else:
        column, notes, told = "value", (_missing(plan, kind),), lambda module: (None, "not recorded")
    money = plan.budget or max(1, plan.parameters)
    of = "parameters, no budget" if plan.budget is None else f"of {plan.budget:,} parameters"
    reasons = []
    for module in plan.modules:
        value, text = told(module)
        rank = plan.ranks[module.name]
        reasons.append(Reason(module.name, rank, module.cost * rank / money, value, text))
    return Explanation(
        f"{plan.strategy} on {plan.model}: {plan.parameters:,} {of}",
        column,
        (_formula(plan), *_probe(plan), *notes),
        tuple(reasons),
    )


Told = Callable[[PlanModule], tuple[float | None, str]]


def _of_gains(plan: RankPlan, values: Mapping[str, Any]) -> tuple[str, tuple[str, ...], Told]:
    last: dict[str, float] = {}  # gain per parameter of the last unit bought
    following: dict[str, float] = {}  # and of the first one not bought
    for module in plan.modules:
        rank, gains = plan.ranks[module.name], values[module.name]
        if 0 < rank <= len(gains):
            last[module.name] = gains[rank - 1] / module.cost
        if rank < len(gains):
            following[module.name] = gains[rank] / module.cost
    cutoff = max(following.values(), default=0.0)
    short = min((m.cost for m in plan.modules if m.name in following), default=0)
    left = plan.leftover or 0

    def told(module: PlanModule) -> tuple[float | None, str]:
        name, rank = module.name, plan.ranks[module.name]
        value = last.get(name, following.get(name) if rank == 0 else None)
        if not rank <= len(values[name]) <= rank + 1:
            return (
                None,
                f"the rank was changed after it was allocated: {len(values[name])} gains are recorded",
            )
        if rank == 0:
            why = "its first unit would gain" if name in following else "no unit of it has a value"
            return (
                value,
                f"{why} {value:.3g} per parameter, {_against(value, cutoff)}" if value is not None else why,
            )
        text = f"unit {rank}, its last, gains {last[name]:.3g} per parameter, "
        text += (
            "at or above the cut-off"
            if last[name] >= cutoff
            else "below the cut-off: bought with what was left"
        )
        if name not in following:
            full = "full rank" if rank == module.max_rank else "all that was measured"
            return value, f"{text}; {rank} is {full}"
        return (
            value,
            f"{text}; unit {rank + 1} would gain {following[name]:.3g}, {_against(following[name], cutoff)}",
        )

    notes = f"cut-off: {cutoff:.3g} per parameter, the best unit that was not bought"
    if short and left < short:
        notes += f"; {left:,} parameters are left and the cheapest such unit costs {short:,}"
    return "gain/param", (notes,) if following else (), told


def _against(value: float, cutoff: float) -> str:
    return "below the cut-off" if value < cutoff else "the cut-off: the best that the budget did not reach"


def _of_targets(plan: RankPlan, values: Mapping[str, Any]) -> tuple[str, tuple[str, ...], Told]:
    factor = 1.0
    if plan.budget is not None:
        factor = float(scale_factor(
            {name: Fraction(value) for name, value in values.items()},
            {m.name: m.cost for m in plan.modules}, plan.budget, {m.name: m.max_rank for m in plan.modules},
        ))  # fmt: skip
    total = sum(m.cost * values[m.name] for m in plan.modules) or 1

    def told(module: PlanModule) -> tuple[float | None, str]:
        wanted, rank = float(values[module.name]), plan.ranks[module.name]
        ends = {plan.options.get("min"): "least", plan.options.get("max"): "most"}
        clamp = f" (the {ends[wanted]} that the formula gives)" if wanted in ends else ""
        text = f"wants {wanted:.4g}{clamp}, {module.cost * wanted / total:.2%} of all that is wanted"
        scaled = wanted * factor
        if plan.budget is not None:
            text += f"; scaled to the budget {scaled:.4g}"
        if scaled > module.max_rank and rank == module.max_rank:
            return wanted, f"{text}; held at full rank, {module.max_rank}"
        return wanted, text + _rounding(scaled, rank)

    notes = (
        () if plan.budget is None else (f"every wanted rank is multiplied by {factor:.4g} to fit the budget",)
    )
    return "wanted", notes, told


def _rounding(scaled: float, rank: int) -> str:
    if math.isclose(scaled, rank, rel_tol=1e-5, abs_tol=1e-9):
        return ""  # the kept values have 6 digits
    if math.floor(scaled) == rank:
        return "; rounded down"
    if math.floor(scaled) + 1 == rank:
        return "; rounded up: its remainder was among the largest"
    return (
        f"; rank {rank} is more, as money was left" if rank > scaled else f"; rank {rank} was set afterwards"
    )


def _formula(plan: RankPlan) -> str:
    one = STRATEGIES.get(plan.strategy)
    options = ", ".join(f"{name} {value}" for name, value in plan.options.items() if name != "ranks")
    doc = "a strategy that this rankwise does not know" if one is None else one.doc
    return f"{plan.strategy}: {doc}" + (f" ({options})" if options else "")


def _probe(plan: RankPlan) -> tuple[str, ...]:
    probe = plan.provenance.get("probe")
    if not isinstance(probe, Mapping):
        return ()
    cost = probe.get("cost", {})
    spent = ", ".join(f"{amount:,} {name.replace('_', ' ')}" for name, amount in cost.items() if amount)
    told = {k: v for k, v in probe.items() if k not in ("kind", "cost") and isinstance(v, str | int | float)}
    about = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in told.items())
    return (f"probe: {probe.get('kind')}" + "".join(f"; {part}" for part in (about, spent) if part),)


def _missing(plan: RankPlan, kind: Any) -> str:
    one = STRATEGIES.get(plan.strategy)
    if kind == "trained" or (one is not None and one.kind == "trained"):
        return "these ranks were chosen while the adapters trained: the run's method.json holds the moves"
    return (
        "this plan does not say what modules were valued at (made by an earlier rankwise, by hand or by "
        "another program): make it again with `rankwise plan` or `rankwise.plan` to see it"
    )


def _cells(reason: Reason) -> tuple[str, str, str, str, str]:
    value = "-" if reason.value is None else f"{reason.value:.4g}"
    return reason.name, str(reason.rank), f"{reason.share:.2%}", value, reason.text
