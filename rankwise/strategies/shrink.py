"""Shrink: train at a higher rank, then keep the largest singular values of all updates (`methods/`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, above_one, fraction

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def start(inventory: Inventory, probe: Any, options: Options) -> dict[str, int]:
    """Return one rank everywhere: the shape of the plan that training starts from."""
    above_one(options, "factor")
    fraction(options, "refit_share")
    return dict.fromkeys(inventory.names, 1)
