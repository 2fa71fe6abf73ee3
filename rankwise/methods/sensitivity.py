"""Sensitivity: a uniform warm-up, then one reallocation by what removing each module's update would cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from rankwise import lowrank
from rankwise.budget import solve_gains
from rankwise.checkpoint import Saved
from rankwise.methods.resize import factors
from rankwise.methods.segments import Decision, importance, in_segments, prior
from rankwise.methods.session import Outcome, Session
from rankwise.plans import RankPlan


@contextmanager
def sensitivity(session: Session) -> Iterator[tuple[Any, Outcome]]:
    """Train the session's plan for `warm_share` of the steps, reallocate once, train on (`session.Method`).

    The warm-up's tokens are training tokens, and what it learned is kept: modules are pruned and grown. A run
    of one step has no room for a change and keeps its plan. `Outcome.details` is that of
    `segments.in_segments`; the move also states `importance`, every module's value in nats per label token.
    """
    steps, share = len(session.steps), session.plan.options["warm_share"]
    boundaries = [min(max(1, round(share * steps)), steps - 1)] if steps > 1 else []

    def decide(plan: RankPlan, saved: Saved, memory: dict[str, Any]) -> Decision:
        values = importance(saved, plan.modules, session.config.betas[0])
        if not any(values.values()):
            return Decision(plan.ranks, {"importance": values})
        costs = {module.name: module.cost for module in plan.modules}
        full = {module.name: module.max_rank for module in plan.modules}
        ranks = solve_gains(gains(plan, saved, values), costs, plan.budget or 0, full)
        return Decision(ranks, {"importance": values})

    with in_segments(session, session.plan, boundaries, decide) as result:
        yield result


def gains(plan: RankPlan, saved: Saved, values: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Return what each unit of rank is worth, for every module up to its full rank.

    A module's value is spread over the units that it has by energy: the k-th singular direction of B A gets
    the share s_k^2 / sum s^2. Beyond its present rank r nothing was measured: the last unit's worth goes on
    falling as r/k, the harmonic decline under which units that were worth the same would be held in
    proportion to value. A steep spectrum so asks for no more rank, a flat one does. A module without adapter
    starts from the mean first unit of its part.
    """
    held = {}
    for module in plan.modules:
        found = factors(saved, module.name)
        if found is not None:
            energy = lowrank.singular_values(found.a["value"], found.b["value"]).square().numpy()
            share = energy / energy.sum() if energy.any() else np.full(len(energy), 1 / len(energy))
            held[module.name] = np.minimum.accumulate(values[module.name] * share)
    first = {name: float(units[0]) for name, units in held.items()}
    result = {}
    for module in plan.modules:
        units = held.get(module.name, np.array([prior(module, first, plan.modules)]))
        beyond = np.arange(len(units) + 1, module.max_rank + 1)
        result[module.name] = np.concatenate([units, units[-1] * len(units) / beyond])
    return result
