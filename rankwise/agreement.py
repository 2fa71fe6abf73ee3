"""How far plans agree that were measured on different rows: noise must not be mistaken for structure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from rankwise.errors import RankwiseError
from rankwise.plans import RankPlan

MEASURES: dict[str, tuple[str, str]] = {
    "correlation": ("rank correlation (Spearman; 1: one order)", ".3f"),
    "difference": ("mean absolute difference of ranks", ".3f"),
    "moved": ("parameters that move, share of the budget", ".1%"),
}
"""Measure -> its words, and how its numbers are written."""


@dataclass(frozen=True)
class Pair:
    """How two plans on the same modules differ.

    Attributes:
        correlation: Spearman's rank correlation of the modules' LoRA ranks, -1 to 1; 1 for equal plans; NaN
            where one plan gives all modules one rank and the other does not.
        difference: mean over modules of |rank - rank|.
        moved: sum of cost x |rank - rank| / 2, as a share of the budget (of the larger plan's parameters
            where there is no budget): what is taken from some modules and given to others.
    """

    correlation: float
    difference: float
    moved: float


@dataclass(frozen=True)
class Agreement:
    """Plans of the same request on disjoint calibration rows, and how every two of them differ.

    Attributes:
        plans: one for each set of rows.
        pairs: every two of them, in the order (1, 2), (1, 3), ..., (2, 3), ...
    """

    plans: tuple[RankPlan, ...]
    pairs: tuple[Pair, ...]

    def mean(self, measure: str) -> float:
        """Return the mean over the pairs in which it is defined, NaN if in none; names as in `Pair`."""
        found = self._defined(measure)
        return sum(found) / len(found) if found else math.nan

    def range(self, measure: str) -> tuple[float, float]:
        """Return the least and the largest over the pairs in which it is defined; NaN if in none."""
        found = self._defined(measure)
        return (min(found), max(found)) if found else (math.nan, math.nan)

    def _defined(self, measure: str) -> list[float]:
        return [value for pair in self.pairs if not math.isnan(value := getattr(pair, measure))]

    def table(self) -> Table:
        """Return the measures as a table: mean, least and largest over the pairs."""
        one = self.plans[0]
        table = Table(
            title=f"{one.strategy}: {len(self.plans)} plans on disjoint calibration rows",
            box=SIMPLE_HEAD, padding=(0, 1),
        )  # fmt: skip
        table.add_column("over pairs of plans")
        for heading in ("mean", "least", "largest"):
            table.add_column(heading, justify="right", no_wrap=True)
        for measure, (words, form) in MEASURES.items():
            table.add_row(words, *(_number(v, form) for v in (self.mean(measure), *self.range(measure))))
        if undefined := len(self.pairs) - len(self._defined("correlation")):
            table.caption = (
                f"no rank correlation in {undefined} of {len(self.pairs)} pairs: one rank everywhere"
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        lines = [f"{self.plans[0].strategy}: {len(self.plans)} plans on disjoint calibration rows"]
        for measure, (words, form) in MEASURES.items():
            mean, low, high = (_number(v, form) for v in (self.mean(measure), *self.range(measure)))
            lines.append(f"{words}: {mean} ({low} to {high})")
        return "\n".join(lines)


def agreement(plans: Sequence[RankPlan]) -> Agreement:
    """Compare plans pairwise.

    Raises:
        RankwiseError: fewer than two plans, or plans of different modules.
    """
    if len(plans) < 2:
        raise RankwiseError(f"Agreement needs two plans or more; got {len(plans)}.")
    if any(set(plan.ranks) != set(plans[0].ranks) for plan in plans):
        raise RankwiseError("Plans can be compared where they rank the same modules; these do not.")
    return Agreement(tuple(plans), tuple(_pair(a, b) for a, b in itertools.combinations(plans, 2)))


def _pair(one: RankPlan, other: RankPlan) -> Pair:
    costs = np.array([module.cost for module in one.modules])
    a, b = (np.array([plan.ranks[module.name] for module in one.modules]) for plan in (one, other))
    money = one.budget or max(one.parameters, other.parameters)
    apart = np.abs(a - b)
    return Pair(_correlation(a, b), float(apart.mean()), float((costs * apart).sum() / 2 / max(1, money)))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if (a == b).all():
        return 1.0
    if (a == a[0]).all() or (b == b[0]).all():
        return math.nan
    from scipy.stats import spearmanr  # here, as it takes most of a second to load

    return float(spearmanr(a, b).statistic)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
