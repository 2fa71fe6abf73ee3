"""Attention-heavy: full rank budget on attention, half of it on the rest (the earlier study's formula)."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, Fraction]:
    """Return `base` for attention modules and `base / 2` for all others."""
    (base,) = whole(options, "base")
    return {
        module.name: Fraction(base) if module.kind == "attention" else Fraction(base, 2)
        for module in inventory
    }
