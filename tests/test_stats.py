"""Intervals, tests and power against scipy's and statsmodels' own, and against figures known before."""

from __future__ import annotations

import math

import numpy as np
import pytest
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
    assert math.isnan(stats.sign_flip(range(1, 22)))


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
    assert TTestPower().power(found, 2, 0.05) == pytest.approx(0.8, abs=1e-3)


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
