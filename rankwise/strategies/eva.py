"""EVA: ranks where few directions explain much of a module's input (arXiv 2410.07170)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.strategies.options import Options

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def gains(inventory: Inventory, probe: Any, options: Options) -> dict[str, np.ndarray]:
    """Return the explained-variance ratio of each principal component of the module's inputs (eq. 4 there).

    The paper pools the ratios and keeps the largest, each counted as one rank; here the solver divides them
    by the unit's cost, so that the budget is one of parameters.
    """
    values = probe.of("explained_variance_ratio")
    return {name: values[name].astype(np.float64) for name in inventory.names}
