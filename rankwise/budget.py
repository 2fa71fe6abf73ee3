"""From wishes to whole ranks: (gains or targets, costs, budget) -> integer ranks within the budget.

A budget is a count of trainable parameters. One unit of rank on a module costs `in + out` of them
and modules differ (4 : 6 : 11 in SmolLM2), so counting ranks is not counting parameters.

All money is integer and all targets are `Fraction`s: what comes out does not depend on rounding.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from numbers import Rational

import numpy as np

from rankwise.errors import RankwiseError

FORMS = (
    "'r=8' (what uniform rank 8 costs on the study's targets), a number of trainable parameters such as "
    "'1.2M', '300k' or 6291456, or a share of the base parameters such as '0.5%'"
)
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_UNIFORM = re.compile(r"r\s*=\s*(\d{1,12})")
_NUMBER = re.compile(r"(\d[\d_]{0,29}(?:\.\d{1,30})?(?:[eE]\+?\d{1,2})?)\s*([kKmMgGbB%]?)")


def parse_budget(
    text: str | int, *, costs: Mapping[str, int], max_ranks: Mapping[str, int], base_parameters: int
) -> int:
    """Return the number of trainable parameters that a budget text stands for.

    Args:
        text: `r=8`, `1.2M`, `300k`, `6291456` (text or integer) or `0.5%`; parts of a parameter are
            dropped, for a budget is a ceiling. Under `r=k` a module narrower than k counts at full rank.
        costs: Parameters per unit of rank of each of the study's target modules.
        max_ranks: Their full ranks.
        base_parameters: Parameters of the base model, for shares.

    Raises:
        RankwiseError: not one of the forms, or refused by `check_budget`.
    """
    written = str(text).strip()
    uniform, number = _UNIFORM.fullmatch(written), _NUMBER.fullmatch(written)
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise RankwiseError(f"A budget is {FORMS}; got {text!r}.")
    if uniform:
        rank = int(uniform[1])
        if rank > max(max_ranks.values(), default=0):
            raise RankwiseError(
                f"Budget {written!r} is above full rank: the widest target module takes rank "
                f"{max(max_ranks.values(), default=0)} at most."
            )
        budget = sum(cost * min(rank, max_ranks[name]) for name, cost in costs.items())
    elif number:
        amount = Fraction(number[1])
        scale = Fraction(base_parameters, 100) if number[2] == "%" else _SUFFIX[number[2].lower()]
        budget = math.floor(amount * scale)
    elif re.fullmatch(r"-.*|r\s*=\s*-.*", written) and any(c.isdigit() for c in written):
        raise RankwiseError(f"A budget must be above zero; got {written!r}. It is {FORMS}.")
    else:
        raise RankwiseError(f"A budget is {FORMS}; got {written!r}.")
    check_budget(budget, costs=costs, max_ranks=max_ranks, text=written)
    return budget


def check_budget(
    budget: int, *, costs: Mapping[str, int], max_ranks: Mapping[str, int], text: str | None = None
) -> None:
    """Refuse a budget that buys nothing or more than there is to buy.

    Raises:
        RankwiseError: zero or negative, below the cheapest unit of rank, or above what full rank
            on every module costs. The text names the bound.
    """
    shown = f"{budget:,} parameters" if text in (None, str(budget)) else f"{text!r} ({budget:,} parameters)"
    usable = [cost for name, cost in costs.items() if max_ranks[name] > 0]
    if not usable:
        raise RankwiseError("There is no target module to spend a budget on.")
    if budget <= 0:
        raise RankwiseError(f"A budget must be above zero; got {shown}. It is {FORMS}.")
    if budget < min(usable):
        raise RankwiseError(
            f"Budget {shown} is too small for one unit of rank anywhere: the cheapest costs {min(usable):,}."
        )
    full = sum(cost * max_ranks[name] for name, cost in costs.items())
    if budget > full:
        raise RankwiseError(f"Budget {shown} is above full rank on every target module, {full:,}.")


def solve_gains(
    gains: Mapping[str, np.ndarray], costs: Mapping[str, int], budget: int, max_ranks: Mapping[str, int]
) -> dict[str, int]:
    """Spend a budget where a parameter gains most.

    Units of rank are bought in falling order of gain per parameter (ties: the mapping's order). A
    module whose next unit does not fit is finished and the others go on. Guaranteed:

    - never over the budget;
    - what is left is less than the next unit of every module that is not at its maximum;
    - total gain >= optimum - gain of the first unit that did not fit (the relaxation that may buy
      a part of that unit is an upper bound); equal to the optimum where all costs are equal;
    - total gain and spend do not fall when the budget grows: at the first difference, the larger
      budget buys a unit that the smaller one misses by less than its cost, and up to there no
      denser unit is left; by single parameters, the larger budget is then spent to the last one.

    Args:
        gains: For each module the value of its 1st, 2nd, ... unit: finite, >= 0, non-increasing.
            A module's maximum is the array's length or its full rank, whichever is less. Units
            of zero gain are bought too.
        costs: Parameters per unit of rank, for at least the modules in `gains`.
        budget: Trainable parameters, >= 0.
        max_ranks: Full ranks, for at least the modules in `gains`.

    Returns:
        Ranks, in the order of `gains`. Cost: O(units log modules).

    Raises:
        RankwiseError: a gain that is not as above (the module is named), or a bad budget.
    """
    left = _whole_budget(budget)
    arrays = {name: _checked_gains(name, values) for name, values in gains.items()}
    limits = {name: min(len(array), _lookup(max_ranks, name)) for name, array in arrays.items()}
    order = {name: i for i, name in enumerate(arrays)}
    ranks = dict.fromkeys(arrays, 0)
    price = {name: _cost(costs, name) for name in arrays}
    heap = [(-array[0] / price[n], order[n], n) for n, array in arrays.items() if limits[n]]
    heapq.heapify(heap)
    while heap:
        _, _, name = heapq.heappop(heap)
        if price[name] > left:
            continue
        left -= price[name]
        ranks[name] += 1
        if ranks[name] < limits[name]:
            heapq.heappush(heap, (-arrays[name][ranks[name]] / price[name], order[name], name))
    return ranks


def solve_targets(
    targets: Mapping[str, float | Rational],
    costs: Mapping[str, int],
    budget: int,
    max_ranks: Mapping[str, int],
) -> dict[str, int]:
    """Scale wanted ranks to a budget so that their shape is kept.

    One factor f is found, exactly, with `sum(cost * min(f * target, max_rank)) = budget`; each
    module gets the floor of that, and what is left goes to the largest remainders
    `(f * target - rank) * cost` (ties: the mapping's order) until no unit fits. Guaranteed:

    - never over the budget, and a module with target 0 gets 0;
    - what is left is less than the next unit of every module with a target above 0 that is not
      at its full rank;
    - no module gets less than the floor of its scaled target;
    - of two modules of equal cost and full rank, the one that wants more gets no less; of two that
      want the same, ranks differ by 1 at most;
    - equal targets under the budget of uniform rank k give k everywhere.

    Not guaranteed: that spend, or a module's rank, never falls as the budget grows (largest
    remainders do not have that property; what is left stays below the cheapest next unit).

    Args:
        targets: Wanted ranks, finite and >= 0, not all 0. Only their proportions matter.
        costs: Parameters per unit of rank, for at least the modules in `targets`.
        budget: Trainable parameters, >= 0.
        max_ranks: Full ranks, for at least the modules in `targets`.

    Returns:
        Ranks, in the order of `targets`. Cost: O((modules + leftover units) log modules).

    Raises:
        RankwiseError: a target that is not as above (the module is named), or a bad budget.
    """
    left = _whole_budget(budget)
    exact = _exact_targets(targets)
    if not any(exact.values()):
        raise RankwiseError("Every target is 0, so there is no shape to scale to the budget.")
    price = {name: _cost(costs, name) for name in exact}
    limits = {name: _lookup(max_ranks, name) for name in exact}
    factor = scale_factor(exact, price, left, limits)
    scaled = {name: min(factor * wanted, Fraction(limits[name])) for name, wanted in exact.items()}
    ranks = {name: math.floor(value) for name, value in scaled.items()}
    left -= sum(price[name] * rank for name, rank in ranks.items())
    order = {name: i for i, name in enumerate(exact)}

    def remainder(name: str) -> tuple[Fraction, int, str]:
        return (ranks[name] - scaled[name]) * price[name], order[name], name

    heap = [remainder(name) for name, wanted in exact.items() if wanted > 0 and ranks[name] < limits[name]]
    heapq.heapify(heap)
    while heap:
        _, _, name = heapq.heappop(heap)
        if price[name] > left:
            continue
        left -= price[name]
        ranks[name] += 1
        if ranks[name] < limits[name]:
            heapq.heappush(heap, remainder(name))
    return ranks


def raw_ranks(targets: Mapping[str, float | Rational], max_ranks: Mapping[str, int]) -> dict[str, int]:
    """Return a formula's own ranks, for `match: none`: the floor of each target, at most full rank.

    Raises:
        RankwiseError: a target that is negative or not finite (the module is named).
    """
    return {
        name: min(math.floor(wanted), _lookup(max_ranks, name))
        for name, wanted in _exact_targets(targets).items()
    }


def scale_factor(
    targets: Mapping[str, Fraction], costs: Mapping[str, int], budget: int, limits: Mapping[str, int]
) -> Fraction:
    """Return the exact factor f with `sum(cost * min(f * target, limit)) = budget`."""
    # Spend as a function of the factor is piecewise linear, with a bend where a module reaches its
    # full rank; walk along the bends until the piece that holds the budget.
    wanting = [name for name, wanted in targets.items() if wanted > 0]
    bends = sorted((Fraction(limits[name]) / targets[name], name) for name in wanting)
    capped, slope = 0, sum((costs[name] * targets[name] for name in wanting), Fraction(0))
    for bend, name in bends:
        if capped + slope * bend >= budget:
            break
        capped += costs[name] * limits[name]
        slope -= costs[name] * targets[name]
    else:
        return bends[-1][0]
    return (budget - capped) / slope


def _checked_gains(name: str, values: np.ndarray) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise RankwiseError(f"The gains of {name!r} must be real numbers; got {values!r:.80}.") from None
    if array.ndim != 1:
        raise RankwiseError(
            f"The gains of {name!r} must be one value per unit of rank (1-D); got shape {array.shape}."
        )
    if not np.isfinite(array).all():
        unit = int(np.flatnonzero(~np.isfinite(array))[0])
        raise RankwiseError(f"The gains of {name!r} must be finite; unit {unit + 1} is {array[unit]}.")
    if (array < 0).any():
        raise RankwiseError(f"The gains of {name!r} must not be negative; the least is {array.min()}.")
    if (np.diff(array) > 0).any():
        unit = int(np.flatnonzero(np.diff(array) > 0)[0])
        raise RankwiseError(
            f"The gains of {name!r} must not increase from one unit of rank to the next; "
            f"unit {unit + 1} has {array[unit]}, unit {unit + 2} has {array[unit + 1]}."
        )
    return array


def _exact_targets(targets: Mapping[str, float | Rational]) -> dict[str, Fraction]:
    exact = {}
    for name, wanted in targets.items():
        try:
            exact[name] = Fraction(wanted) if isinstance(wanted, Rational) else Fraction(float(wanted))
        except (TypeError, ValueError, OverflowError):
            raise RankwiseError(f"The target of {name!r} must be a finite number; got {wanted!r}.") from None
        if exact[name] < 0:
            raise RankwiseError(f"The target of {name!r} must not be negative; got {wanted!r}.")
    return exact


def _whole_budget(budget: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, int | np.integer) or budget < 0:
        raise RankwiseError(f"A solver takes a whole number of parameters, 0 or more; got {budget!r}.")
    return int(budget)


def _cost(costs: Mapping[str, int], name: str) -> int:
    cost = _lookup(costs, name)
    if cost < 1:
        raise RankwiseError(f"The cost of a unit of rank of {name!r} must be 1 or more; got {cost}.")
    return cost


def _lookup(table: Mapping[str, int], name: str) -> int:
    if name not in table:
        raise RankwiseError(f"Module {name!r} is not among the {len(table)} target modules of the inventory.")
    return int(table[name])
