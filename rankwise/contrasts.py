"""The declared contrasts: paired differences, their tests, and what may be said of them. No torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from rankwise import stats
from rankwise.config import SCREENING_BELOW, StudyConfig
from rankwise.errors import RankwiseError
from rankwise.resampling import crossed_bootstrap
from rankwise.seeds import generator
from rankwise.tables import Results, count_of_seeds, hopeless

DRAWS = 4_000
"""Of the bootstrap: its ends are right to about 2 % of the interval's width."""


@dataclass(frozen=True)
class ContrastRow:
    """One declared contrast: numbers where there are some, and what may be said of them.

    `p_holm` is None where it has no verdict yet or none at all, whatever its `paired` numbers are.
    """

    arm: str
    against: str
    paired: stats.Paired | None
    p_holm: float | None
    margin: float | None
    verdict: str
    bootstrap: tuple[float, float] | None = None  # 95 %, new seeds and rows; decides nothing


def contrast_rows(results: Results) -> list[ContrastRow]:
    """Return the declared contrasts with their paired t-intervals, Holm-adjusted, and their verdicts.

    Holm's adjustment is over all that were declared: one that cannot be tested counts as p = 1, so that the
    others' verdicts do not grow stronger by what went wrong elsewhere, nor change when it is mended.
    """
    pairs = results.config.pairs()
    compared = [_compare(results, *pair, len(pairs)) for pair in pairs]
    untested = [_untested(results, pair) for pair in pairs]
    found = [1.0 if p is None or why else p.p for p, why in zip(compared, untested, strict=True)]
    return [
        _contrast_row(results, pair, paired, why, None if paired is None or why else adjusted)
        for pair, paired, why, adjusted in zip(pairs, compared, untested, stats.holm(found), strict=True)
    ]


def differences(results: Results, arm: str, against: str) -> list[float]:
    """Return the arm's primary metric minus the other's, for the seeds that both have finished."""
    a, b = results.losses(arm), results.losses(against)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def _compare(results: Results, arm: str, against: str, contrasts: int) -> stats.Paired | None:
    found = differences(results, arm, against)
    if len(found) < 2:
        return None
    return stats.paired(found, contrasts=contrasts, generator=generator(0, "sign flip", arm, against))


def baseline_gain(results: Results) -> float | None:
    """Return what the baseline gains over the untouched model in the metric's unit; None while unknown."""
    untouched, baseline = results.untouched(), results.config.baseline
    losses = list(results.losses(baseline).values()) if baseline else []
    return None if untouched is None or not losses else untouched - statistics.fmean(losses)


def margin(results: Results) -> float | None:
    """Return the margin of equivalence in the metric's unit: a share of the baseline's gain.

    None while that is unknown, and where the baseline gains nothing: nothing lies within a share of that.
    """
    gain = baseline_gain(results)
    return results.config.margin * gain if gain is not None and gain > 0 else None


def margin_words(results: Results) -> str:
    """Return the margin as tables tell it, or why there is none; empty while it is unknown."""
    band = margin(results)
    if band is not None:
        return (
            f"margin {band:.4f}, {100 * results.config.margin:.3g} % of what {results.config.baseline} gains"
        )
    known = baseline_gain(results) is not None
    return "no margin: the baseline gains nothing over the untouched model" if known else ""


def _untested(results: Results, pair: tuple[str, str]) -> str | None:
    """Return why a contrast has no verdict, as its verdict says it; None where it can be tested."""
    if any(r["status"] == "failed" for name in pair for r in results.of(name).values()):
        return "no verdict: a run failed"
    if lost := [name for name in pair if hopeless(results.index["rates"][name])]:
        return f"no verdict: every rate of {lost[0]} diverged"
    if any(len(results.of(name)) != results.config.seeds.reporting for name in pair):
        return "no verdict yet: runs are missing"
    return None


def _contrast_row(
    results: Results, pair: tuple[str, str], paired: stats.Paired | None, untested: str | None,
    p_holm: float | None,
) -> ContrastRow:  # fmt: skip
    band = margin(results)
    within = band is not None and paired is not None and _equivalent(results, pair, band)
    if untested is not None:
        verdict = untested
    elif results.config.seeds.reporting < SCREENING_BELOW or paired is None or p_holm is None:
        verdict = f"screening: {count_of_seeds(results.config.seeds.reporting)}, no verdict"
    elif p_holm < 0.05:
        verdict = "differs: lower loss" if paired.mean < 0 else "differs: higher loss"
        verdict += ", within the margin" * within  # both are shown: a difference, and that it is small
    elif within:
        verdict = "equivalent within the margin"
    else:
        verdict = f"no difference shown; could have seen {paired.detectable:.4f}"
    return ContrastRow(*pair, paired, p_holm, band, verdict, crossed(results, *pair))


def _equivalent(results: Results, pair: tuple[str, str], band: float) -> bool:
    """Whether TOST says so, at 5 % over all declared contrasts (Bonferroni)."""
    return stats.equivalent(differences(results, *pair), band, alpha=0.05 / len(results.config.pairs()))


def crossed(results: Results, arm: str, against: str) -> tuple[float, float] | None:
    """Return the BCa bootstrap interval of the difference per token, seeds and test rows drawn crosswise.

    The draws depend on the arms' names alone. None with fewer than 2 seeds in common. Cost: 0.1 s for 8 seeds
    and 200 rows, and reading each run's rows. None too where some run's rows cannot be read.
    """
    seeds = sorted(results.losses(arm).keys() & results.losses(against).keys())
    if len(seeds) < 2:
        return None
    try:
        tables = [(results.rows(arm, seed), results.rows(against, seed)) for seed in seeds]
    except RankwiseError:
        return None  # rows that are gone cost this interval, never the verdict
    names = [row for row, (_, tokens) in tables[0][0].items() if tokens]
    if len(names) < 2 or any(row not in one for pair in tables for one in pair for row in names):
        return None
    found = np.array([[mine[row][0] - other[row][0] for row in names] for mine, other in tables])
    tokens = np.array([tables[0][0][row][1] for row in names], dtype=float)
    return crossed_bootstrap(found, tokens, generator(0, "bootstrap", arm, against), draws=DRAWS).bca


def control(config: StudyConfig, arm: str) -> str | None:
    """Return the uniform arm of an arm's budget, the baseline first, or else the baseline; None for those."""
    wanted = config.arms[arm]
    if wanted.strategy == "uniform":
        return None
    same = [
        name
        for name, other in config.arms.items()
        if other.strategy == "uniform"
        if wanted.budget is not None and str(other.budget) == str(wanted.budget)
    ]
    found = config.baseline if config.baseline in same or not same else same[0]
    return None if found == arm else found
