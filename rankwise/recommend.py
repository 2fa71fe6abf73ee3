"""The cheapest plan that is good enough, with what it saves and how sure that is. Records in, an answer out.

`ladder` decides; this file asks whether it may (complete records, seeds enough, a margin above zero), counts
what the chosen plan saves, and says it in words. A ladder is tested as it was declared: where one of its arms
cannot be tested the whole ladder has no verdict, since "no worse than every plan" would leave out that arm.
Alpha is shared by all declared ladders, also by those without a verdict.

A verdict is about the plans of one ladder. Where several ladders name a plan, the one with fewer parameters
is recommended; those plans are not tested against each other, and the text says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rankwise import contrasts, tables
from rankwise import ladder as ladders
from rankwise.advice import LadderResult, Recommendation, Rung
from rankwise.config import SCREENING_BELOW
from rankwise.errors import RankwiseError
from rankwise.ladder import Decision, Step
from rankwise.savings import Savings, count, done, parameters, savings_of, timing_cautions
from rankwise.tables import Results

__all__ = ["ALPHA", "LadderResult", "Recommendation", "Rung", "Savings", "recommend"]

ALPHA = 0.05
"""The chance, at most, that a study recommends a plan that is worse than its ladder's best by the margin."""

EXAMPLE = """\
ladders:
  uniform: [uniform@r1, uniform@r2, uniform@r4]"""


def recommend(results: Results) -> Recommendation:
    """Return the cheapest plan of a study's ladders that is good enough, or why that cannot be said.

    Args:
        results: a study's index and records.

    Raises:
        RankwiseError: the study declares no ladder.

    Cost: below 50 ms for 8 arms and 8 seeds, besides reading the records.
    """
    config = results.config
    if not config.ladders or config.baseline is None:
        raise RankwiseError(
            f"study {config.name!r} declares no ladder, so there is nothing to choose from. A ladder names "
            f"two or more of the arms ({', '.join(config.arms)}), such as\n{EXAMPLE}\n"
            "Declared after the first run it makes the study exploratory."
        )
    margin = contrasts.margin(results)
    level = ALPHA / len(config.ladders)
    found = tuple(_ladder_result(results, name, arms, margin, level) for name, arms in config.ladders.items())
    return Recommendation(
        study=config.name,
        ladders=found,
        baseline=config.baseline,
        share=config.margin,
        margin=margin,
        alpha=ALPHA,
        seeds=config.seeds.reporting,
        exploratory=bool(results.index["exploratory"]),
        cautions=tuple(_cautions(results, found)),
        results=results,
    )


def _ladder_result(
    results: Results, name: str, arms: Sequence[str], margin: float | None, level: float
) -> LadderResult:
    counts = {arm: parameters(results, arm) for arm in arms}
    known = None not in counts.values()  # else as declared: an arm without a run is not the smallest
    order = sorted(arms, key=lambda arm: counts[arm] or 0) if known else list(arms)
    faults = tuple(_faults(results, order, margin))
    decision = None
    if not faults and margin is not None:
        losses = [[loss for _, loss in sorted(results.losses(arm).items())] for arm in order]
        decision = ladders.decide(np.array(losses), margin, level)
    rungs = tuple(_rung(results, order, place, decision) for place in range(len(order)))
    chosen = None if decision is None or decision.chosen is None else order[decision.chosen]
    others = dict.fromkeys([order[-1], str(results.config.baseline)])
    found = [savings_of(results, chosen, other) for other in others if chosen and chosen != other]
    return LadderResult(name, rungs, decision, faults, tuple(one for one in found if one is not None))


def _faults(results: Results, arms: Sequence[str], margin: float | None) -> list[str]:
    """Return in clauses why a ladder has no verdict."""
    config = results.config
    seeds, baseline = config.seeds.reporting, str(config.baseline)
    needed = dict.fromkeys([*arms, baseline])
    failed = {arm: sum(r["status"] == "failed" for r in results.of(arm).values()) for arm in needed}
    lost = [arm for arm in needed if tables.hopeless(results.index["rates"][arm])]
    missing = {arm: seeds - len(results.of(arm)) for arm in needed if arm not in lost}
    faults = [f"{count(number, 'run')} of {arm} failed" for arm, number in failed.items() if number]
    faults += [f"every learning rate of {arm} diverged" for arm in lost]
    if total := sum(missing.values()):
        which = ", ".join(f"{arm} {number}" for arm, number in missing.items() if number)
        tuning = ", learning rates are still being tuned" if results.index["tuning_unfinished"] else ""
        faults.append(f"{total} of {seeds * len(needed)} reporting runs are missing ({which}){tuning}")
    if results.untouched() is None:
        faults.append("the model without an adapter has not been measured")
    if seeds < SCREENING_BELOW:
        faults.append(f"the study screens with {count(seeds, 'seed')}, and a verdict takes {SCREENING_BELOW}")
    gain = contrasts.baseline_gain(results)
    if gain is not None and margin is None and not missing.get(baseline) and not failed[baseline]:
        faults.append(
            f"{baseline} gains nothing over the model without an adapter ({gain:+.4f}), so there is no margin"
        )
    return faults


def _rung(results: Results, order: Sequence[str], place: int, decision: Decision | None) -> Rung:
    arm, largest = order[place], order[-1]
    losses = tuple(loss for _, loss in sorted(results.losses(arm).items()))
    paired = contrasts.differences(results, arm, largest) if arm != largest else []
    trained = parameters(results, arm)
    rung = Rung(
        arm=arm,
        parameters=None if trained is None else round(trained),
        losses=losses,
        loss=statistics.fmean(losses) if losses else None,
        difference=statistics.fmean(paired) if paired else None,
        common=len(paired),
    )
    steps = () if decision is None else decision.steps
    step = next((step for step in steps if step.rung == place), None)
    return rung if step is None else replace(rung, **_tested(step, order))


def _tested(step: Step, order: Sequence[str]) -> dict[str, Any]:
    bounds = {order[rival]: test.bound for rival, test in zip(step.rivals, step.tests, strict=True)}
    rival = order[step.rivals[step.hardest]]
    return {
        "bound": bounds.get(order[-1]),
        "rival": rival,
        "rival_bound": bounds[rival],
        "level": step.level,
        "p": step.p,
        "passed": step.passed,
    }


def _cautions(results: Results, found: Sequence[LadderResult]) -> list[str]:
    """Return what must be read with the answer."""
    rates = results.index["rates"]
    arms = list(dict.fromkeys([arm for one in found for arm in one.arms] + [str(results.config.baseline)]))
    lines = [
        f"The learning rate of {arm} lies at the edge of its grid: another may suit it better."
        for arm in arms
        if rates[arm].get("at_edge")
    ]
    if not results.config.tuned:
        lines.append("Learning rates were not tuned: a difference may be the rate's, not the ranks'.")
    for arm in dict.fromkeys(one.chosen for one in found if one.chosen):
        costs = [_probe_seconds(record) for record in done(results, arm).values()]
        if any(costs):
            typical = statistics.median(costs)
            lines.append(
                f"The plan of {arm} takes a probe of {typical:.1f} s, not part of its training time."
            )
    return [*lines, *timing_cautions(results, arms), *results.index["resolved"]["notices"]]


def _probe_seconds(record: dict[str, Any]) -> float:
    return sum(probe["cost"]["seconds"] for probe in record["train_info"].get("probes") or ())
