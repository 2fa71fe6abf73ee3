"""Linear decay: high ranks near the input, low ones near the output (the earlier study's formula)."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, depth, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, Fraction]:
    """Return `base - (base - min) * i / (L - 1)` for layer i of L; a single layer gets `base`."""
    base, low = whole(options, "base", "min")
    return {module.name: base - (base - low) * depth(module, inventory) for module in inventory}
