"""Grow and prune: rank moves from modules that need it least to those that need it most, while they train.

Every `every` steps each module is valued by what losing its update would cost (`segments.importance`). The
k-th unit of rank of a module of value v is taken to be worth v/k, so that the greedy solver's answer gives
every module parameters in proportion to its value. (The energies of single units would punish the young: a
unit that has just grown is the module's smallest, and would be pruned again at the next boundary.) Ranks move
towards that answer, the densest unit first, until `move_share` of the budget has moved.

A module without adapter has no gradient of B to be measured by. One that was pruned away keeps the share of
the summed value that it had last; one that never had an adapter is taken for an average unit of its part. So
both come back once the others are worth less than that per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from rankwise.budget import solve_gains
from rankwise.checkpoint import Saved
from rankwise.methods.segments import Decision, importance, in_segments, prior
from rankwise.methods.session import Outcome, Session
from rankwise.plans import RankPlan


@contextmanager
def grow_prune(session: Session) -> Iterator[tuple[Any, Outcome]]:
    """Start at the session's plan and move rank every `every` steps (see `session.Method`).

    The last move leaves `every` steps, so that what it grows is trained no less than what others grew. A
    boundary at which no module has a value (B still zero) changes nothing. `Outcome.details` is that of
    `segments.in_segments`; each move also states `importance`, the values of the modules that changed.
    """
    options = session.plan.options
    boundaries = range(options["every"], len(session.steps) - options["every"] + 1, options["every"])

    def decide(plan: RankPlan, saved: Saved, memory: dict[str, Any]) -> Decision:
        measured = importance(saved, plan.modules, session.config.betas[0])
        total = sum(measured.values())
        if not total:
            return Decision(plan.ranks, memory=memory)
        values = {**_absent(plan, measured, memory), **measured}
        ranks = moved(plan, values, options["move_share"])
        shares = {name: value / total for name, value in values.items()}
        gone = {n: shares[n] for n, rank in ranks.items() if rank == 0 and (n in measured or n in memory)}
        changed = {name: values[name] for name, rank in ranks.items() if rank != plan.ranks[name]}
        return Decision(ranks, {"importance": changed}, gone)

    with in_segments(session, session.plan, boundaries, decide) as result:
        yield result


def moved(plan: RankPlan, values: Mapping[str, float], share: float) -> dict[str, int]:
    """Return the ranks after one move: never over the plan's budget, at most a share of it pruned.

    Args:
        plan: the present ranks, with a budget.
        values: what each module is worth, >= 0, in any unit.
        share: of the budget's parameters that may be pruned.

    The units that `budget.solve_gains` would add are taken densest first; for each, the units that it would
    drop go, least dense first, until the new one fits. It ends where that would prune more than the share.
    """
    budget = plan.budget or 0
    costs = {module.name: module.cost for module in plan.modules}
    full = {module.name: module.max_rank for module in plan.modules}
    gains = {name: values[name] / np.arange(1, full[name] + 1) for name in plan.ranks}
    wanted = solve_gains(gains, costs, budget, full)

    def units(low: Mapping[str, int], high: Mapping[str, int]) -> list[tuple[float, str]]:
        return [(gains[n][k] / costs[n], n) for n in plan.ranks for k in range(low[n], high[n])]

    grown = sorted(units(plan.ranks, wanted), key=lambda unit: -unit[0])
    spare = sorted(units(wanted, plan.ranks), key=lambda unit: unit[0])
    ranks, room, left = dict(plan.ranks), budget - plan.parameters, share * budget
    for _, name in grown:
        need, freed = 0, 0
        while room + freed < costs[name]:  # the solver's answer fits the budget, so there is enough to drop
            freed += costs[spare[need][1]]
            need += 1
        if freed > left:
            break
        for _, donor in spare[:need]:
            ranks[donor] -= 1
        spare = spare[need:]
        ranks[name] += 1
        room += freed - costs[name]
        left -= freed
    return ranks


def _absent(plan: RankPlan, measured: Mapping[str, float], memory: Mapping[str, float]) -> dict[str, float]:
    """Return values for the modules without adapter: the share they had last, or an average unit's."""
    units = {name: value / plan.ranks[name] for name, value in measured.items()}
    total = sum(measured.values())
    return {
        module.name: memory[module.name] * total
        if module.name in memory
        else prior(module, units, plan.modules)
        for module in plan.modules
        if module.name not in measured
    }
