"""Weight spectrum: ranks where the frozen weight itself has large singular values. A control without data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.strategies.options import Options

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def gains(inventory: Inventory, probe: Any, options: Options) -> dict[str, np.ndarray]:
    """Return sigma_k(W)^2 / ||W||_F^2, the share of the weight's energy in its k-th direction.

    A share, so that modules of unlike scale compare, as EVA's ratios do; 0 for a weight of zeros.
    """
    values = probe.of("singular_values")
    energy = probe.of("norm")
    return {
        name: np.square(values[name].astype(np.float64)) / max(float(energy[name]) ** 2, 1e-300)
        for name in inventory.names
    }
