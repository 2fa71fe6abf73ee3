"""The strategies, one file each, and the way from a strategy to a plan.

To add one: write `(inventory, probe, options) -> {name: ...}` in a file of its own and name it
below. `tests/contracts/test_strategies.py` then holds it to the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankwise.budget import parse_budget, raw_ranks, solve_gains, solve_targets
from rankwise.errors import RankwiseError, did_you_mean, one_of
from rankwise.evidence import Evidence, Kind
from rankwise.plans import PlanModule, RankPlan, ScaleRule
from rankwise.strategies import (
    adalora,
    attention_heavy,
    attention_only,
    custom,
    empirical,
    eva,
    fisher,
    gora,
    grow_prune,
    linear_decay,
    linear_growth,
    lora_drop,
    mlp_only,
    random,
    reversed,
    sensitivity,
    shrink,
    spectral,
    uniform,
    weight_spectrum,
)
from rankwise.strategies.options import Options, Strategy

if TYPE_CHECKING:
    from rankwise.inventory import Inventory

STRATEGIES: dict[str, Strategy] = {
    "uniform": Strategy("targets", uniform.targets, {"base": 16}, "one rank everywhere"),
    "linear_decay": Strategy(
        "targets", linear_decay.targets, {"base": 16, "min": 4}, "from base at the input to min at the output"
    ),
    "linear_growth": Strategy(
        "targets",
        linear_growth.targets,
        {"base": 16, "min": 4},
        "from min at the input to base at the output",
    ),
    "attention_heavy": Strategy(
        "targets", attention_heavy.targets, {"base": 16}, "base on attention, half of it elsewhere"
    ),
    "empirical": Strategy(
        "targets",
        empirical.targets,
        {"base": 16, "min": 4, "max": 32},
        "0.6, 1.2 and 1.0 times base in the first, middle and last layers",
    ),
    "attention_only": Strategy("targets", attention_only.targets, {"base": 16}, "base on attention alone"),
    "mlp_only": Strategy("targets", mlp_only.targets, {"base": 16}, "base on the feed-forward half alone"),
    "random": Strategy(
        "targets",
        random.targets,
        {"min": 4, "max": 32, "seed": 0},
        "uniform draws from min to max (a control)",
    ),
    "spectral": Strategy(
        "gains", spectral.gains, {}, "squared singular values of the loss's gradient", "gradients"
    ),
    "eva": Strategy("gains", eva.gains, {}, "explained variance of the inputs (EVA)", "inputs"),
    "weight_spectrum": Strategy(
        "gains", weight_spectrum.gains, {}, "energy of the frozen weights (a control without data)", "weights"
    ),
    "gora": Strategy(
        "targets",
        gora.targets,
        {"base": 8, "min": 4, "max": 32},
        "importance mean|W * gradient| (GoRA)",
        "importance",
    ),
    "fisher": Strategy("targets", fisher.targets, {"base": 16}, "mean squared gradient", "fisher"),
    "lora_drop": Strategy(
        "targets",
        lora_drop.targets,
        {"base": 16},
        "output of a briefly trained adapter (LoRA-drop)",
        "outputs",
    ),
    "adalora": Strategy(
        "trained",
        adalora.start,
        {"factor": 1.5, "every": 1},
        "prunes triplets while training (AdaLoRA, PEFT's own)",
    ),
    "sensitivity": Strategy(
        "trained",
        sensitivity.start,
        {"warm_share": 0.2},
        "uniform at first, then by what removing each update would cost",
    ),
    "grow_prune": Strategy(
        "trained",
        grow_prune.start,
        {"every": 5, "move_share": 0.1},
        "moves rank between modules while training",
    ),
    "shrink": Strategy(
        "trained",
        shrink.start,
        {"factor": 4.0, "refit_share": 0.25},
        "trains at a higher rank, then keeps the largest singular values",
    ),
    "custom": Strategy("targets", custom.targets, {"ranks": None}, "ranks given by layer, kind or module"),
    "reversed": Strategy(
        "inner", reversed.mirrored, {"of": None}, "another strategy with its layers mirrored (a control)"
    ),
}


def allocate(
    inventory: Inventory,
    *,
    strategy: str,
    study_targets_inventory: Inventory | None = None,
    budget: str | int | None = None,
    match: Literal["budget", "none"] = "budget",
    scale: ScaleRule | Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    model: str = "",
    probe: Any = None,
) -> RankPlan:
    """Return the plan of one strategy on the modules of an inventory.

    Args:
        inventory: The modules that may get ranks (the arm's targets).
        strategy: A name in `STRATEGIES`.
        study_targets_inventory: The modules on which `r=8` and full rank are counted (the study's
            targets), so that arms on subsets spend the same; by default `inventory`.
        budget: See `rankwise.budget.parse_budget`; ignored with `match="none"`.
        match: "budget" fits the ranks to the budget; "none" keeps the formula's own, floored.
        scale: The scale rule; by default constant 2.
        options: The strategy's options; what is not given has the default.
        seed: Reaches strategies that draw, unless their options name a seed.
        model: The model's name, for the record.
        probe: The `Evidence` that the strategy asks for (`evidence_of`).

    Raises:
        RankwiseError: an unknown strategy or option, a budget that is missing or impossible, or
            a plan without a single rank.
    """
    study = inventory if study_targets_inventory is None else study_targets_inventory
    one, settings = resolve(strategy, options or {}, seed)
    kind = STRATEGIES[settings["of"]].kind if one.kind == "inner" else one.kind
    amount = _amount(strategy, kind, match, budget, study)
    needs = evidence_of(strategy, settings)
    values = _values(one, strategy, inventory, probe, needs, settings)
    ranks, notices = _ranks(kind, values, inventory, amount)
    _refuse_empty(ranks, values, inventory, strategy, amount)
    return RankPlan(
        model=model,
        strategy=strategy,
        options=settings,
        targets=inventory.targets,
        match=match,
        budget=amount,
        scale=ScaleRule() if scale is None else ScaleRule.model_validate(scale),
        ranks=ranks,
        modules=tuple(_planned(inventory)),
        exclude=inventory.lookalikes,
        provenance={
            "seed": seed,
            "budget": budget if amount is not None else None,
            "architecture": inventory.architecture,
            "base_parameters": inventory.base_parameters,
            "unreachable_share": inventory.unreachable_share,
            "notices": [*inventory.notices, *notices],
            **_account(kind, values, ranks, probe if needs else None),
        },
    )


def _values(
    one: Strategy, strategy: str, inventory: Inventory, probe: Any, needs: Kind | None, settings: Options
) -> dict[str, Any]:
    """Return what the strategy values each module at, in the inventory's order."""
    if needs is not None and getattr(probe, "kind", None) != needs:
        looks, rows = "the weights", ""
        if needs != "weights":
            looks, rows = "data", " of calibration rows (`--data` on the command line, `data=` in Python)"
        raise RankwiseError(f"Strategy {strategy} looks at {looks}: it needs the {needs} probe{rows}.")
    values = one.function(inventory, probe, settings)
    if set(values) != set(inventory.names):
        raise RankwiseError(f"Strategy {strategy} must value exactly the modules of the inventory.")
    return {name: values[name] for name in inventory.names}


def _ranks(
    kind: str, values: Mapping[str, Any], inventory: Inventory, amount: int | None
) -> tuple[dict[str, int], list[str]]:
    """Return whole ranks, and what must be known of them."""
    full = inventory.max_ranks
    if amount is None:
        capped = sum(values[name] >= limit + 1 for name, limit in full.items())
        told = [f"{capped} modules wanted more than their full rank and got that."] if capped else []
        return raw_ranks(values, full), told
    if kind != "gains":
        return solve_targets(values, inventory.costs, amount, full), []
    longer = {name: _extended(gains, full[name]) for name, gains in values.items()}
    ranks = solve_gains(longer, inventory.costs, amount, full)
    beyond = sum(rank > len(values[name]) for name, rank in ranks.items())
    told = [f"{beyond} modules got more rank than was measured; gains then fall as 1/k."] if beyond else []
    return ranks, told


def _extended(gains: Any, max_rank: int) -> np.ndarray:
    """Return gains for every unit up to full rank: probes stop at some 64 units, budgets need not.

    The last one that was measured goes on falling as 1/k, so that large budgets are spent in its proportion.
    """
    array = np.asarray(gains, dtype=np.float64)
    if array.ndim != 1 or not 0 < len(array) < max_rank:
        return array
    beyond = np.arange(len(array) + 1, max_rank + 1)
    return np.concatenate([array, array[-1] * len(array) / beyond])


def _account(
    kind: str, values: Mapping[str, Any], ranks: Mapping[str, int], probe: Evidence | None
) -> dict[str, Any]:
    """Return what `rankwise.explain` reads: what modules were valued at, to 6 digits, and the probe.

    Of gains, those of the units that were bought and of the next one. Seconds are left out: equal plans are
    equal files.
    """
    account: dict[str, Any] = {"valued_as": kind}
    if kind == "gains":
        bought = {name: values[name][: rank + 1] for name, rank in ranks.items()}
        account["values"] = {name: [_digits(gain) for gain in gains] for name, gains in bought.items()}
    elif kind == "targets":
        account["values"] = {name: _digits(value) for name, value in values.items()}
    if probe is not None:
        summary = probe.summary()
        cost = {name: amount for name, amount in summary["cost"].items() if name != "seconds"}
        account["probe"] = summary | {"cost": cost}
    return account


def _digits(value: Any) -> float:
    return float(f"{float(value):.6g}")


def resolve(strategy: str, options: Mapping[str, Any], seed: int = 0) -> tuple[Strategy, dict[str, Any]]:
    """Return a strategy and its complete options: those given, the defaults for the others.

    Raises:
        RankwiseError: an unknown strategy, an option that it does not take, or one that it needs
            and did not get. The values themselves are checked by the strategy.
    """
    one = _named("strategy", strategy)
    accepted = dict(one.options)
    if one.kind == "inner" and options.get("of") is not None:
        inner = _named("Option of", options["of"])
        if inner.kind in ("inner", "trained"):
            raise RankwiseError(
                f"Option of must name a strategy that allocates before training, not itself and not one that "
                f"chooses while it trains; got {options['of']!r}."
            )
        accepted |= inner.options
    if "seed" in accepted:
        accepted["seed"] = seed
    for name in options:
        if name not in accepted:
            takes = ", ".join(accepted) or "none"
            raise RankwiseError(
                f"Strategy {strategy} has no option {name!r}; it takes {takes}.{did_you_mean(name, accepted)}"
            )
    settings = {name: options.get(name, default) for name, default in accepted.items()}
    if missing := [name for name, value in settings.items() if value is None]:
        raise RankwiseError(f"Strategy {strategy} needs the option {', '.join(missing)}.")
    return one, settings


def evidence_of(strategy: str, options: Mapping[str, Any]) -> Kind | None:
    """Return the kind of probe that a strategy reads, that of its inner one included; None for none."""
    one = STRATEGIES[strategy]
    return STRATEGIES[options["of"]].evidence if one.kind == "inner" else one.evidence


def _named(what: str, name: Any) -> Strategy:
    if not isinstance(name, str) or name not in STRATEGIES:
        raise RankwiseError(one_of(what, name, STRATEGIES))
    return STRATEGIES[name]


def _amount(strategy: str, kind: str, match: str, budget: str | int | None, study: Inventory) -> int | None:
    if match not in ("budget", "none"):
        raise RankwiseError(one_of("match", match, ("budget", "none")))
    if match == "none":
        if kind == "trained":
            raise RankwiseError(
                f"Strategy {strategy} trains towards a budget: give it one instead of `match: none`."
            )
        if kind == "gains":
            raise RankwiseError(
                f"Strategy {strategy} values units of rank and wants no number of its own: give it a "
                "budget instead of `match: none`."
            )
        return None
    if budget is None:
        raise RankwiseError(
            f"Strategy {strategy} needs a budget such as 'r=8'; `match: none` keeps a formula's own ranks."
        )
    return parse_budget(
        budget, costs=study.costs, max_ranks=study.max_ranks, base_parameters=study.base_parameters
    )


def _refuse_empty(
    ranks: Mapping[str, int],
    values: Mapping[str, Any],
    inventory: Inventory,
    strategy: str,
    amount: int | None,
) -> None:
    if any(ranks.values()):
        return
    if amount is None:
        raise RankwiseError(
            f"Strategy {strategy} wants less than rank 1 on every module: no adapter would be built."
        )
    unwanted = {name for name, value in values.items() if isinstance(value, Number) and value == 0}
    usable = [module.cost for module in inventory if module.name not in unwanted]
    raise RankwiseError(
        f"The budget of {amount:,} parameters buys no rank on the modules that {strategy} uses: "
        f"the cheapest unit there costs {min(usable):,}."
    )


def _planned(inventory: Inventory) -> list[PlanModule]:
    fields = tuple(PlanModule.model_fields)
    return [PlanModule(**{field: getattr(module, field) for field in fields}) for module in inventory]
