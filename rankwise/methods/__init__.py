"""How ranks are settled in the course of training: before it (fixed), during it, or after it.

A strategy of the kind "trained" has a method of its name here; every other one is trained as it was planned.
"""

from __future__ import annotations

from rankwise.methods.adalora import adalora
from rankwise.methods.fixed import fixed
from rankwise.methods.grow_prune import grow_prune
from rankwise.methods.sensitivity import sensitivity
from rankwise.methods.session import Method
from rankwise.methods.shrink import shrink

METHODS: dict[str, Method] = {
    "adalora": adalora,
    "grow_prune": grow_prune,
    "sensitivity": sensitivity,
    "shrink": shrink,
}


def method_of(strategy: str) -> Method:
    """Return the way in which a strategy's plan is trained."""
    return METHODS.get(strategy, fixed)
