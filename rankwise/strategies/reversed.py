"""Reversed: another strategy's plan with its layers mirrored. Does the shape matter, or the spread alone?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.strategies.options import Options

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


def mirrored(inventory: Inventory, probe: Any, options: Options) -> dict[str, Any]:
    """Give a module of layer i what the strategy `of` gives the same path in layer L - 1 - i.

    Works for targets and for gains. A module whose counterpart is not among the targets keeps its
    own. The remaining options are the inner strategy's.
    """
    from rankwise.strategies import STRATEGIES  # the dict names this file, so it cannot be read earlier

    inner = {name: value for name, value in options.items() if name != "of"}
    values = STRATEGIES[options["of"]].function(inventory, probe, inner)
    places = {(module.layer, module.path): module.name for module in inventory}
    last = inventory.layers - 1
    return {m.name: values[places.get((last - m.layer, m.path), m.name)] for m in inventory}
