"""Evidence from calibration rows: measured once per model, rows and options, kept in the cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rankwise.config import NUMERICS
from rankwise.data import Example
from rankwise.engine.paths import Path as EnginePath
from rankwise.errors import RankwiseError, one_of
from rankwise.evidence import Evidence, Kind, Unmeasurable
from rankwise.inventory import Inventory
from rankwise.probes import cache
from rankwise.probes.watch import Setting

MEASURES: dict[Kind, tuple[str, str]] = {
    "gradients": ("gradients", "measure_gradients"),
    "importance": ("gradients", "measure_importance"),
    "fisher": ("squares", "measure_fisher"),
    "inputs": ("inputs", "measure_inputs"),
    "weights": ("weights", "measure_weights"),
    "outputs": ("outputs", "measure_outputs"),
}
"""Kind -> file here and function `(watch.Setting) -> Evidence`; loaded when it is wanted."""

WITHOUT_ROWS = {"weights"}
WITHOUT_DRAWS = {"importance", "fisher", "inputs"}
BY_MICRO_BATCH = {"inputs"}
"""Kinds whose numbers depend on how rows are cut into micro-batches by more than rounding."""


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
    """Measure one kind of evidence, or take it from the cache.

    The model is left as it was: weights, `requires_grad`, hooks, training flags, device.

    Args:
        kind: of `evidence.QUANTITIES`.
        model: the base model, without adapters.
        inventory: the modules to measure.
        rows: calibration rows; "weights" needs none.
        engine: the way through the model, not installed.
        micro_tokens: tokens computed at once; bounds memory.
        fingerprint: names the model's weights and their precision; without it nothing is kept.
        seed: of random draws, in the kinds that make any.
        options: of the kind; see its function.
        on_progress: hears (tokens done, tokens in all, over all passes); not at all if it was in the cache.

    Raises:
        RankwiseError: an unknown kind or option, no rows, rows without labels, a loss that is not finite, a
            cache that cannot be written.
    """
    if kind not in MEASURES:
        raise RankwiseError(one_of("probe", kind, MEASURES))
    if not rows and kind not in WITHOUT_ROWS:
        raise RankwiseError(f"The {kind} probe needs calibration rows and got none.")
    chosen = dict(options or {})

    def measure() -> Evidence:
        file, name = MEASURES[kind]
        function = getattr(importlib.import_module(f"rankwise.probes.{file}"), name)
        found: Evidence = function(
            Setting(model, inventory, rows, engine, micro_tokens, seed, chosen, on_progress)
        )
        for quantity, by_module in found.values.items():
            bad = next((name for name, array in by_module.items() if not np.isfinite(array).all()), None)
            if bad is not None:
                raise Unmeasurable(
                    f"The {kind} probe needs finite numbers, and {quantity} of {bad} is not: its precision "
                    "overflows."
                )
        return found

    if fingerprint is None:
        return measure()
    digest = cache.key(
        kind=kind, model=fingerprint, options=chosen, numerics=NUMERICS, engine=engine.name,
        rows="" if kind in WITHOUT_ROWS else cache.rows_digest(rows),
        seed=None if kind in WITHOUT_DRAWS else seed,
        micro_tokens=micro_tokens if kind in BY_MICRO_BATCH else None,
        modules=[(module.name, module.in_features, module.out_features) for module in inventory],
    )  # fmt: skip
    return cache.kept(digest, kind, inventory.names, measure)
