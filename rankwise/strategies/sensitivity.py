"""Sensitivity: a uniform warm-up, then ranks by what removing each update would cost (`methods/`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, fraction

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def start(inventory: Inventory, probe: Any, options: Options) -> dict[str, int]:
    """Return one rank everywhere: the shape of the plan that training starts from."""
    fraction(options, "warm_share")
    return dict.fromkeys(inventory.names, 1)
