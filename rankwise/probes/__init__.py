"""Evidence from calibration rows: measured once per model, rows and options, kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rankwise.data import Example
from rankwise.engine.paths import Path as EnginePath
from rankwise.evidence import Evidence, Kind
from rankwise.inventory import Inventory


def evidence(
    kind: Kind,
    model: Any,
    inventory: Inventory,
    rows: Sequence[Example],
    *,
    engine: EnginePath,
    micro_tokens: int = 1024,
    fingerprint: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evidence:
    """Measure one kind of evidence, or take it from the cache."""
    raise NotImplementedError
