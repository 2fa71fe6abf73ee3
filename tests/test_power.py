"""Power and seeds against statsmodels, numerical integrals and simulation; the sentences against both."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import scipy.stats
from scipy import integrate
from statsmodels.stats.power import TTestPower

from rankwise import power, stats


@pytest.mark.parametrize("n", [2, 3, 8, 20, 100])
@pytest.mark.parametrize("alpha", [0.05, 0.0025])
def test_power_is_statsmodels(n: int, alpha: float):
    for effect in np.array([0.1, 1.0, 2.0, 4.0]) / math.sqrt(n):  # theirs is nan where power is all but 1
        theirs = TTestPower().power(effect, n, alpha)
        assert power.effect_power(n, effect, alpha) == pytest.approx(theirs, abs=1e-9)
        assert power.effect_power(n, -effect, alpha) == power.effect_power(n, effect, alpha)
        one_sided = TTestPower().power(effect, n, alpha, alternative="larger")
        found = power.noninferior_power(n, 0.2 + 0.01 * effect, 0.01, 0.2, alpha)
        assert found == pytest.approx(one_sided, abs=1e-9)


def test_power_has_its_limits():
    for n in (2, 8, 300):
        assert power.effect_power(n, 0.0) == pytest.approx(0.05)
        assert power.noninferior_power(n, 0.01, 0.01, 0.01) == pytest.approx(0.05), "the truth at the margin"
        assert power.effect_power(n, 1e4) == pytest.approx(1.0)
        assert power.noninferior_power(n, 0.01, 0.01, 10.0) == pytest.approx(0.0, abs=1e-9)
        assert power.noninferior_power(n, 0.01, 0.01, -10.0) == pytest.approx(1.0)


def tost_power(n: int, margin: float, difference: float, alpha: float) -> float:
    """SD 1, by adaptive integration over the estimated variance."""
    t, root = scipy.stats.t.ppf(1 - alpha, n - 1), math.sqrt(n)

    def inside(q: float) -> float:
        room = margin * root - t * math.sqrt(q / (n - 1))
        shift = difference * root
        ends = scipy.stats.norm.cdf([room - shift, -room - shift])
        return (ends[0] - ends[1]) * scipy.stats.chi2.pdf(q, n - 1)

    return integrate.quad(inside, 0, (n - 1) * (margin * root / t) ** 2, limit=300)[0]


@pytest.mark.parametrize("n", [3, 6, 20])
@pytest.mark.parametrize(("margin", "difference"), [(0.3, 0.0), (1.0, 0.4), (1.5, -1.5)])
def test_power_of_tost(n: int, margin: float, difference: float):
    for alpha in (0.05, 0.01):
        found = power.equivalent_power(n, 0.02 * margin, 0.02, 0.02 * difference, alpha)
        assert found == pytest.approx(tost_power(n, margin, difference, alpha), abs=1e-4)


def test_power_of_tost_by_simulation():
    cases = np.random.default_rng(0).normal(0.3, 1.0, (4_000, 8))
    called = np.mean([stats.tost(d, 1.3).shown for d in cases])
    assert called == pytest.approx(power.equivalent_power(8, 1.3, 1.0, 0.3), abs=0.02)


@pytest.mark.parametrize("effect", [0.3, 0.66, 1.0, 3.0])
def test_seeds_for_an_effect_are_statsmodels(effect: float):
    exact = TTestPower().solve_power(effect, power=0.8, alpha=0.05)
    assert power.seeds_for_effect(effect) == max(2, math.ceil(exact))


@pytest.mark.parametrize(("margin", "difference"), [(0.5, 0.0), (0.5, 0.2), (1.0, -0.3)])
def test_seeds_for_a_margin_are_the_fewest(margin: float, difference: float):
    n = power.seeds_for_noninferior(0.01 * margin, 0.01, 0.01 * difference, power=0.9)
    exact = TTestPower().solve_power(margin - difference, power=0.9, alpha=0.05, alternative="larger")
    assert n == math.ceil(exact)
    n = power.seeds_for_equivalent(0.01 * margin, 0.01, 0.01 * difference)
    assert n is not None
    enough, fewer = (tost_power(k, margin, difference, 0.05) for k in (n, n - 1))
    assert enough >= 0.8 > fewer


def test_where_no_number_of_seeds_helps():
    assert power.seeds_for_noninferior(0.1, 1.0, 0.1) is None
    assert power.seeds_for_equivalent(0.1, 1.0, -0.2) is None
    assert power.seeds_for_effect(0.0) is None
    assert power.seeds_for_noninferior(0.1, 1.0, 0.1 - 1e-5) is None, "billions of seeds"
    assert power.seeds_for_noninferior(0.1, 1e-9) == 2


@pytest.mark.parametrize(("contrasts", "seeds"), [(1, 6), (2, 7), (3, 7), (4, 8), (6, 8), (7, 9)])
def test_fewest_seeds_of_an_exact_test(contrasts: int, seeds: int):
    assert power.exact_seeds(contrasts) == seeds
    for n, reaches in ((seeds, True), (seeds - 1, False)):
        lowest = stats.sign_flip(np.ones(n))
        assert (stats.holm([lowest] + [0.9] * (contrasts - 1))[0] <= 0.05) == reaches


@pytest.mark.parametrize("n", [2, 6, 20])
def test_provable_margins(n: int):
    equal = power.provable_margin(n, alpha=0.05 / 3)
    assert tost_power(n, equal, 0.0, 0.05 / 3) == pytest.approx(0.8, abs=1e-3)
    one_sided = power.provable_margin(n, two_sided=False)
    assert TTestPower().power(one_sided, n, 0.05, alternative="larger") == pytest.approx(0.8, abs=1e-3)
    assert one_sided < equal


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_sentences_of_a_design_in_sds():
    detects, within = power.design_answers(8, 6)
    hardest = TTestPower().solve_power(nobs=8, alpha=0.05 / 6, power=0.8)
    assert numbers(detects) == pytest.approx([1.16, hardest], abs=0.006) and "6 contrasts" in detects
    margin = power.provable_margin(8, alpha=0.05 / 6)
    assert numbers(within)[0] == pytest.approx(margin, abs=0.006) and "equivalent" in within


def test_sentences_of_a_design_with_a_spread():
    detects, within, margin = power.design_answers(8, 1, sd=0.01, margin=0.01)
    assert numbers(detects) == pytest.approx([0.0116], abs=6e-5) and "SDs" not in detects + within
    assert "0.0100" in margin and f"{tost_power(8, 1.0, 0.0, 0.05):.0%}" in margin
    n = power.seeds_for_equivalent(0.01, 0.01)
    assert margin.endswith(f"80 % takes {n} seeds.")
    assert "takes" not in power.design_answers(20, 1, sd=0.01, margin=0.01)[-1], "there it is enough"


@pytest.mark.parametrize(
    ("seeds", "contrasts", "told"),
    [
        (5, 1, "0.0625; it takes 6 seeds."),
        (6, 4, "0.0312; it takes 8 seeds or fewer contrasts."),
        (8, 4, None),
    ],
)
def test_sentences_about_the_exact_test(seeds: int, contrasts: int, told: str | None):
    found = [line for line in power.design_answers(seeds, contrasts) if "sign-flip" in line]
    assert [line.split(" seeds is ")[-1] for line in found] == ([f"{told}"] if told else [])


def test_one_seed_answers_nothing():
    (line,) = power.design_answers(1, 3)
    assert "no verdict" in line
