"""What strategies share: the shape of an entry, and the checks and arithmetic of their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from rankwise.errors import RankwiseError
from rankwise.evidence import Kind

if TYPE_CHECKING:
    from rankwise.inventory import Inventory, Module

Options = Mapping[str, Any]
Function = Callable[["Inventory", Any, Options], Mapping[str, Any]]
"""`(inventory, probe, options) -> {module name: wanted rank, or array of gains}`; `probe` is the `Evidence`
that the strategy asks for, None where it asks for none."""


@dataclass(frozen=True)
class Strategy:
    """One way to allocate ranks.

    `kind` says what the function returns: "targets" (wanted ranks, not yet whole), "gains" (the
    value of each unit of rank), "inner" (whatever the strategy named by the option `of` returns) or
    "trained" (targets of the plan that training starts from; a method of the same name in `methods/`
    chooses the final ranks while it trains).
    `options` are the accepted option names with their defaults; a default of None must be given.
    `evidence` names the probe that the function reads (`evidence.QUANTITIES`), if any.
    """

    kind: Literal["targets", "gains", "inner", "trained"]
    function: Function
    options: Options
    doc: str
    evidence: Kind | None = None


def whole(options: Options, *names: str) -> tuple[int, ...]:
    """Return the named options, checked: whole, at least 1, and min <= base <= max.

    Raises:
        RankwiseError: naming the option, its value and the rule.
    """
    for name in names:
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RankwiseError(f"Option {name} must be a whole number of 1 or more; got {value!r}.")
    ordered = [name for name in ("min", "base", "max") if name in names]
    if [options[name] for name in ordered] != sorted(options[name] for name in ordered):
        shown = ", ".join(f"{name} {options[name]}" for name in ordered)
        raise RankwiseError(f"Options must keep {' <= '.join(ordered)}; got {shown}.")
    return tuple(options[name] for name in names)


def fraction(options: Options, name: str) -> float:
    """Return the named option, checked: a number above 0 and at most 1.

    Raises:
        RankwiseError: naming the option, its value and the rule.
    """
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RankwiseError(f"Option {name} must be a share above 0 and at most 1; got {value!r}.")
    return float(value)


def above_one(options: Options, name: str) -> float:
    """Return the named option, checked: a finite number above 1.

    Raises:
        RankwiseError: naming the option, its value and the rule.
    """
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 < value <= 64:
        raise RankwiseError(f"Option {name} must be a number above 1, 64 at most; got {value!r}.")
    return float(value)


def proportional(inventory: Inventory, values: Mapping[str, Any], base: int) -> dict[str, Fraction]:
    """Return `base` times each module's value over the mean of all; `base` everywhere if all are 0."""
    exact = {name: Fraction(float(values[name])) for name in inventory.names}
    mean = sum(exact.values(), Fraction(0)) / max(1, len(exact))
    return {name: base * value / mean if mean else Fraction(base) for name, value in exact.items()}


def depth(module: Module, inventory: Inventory) -> Fraction:
    """Return the module's layer as a share of the model's depth: 0 first, 1 last; 0 in a single layer."""
    return Fraction(module.layer, max(1, inventory.layers - 1))


def only(inventory: Inventory, kind: str, rank: int) -> dict[str, int]:
    """Return `rank` for the modules of a kind and 0 for the others.

    Raises:
        RankwiseError: there is no module of that kind.
    """
    targets = {module.name: rank if module.kind == kind else 0 for module in inventory}
    if not any(targets.values()):
        found = ", ".join(dict.fromkeys(module.kind for module in inventory))
        raise RankwiseError(f"The targets hold no module of kind {kind}, only {found}.")
    return targets
