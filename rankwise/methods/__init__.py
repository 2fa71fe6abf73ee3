"""How ranks are settled in the course of training: before it (fixed), during it, or after it.

A strategy of the kind "trained" has a method of its name here; every other one is trained as it was planned.
"""

from __future__ import annotations

from rankwise.methods.fixed import fixed
from rankwise.methods.session import Method

METHODS: dict[str, Method] = {}


def method_of(strategy: str) -> Method:
    """Return the way in which a strategy's plan is trained."""
    return METHODS.get(strategy, fixed)
