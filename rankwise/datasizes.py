"""The axis `train_examples`: one study for each number of training rows, and where their answer settles.

Each number makes a study of its own, with a folder of its own (`NAME-n64`), rates tuned anew: more rows are
more steps, and more steps want another rate. The first rows of a larger draw are the smaller draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from rankwise import stats
from rankwise.config import StudyConfig
from rankwise.store import Store
from rankwise.tables import Results, differences

Overrides = tuple[str, ...]


def sized(config: StudyConfig, overrides: Sequence[str] = ()) -> dict[int, Overrides]:
    """Return training rows -> the overrides that make the study with so many, fewest first.

    A study without the axis is itself alone.
    """
    if not config.train_examples:
        return {config.data.train: tuple(overrides)}
    return {
        rows: (*overrides, "train_examples=[]", f"data.train={rows}", f"name={config.name}-n{rows}")
        for rows in sorted(config.train_examples)
    }


def records(config: StudyConfig, results: Path) -> dict[int, Results]:
    """Return training rows -> the records of the study with so many, as far as it has begun."""
    found = {}
    for rows in sorted(config.train_examples):
        store = Store(results, f"{config.name}-n{rows}")
        if (store.folder / "study.json").exists():
            found[rows] = Results(store)
    return found


@dataclass(frozen=True)
class Agreement:
    """How far the arms' order at one number of rows is that at the largest.

    Attributes:
        rows: of training.
        pairs: of arms whose difference at the largest number has a 95 % paired t-interval on one side of 0.
        agree: of those, how many have the same sign of the mean difference here.
        correlation: Spearman's, of the arms' mean losses here and there; None with fewer than 3 arms.
    """

    rows: int
    pairs: int
    agree: int
    correlation: float | None


def agreements(by_size: Mapping[int, Results]) -> list[Agreement]:
    """Return each number of rows against the largest, fewest first; the intervals are not adjusted."""
    if len(by_size) < 2:
        return []
    largest = by_size[max(by_size)]
    arms = [arm for arm in largest.config.arms if all(one.losses(arm) for one in by_size.values())]
    decided = {pair: sign for pair in combinations(arms, 2) if (sign := _side(largest, *pair))}
    there = [statistics.fmean(largest.losses(arm).values()) for arm in arms]
    found = []
    for rows in sorted(by_size)[:-1]:
        here = by_size[rows]
        means = [statistics.fmean(here.losses(arm).values()) for arm in arms]
        agree = sum(_sign(here, *pair) == sign for pair, sign in decided.items())
        found.append(Agreement(rows, len(decided), agree, _spearman(means, there)))
    return found


def told(found: Sequence[Agreement], largest: int) -> list[str]:
    """Return in sentences where the order of the arms stops changing."""
    if not found:
        return []
    if not found[0].pairs:
        return [
            f"At {largest} rows no two arms are told apart (95 % paired intervals), so the amount of data "
            "cannot change their order: what there is of it is noise."
        ]
    lines = [
        f"{one.rows} rows: {one.agree} of the {one.pairs} pairs of arms that {largest} rows tell apart stand "
        "in the same order" + ("" if one.correlation is None else f" (Spearman {one.correlation:.2f})") + "."
        for one in found
    ]
    settled = largest
    for one in reversed(found):
        if one.agree < one.pairs:
            break
        settled = one.rows
    return [*lines, f"From {settled} rows on the order of those pairs no longer changes."]


def _sign(results: Results, arm: str, other: str) -> int:
    found = differences(results, arm, other)
    mean = statistics.fmean(found) if found else 0.0
    return (mean > 0) - (mean < 0)


def _side(results: Results, arm: str, other: str) -> int:
    """Return the sign of a difference whose interval leaves 0 out; 0 where it does not."""
    found = differences(results, arm, other)
    if len(found) < 2:
        return 0
    paired = stats.paired(found)
    return 1 if paired.low > 0 else -1 if paired.high < 0 else 0


def _spearman(here: Sequence[float], there: Sequence[float]) -> float | None:
    if len(here) < 3:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(here, there).statistic)
