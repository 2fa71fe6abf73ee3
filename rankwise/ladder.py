"""The cheapest plan of a ladder that is good enough. Losses in, a decision out.

Plans stand in the order of their parameters, fewest first, and share their seeds. "Good enough" means shown,
by one-sided paired t-tests, to lose less than the margin against *every* other plan of the ladder
(intersection-union: no plan is first picked by its loss and then tested by the same data).

The walk goes down from the largest plan and ends at the first failure after a plan has passed; the last that
passed is chosen. Where the largest fails (it overfits, or the seeds are too few) the walk may go on below it,
and that has a price: each such fresh start is one more chance to be wrong. Skipping failed plans at the full
level errs in up to 11 % of simulated studies, not 5 %. So alpha is shared beforehand (the fallback procedure,
Wiens and Dmitrienko 2005): the largest plan is tested at 80 % of it, each of the others has an equal share of
the rest, and a plan that passes hands its whole level down to the next.

Why that holds for any truth and any correlation: call a plan bad if its true loss is the margin or more above
the best plan's. A bad plan passes its test against that best plan with at most the probability of its level.
Until a bad plan has passed, what a bad plan is tested at is its own share and those of the good plans just
above it; these sets do not overlap, so all levels together are at most alpha.

Power in 2,000 simulated studies of 5 plans (`pytest tests/test_ladder.py -s` prints more), 8 seeds and a
margin of 1.4 SDs of the seed differences: a ladder without differences ends at its smallest plan in 64 % of
studies and without a plan in 6 % (67 % and 8 % if alpha were not shared); where the largest plan is worse by
the margin it ends at the cheapest good one in 76 % (2 %) and without one in 20 % (97 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.power import RESERVE, seeds_for_noninferior
from rankwise.stats import NonInferior, noninferior


@dataclass(frozen=True)
class Step:
    """One plan's tests against every other plan of the ladder.

    Attributes:
        rung: the plan's place in the ladder, 0 the smallest.
        level: the level that it was tested at.
        rivals: the other plans' places.
        tests: one per rival, the difference being this plan minus the rival.
        p: the largest of their p-values, that of the intersection-union test.
        passed: whether p is below the level.
    """

    rung: int
    level: float
    rivals: tuple[int, ...]
    tests: tuple[NonInferior, ...]
    p: float
    passed: bool

    @property
    def hardest(self) -> int:
        """The index, in `rivals` and `tests`, of the largest p."""
        return max(range(len(self.tests)), key=lambda index: self.tests[index].p)


@dataclass(frozen=True)
class Settling:
    """What it may take to settle a plan that failed; an estimate, from the spread of the seeds at hand.

    Attributes:
        rung: the plan's place.
        more: further seeds for 80 % power (or what was asked) in the plan's hardest comparison, should its
            true difference be the observed one; None where that lies at the margin or beyond, or so near
            that no number of seeds that can be run will do. The walk stopped *because* the plan looked bad,
            so this leans to the high side.
        more_if_equal: the same, should there be no true difference; 0 where the seeds would have done, None
            where the margin is too small for any number of seeds that can be run.
    """

    rung: int
    more: int | None
    more_if_equal: int | None


@dataclass(frozen=True)
class Decision:
    """Which plan of a ladder, after which tests.

    Attributes:
        chosen: the plan's place, 0 the smallest; None where no plan passed.
        steps: the tests in the order made.
        margin: in the unit of the losses.
        alpha: the chance, at most, of choosing a plan that is worse than the best by the margin.
        seeds: how many.
    """

    chosen: int | None
    steps: tuple[Step, ...]
    margin: float
    alpha: float
    seeds: int

    @property
    def failed(self) -> Step | None:
        """The failure that ended the walk; None where the smallest plan passed."""
        return None if self.steps[-1].passed else self.steps[-1]

    def settling(self, power: float = 0.8) -> Settling | None:
        """Return what would settle the next plan down; None where the smallest plan passed.

        Where no plan passed it is the one that needs the fewest further seeds. More seeds are for a new
        study that declares them: testing again and again as they come would raise the error. Cost: some ms.
        """
        if self.failed is None:
            return None
        open_steps = [self.failed] if self.chosen is not None else list(self.steps)
        found = [_settling(step, self.margin, self.seeds, power) for step in open_steps]
        return min(found, key=lambda s: (s.more is None, s.more or 0, s.more_if_equal or 0))


def decide(losses: np.ndarray, margin: float, alpha: float = 0.05, reserve: float = RESERVE) -> Decision:
    """Choose the cheapest plan that is non-inferior to every plan of its ladder.

    Args:
        losses: (plans, seeds), plans from fewest to most parameters, seeds shared; lower is better.
        margin: how much more loss is still good enough; above 0, in the losses' unit, set beforehand.
        alpha: the chance, at most, of choosing a plan that is worse than the ladder's best by the margin.
        reserve: share of alpha that is kept for plans below a largest plan that fails; with 0 the walk ends
            there, without a plan.

    Raises:
        ValueError: for fewer than 2 plans or seeds, a loss that is not finite, a margin not above 0, or alpha
            or reserve out of range.

    Cost: plans**2 t-tests, below 1 ms for 5 plans.
    """
    x = np.asarray(losses, dtype=float)
    if x.ndim != 2 or min(x.shape) < 2 or not np.isfinite(x).all():
        raise ValueError(
            f"a ladder needs finite losses of 2 or more plans and seeds, (plans, seeds); got {x.shape}, "
            f"{int(np.isfinite(x).sum())} of {x.size} finite"
        )
    if not (0 < alpha < 1 and 0 <= reserve < 1):
        raise ValueError(f"alpha lies in (0, 1) and reserve in [0, 1); got {alpha} and {reserve}")
    chosen: int | None = None
    steps: list[Step] = []
    carried = 0.0
    for rung in reversed(range(len(x))):
        level = alpha * (carried + _share(rung, len(x), reserve))
        if level == 0:
            break  # nothing was kept for a fresh start
        steps.append(_step(x, rung, margin, level))
        if steps[-1].passed:
            chosen, carried = rung, level / alpha
        elif chosen is not None:
            break
    return Decision(chosen, tuple(steps), margin, alpha, x.shape[1])


def decide_together(
    ladders: Mapping[str, np.ndarray], margin: float, alpha: float = 0.05, reserve: float = RESERVE
) -> dict[str, Decision]:
    """Choose in each of several ladders, at alpha shared equally, so that alpha holds for all of them.

    A plan is compared with the plans of its own ladder; arguments and errors are those of `decide`.
    """
    return {name: decide(x, margin, alpha / len(ladders), reserve) for name, x in ladders.items()}


def _share(rung: int, plans: int, reserve: float) -> float:
    return 1 - reserve if rung == plans - 1 else reserve / (plans - 1)


def _step(x: np.ndarray, rung: int, margin: float, level: float) -> Step:
    rivals = tuple(other for other in range(len(x)) if other != rung)
    tests = tuple(noninferior(x[rung] - x[other], margin, level) for other in rivals)
    return Step(rung, level, rivals, tests, max(t.p for t in tests), all(t.shown for t in tests))


def _settling(step: Step, margin: float, seeds: int, power: float) -> Settling:
    needed = [_needed(test, margin, test.mean, step.level, power) for test in step.tests]
    equal = [_needed(test, margin, 0.0, step.level, power) for test in step.tests]
    return Settling(step.rung, _most(needed, seeds), _most(equal, seeds))


def _most(needed: Sequence[int | None], seeds: int) -> int | None:
    """Return how many seeds more the hardest comparison takes; None where some takes more than can be run."""
    known = [n for n in needed if n is not None]
    return max(0, max(known) - seeds) if len(known) == len(needed) else None


def _needed(test: NonInferior, margin: float, difference: float, level: float, power: float) -> int | None:
    if test.sd == 0:
        return 2 if difference < margin else None
    return seeds_for_noninferior(margin, test.sd, difference, power, level)


def reasons(decision: Decision, names: Sequence[str]) -> list[str]:
    """Return what was decided and why it stopped there, in sentences.

    Args:
        decision: of `decide`.
        names: one per plan, in the ladder's order.
    """
    margin, failed = f"{decision.margin:.4f}", decision.failed
    if decision.chosen is None:
        lines = [f"no plan is shown to be within {margin} of every other plan of the ladder."]
    else:
        lines = [f"{names[decision.chosen]} is shown to be within {margin} of every plan of the ladder."]
    if failed is None:
        return [*lines, "It is the smallest plan of the ladder."]
    if decision.chosen is not None:
        lines.append(_failure(failed, names))
    else:
        lines += [_failure(step, names) for step in decision.steps]
    return [*lines, _outlook(decision, names)]


def _failure(step: Step, names: Sequence[str]) -> str:
    test = step.tests[step.hardest]
    return (
        f"{names[step.rung]} is not: against {names[step.rivals[step.hardest]]} it may lose up to "
        f"{test.bound:.4f} (observed {test.mean:+.4f}, p = {test.p:.3g}, tested at {step.level:.2%})."
    )


def _outlook(decision: Decision, names: Sequence[str]) -> str:
    found = decision.settling()
    assert found is not None  # there was a failure
    name, had = names[found.rung], decision.seeds
    if found.more_if_equal is None:
        return f"A margin of {decision.margin:.2g} is too small for any number of seeds to show {name}."
    if found.more is None:
        return f"{name} looks worse by the margin or more: more seeds are not expected to change that."
    equal = f", {had + found.more_if_equal} if it is truly no different" if found.more_if_equal else ""
    return (
        f"A new study of about {had + found.more} seeds would settle {name} (an estimate from the spread of "
        f"these {had} seeds, 80 % power{equal})."
    )
