"""Linear growth: low ranks near the input, high ones near the output; linear decay's mirror."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, Fraction]:
    """Return `base - (base - min) * (L - 1 - i) / (L - 1)` for layer i of L; a single layer gets `base`."""
    base, low = whole(options, "base", "min")
    last = inventory.layers - 1
    return {
        module.name: base - (base - low) * Fraction(last - module.layer, max(1, last)) for module in inventory
    }
