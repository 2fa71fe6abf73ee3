"""AdaLoRA: starts with spare rank, prunes triplets while it trains (2303.10512; `methods/adalora.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, above_one, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def start(inventory: Inventory, probe: Any, options: Options) -> dict[str, int]:
    """Return one rank everywhere: the shape of the plan that training starts from."""
    above_one(options, "factor")
    whole(options, "every")
    return dict.fromkeys(inventory.names, 1)
