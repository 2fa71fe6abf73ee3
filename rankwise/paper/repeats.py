"""Runs that were made on more than one kind of device: how far their losses lie apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rankwise.config import digest
from rankwise.tables import Results

ELSEWHERE = ("device", "threads", "measure")
"""What runs of the same work may differ in: where they were made, what was measured beside the loss."""

ASKED = ("device", "dtype", "threads")
"""What training was asked for; the run itself says what came of it."""


def apart(studies: Sequence[Results]) -> list[float]:
    """Return, for each run that scored test rows on several kinds of device, how far its losses lie apart.

    Returns:
        Largest minus smallest test loss, in nats per token; one number for each such run.

    Cost: one small file for each run.
    """
    losses: dict[str, dict[str, float]] = defaultdict(dict)
    for results in studies:
        for run_id, record in results.records.items():
            loss = record["train_info"]["metrics"].get("test_loss")
            run = results.store.config(run_id)
            if loss is not None and run is not None:
                losses[_work(run)][str(run["device"])] = float(loss)
    return [max(found.values()) - min(found.values()) for found in losses.values() if len(found) > 1]


def _work(run: dict[str, Any]) -> str:
    """Return a name of all that decides a run's loss, its device aside."""
    kept = {name: value for name, value in run.items() if name not in ELSEWHERE}
    return digest(kept | {"train": {name: v for name, v in run["train"].items() if name not in ASKED}})
