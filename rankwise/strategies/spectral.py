"""Spectral: what the loss's gradient says a unit of rank can win (ours to study)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.strategies.options import Options

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def gains(inventory: Inventory, probe: Any, options: Options) -> dict[str, np.ndarray]:
    """Return sigma_k(G)^2, G the mean gradient of the loss by the module's frozen weight.

    To first order, a step of size t along the best rank-k approximation of -G lowers the loss by t *
    sum_{i<=k} sigma_i(G)^2 (Eckart-Young), so the k-th unit's own part is sigma_k(G)^2; the solver divides
    it by the unit's cost d_in + d_out.
    """
    values = probe.of("singular_values")
    return {name: np.square(values[name].astype(np.float64)) for name in inventory.names}
