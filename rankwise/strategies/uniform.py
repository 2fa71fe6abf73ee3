"""Uniform: one rank everywhere. The baseline of every comparison (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, int]:
    """Return the rank `base` for every module."""
    (base,) = whole(options, "base")
    return dict.fromkeys(inventory.names, base)
