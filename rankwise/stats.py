"""From paired differences to estimates and decisions. Numbers in, numbers out: no files, no torch.

Differences are arm minus baseline, one per seed, both sides sharing the seed's draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit


@dataclass(frozen=True)
class Paired:
    """A paired comparison: mean difference, its t-interval, and the two p-values.

    Attributes:
        n: seeds.
        mean, sd: of the differences, in the metric's unit.
        low, high: the 95 % paired t-interval, which decides.
        p: two-sided p of the paired t-test.
        p_sign_flip: two-sided p of the sign-flip test, never below 2 / 2**n; nan past 20 seeds where no
            generator was given.
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


@dataclass(frozen=True)
class NonInferior:
    """Whether a mean difference is shown to lie below a margin (one-sided paired t-test).

    Attributes:
        n: seeds.
        mean, sd: of the differences, in the metric's unit; a positive mean is worse.
        margin: the difference that would be too much.
        p: of a true mean at or above the margin.
        bound: the upper 1 - alpha confidence bound of the mean; below the margin exactly when shown.
        shown: whether p < alpha.
    """

    n: int
    mean: float
    sd: float
    margin: float
    p: float
    bound: float
    shown: bool


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided paired t-tests (TOST) against a margin on either side.

    Attributes:
        n: seeds.
        mean, sd: of the differences, in the metric's unit.
        margin: half the width of the band.
        p: the larger of the two one-sided p-values.
        low, high: the 1 - 2 alpha interval of the mean; inside +-margin exactly when shown.
        shown: whether both tests reject at alpha.
    """

    n: int
    mean: float
    sd: float
    margin: float
    p: float
    low: float
    high: float
    shown: bool


def paired(
    differences: Sequence[float],
    level: float = 0.95,
    contrasts: int = 1,
    generator: np.random.Generator | None = None,
) -> Paired:
    """Compare paired values.

    Args:
        differences: one per seed, in the metric's unit; at least 2, all finite.
        level: coverage of the interval, of this contrast by itself.
        contrasts: how many are declared; `detectable` allows for all of them.
        generator: draws the signs of the sign-flip test past 20 seeds; without it that p is nan there.

    Raises:
        ValueError: with fewer than 2 differences, or one that is not finite.

    Cost: that of `sign_flip`.
    """
    d = _sound(differences, "paired")
    mean, sd, error = _moments(d)
    half = float(stdtrit(d.size - 1, 0.5 + level / 2)) * error
    p = 2 * float(stdtr(d.size - 1, -abs(mean) / error)) if sd > 0 else float(mean == 0)
    detectable = sd * detectable_effect(d.size, alpha=0.05 / contrasts)
    return Paired(d.size, mean, sd, mean - half, mean + half, p, sign_flip(d, generator), detectable)


def _sound(differences: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    d = np.asarray(differences, dtype=float)
    if d.size < 2 or not np.isfinite(d).all():
        raise ValueError(f"{name} needs 2 or more finite differences; got {list(differences)}")
    return d


def sign_flip(
    differences: Sequence[float] | np.ndarray,
    generator: np.random.Generator | None = None,
    draws: int = 20_000,
) -> float:
    """Return the two-sided p of the sign-flip test of a zero mean.

    Up to 20 differences it is exact (all 2**n signs). Beyond, `draws` random signs come from the generator
    and the observed ones count as one more, so that p is valid and at least 1 / (draws + 1) (Phipson and
    Smyth 2010); without a generator it is nan. Cost: 2**n sums (8 MB at 20), or draws * n.
    """
    d = np.asarray(differences, dtype=float)
    rounding = 1e-12 * np.abs(d).sum()  # sums that are equal on paper may differ in the last bits
    if d.size > 20:
        if generator is None:
            return math.nan
        flips = generator.integers(0, 2, (draws, d.size), dtype=np.int8) * 2.0 - 1
        extreme = np.abs(flips @ d) >= abs(d.sum()) - rounding
        return float((1 + extreme.sum()) / (1 + draws))
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - rounding))


def effect_power(n: int, effect: float, alpha: float = 0.05) -> float:
    """Return the power of the two-sided paired t-test; the differences are normal with a known SD.

    Args:
        n: seeds, 2 or more.
        effect: the true mean difference, in SDs of the differences.
        alpha: level of the test; divide it by the contrasts for Holm's hardest step.
    """
    t = float(stdtrit(n - 1, 1 - alpha / 2))
    shift = abs(effect) * math.sqrt(n)
    return chance_below(n, -shift, -t) + chance_below(n, shift, -t)


def chance_below(n: int, shift: float, t: float) -> float:
    """Return the chance that a paired t statistic falls below t < 0, its mean shifted by `shift` errors."""
    chance = float(nctdtr(n - 1, shift, t))
    # scipy gives up (nan) where the answer is next to nothing: below the normal tail at -shift
    return 0.0 if math.isnan(chance) and shift > 4 else chance


@lru_cache(maxsize=256)  # a study asks the same for each of its contrasts
def detectable_effect(n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the smallest detectable mean difference of a paired t-test, in SDs of the differences.

    Source: the non-central t distribution. statsmodels' `TTestPower.solve_power` agrees, but answers 10 where
    the effect is larger (2 seeds and several contrasts).
    """
    from scipy.optimize import brentq  # here, as it takes most of a second to load

    high = 1.0
    while effect_power(n, high, alpha) < power:
        high *= 2
    return float(brentq(lambda effect: effect_power(n, effect, alpha) - power, 0.0, high))


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token; beyond 700 nats a float overflows, so it stays there."""
    return math.exp(min(loss, 700.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the given order."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]] if len(p_values) else []


def noninferior(differences: Sequence[float] | np.ndarray, margin: float, alpha: float = 0.05) -> NonInferior:
    """Test whether the mean difference (candidate minus rival, lower is better) lies below the margin.

    Args:
        differences: one per seed, in the metric's unit; at least 2, all finite.
        margin: above 0, in the same unit.
        alpha: chance of calling a candidate fine whose true difference is the margin or more.

    Raises:
        ValueError: for fewer than 2 differences, one that is not finite, or a margin not above 0.
    """
    d = _sound(differences, "noninferior")
    _check_margin(margin, "non-inferiority")
    mean, sd, error = _moments(d)
    p = _below(mean - margin, error, d.size)
    bound = mean + float(stdtrit(d.size - 1, 1 - alpha)) * error
    return NonInferior(d.size, mean, sd, margin, p, bound, p < alpha)


def tost(differences: Sequence[float] | np.ndarray, margin: float, alpha: float = 0.05) -> Equivalence:
    """Test whether the mean difference lies inside +-margin: two one-sided paired t-tests.

    Args:
        differences: one per seed, in the metric's unit; at least 2, all finite.
        margin: above 0, in the same unit; set before the data are seen.
        alpha: chance of calling two equivalent whose true difference is the margin or more.

    Raises:
        ValueError: for fewer than 2 differences, one that is not finite, or a margin not above 0.

    Source: Schuirmann 1987.
    """
    _check_margin(margin, "equivalence")
    d = _sound(differences, "tost")
    mean, sd, error = _moments(d)
    p = max(_below(mean - margin, error, d.size), _below(-mean - margin, error, d.size))
    half = float(stdtrit(d.size - 1, 1 - alpha)) * error
    return Equivalence(d.size, mean, sd, margin, p, mean - half, mean + half, p < alpha)


def equivalent(differences: Sequence[float], margin: float, alpha: float = 0.05) -> bool:
    """Whether two one-sided t-tests put the mean difference inside +-margin: `tost`, its answer alone."""
    return tost(differences, margin, alpha).shown


def _moments(d: np.ndarray) -> tuple[float, float, float]:
    """Return mean, SD and standard error."""
    sd = float(d.std(ddof=1))
    return float(d.mean()), sd, sd / math.sqrt(d.size)


def _below(mean: float, error: float, n: int) -> float:
    """Return the one-sided p of a true mean at or above 0."""
    if error == 0:
        return float(mean >= 0)
    return float(stdtr(n - 1, mean / error))


def _check_margin(margin: float, what: str) -> None:
    if not margin > 0:
        raise ValueError(f"the margin of {what} must be above 0; got {margin}")
