"""Custom: ranks that a person wrote down, by layer, by kind, or by module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rankwise.errors import RankwiseError, did_you_mean
from rankwise.strategies.options import Options

if TYPE_CHECKING:
    from rankwise.inventory import Inventory, Module

KINDS = ("attention", "mlp", "other")


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, float]:
    """Return the ranks of the option `ranks`, which is one of these.

    - per layer: a list with one rank for each layer, or {"0": 8, "1": 4, ...}, complete;
    - per kind: {"attention": 8, "mlp": 4}, complete for the kinds that the targets have;
    - per module: full names or suffixes ("q_proj", "mlp.c_proj"); the longest that fits counts, and
      modules that nothing names get 0.

    Raises:
        RankwiseError: forms are mixed, a key fits nothing, a layer or kind is missing, or a rank is
            not a finite number of 0 or more.
    """
    ranks = options["ranks"]
    if isinstance(ranks, list | tuple):
        ranks = dict(enumerate(ranks))
    if not isinstance(ranks, Mapping):
        raise RankwiseError(f"Option ranks must be a list or a mapping of ranks; got {ranks!r:.80}.")
    table = {str(key): _rank(str(key), value) for key, value in ranks.items()}
    if not table:
        raise RankwiseError("Option ranks is empty; give ranks per layer, per kind or per module.")
    layers = [key for key in table if key.isdecimal()]
    kinds = [key for key in table if key in KINDS]
    for form, keys in (("layers", layers), ("kinds", kinds)):
        if keys and len(keys) < len(table):
            other = next(key for key in table if key not in keys)
            raise RankwiseError(
                f"Option ranks mixes {form} ({keys[0]!r}) with something else ({other!r})."
                + _near(other, inventory)
            )
    if layers:
        return _per_layer(inventory, {int(key): rank for key, rank in table.items()})
    return _per_kind(inventory, table) if kinds else _per_module(inventory, table)


def _rank(key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise RankwiseError(
            f"Option ranks: the rank of {key!r} must be a number of 0 or more; got {value!r}."
        )
    return value


def _per_layer(inventory: Inventory, table: Mapping[int, float]) -> dict[str, float]:
    present = set(range(inventory.layers))
    if wrong := sorted(set(table) - present):
        raise RankwiseError(
            f"Option ranks names layers {_listed(wrong)}; the model's are 0 to {inventory.layers - 1}."
        )
    if missing := sorted(present - set(table)):
        raise RankwiseError(
            f"Option ranks must name every layer (0 switches one off); missing: {_listed(missing)}."
        )
    return {module.name: table[module.layer] for module in inventory}


def _per_kind(inventory: Inventory, table: Mapping[str, float]) -> dict[str, float]:
    present = dict.fromkeys(module.kind for module in inventory)
    if wrong := [kind for kind in table if kind not in present]:
        raise RankwiseError(
            f"Option ranks names kinds {_listed(wrong)}, of which there are no targets; "
            f"there are {_listed(present)}."
        )
    if missing := [kind for kind in present if kind not in table]:
        raise RankwiseError(
            f"Option ranks must name every kind (0 switches one off); missing: {_listed(missing)}."
        )
    return {module.name: table[module.kind] for module in inventory}


def _per_module(inventory: Inventory, table: Mapping[str, float]) -> dict[str, float]:
    unused = set(table)
    chosen = {}
    for module in inventory:
        fitting = [key for key in table if _fits(key, module)]
        unused -= set(fitting)
        chosen[module.name] = table[max(fitting, key=len)] if fitting else 0
    if unused:
        first = min(unused)
        raise RankwiseError(
            f"Option ranks: {first!r} is no layer, kind, module or suffix among the targets "
            f"(suffixes: {', '.join(inventory.suffixes)}).{_near(first, inventory)}"
        )
    return chosen


def _fits(key: str, module: Module) -> bool:
    return module.name == key or module.name.endswith("." + key)


def _near(key: str, inventory: Inventory) -> str:
    paths = dict.fromkeys(module.path for module in inventory)
    return did_you_mean(key, [*inventory.suffixes, *paths, *KINDS, *inventory.names])


def _listed(values: Any) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
