"""Shrink: train at a higher rank, then keep the largest singular values of all updates, and refit.

As PARA (arXiv 2604.27796) has one threshold over all singular values of all updates; here they are bought per
parameter, so that the budget counts parameters, and training goes on after the cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from rankwise import lowrank
from rankwise.budget import solve_gains, solve_targets
from rankwise.checkpoint import Saved
from rankwise.methods.resize import factors
from rankwise.methods.segments import Decision, in_segments
from rankwise.methods.session import Outcome, Session, replanned
from rankwise.plans import RankPlan


@contextmanager
def shrink(session: Session) -> Iterator[tuple[Any, Outcome]]:
    """Train at `factor` times the budget, truncate once, refit for `refit_share` of the steps.

    See `session.Method`. The refit is part of the run's steps. A run of one step is truncated after it,
    without a refit. `Outcome.details` is that of `segments.in_segments`; the move also states `energy_kept`,
    per module the share of sum s^2 that is left.
    """
    plan, steps = session.plan, len(session.steps)
    start = larger(plan, plan.options["factor"])
    cut = round((1 - plan.options["refit_share"]) * steps)
    boundaries = [max(1, min(cut, steps - 1))] if steps else []

    def decide(present: RankPlan, saved: Saved, memory: dict[str, Any]) -> Decision:
        energy = energies(present, saved)
        costs = {module.name: module.cost for module in present.modules}
        ranks = solve_gains(energy, costs, plan.budget or 0, present.ranks)
        kept = {name: _share(values, ranks[name]) for name, values in energy.items()}
        return Decision(ranks, {"energy_kept": kept})

    with in_segments(session, start, boundaries, decide) as result:
        yield result


def larger(plan: RankPlan, factor: float) -> RankPlan:
    """Return the uniform plan of `factor` times the budget, at most full rank everywhere."""
    costs = {module.name: module.cost for module in plan.modules}
    full = {module.name: module.max_rank for module in plan.modules}
    amount = int(factor * (plan.budget or 0))
    return replanned(plan, solve_targets(dict.fromkeys(costs, 1), costs, amount, full))


def energies(plan: RankPlan, saved: Saved) -> dict[str, np.ndarray]:
    """Return s_k^2 of every module's update s B A, falling: what each unit of rank holds."""
    found = {}
    for module in plan.modules:
        held = factors(saved, module.name)
        values = np.zeros(0)
        if held is not None:
            scale = plan.scale.scaling(held.rank)
            values = (scale * lowrank.singular_values(held.a["value"], held.b["value"])).square().numpy()
        found[module.name] = np.minimum.accumulate(values)
    return found


def _share(values: np.ndarray, rank: int) -> float:
    return float(values[:rank].sum() / values.sum()) if values.any() else 1.0
