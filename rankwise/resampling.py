"""The bootstrap for seeds crossed with test rows. Arrays and a generator in, intervals out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

CHUNK = 500
"""Draws computed at once: rows x CHUNK counts are held in memory."""


@dataclass(frozen=True)
class Crossed:
    """A token-weighted mean difference with its crossed bootstrap intervals.

    Attributes:
        estimate: sum of the rows' summed differences over the sum of their tokens, in nats per token.
        error: SD of the bootstrap draws.
        percentile: (low, high) quantiles of the draws.
        bca: (low, high), corrected for bias and skewness.
        seeds, rows, draws: sizes.
    """

    estimate: float
    error: float
    percentile: tuple[float, float]
    bca: tuple[float, float]
    seeds: int
    rows: int
    draws: int


def crossed_bootstrap(
    differences: np.ndarray,
    tokens: np.ndarray,
    generator: np.random.Generator,
    level: float = 0.95,
    draws: int = 10_000,
) -> Crossed:
    """Resample seeds and test rows independently of each other (the pigeonhole bootstrap).

    Every seed scores the same rows, so neither lies within the other: a draw takes seeds with replacement,
    rows with replacement, and every cell where they cross. The interval speaks of new seeds *and* new rows;
    the paired t-interval keeps the rows as they are, so it may be narrower.

    Coverage of a nominal 95 % in 1,500 simulated studies (normal effects, 100 rows): where the luck of seeds
    is all there is, both intervals cover 85 % at 6 seeds, 89 % at 8 and 93 % at 20, as resampling shrinks the
    seeds' variance by (n - 1) / n and knows no t distribution. Where the rows' own effects dominate it is
    95 %. Where the noise of single cells dominates it is above 99 %: that variance counts up to three times
    (Owen 2007). So this is shown beside the t-interval, which decides.

    Args:
        differences: (seeds, rows), arm minus baseline, loss in nats summed over a row's label tokens.
        tokens: (rows,) label tokens of each row, all above 0, the same for every seed.
        generator: draws the seeds and rows.
        level: nominal coverage.
        draws: bootstrap draws.

    Raises:
        ValueError: when the shapes do not fit, there are fewer than 2 seeds or rows, a difference is not
            finite, or a row has no token.

    Cost: draws * seeds * rows multiply-adds and rows * 500 * 8 bytes; 0.2 s for 8 x 400 x 10,000.
    Source: Owen 2007 ("The pigeonhole bootstrap", Annals of Applied Statistics 1); Efron 1987 for BCa, the
    acceleration pooled over the two factors' jackknives as in scipy's multi-sample `bootstrap`.
    """
    d, w = np.asarray(differences, dtype=float), np.asarray(tokens, dtype=float)
    if d.ndim != 2 or min(d.shape) < 2 or w.shape != d.shape[1:] or not np.isfinite(d).all():
        raise ValueError(
            "crossed_bootstrap needs finite (seeds, rows) differences, 2 or more of each, and (rows,) "
            f"tokens; got {d.shape} and {w.shape}, {np.isfinite(d).sum()} of {d.size} finite"
        )
    if not (w > 0).all():
        raise ValueError(f"every row needs label tokens; {int((w <= 0).sum())} of {w.size} rows have none")
    estimate = float(d.sum() / (len(d) * w.sum()))
    found = np.concatenate([_draw(d, w, generator, size) for size in _chunks(draws)])
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    corrected = _corrected(found, estimate, d, w, tails)
    plain, bca = (
        (float(low), float(high)) for low, high in (np.quantile(found, tails), np.quantile(found, corrected))
    )
    seeds, rows = d.shape
    return Crossed(estimate, float(found.std(ddof=1)), plain, bca, seeds, rows, draws)


def _chunks(draws: int) -> list[int]:
    return [min(CHUNK, draws - start) for start in range(0, draws, CHUNK)]


def _draw(d: np.ndarray, w: np.ndarray, generator: np.random.Generator, size: int) -> np.ndarray:
    """Return `size` draws of the ratio: how often each seed and row was taken, times the differences."""
    seeds, rows = (_counts(generator, size, n) for n in d.shape)
    return np.einsum("bs,bs->b", seeds, rows @ d.T) / (len(d) * (rows @ w))


def _counts(generator: np.random.Generator, size: int, n: int) -> np.ndarray:
    taken = generator.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
    return np.bincount(taken.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _corrected(
    found: np.ndarray, estimate: float, d: np.ndarray, w: np.ndarray, tails: np.ndarray
) -> np.ndarray:
    """Return BCa's tail probabilities."""
    rounding = 1e-12 * np.abs(d).sum() / (len(d) * w.sum())  # draws that equal the estimate on paper
    below, at = found < estimate - rounding, np.abs(found - estimate) <= rounding
    share = float(np.clip(below.mean() + at.mean() / 2, 0.5 / found.size, 1 - 0.5 / found.size))
    bias, skew = float(ndtri(share)), _acceleration(d, w)
    z = bias + ndtri(tails)
    return np.asarray(ndtr(bias + z / (1 - skew * z)))


def _acceleration(d: np.ndarray, w: np.ndarray) -> float:
    """Return BCa's acceleration from leaving out every seed, and every row, in turn."""
    by_seed, by_row, total = d.sum(1), d.sum(0), w.sum()
    left = (
        (d.sum() - by_seed) / ((len(d) - 1) * total),
        (d.sum() - by_row) / (len(d) * (total - w)),
    )
    cubes = squares = 0.0
    for values in left:
        n = values.size
        influence = (n - 1) * (values.mean() - values)
        cubes += float((influence**3).sum()) / n**3
        squares += float((influence**2).sum()) / n**2
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0
