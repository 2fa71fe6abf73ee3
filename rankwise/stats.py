"""From paired differences to estimates and decisions. Numbers in, numbers out: no files, no torch.

Differences are arm minus baseline, one per seed, both sides sharing the seed's draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Paired:
    """A paired comparison: mean difference, its t-interval, and the two p-values.

    Attributes:
        n: seeds.
        mean, sd: of the differences, in the metric's unit.
        low, high: the 95 % paired t-interval, which decides.
        p: two-sided p of the paired t-test.
        p_sign_flip: two-sided p of the exact sign-flip test, never below 2 / 2**n.
        detectable: the true difference that this many seeds would find in 80 of 100 studies.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float
    p_sign_flip: float
    detectable: float


def paired(differences: Sequence[float], level: float = 0.95, contrasts: int = 1) -> Paired:
    """Compare paired values.

    Args:
        differences: one per seed, in the metric's unit; at least 2, all finite.
        level: coverage of the interval, of this contrast by itself.
        contrasts: how many are declared; `detectable` allows for all of them.

    Raises:
        ValueError: with fewer than 2 differences, or one that is not finite.

    Cost: 2**n sums for the exact test, n at most 20 (beyond that its p is nan).
    """
    d = np.asarray(differences, dtype=float)
    if d.size < 2 or not np.isfinite(d).all():
        raise ValueError(f"paired needs 2 or more finite differences; got {list(differences)}")
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    error, t = sd / math.sqrt(d.size), stats.t(d.size - 1)
    half = float(t.ppf(0.5 + level / 2)) * error
    p = 2 * float(t.sf(abs(mean) / error)) if sd > 0 else float(mean == 0)
    detectable = sd * detectable_effect(d.size, alpha=0.05 / contrasts)
    return Paired(d.size, mean, sd, mean - half, mean + half, p, sign_flip(d), detectable)


def sign_flip(differences: Sequence[float] | np.ndarray) -> float:
    """Return the two-sided p of the exact sign-flip test of a zero mean (all 2**n signs)."""
    d = np.asarray(differences, dtype=float)
    if d.size > 20:
        return math.nan
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    rounding = 1e-12 * np.abs(d).sum()  # sums that are equal on paper may differ in the last bits
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - rounding))


def detectable_effect(n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the smallest detectable mean difference of a paired t-test, in SDs of the differences.

    Source: the non-central t distribution, solved by statsmodels' `TTestPower`.
    """
    from statsmodels.stats.power import TTestPower  # heavy import, needed only here

    return float(TTestPower().solve_power(nobs=n, alpha=alpha, power=power, alternative="two-sided"))


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token; beyond 700 nats a float overflows, so it stays there."""
    return math.exp(min(loss, 700.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the given order."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]] if len(p_values) else []


def equivalent(differences: Sequence[float], margin: float, alpha: float = 0.05) -> bool:
    """Whether two one-sided t-tests put the mean difference inside +-margin (TOST).

    Raises:
        ValueError: when the margin is not above zero.
    """
    if not margin > 0:
        raise ValueError(f"the margin of equivalence must be above 0; got {margin}")
    d = np.asarray(differences, dtype=float)
    half = float(stats.t.ppf(1 - alpha, d.size - 1)) * d.std(ddof=1) / math.sqrt(d.size)
    return bool(d.mean() - half > -margin and d.mean() + half < margin)
