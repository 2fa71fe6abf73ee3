"""EVA: ranks where few directions explain much of a module's input (arXiv 2410.07170)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.strategies.options import Options

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def gains(inventory: Inventory, probe: Any, options: Options) -> dict[str, np.ndarray]:
    """Return the explained-variance ratio of each principal component of the module's inputs.

    The paper pools the ratios of all modules and keeps the largest, each counted as one rank. Here the
    solver divides them by the cost of a unit, so the budget is one of parameters; at cost 1 everywhere the
    ranks are those of PEFT's `initialize_lora_eva_weights` (tests/test_probe_inputs.py). Modules reading the
    same input (q, k and v) have the same ratios, so under a parameter budget the cheaper ones come first.
    """
    values = probe.of("explained_variance_ratio")
    return {name: values[name].astype(np.float64) for name in inventory.names}
