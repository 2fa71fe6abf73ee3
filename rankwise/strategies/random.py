"""Random: a wanted rank drawn for each module. The control that any clever allocation must beat."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rankwise.errors import RankwiseError
from rankwise.seeds import generator
from rankwise.strategies.options import Options, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, Fraction]:
    """Return `min + (max - min) * u` with u uniform on [0, 1).

    Each module draws from (seed, its name), so that neither the order nor the choice of targets
    changes what a module draws.
    """
    low, high = whole(options, "min", "max")
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise RankwiseError(f"Option seed must be a whole number of 0 or more; got {seed!r}.")
    return {
        name: low + (high - low) * Fraction(float(generator(seed, "random ranks", name).random()))
        for name in inventory.names
    }
