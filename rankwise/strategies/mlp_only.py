"""Feed-forward only: adapters on the MLP alone ("Selective LoRA", the study before the earlier one)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, only, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, int]:
    """Return `base` for MLP modules and 0 for all others."""
    (base,) = whole(options, "base")
    return only(inventory, "mlp", base)
