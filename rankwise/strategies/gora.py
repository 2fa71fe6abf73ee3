"""GoRA: ranks in proportion to how much the loss depends on a module's weight (arXiv 2502.12171)."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, Fraction]:
    """Return clamp(round(R * a / (d_in + d_out)), min, max).

    a is the module's share of the importances mean|W * G| (elementwise) and R = base * sum(d_in + d_out), the
    parameters of uniform rank `base`. The clamp is the paper's: `min` and `max`, 4 and 32 about a base of 8.
    In the paper a function f may flatten d_in + d_out in both places (its authors' code knows the identity,
    sqrt and log1p); here f is the identity, so that R counts parameters.
    """
    low, base, high = whole(options, "min", "base", "max")
    importance = {name: Fraction(float(probe.of("mean_absolute")[name])) for name in inventory.names}
    total = sum(importance.values()) or Fraction(1)
    parameters = base * sum(module.cost for module in inventory)
    wanted = {m.name: parameters * importance[m.name] / total / m.cost for m in inventory}
    return {name: Fraction(min(max(round(value), low), high)) for name, value in wanted.items()}
