"""Fisher: ranks in proportion to the mean squared gradient of a module's weights."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options, proportional, whole

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def targets(inventory: Inventory, probe: Any, options: Options) -> dict[str, Fraction]:
    """Return `base` times the module's empirical Fisher information over the modules' mean.

    The information is that of FIM-LoRA (arXiv 2605.16800): the square of each example's gradient, averaged
    over examples and over the module's weights.
    """
    (base,) = whole(options, "base")
    return proportional(inventory, probe.of("mean_square"), base)
