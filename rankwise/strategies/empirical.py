"""Empirical: low ranks in the first layers, high in the middle, medium at the end (the earlier study's)."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, depth, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory

EARLY, MIDDLE, LATE = Fraction(6, 10), Fraction(12, 10), Fraction(1)
EARLY_ENDS, MIDDLE_ENDS = Fraction(3, 10), Fraction(7, 10)


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, Fraction]:
    """Return 0.6, 1.2 or 1.0 times `base`, kept from `min` to `max`.

    The share of depth i / (L - 1) decides: below 0.3, below 0.7, the rest. Fractions keep both the
    borders and the floors free of rounding.
    """
    base, low, high = whole(options, "base", "min", "max")

    def wanted(share: Fraction) -> Fraction:
        factor = EARLY if share < EARLY_ENDS else MIDDLE if share < MIDDLE_ENDS else LATE
        return min(max(base * factor, Fraction(low)), Fraction(high))

    return {module.name: wanted(depth(module, inventory)) for module in inventory}
