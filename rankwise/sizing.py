"""The study that a given time affords. Seconds and a spread in, a design and its price out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rankwise.config import SCREENING_BELOW
from rankwise.errors import RankwiseError
from rankwise.ladder import decide
from rankwise.power import seeds_for_noninferior
from rankwise.seeds import generator

PILOT_RANKS = (1, 16)
"""The ends of every ladder: the pilot tunes them, and the study takes those runs over."""

PILOT_RATES = (1e-3, 3e-3, 1e-2)
PILOT_SEEDS = 2
MOST_SEEDS = 20
"""Of a study that sizes itself: beyond, more rows teach more than more seeds do."""

SLACK = 0.85
"""Share of the time that a design may fill: runs are not all alike, and a grid may have to be extended."""

LEAST = {"train": 16, "validation": 8, "test": 24, "reserved": 0}
"""Rows, of the smallest study there is."""

CALIBRATION = 32
"""Most rows that a probe looks at."""

TESTED = 1.25
"""Test rows for each training row, where there are as many."""

SCORING = 1 / 3
"""Time of a scored token, in trained ones: it goes forward alone, and back takes twice as long."""

ALPHA = 0.05
SIMULATED = 400
"""Studies, for the chance that a design names its smallest plan; right to about 5 %."""


@dataclass(frozen=True)
class Choice:
    """A design as far as it decides cost: the uniform ranks, the data-driven ones, the fewest seeds."""

    uniform: tuple[int, ...]
    spectral: tuple[int, ...]
    least_seeds: int


CHOICES = (
    Choice((1, 2, 4, 8, 16), (1, 2, 4), 8),
    Choice((1, 2, 4, 8, 16), (), 8),
    Choice((1, 4, 16), (), SCREENING_BELOW),
    Choice((1, 16), (), SCREENING_BELOW),
    Choice((1, 16), (), 2),
)
"""From the one that answers most to the least; the first that the time affords is taken."""


@dataclass(frozen=True)
class Price:
    """What the study takes, in seconds on all its processes together.

    Attributes:
        tuning, reporting: per run.
        probe: per seed, for the plans that follow the gradients.
        untouched: scoring the model as it is, once, in the pilot.
        rates: tried for each arm.
    """

    tuning: float
    reporting: float
    probe: float = 0.0
    untouched: float = 0.0
    rates: int = len(PILOT_RATES) + 1


@dataclass(frozen=True)
class Design:
    """What will be run.

    Attributes:
        uniform, spectral: ranks of either ladder; no second ladder where it is empty.
        seeds: reporting seeds.
        runs: that are still to do.
        seconds: that they are expected to take.
        enough: whether the time affords it; a study that is too large is still the least there is.
    """

    uniform: tuple[int, ...]
    spectral: tuple[int, ...]
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


def runs_for(seconds: float) -> int:
    """Return how many runs a study of this length should have room for: seeds enough come before rows."""
    return 48 if seconds < 1800 else 80


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
    a_row = run_seconds(1, TESTED, tokens_per_row, tokens_per_second)  # of a reporting run, the longer kind
    affordable = 0.75 * seconds / runs_for(seconds) / a_row
    train = int(max(LEAST["train"], min(affordable, 0.5 * left)))
    found = {
        "train": train,
        "validation": max(LEAST["validation"], min(train // 2, left // 8)),
        "test": max(LEAST["test"], min(int(TESTED * train), left // 4)),
        "reserved": reserved,
    }
    found["train"] = max(LEAST["train"], train - max(0, sum(found.values()) - usable))
    if sum(found.values()) > usable:
        raise RankwiseError(
            "auto needs 48 rows at least (16 to train on, 8 to choose rates, 24 to test); "
            f"{usable} can be used."
        )
    return found


def run_seconds(train: float, scored: float, tokens_per_row: float, tokens_per_second: float) -> float:
    """Return what a run takes that trains on some rows, once, and scores others.

    Args:
        train: rows.
        scored: rows.
        tokens_per_row: mean.
        tokens_per_second: that training takes on.
    """
    return (train + SCORING * scored) * tokens_per_row / tokens_per_second


def price_of(rows: Mapping[str, int], tokens_per_row: float, tokens_per_second: float) -> Price:
    """Return what runs on these rows (see `rows_for`) take at a speed that was measured.

    Tuning runs score the validation rows, reporting runs the test rows.
    """

    def seconds(train: int, scored: int) -> float:
        return run_seconds(train, scored, tokens_per_row, tokens_per_second)

    return Price(
        tuning=seconds(rows["train"], rows["validation"]),
        reporting=seconds(rows["train"], rows["test"]),
        probe=seconds(min(CALIBRATION, rows["train"]), 0),
        untouched=seconds(0, rows["validation"] + rows["test"]),
    )


def pilot_takes(price: Price) -> tuple[int, float]:
    """Return how many runs a whole pilot is expected to have, and its seconds."""
    tuning = len(PILOT_RANKS) * price.rates * PILOT_SEEDS
    return 1 + tuning, price.untouched + tuning * price.tuning


def choose(seconds: float, price: Price) -> Design:
    """Return the design that answers most within the time.

    Args:
        seconds: that are left after the pilot.
        price: of what is to come; the pilot's own runs, of either end of the ladder, are done.
    """
    for choice in CHOICES:
        found = _sized(choice, seconds, price)
        if found.enough:
            return found
    return found


def _sized(choice: Choice, seconds: float, price: Price) -> Design:
    arms = len(choice.uniform) + len(choice.spectral)
    tuning = (arms - len(PILOT_RANKS)) * price.rates * PILOT_SEEDS
    probe = price.probe if choice.spectral else 0.0
    fixed, a_seed = tuning * price.tuning + PILOT_SEEDS * probe, arms * price.reporting + probe
    seeds = math.floor((SLACK * seconds - fixed) / a_seed)
    enough = seeds >= choice.least_seeds
    seeds = max(choice.least_seeds, min(seeds, MOST_SEEDS))
    return Design(
        choice.uniform, choice.spectral, seeds, arms * seeds + tuning, fixed + seeds * a_seed, enough
    )


def outlook(design: Design, sd: float, margin: float) -> list[str]:
    """Return in sentences what a design can show, said before it starts.

    Args:
        design: what will be run.
        sd: of the seed-to-seed difference of two plans, in nats per token, as the pilot saw it.
        margin: of loss, likewise.

    Cost: about a second: `ladder.decide` on simulated studies whose plans do not differ.
    """
    seeds = design.seeds
    if seeds < SCREENING_BELOW:
        return [f"{seeds} seeds screen: there will be numbers and no verdict, which takes {SCREENING_BELOW}."]
    if not margin > 0:
        return ["In the pilot training gained nothing, so there may be no margin and no verdict."]
    if math.isnan(sd):
        return ["The pilot saw no spread between seeds, so what this study can show is not known beforehand."]
    level = ALPHA / (2 if design.spectral else 1)
    smallest, none = _chances(len(design.uniform), seeds, max(sd, 1e-9), margin, level)
    lines = [
        f"If all {len(design.uniform)} uniform plans are equally good, {seeds} seeds name the smallest in "
        f"about {smallest:.0%} of studies and none in {none:.0%}: margin {margin:.4f}, differences spread by "
        f"{sd:.4f} over seeds (a rough figure, from the pilot)."
    ]
    needed = seeds_for_noninferior(margin, max(sd, 1e-9), 0.0, 0.8, level)
    if smallest < 0.8 and needed is not None and needed > seeds:
        lines.append(
            f"Some {needed} seeds would show two such plans to be within the margin; a ladder takes more."
        )
    return lines


def _chances(plans: int, seeds: int, sd: float, margin: float, level: float) -> tuple[float, float]:
    """Return how often a ladder of equal plans ends at its smallest, and how often without a plan."""
    draw = generator(0, "outlook", plans, seeds)
    found = [
        decide(draw.normal(0.0, sd / math.sqrt(2), (plans, seeds)), margin, level).chosen
        for _ in range(SIMULATED)
    ]
    return found.count(0) / SIMULATED, found.count(None) / SIMULATED
