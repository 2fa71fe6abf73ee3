"""The crossed bootstrap against full enumeration, closed forms, scipy's bootstrap, and simulated coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from rankwise.resampling import crossed_bootstrap


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def effects(seeds: int, rows: int, sds: tuple[float, float, float], seed: int = 0):
    """Tokens, and summed differences with effects of seeds, of rows, and of cells; the truth is 0."""
    r = rng(seed)
    tokens = r.integers(20, 200, rows).astype(float)
    by_seed, by_row = sds[0] * r.normal(size=(seeds, 1)), sds[1] * r.normal(size=rows)
    return (by_seed + by_row + sds[2] * r.normal(size=(seeds, rows))) * tokens, tokens


def test_the_estimate_is_a_ratio_of_sums():
    d = np.array([[1.0, 0.0], [3.0, 8.0]])
    found = crossed_bootstrap(d, np.array([1.0, 3.0]), rng(), draws=50)
    assert found.estimate == 12 / 8 and (found.seeds, found.rows, found.draws) == (2, 2, 50)
    heavier = crossed_bootstrap(d, np.array([10.0, 3.0]), rng(), draws=50)
    assert heavier.estimate == 12 / 26, "label tokens weigh the rows, which are not averaged one by one"


def test_the_draws_are_those_of_full_enumeration():
    """All 2**2 * 4**4 resamples of a tiny table, each seed list crossed with each row list."""
    d, tokens = rng(5).normal(size=(2, 4)) + 0.3, np.array([1.0, 2.0, 5.0, 9.0])
    every = np.array(
        [
            d[np.ix_(seeds, rows)].sum() / (2 * tokens[list(rows)].sum())
            for seeds in itertools.product(range(2), repeat=2)
            for rows in itertools.product(range(4), repeat=4)
        ]
    )
    found = crossed_bootstrap(d, tokens, rng(1), level=0.8, draws=200_000)
    assert found.error == pytest.approx(every.std(), rel=0.01)
    for value, tail in zip(found.percentile, (0.1, 0.9), strict=True):
        assert abs(np.mean(every < value) - tail) < 0.01
    assert found.estimate == pytest.approx(d.sum() / 34)


def test_its_variance_is_the_closed_form():
    """With equal tokens, from multinomial moments: cell noise counts about three times (Owen 2007)."""
    seeds, rows = 8, 60
    d, tokens = effects(seeds, rows, (0.0, 0.0, 1.0))
    d, tokens = d / tokens, np.ones(rows)
    same_seed, same_row = np.eye(seeds) + 1 - 1 / seeds, np.eye(rows) + 1 - 1 / rows
    variance = np.einsum("sr,st,tq,rq->", d, same_seed, d, same_row) / (seeds * rows) ** 2 - d.mean() ** 2
    found = crossed_bootstrap(d, tokens, rng(1), draws=20_000)
    assert found.error**2 == pytest.approx(variance, rel=0.04)
    assert 2 < found.error**2 / (d.var() / d.size) < 3.3


@pytest.mark.parametrize("factor", ["seeds", "rows"])
def test_with_one_factor_it_is_scipys_bootstrap(factor: str):
    if factor == "seeds":  # every row says the same
        values, tokens = rng(2).lognormal(0.0, 1.5, 10), np.full(5, 3.0)
        d = np.outer(values, tokens)

        def ratio(v, axis=-1):
            return np.mean(v, axis=axis)

        data = (values,)
    else:  # every seed says the same
        tokens = rng(3).integers(1, 50, 14).astype(float)
        sums = tokens * rng(4).lognormal(0.0, 1.5, 14)
        d = np.tile(sums, (3, 1))

        def ratio(s, t, axis=-1):
            return np.sum(s, axis=axis) / np.sum(t, axis=axis)

        data = (sums, tokens)
    ours = crossed_bootstrap(d, tokens, rng(1), draws=40_000)
    for method, interval in (("percentile", ours.percentile), ("BCa", ours.bca)):
        theirs = scipy.stats.bootstrap(
            data, ratio, paired=True, n_resamples=40_000, method=method, rng=rng(9), batch=5_000
        )
        low, high = theirs.confidence_interval
        assert interval == pytest.approx((low, high), abs=0.025 * (high - low)), method
        assert ours.error == pytest.approx(theirs.standard_error, rel=0.03)
    gap = abs(ours.bca[1] - ours.percentile[1]) / (ours.percentile[1] - ours.percentile[0])
    assert gap > 0.1, "so skewed that the tolerance cannot hide what BCa corrects"


def test_draws_come_from_the_generator_alone():
    d, tokens = effects(6, 40, (0.01, 0.1, 0.1))
    first = crossed_bootstrap(d, tokens, rng(1), draws=700)
    assert first == crossed_bootstrap(d, tokens, rng(1), draws=700)
    assert first.percentile != crossed_bootstrap(d, tokens, rng(2), draws=700).percentile
    wide = crossed_bootstrap(d, tokens, rng(1), level=0.99, draws=700)
    assert wide.percentile[0] < first.percentile[0] < first.percentile[1] < wide.percentile[1]


def test_equal_differences_give_a_point():
    tokens = np.array([2.0, 3.0, 7.0])
    found = crossed_bootstrap(np.tile(0.25 * tokens, (6, 1)), tokens, rng(), draws=200)
    assert (*found.percentile, *found.bca) == pytest.approx((0.25,) * 4) and found.error < 1e-12


@pytest.mark.parametrize(
    ("d", "tokens", "match"),
    [
        (np.ones((1, 3)), np.ones(3), "2 or more of each"),
        (np.ones((3, 1)), np.ones(1), "2 or more of each"),
        (np.ones((3, 4)), np.ones(3), r"got \(3, 4\) and \(3,\)"),
        (np.array([[1.0, math.nan], [0.0, 0.0]]), np.ones(2), "3 of 4 finite"),
        (np.ones((2, 3)), np.array([1.0, 0.0, 2.0]), "1 of 3 rows have none"),
    ],
)
def test_what_it_refuses(d: np.ndarray, tokens: np.ndarray, match: str):
    with pytest.raises(ValueError, match=match):
        crossed_bootstrap(d, tokens, rng())


@pytest.mark.parametrize(
    ("seeds", "sds", "low", "high"),
    [
        (6, (1.0, 0.05, 0.05), 0.80, 0.90),  # too short with few seeds, as its docstring says
        (20, (1.0, 0.05, 0.05), 0.90, 0.96),
        (6, (0.01, 1.0, 0.3), 0.92, 0.98),
        (6, (0.0, 0.0, 1.0), 0.98, 1.0),  # and too long where single cells are the noise
    ],
    ids=["seeds", "many seeds", "rows", "cells"],
)
def test_coverage_is_what_the_docstring_says(seeds: int, sds: tuple, low: float, high: float):
    found = [
        crossed_bootstrap(*effects(seeds, 100, sds, seed=study), rng(10_000 + study), draws=400)
        for study in range(600)
    ]
    for kind in ("percentile", "bca"):
        covered = np.mean([getattr(f, kind)[0] <= 0 <= getattr(f, kind)[1] for f in found])
        print(f"{kind}, {seeds} seeds, SDs {sds}: {covered:.1%}")
        assert low <= covered <= high, kind
