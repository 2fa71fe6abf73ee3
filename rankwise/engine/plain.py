"""The plain path: rows padded to the longest, the model's own forward, exact for every architecture.

Shapes: B rows, T tokens of the longest row, P positions that some row has a label for, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from rankwise.data import Example

IGNORE = -100


@dataclass(frozen=True)
class Scores:
    """Per-row results of a forward pass; `nll` carries the gradient in training.

    Attributes:
        nll: summed negative log-likelihood of the row's label tokens, in nats, shape (B,).
        tokens: label tokens per row, shape (B,).
        correct: label tokens that the model ranks first, shape (B,).
    """

    nll: torch.Tensor
    tokens: torch.Tensor
    correct: torch.Tensor


Scorer = Callable[[Any, Sequence[Example]], Scores]


def score(model: Any, rows: Sequence[Example]) -> Scores:
    """Return the loss of each row; logits are made only at positions that some row has a label for."""
    device = next(model.parameters()).device
    ids, mask, labels = (torch.from_numpy(array).to(device) for array in pad(rows))
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # the label of position t is token t+1
    positions = (shifted != IGNORE).any(dim=0).nonzero().squeeze(1)  # (P,)
    wanted = shifted[:, positions]  # (B, P)
    logits = _logits(model, ids, mask, positions).float()  # (B, P, V)
    # over the last axis: along a strided one PyTorch sums the vocabulary less exactly (LOG.md, 2026-11-24)
    nll = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
    right = (logits.detach().argmax(-1) == wanted) & (wanted != IGNORE)
    return Scores(nll.sum(1), (wanted != IGNORE).sum(1), right.sum(1))


@torch.no_grad()
def first_not_finite(model: Any, rows: Sequence[Example], scored: Scorer = score) -> str:
    """Name the module whose output goes bad first in a forward pass, to explain a loss that is not finite."""
    bad: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if not bad and torch.is_tensor(output) and not torch.isfinite(output).all():
                bad.append(name)

        return hook

    watched = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(watch(name)) for name, module in watched]
    try:
        scored(model, rows)
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else "no module (the loss itself)"


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if _keeps_logits(type(unwrapped(model))):
        return model(input_ids=ids, attention_mask=mask, logits_to_keep=positions, use_cache=False).logits
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, positions]


def unwrapped(model: Any) -> Any:
    """Return the Transformers model, with its adapters in place, of a PEFT model; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _keeps_logits(kind: Any) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def pad(rows: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return token ids, attention mask and labels, each (B, T), padded on the right."""
    longest = max(len(row.input_ids) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORE, dtype=np.int64)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        ids[i, :length], mask[i, :length], labels[i, :length] = row.input_ids, 1, row.labels
    return ids, mask, labels
