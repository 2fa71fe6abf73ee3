"""Intervals, tests and power against scipy's and statsmodels' own, and against figures known before."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from rankwise import stats


def draws(n: int, mean: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An arm and a baseline, which share their seeds' luck."""
    rng = np.random.default_rng(seed)
    luck = rng.normal(0, 0.05, n)
    return 1.7 + mean + luck + rng.normal(0, 0.01, n), 1.7 + luck + rng.normal(0, 0.01, n)


@pytest.mark.parametrize("n", [2, 5, 8, 20])
@pytest.mark.parametrize("mean", [0.0, -0.02])
def test_paired_agrees_with_scipy(n: int, mean: float):
    arm, base = draws(n, mean)
    found = stats.paired(arm - base)
    theirs = scipy.stats.ttest_rel(arm, base)
    low, high = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert found.mean == pytest.approx(np.mean(arm - base)) and found.n == n
    assert found.sd == pytest.approx(np.std(arm - base, ddof=1))
    assert found.detectable == pytest.approx(found.sd * stats.detectable_effect(n))


def test_the_interval_decides_as_p_does():
    for seed in range(40):
        found = stats.paired(np.subtract(*draws(8, 0.012, seed)))
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    wide, narrow = stats.paired([1.0, 2.0, 4.0], 0.99), stats.paired([1.0, 2.0, 4.0], 0.5)
    low, high = scipy.stats.ttest_1samp([1.0, 2.0, 4.0], 0).confidence_interval(0.99)
    assert (wide.low, wide.high) == pytest.approx((low, high)) and narrow.low > wide.low


@pytest.mark.parametrize("n", [2, 3, 6, 8])
@pytest.mark.parametrize("mean", [0.0, 0.01, 0.2])
def test_sign_flip_is_scipys_exact_permutation_test(n: int, mean: float):
    difference = np.subtract(*draws(n, mean, seed=n))
    theirs = scipy.stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=2 ** (n + 1), alternative="two-sided"
    )
    assert stats.sign_flip(difference) == pytest.approx(theirs.pvalue)


def test_sign_flip_by_hand():
    assert stats.sign_flip([1, 2, 3]) == 2 / 8  # only +++ and --- reach 6
    assert stats.sign_flip([1, 2, -3]) == 1.0
    assert stats.sign_flip([0.1, 0.2, -0.3]) == 1.0  # whose floats sum to 6e-17, not to 0
    assert stats.sign_flip([0.1] * 6) == 2 / 2**6  # 0.1 six times in another order sums to another float
    assert stats.sign_flip([1, 1, 1, -1]) == 10 / 16
    assert math.isnan(stats.sign_flip(range(1, 22))), "past 20 it needs a generator"


def exact_p(whole: np.ndarray) -> float:
    """The sign-flip p of whole numbers, counted sum by sum: independent of enumerating signs."""
    ways = np.ones(1)
    for value in np.abs(whole):
        ways = np.convolve(ways, np.bincount([0, 2 * value], minlength=2 * value + 1))
    sums = np.arange(ways.size) - np.abs(whole).sum()
    return float(ways[np.abs(sums) >= abs(whole.sum())].sum() / ways.sum())


@pytest.mark.parametrize("shift", [0, 3, 6])
def test_sign_flip_past_20_seeds_is_monte_carlo(shift: int):
    whole = np.random.default_rng(shift).integers(-9, 10, 30) + shift
    assert exact_p(whole[:12]) == pytest.approx(stats.sign_flip(whole[:12])), "the reference itself"
    p, draws = exact_p(whole), 20_000
    found = stats.sign_flip(whole, np.random.default_rng(1), draws)
    assert abs(found - p) < 4 * math.sqrt(p * (1 - p) / draws) + 1 / draws
    assert found == stats.sign_flip(whole, np.random.default_rng(1), draws)
    assert stats.paired(whole, generator=np.random.default_rng(1)).p_sign_flip == found
    assert math.isnan(stats.paired(whole).p_sign_flip)


def test_a_sampled_p_is_never_zero():
    assert stats.sign_flip([1.0] * 40, np.random.default_rng(0), 99) == pytest.approx(1 / 100)


def test_equal_differences_are_certain():
    found = stats.paired([0.5, 0.5, 0.5])
    assert (found.low, found.high, found.p, found.sd) == (0.5, 0.5, 0.0, 0.0)
    assert stats.paired([0.0, 0.0]).p == 1.0


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_paired_refuses_what_it_cannot_compare(bad: list[float]):
    with pytest.raises(ValueError, match="2 or more finite"):
        stats.paired(bad)


@pytest.mark.parametrize(("n", "sds"), [(5, 1.68), (8, 1.16), (10, 1.00), (20, 0.66)])
def test_detectable_effect_is_the_one_on_record(n: int, sds: float):
    found = stats.detectable_effect(n)
    assert round(found, 2) == pytest.approx(sds)
    assert TTestPower().power(found, n, 0.05) == pytest.approx(0.8, abs=1e-6)


def test_detectable_effect_by_simulation():
    rng = np.random.default_rng(1)
    studies = rng.normal(stats.detectable_effect(8), 1, (20_000, 8))
    assert np.mean(scipy.stats.ttest_1samp(studies, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)


def test_two_seeds_have_a_detectable_effect_or_none_but_no_warning(recwarn):
    found = stats.detectable_effect(2)
    assert not list(recwarn)
    t, normal = scipy.stats.t.ppf(0.975, 1), scipy.stats.norm
    shift = found * math.sqrt(2)

    def over(y: float) -> float:
        """Density at y of |z + shift| > t |y|, for two independent standard normals."""
        return 2 * normal.pdf(y) * (normal.cdf(shift - t * y) + normal.cdf(-shift - t * y))

    assert scipy.integrate.quad(over, 0, 9)[0] == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("contrasts", [2, 6, 15])
def test_two_seeds_and_many_contrasts_need_huge_effects(contrasts: int):
    """Statsmodels' solver gives up there and answers 10."""
    alpha = 0.05 / contrasts
    found = stats.detectable_effect(2, alpha=alpha)
    t = scipy.stats.t.ppf(1 - alpha / 2, 1)
    cases = np.random.default_rng(0).normal(found, 1, (200_000, 2))
    power = np.mean(np.abs(cases.mean(1)) * math.sqrt(2) / cases.std(1, ddof=1) > t)
    assert power == pytest.approx(0.8, abs=0.005) and found > 15


def test_holm_by_hand():
    # sorted 0.01 x4, 0.02 x3, 0.03 x2, 0.5 x1, none below the one before
    assert stats.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert stats.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == [] and stats.holm([0.2]) == pytest.approx([0.2])
    p = np.random.default_rng(0).uniform(0, 0.1, 6)
    assert stats.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


@pytest.mark.parametrize("n", [3, 6, 8])
@pytest.mark.parametrize("mean", [0.0, 0.004, -0.008])
def test_equivalence_is_statsmodels_tost(n: int, mean: float):
    arm, base = draws(n, mean, seed=3 * n)
    answers = set()
    for margin in np.geomspace(1e-4, 1, 25):
        p = ttost_paired(arm, base, -margin, margin)[0]
        assert stats.equivalent(arm - base, margin) == (p < 0.05)
        answers.add(bool(p < 0.05))
    assert answers == {True, False}, "the margins must lie on both sides"


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
def test_a_margin_is_above_zero(margin: float):
    with pytest.raises(ValueError, match="above 0"):
        stats.equivalent([0.1, 0.2], margin)


# --- non-inferiority and equivalence --------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 6, 20])
@pytest.mark.parametrize("alpha", [0.05, 0.0025])
def test_noninferior_is_scipys_one_sided_test(n: int, alpha: float):
    arm, base = draws(n, 0.004, seed=n)
    answers = set()
    for margin in np.geomspace(1e-4, 5, 40):
        found = stats.noninferior(arm - base, margin, alpha)
        theirs = scipy.stats.ttest_rel(arm - margin, base, alternative="less")
        assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert found.bound == pytest.approx(theirs.confidence_interval(1 - alpha).high + margin)
        assert found.shown == (found.p < alpha) == (found.bound < margin)
        assert (found.n, found.margin) == (n, margin)
        assert (found.mean, found.sd) == pytest.approx((np.mean(arm - base), np.std(arm - base, ddof=1)))
        answers.add(found.shown)
    assert answers == {True, False} or (n == 2 and alpha < 0.01)


def test_noninferior_has_a_direction():
    assert stats.noninferior([-0.50, -0.51, -0.52], 0.01).shown, "much better is fine"
    assert not stats.noninferior([0.50, 0.51, 0.52], 0.01).shown
    assert not stats.equivalent([-0.50, -0.51, -0.52], 0.01)


@pytest.mark.parametrize("n", [2, 5, 8, 20])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 3])
def test_tost_is_statsmodels(n: int, alpha: float):
    arm, base = draws(n, -0.003, seed=n)
    for margin in np.geomspace(1e-4, 1, 20):
        found = stats.tost(arm - base, margin, alpha)
        assert found.p == pytest.approx(ttost_paired(arm, base, -margin, margin)[0], rel=1e-9)
        low, high = scipy.stats.ttest_rel(arm, base).confidence_interval(1 - 2 * alpha)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
        assert found.shown == (found.p < alpha) == (-margin < low and high < margin)


@pytest.mark.parametrize(("difference", "inside"), [(0.5, True), (1.0, False), (1.5, False), (-1.0, True)])
def test_differences_without_spread_are_certain(difference: float, inside: bool):
    found = stats.noninferior([difference] * 3, 1.0)
    assert (found.p, found.bound, found.shown) == (float(not inside), difference, inside)
    assert stats.tost([difference] * 3, 1.0).shown == (abs(difference) < 1)


@pytest.mark.parametrize("test", [stats.noninferior, stats.tost])
def test_bad_values_are_refused(test):
    for bad in ([], [1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="2 or more finite"):
            test(bad, 0.1)
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            test([0.1, 0.2], margin)


# --- by simulation: what the intervals and tests promise holds --------------------------------------


def studies(n: int, mean: float, count: int, seed: int = 7) -> np.ndarray:
    """Differences of many studies, (studies, seeds); each arm has its own noise on shared luck."""
    rng = np.random.default_rng(seed + n)
    luck = rng.normal(0, 0.05, (count, n))
    return (mean + luck + rng.normal(0, 0.012, (count, n))) - (luck + rng.normal(0, 0.008, (count, n)))


@pytest.mark.parametrize("n", [6, 8, 20])
def test_paired_intervals_cover(n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "sign_flip", lambda *_: math.nan)  # 2**20 sums a study would take minutes
    found = [stats.paired(d) for d in studies(n, 0.013, 2_000)]
    covered = np.mean([f.low <= 0.013 <= f.high for f in found])
    print(f"95 % paired t-intervals at n = {n}: {covered:.1%} covered of {len(found)} studies")
    assert 0.93 <= covered <= 0.97
    low = np.mean([f.low > 0.013 for f in found])
    assert 0.015 <= low <= 0.035, "and misses on both sides alike"


@pytest.mark.parametrize("n", [6, 8, 20])
@pytest.mark.parametrize("side", [1, -1])
def test_the_error_of_tost_at_the_margin(n: int, side: int):
    margin = 0.03  # 2 SDs: wide enough that the other side's test hardly matters
    found = [stats.tost(d, margin) for d in studies(n, side * margin, 4_000)]
    error = np.mean([f.shown for f in found])
    print(f"TOST, n = {n}, truth at {side * margin:+}: called equivalent in {error:.1%}")
    assert 0.04 <= error <= 0.055
    assert np.mean([stats.tost(d, margin).shown for d in studies(n, 0.0, 500)]) > 0.9, "and it has power"


@pytest.mark.parametrize("n", [6, 8, 20])
def test_the_error_of_noninferior_at_the_margin(n: int):
    found = [stats.noninferior(d, 0.01).shown for d in studies(n, 0.01, 4_000, seed=3)]
    assert 0.04 <= np.mean(found) <= 0.055
