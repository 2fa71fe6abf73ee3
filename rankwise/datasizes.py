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
from rankwise.config import SCREENING_BELOW, StudyConfig
from rankwise.contrasts import differences
from rankwise.store import Store
from rankwise.studyfile import read_study
from rankwise.tables import Results, hopeless

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


def read_begun(path: Path, results: Path) -> list[tuple[StudyConfig, Results | None]]:
    """Return a file's study with its records (None before its first run), one for each number of rows.

    Raises:
        RankwiseError: the file has faults, or records cannot be read.
    """
    whole, found = read_study(path).config, []
    for overrides in sized(whole).values():
        config = read_study(path, overrides).config if overrides else whole
        store = Store(results, config.name)
        begun = (store.folder / "study.json").exists()
        found.append((config, Results(store) if begun else None))
    return found


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
    """Return each number of rows against the largest, fewest first; the intervals are not adjusted.

    Numbers of rows whose study is unfinished or had a failed run are left out.
    """
    by_size = {rows: one for rows, one in by_size.items() if _whole(one)}
    if len(by_size) < 2:
        return []
    largest = by_size[max(by_size)]
    arms = list(largest.config.arms)
    decided = {pair: sign for pair in combinations(arms, 2) if (sign := _side(largest, *pair))}
    there = [statistics.fmean(largest.losses(arm).values()) for arm in arms]
    found = []
    for rows in sorted(by_size)[:-1]:
        here = by_size[rows]
        means = [statistics.fmean(here.losses(arm).values()) for arm in arms]
        agree = sum(_sign(here, *pair) == sign for pair, sign in decided.items())
        found.append(Agreement(rows, len(decided), agree, _spearman(means, there)))
    return found


def told(by_size: Mapping[int, Results], asked: Sequence[int] = ()) -> list[str]:
    """Return in sentences where the order of the arms stops changing, as far as that can be said.

    Args:
        by_size: of `records`.
        asked: the numbers of rows that the study asks about; those that have not begun are told.
    """
    found, counts = agreements(by_size), []
    if found and (found[0].pairs or _screens(by_size)):
        counts = _counts(found, _largest(by_size))
    left = _left_out(by_size, asked)
    return [*counts, _conclusion(by_size, found), *([f"Left out: {left}."] if left else [])]


def sentences(by_size: Mapping[int, Results], asked: Sequence[int] = ()) -> list[str]:
    """Return the answer in one sentence that stands alone, then `told`."""
    found, left = agreements(by_size), _left_out(by_size, asked)
    pairs = f"the pairs of arms that {_largest(by_size)} rows tell apart" if found else ""
    answer = _conclusion(by_size, found, pairs)
    return [f"{answer[:-1]}; left out: {left}." if left else answer, *told(by_size, asked)]


def _largest(by_size: Mapping[int, Results]) -> int:
    return max(rows for rows, one in by_size.items() if _whole(one))


def _screens(by_size: Mapping[int, Results]) -> bool:
    return by_size[_largest(by_size)].config.seeds.reporting < SCREENING_BELOW


def _conclusion(by_size: Mapping[int, Results], found: Sequence[Agreement], pairs: str = "") -> str:
    """Return where the order settles; `pairs` names those whose order it is, told before if empty."""
    if not found:
        return "Fewer than two numbers of training rows are whole: nothing can be said of their order yet."
    largest = settled = _largest(by_size)
    if _screens(by_size):
        seeds = by_size[largest].config.seeds.reporting
        return f"{seeds} seeds screen: where the order settles is not said."
    if not found[0].pairs:
        return f"At {largest} rows no two arms are told apart (95 % paired intervals): no order is shown."
    for one in reversed(found):
        if one.agree < one.pairs:
            break
        settled = one.rows
    if settled == largest:
        return f"{f'The order of {pairs}' if pairs else 'Their order'} had not settled below {largest} rows."
    return f"From {settled} rows on the order of {pairs or 'those pairs'} is the same."


def _counts(found: Sequence[Agreement], largest: int) -> list[str]:
    return [
        f"{one.rows} rows: {one.agree} of the {one.pairs} pairs of arms that {largest} rows tell apart stand "
        "in the same order" + ("" if one.correlation is None else f" (Spearman {one.correlation:.2f})") + "."
        for one in found
    ]


def _left_out(by_size: Mapping[int, Results], asked: Sequence[int]) -> str:
    """Return which numbers of rows `agreements` leaves out, and why; empty where it leaves out none."""
    left = {rows: _why(one) for rows, one in by_size.items() if not _whole(one)}
    left |= {rows: "not begun" for rows in asked if rows not in by_size}
    return ", ".join(f"{rows} rows ({why})" for rows, why in sorted(left.items()))


def _why(results: Results) -> str:
    """Return why a number of rows is not whole."""
    wanted, arms = results.config.seeds.reporting, results.config.arms
    records = {arm: results.of(arm) for arm in arms}
    failed = sum(record["status"] == "failed" for of_arm in records.values() for record in of_arm.values())
    lost = [arm for arm in arms if hopeless(results.index["rates"][arm])]
    whys = ["a run failed" if failed == 1 else f"{failed} runs failed"] if failed else []
    whys += [f"every rate of {arm} diverged" for arm in lost]
    if any(len(records[arm]) < wanted for arm in arms if arm not in lost):
        whys.append("unfinished")
    return ", ".join(whys) or "one seed"


def _whole(results: Results) -> bool:
    wanted = results.config.seeds.reporting
    return wanted > 1 and all(len(results.losses(arm)) == wanted for arm in results.config.arms)


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
