"""Arms of one budget side by side: what the means of a study range over, and what else moves the loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from rankwise import contrasts
from rankwise.config import StudyConfig
from rankwise.paper.macros import Macro
from rankwise.paper.names import camel
from rankwise.paper.studies import Told
from rankwise.paper.typeset import name
from rankwise.tables import Results


@dataclass(frozen=True)
class Group:
    """The arms of one budget, over the seeds that all of them have finished.

    Attributes:
        budget: as the study writes it.
        arms: names, in the study's order.
        seeds: that every arm of the group has finished.
        means: arm -> mean loss over those seeds; empty without such a seed.
        over_seeds: root mean square of the arms' SDs over those seeds; None with fewer than 2.
        over_pairs: the same of their differences to the uniform arm: what a comparison has to live with, as
            arms share seeds; None without a uniform arm too.
        over_rates: mean over the tuned arms of the range of validation loss over the declared grid, without
            rates that diverged.
    """

    budget: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    means: dict[str, float]
    over_seeds: float | None
    over_pairs: float | None
    over_rates: float | None


def budgets(config: StudyConfig) -> dict[str, list[str]]:
    """Return budget -> the arms that have it, two or more of them, in the study's order."""
    found: dict[str, list[str]] = {}
    for arm, wanted in config.arms.items():
        if wanted.budget is not None and wanted.match == "budget":
            found.setdefault(str(wanted.budget), []).append(arm)
    return {budget: arms for budget, arms in found.items() if len(arms) > 1}


def group(results: Results, budget: str, arms: list[str]) -> Group:
    """Return one budget's arms as far as their runs are done."""
    losses = {arm: results.losses(arm) for arm in arms}
    seeds = sorted(set.intersection(*(set(found) for found in losses.values())))
    means = {arm: statistics.fmean(found[s] for s in seeds) for arm, found in losses.items() if seeds}
    control = uniform(results.config, arms)
    apart = [
        [found[s] - losses[control][s] for s in seeds]
        for arm, found in losses.items()
        if control in losses and arm != control
    ]
    alone = [[found[s] for s in seeds] for found in losses.values()]
    return Group(
        budget, tuple(arms), tuple(seeds), means, _spread(alone), _spread(apart), _over_rates(results, arms)
    )


def uniform(config: StudyConfig, arms: list[str]) -> str | None:
    """Return the arm that the others of a budget are compared with."""
    return next((other for arm in arms if (other := contrasts.control(config, arm))), None)


def _spread(samples: list[list[float]]) -> float | None:
    """Return the root mean square of the samples' SDs; None with fewer than 2 values in each."""
    if not samples or len(samples[0]) < 2:
        return None
    return math.sqrt(statistics.fmean(map(statistics.variance, samples)))


def _over_rates(results: Results, arms: list[str]) -> float | None:
    declared, ranges = set(results.config.train.learning_rates), []
    for arm in arms:
        grid = results.index["rates"][arm].get("grid") or ()
        tried = [
            g["losses"] for g in grid if g["rate"] in declared and g["losses"] and None not in g["losses"]
        ]
        means = [statistics.fmean(found) for found in tried]
        if len(means) > 1:
            ranges.append(max(means) - min(means))
    return statistics.fmean(ranges) if ranges else None


def group_macros(study: Told) -> Iterator[Macro]:
    """Yield the numbers of every budget that two or more arms share."""
    if study.config is None:
        return
    for budget, arms in budgets(study.config).items():
        found = None if study.results is None else group(study.results, budget, arms)
        yield from _of(study, budget, arms, found)


def _of(study: Told, budget: str, arms: list[str], found: Group | None) -> Iterator[Macro]:
    config, means = study.config, {} if found is None else found.means
    assert config is not None
    control = uniform(config, arms)
    low = min(means, key=lambda arm: means[arm]) if means else None
    high = max(means, key=lambda arm: means[arm]) if means else None
    beneath = sum(loss < means[control] for loss in means.values()) if control in means else None
    numbers: dict[str, tuple[float | None, str, str]] = {
        "Arms": (len(arms), ",d", "arms"),
        "Seeds": (len(found.seeds) if found else None, "d", "seeds that all arms have finished"),
        "LowestLoss": (means[low] if low else None, ".4f", "nats per token"),
        "HighestLoss": (means[high] if high else None, ".4f", "nats per token"),
        "UniformLoss": (means.get(control or ""), ".4f", "nats per token"),
        "BelowUniform": (beneath, "d", "arms with a lower mean than the uniform one"),
        "Range": (means[high] - means[low] if low and high else None, ".4f", "nats per token"),
        "OverArms": (
            statistics.stdev(means.values()) if len(means) > 1 else None,
            ".4f",
            "SD, nats per token",
        ),
        "OverSeeds": (found.over_seeds if found else None, ".4f", "SD, nats per token"),
        "OverPairs": (found.over_pairs if found else None, ".4f", "SD of paired differences, nats per token"),
        "OverRates": (found.over_rates if found else None, ".4f", "range, nats per token"),
    }
    label = f"Budget{camel(budget)}"
    for quantity, (value, form, unit) in numbers.items():
        yield study.number(value, form, unit, label + quantity)
    spread, rates = numbers["Range"][0], numbers["OverRates"][0]
    more = None if spread is None or rates is None else "more" if rates > spread else "less"
    texts = {
        "Name": name(budget),
        "RatesThanArms": more,
        "LowestArm": low and name(low),
        "HighestArm": high and name(high),
    }
    for quantity, text in texts.items():
        yield study.text(text, label + quantity)


def difference(results: Results, arm: str) -> float | None:
    """Return the arm's mean paired difference to its control; None for a control, or without seeds."""
    other = contrasts.control(results.config, arm)
    found = [] if other is None else contrasts.differences(results, arm, other)
    return statistics.fmean(found) if found else None
