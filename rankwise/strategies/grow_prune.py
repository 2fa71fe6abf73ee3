"""Grow and prune: rank moves between modules while they train (`methods/grow_prune.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, fraction, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def start(inventory: Inventory, probe: Any, options: Options) -> dict[str, int]:
    """Return one rank everywhere: the shape of the plan that training starts from."""
    whole(options, "every")
    fraction(options, "move_share")
    return dict.fromkeys(inventory.names, 1)
