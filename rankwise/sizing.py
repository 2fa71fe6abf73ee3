"""The study that a given time affords. Seconds and a spread in, a design and its price out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankwise.config import SCREENING_BELOW
from rankwise.errors import RankwiseError
from rankwise.power import noninferior_power, seeds_for_noninferior

PILOT_RANKS = (1, 16)
"""The ends of every ladder: the pilot tunes them, and what lies between is tuned too if time allows."""

PILOT_RATES = (1e-3, 3e-3, 1e-2)
PILOT_SEEDS = 2
MOST_SEEDS = 20
"""Of a study that sizes itself: beyond, more rows teach more than more seeds do."""

SLACK = 0.85
"""Share of the time that a design may fill: runs are not all alike, and a grid may have to be extended."""

ALPHA = 0.05


@dataclass(frozen=True)
class Rung:
    """A design as far as it decides cost: the uniform ranks, the data-driven ones, whether each is tuned."""

    uniform: tuple[int, ...]
    spectral: tuple[int, ...]
    tuned: bool
    least_seeds: int


CHOICES = (
    Rung((1, 2, 4, 8, 16), (1, 2, 4), True, 8),
    Rung((1, 2, 4, 8, 16), (), True, 8),
    Rung((1, 2, 4, 8, 16), (), False, 8),
    Rung((1, 4, 16), (), False, SCREENING_BELOW),
    Rung((1, 16), (), False, SCREENING_BELOW),
    Rung((1, 16), (), False, 2),
)
"""From the one that answers most to the least; the first that the time affords is taken."""


@dataclass(frozen=True)
class Price:
    """Seconds that the study takes on per run, all its processes together."""

    tuning: float
    reporting: float


@dataclass(frozen=True)
class Design:
    """What will be run.

    Attributes:
        uniform, spectral: ranks of either ladder; no second ladder where it is empty.
        tuned: whether every arm's rate is tuned; else the rates between the pilot's two are interpolated.
        seeds: reporting seeds.
        runs: that are still to do.
        seconds: that they are expected to take.
        enough: whether the time affords it; a study that is too large is still the least there is.
    """

    uniform: tuple[int, ...]
    spectral: tuple[int, ...]
    tuned: bool
    seeds: int
    runs: int
    seconds: float
    enough: bool

    @property
    def arms(self) -> int:
        """How many."""
        return len(self.uniform) + len(self.spectral)


def seconds_of(text: str) -> float:
    """Read a time such as `15m`, `2h`, `1h30m` or `90s`.

    Raises:
        RankwiseError: it is no such text, or below a minute.
    """
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    if match is None or not any(match.groups()):
        raise RankwiseError(
            f"--time must be hours, minutes or seconds, such as 15m, 2h or 1h30m; got {text!r}."
        )
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = 3600 * hours + 60 * minutes + seconds
    if not 60 <= total <= 30 * 86400:
        raise RankwiseError(f"--time must be from one minute to 30 days; got {text!r}.")
    return total


def rows_for(seconds: float, tokens_per_second: float, tokens_per_row: float, usable: int) -> dict[str, int]:
    """Return how many rows train, choose rates, test and stay reserved.

    Args:
        seconds: the whole time.
        tokens_per_second: that training takes on, all processes together.
        tokens_per_row: mean.
        usable: rows there are.

    Raises:
        RankwiseError: there are too few rows for any study.
    """
    reserved = 250 if usable >= 800 else 0
    left = usable - reserved
    runs = 48 if seconds < 1800 else 80
    # a reporting run trains on its rows and scores 1.25 times as many at a third of the cost
    affordable = 0.75 * seconds / runs * tokens_per_second / tokens_per_row / (1 + 1.25 / 3)
    train = int(max(16, min(affordable, 0.5 * left)))
    found = {
        "train": train,
        "validation": max(8, min(train // 2, left // 8)),
        "test": max(24, min(int(1.25 * train), left // 4)),
        "reserved": reserved,
    }
    found["train"] = max(16, train - max(0, sum(found.values()) - usable))
    if sum(found.values()) > usable:
        raise RankwiseError(
            "auto needs 48 rows at least (16 to train on, 8 to choose rates, 24 to test); "
            f"{usable} can be used."
        )
    return found


def choose(seconds: float, price: Price, known: int = 0) -> Design:
    """Return the design that answers most within the time.

    Args:
        seconds: that are left.
        price: of a run.
        known: tuning runs of the ladder's two ends that the pilot has already done.
    """
    for choice in CHOICES:
        found = _sized(choice, seconds, price, known)
        if found.enough:
            return found
    return found


def _sized(choice: Rung, seconds: float, price: Price, known: int) -> Design:
    arms = len(choice.uniform) + len(choice.spectral)
    tuning = max(0, arms * (len(PILOT_RATES) + 1) * PILOT_SEEDS - known) if choice.tuned else 0
    left = SLACK * seconds - tuning * price.tuning
    seeds = math.floor(left / (arms * price.reporting))
    enough = seeds >= choice.least_seeds
    seeds = max(choice.least_seeds, min(seeds, MOST_SEEDS))
    runs = arms * seeds + tuning
    price_of_all = tuning * price.tuning + arms * seeds * price.reporting
    return Design(choice.uniform, choice.spectral, choice.tuned, seeds, runs, price_of_all, enough)


def interpolated(ranks: Sequence[int], best: Mapping[int, float]) -> dict[int, float]:
    """Return a rate for each rank, from the best ones of the pilot's ranks.

    Linear in log rate over log rank, then the nearest of the half-decade grid (1e-3, 3e-3, 1e-2, ...).
    """
    low, high = min(best), max(best)
    slope = math.log(best[high] / best[low]) / math.log(high / low) if high > low else 0.0
    found = {}
    for rank in ranks:
        wanted = math.log(best[low]) + slope * math.log(rank / low)
        grid = [float(f"{m}e{e}") for e in range(-6, 1) for m in (1, 3)]
        found[rank] = min(grid, key=lambda rate: abs(math.log(rate) - wanted))
    return found


def outlook(seeds: int, ladders: int, sd: float, margin: float) -> list[str]:
    """Return in sentences what a design can show, said before it starts.

    Args:
        seeds: reporting seeds.
        ladders: that share the 5 %.
        sd: of the seed-to-seed difference of two plans, in nats per token, as the pilot saw it.
        margin: of loss, likewise.
    """
    if seeds < SCREENING_BELOW:
        return [f"{seeds} seeds screen: there will be numbers and no verdict, which takes {SCREENING_BELOW}."]
    if margin <= 0:
        return ["In the pilot training gained nothing, so there may be no margin and no verdict."]
    level = ALPHA / ladders
    sd = max(sd, 1e-6)
    chance = noninferior_power(seeds, margin, sd, 0.0, level)
    text = (
        f"With {seeds} seeds, two plans that do not differ are shown to be within {margin:.4f} of each other "
        f"in about {chance:.0%} of studies (differences spread by {sd:.4f}, a rough figure from the pilot)"
    )
    needed = seeds_for_noninferior(margin, sd, 0.0, 0.8, level)
    if chance >= 0.8 or needed is None:
        return [text + "."]
    return [text + f"; 80 % would take {needed} seeds."]
