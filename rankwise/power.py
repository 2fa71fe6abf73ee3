"""What a design can and cannot answer, before anything runs. Numbers in, numbers or sentences out.

Everything assumes that the differences between two arms, one per seed, are normal with a known SD. Source of
the tests' power: the non-central t distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import chdtri, ndtr, stdtrit

from rankwise.stats import chance_below, detectable_effect, effect_power

RESERVE = 0.2
"""Share of a ladder's alpha that is kept for the plans below its largest (see `ladder`)."""
MOST_SEEDS = 10**7
"""Searches for a number of seeds end here and answer None."""


def noninferior_power(
    n: int, margin: float, sd: float, difference: float = 0.0, alpha: float = 0.05
) -> float:
    """Return the chance that `stats.noninferior` shows a candidate to be within the margin.

    Args:
        n: seeds, 2 or more.
        margin: above 0.
        sd: of the differences, above 0, in the margin's unit.
        difference: their true mean in that unit; a positive one is worse.
        alpha: level of the one-sided test.
    """
    t = float(stdtrit(n - 1, 1 - alpha))
    shift = (margin - difference) / sd * math.sqrt(n)
    return chance_below(n, -shift, -t)


def equivalent_power(n: int, margin: float, sd: float, difference: float = 0.0, alpha: float = 0.05) -> float:
    """Return the chance that `stats.tost` shows two arms to be equivalent.

    Arguments are those of `noninferior_power`. Exact but for the integral over the estimated SD, taken on a
    grid of its quantiles (error below 1e-4). Source: Phillips 1990.
    """
    tail = (np.arange(4000) + 0.5) / 4000
    estimated = np.sqrt(chdtri(n - 1, tail) / (n - 1))
    room = (margin / sd) * math.sqrt(n) - float(stdtrit(n - 1, 1 - alpha)) * estimated
    shift = difference / sd * math.sqrt(n)
    inside = np.where(room > 0, ndtr(room - shift) - ndtr(-room - shift), 0.0)
    return float(inside.mean())


def seeds_for_effect(effect: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Return the fewest seeds whose two-sided paired t-test finds the effect (in SDs) with this power."""
    return _fewest(lambda n: effect_power(n, effect, alpha), power) if effect else None


def seeds_for_noninferior(
    margin: float, sd: float, difference: float = 0.0, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Return the fewest seeds that show non-inferiority with this power; None where no number does.

    No number does where the true difference is at the margin or beyond.
    """
    if difference >= margin:
        return None
    return _fewest(lambda n: noninferior_power(n, margin, sd, difference, alpha), power)


def seeds_for_equivalent(
    margin: float, sd: float, difference: float = 0.0, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Return the fewest seeds that show equivalence with this power; None where no number does."""
    if abs(difference) >= margin:
        return None
    return _fewest(lambda n: equivalent_power(n, margin, sd, difference, alpha), power)


def exact_seeds(contrasts: int = 1, alpha: float = 0.05) -> int:
    """Return the fewest seeds whose exact sign-flip test can reach alpha after Holm over the contrasts.

    Its lowest two-sided p is 2 / 2**n, and Holm asks alpha / contrasts of the smallest p.
    """
    return next(n for n in range(1, 1100) if 2.0 * 2.0**-n <= alpha / contrasts)


def provable_margin(n: int, power: float = 0.8, alpha: float = 0.05, two_sided: bool = True) -> float:
    """Return the smallest margin, in SDs, that n seeds show with this power when there is no difference.

    Args:
        n: seeds, 2 or more.
        power: the wanted chance.
        alpha: level of each one-sided test.
        two_sided: True for equivalence, False for non-inferiority.
    """
    chance = equivalent_power if two_sided else noninferior_power
    low, high = 0.0, 1.0
    while chance(n, high, 1.0, 0.0, alpha) < power:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if chance(n, middle, 1.0, 0.0, alpha) >= power else (middle, high)
    return high


def _fewest(chance: Callable[[int], float], power: float) -> int | None:
    """Return the smallest n of 2 or more with chance(n) >= power, which rises with n."""
    high = 2
    while chance(high) < power:
        high *= 2
        if high > MOST_SEEDS:
            return None
    low = max(high // 2, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high


def design_answers(
    seeds: int, contrasts: int, sd: float | None = None, margin: float | None = None
) -> list[str]:
    """Return in sentences what a design can and cannot answer, at 5 % with 80 % power.

    Args:
        seeds: reporting seeds.
        contrasts: declared contrasts; Holm divides the level of the hardest among them.
        sd: assumed SD of the seed-to-seed differences in loss; None speaks in SDs.
        margin: the margin of equivalence in loss; told with an sd only.

    Cost: below 50 ms.
    """
    if seeds < 2:
        return ["one seed has no spread: no interval, no test and no verdict can come of it."]
    return [
        _detects(seeds, contrasts, sd),
        *_exact(seeds, contrasts),
        _within(seeds, contrasts, sd),
        *(_at_margin(seeds, contrasts, sd, margin) if sd is not None and margin is not None else []),
    ]


def _size(sds: float, sd: float | None) -> str:
    return f"{sds:.2f} SDs of the seed-to-seed differences" if sd is None else f"{sds * sd:.4f}"


def _detects(seeds: int, contrasts: int, sd: float | None) -> str:
    text = f"{seeds} seeds can detect differences of {_size(detectable_effect(seeds), sd)} (80 % power, 5 %"
    if contrasts < 2:
        return text + ")."
    hardest = detectable_effect(seeds, alpha=0.05 / contrasts)
    return text + f"); with Holm's adjustment over {contrasts} contrasts, at worst {_size(hardest, sd)}."


def _exact(seeds: int, contrasts: int) -> list[str]:
    needed = exact_seeds(max(contrasts, 1))
    if seeds >= needed:
        return []
    after = f" after Holm's adjustment over {contrasts} contrasts" if contrasts > 1 else ""
    fewer = " or fewer contrasts" if seeds >= exact_seeds() else ""
    return [
        f"the exact sign-flip test cannot reach 5 %{after}: its lowest p with {seeds} seeds is "
        f"{2 / 2**seeds:.3g}; it takes {needed} seeds{fewer}."
    ]


def _within(seeds: int, contrasts: int, sd: float | None) -> str:
    level = 0.05 / max(contrasts, 1)
    equal, cheap = provable_margin(seeds, alpha=level), provable_margin(seeds, two_sided=False)
    return (
        f"arms that do not differ can be called equivalent within margins from {_size(equal, sd)} (80 % power"
        + (f", 5 % over {contrasts} contrasts" if contrasts > 1 else ", 5 %")
        + f"), and one no worse than another from {_size(cheap, sd)}; narrower margins mostly end undecided."
    )


def _at_margin(seeds: int, contrasts: int, sd: float, margin: float) -> list[str]:
    level = 0.05 / max(contrasts, 1)
    chance = equivalent_power(seeds, margin, sd, alpha=level)
    needed = seeds_for_equivalent(margin, sd, alpha=level)
    text = f"within the margin of {margin:.4f} equal arms are called equivalent in {chance:.0%} of studies"
    if chance >= 0.8:
        return [text + "."]
    return [text + (f"; 80 % takes {needed} seeds." if needed else "; no number of seeds mends that.")]
