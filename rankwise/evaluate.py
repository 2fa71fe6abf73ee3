"""Loss, perplexity and accuracy on held-out rows, kept per example."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rankwise.data import Example
from rankwise.engine.paths import Path, Plain
from rankwise.engine.plain import first_not_finite
from rankwise.stats import perplexity


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one set of rows.

    Attributes:
        metrics: loss (nats per label token), perplexity, token_accuracy, bits_per_byte, tokens, examples.
        examples: per-row columns row_hash, nll (nats, summed), tokens, correct; rows in the given order.
    """

    metrics: dict[str, float | int]
    examples: dict[str, list[Any]]


@torch.no_grad()
def evaluate(
    model: Any,
    rows: Sequence[Example],
    *,
    micro_tokens: int,
    engine: Path | None = None,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> Evaluation:
    """Score every row on the engine's path, already installed on the model (plain unless given).

    `on_tokens` hears how many tokens each batch held.

    Raises:
        FloatingPointError: when a row's loss is not finite; a missing metric is never a number.

    Cost: one forward pass over the rows' tokens.
    """
    engine = engine or Plain()
    was_training = model.training
    model.eval()
    place = {id(row): i for i, row in enumerate(rows)}
    columns = {name: np.zeros(len(rows)) for name in ("nll", "tokens", "correct")}
    try:
        for batch in engine.batches(rows, micro_tokens):
            scores = engine.score(model, batch)
            where = [place[id(row)] for row in batch]
            found = torch.stack([getattr(scores, name).double() for name in columns]).cpu().numpy()
            for values, part in zip(columns.values(), found, strict=True):
                values[where] = part
            on_tokens(sum(len(row.input_ids) for row in batch))
    finally:
        model.train(was_training)
    if not np.isfinite(columns["nll"]).all():
        unscored = rows[int(np.flatnonzero(~np.isfinite(columns["nll"]))[0])]
        module = first_not_finite(model, [unscored], engine.score)
        raise FloatingPointError(
            f"the loss of row {unscored.row_hash[:12]} is not finite; the first bad output is of {module}"
        )
    return Evaluation(_metrics(rows, columns), _columns(rows, columns))


def _metrics(rows: Sequence[Example], columns: dict[str, np.ndarray]) -> dict[str, float | int]:
    nll, tokens = math.fsum(columns["nll"]), int(columns["tokens"].sum())
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "token_accuracy": float(columns["correct"].sum()) / tokens,
        "bits_per_byte": nll / math.log(2) / sum(row.response_bytes for row in rows),
        "tokens": tokens,
        "examples": len(rows),
    }


def _columns(rows: Sequence[Example], columns: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    return {
        "row_hash": [row.row_hash for row in rows],
        "nll": columns["nll"].tolist(),
        "tokens": columns["tokens"].astype(int).tolist(),
        "correct": columns["correct"].astype(int).tolist(),
    }
