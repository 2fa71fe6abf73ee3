"""The learning rate of each arm, chosen on validation: which rate wins, and when the grid is too short."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LOWEST, HIGHEST = 1e-6, 1.0
"""The grid is never extended past these rates."""


def choose(losses: Mapping[float, Sequence[float | None]]) -> float | None:
    """Return the rate with the lowest mean validation loss; None when every rate has diverged.

    Args:
        losses: rate -> one loss per tuning seed; None stands for a run that diverged, which makes its
            rate ineligible. Ties go to the lower rate.
    """
    means = {rate: sum(v) / len(v) for rate, v in losses.items() if v and None not in v}  # type: ignore[arg-type]
    return min(sorted(means), key=lambda rate: means[rate]) if means else None


def extension(losses: Mapping[float, Sequence[float | None]]) -> float | None:
    """Return the rate to add because the winner lies at an edge of the grid, or None.

    A winner below a rate that diverged is not at an edge: the grid has seen the far side.
    """
    best = choose(losses)
    if best is None or len(losses) < 2:
        return None
    if best == max(losses) and half_decade(best, +1) <= HIGHEST:
        return half_decade(best, +1)
    if best == min(losses) and half_decade(best, -1) >= LOWEST:
        return half_decade(best, -1)
    return None


def at_edge(losses: Mapping[float, Sequence[float | None]]) -> bool:
    """Whether the winner lies at an edge that the grid could not be extended past."""
    best = choose(losses)
    return best is not None and len(losses) > 1 and best in (min(losses), max(losses))


def half_decade(rate: float, direction: int) -> float:
    """Return the next rate on the grid ..., 1e-3, 3e-3, 1e-2, ... above (+1) or below (-1) this one."""
    exponent = math.floor(math.log10(rate) + 1e-9)
    steps = sorted(float(f"{m}e{e}") for e in range(exponent - 1, exponent + 3) for m in (1, 3))
    if direction > 0:
        return next(s for s in steps if s > rate * 1.05)
    return next(s for s in reversed(steps) if s < rate / 1.05)
