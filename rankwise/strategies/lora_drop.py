"""LoRA-drop: ranks in proportion to what a briefly trained adapter adds to a module's output (2402.07721)."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, proportional, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, Fraction]:
    """Return `base` times the module's mean squared update ||s B A x||^2 over the modules' mean.

    The paper keeps the modules with the largest outputs and lets the others share one adapter; here the same
    evidence shapes ranks. Its brief training is the probe's and its cost is shown with the probe's.
    """
    (base,) = whole(options, "base")
    return proportional(inventory, probe.of("mean_square"), base)
