"""What an adapter folder is worth on rows: the loss of its base model with it, and without.

Scored with the model's own forward on padded rows (`engine.plain`) in fp32, which is exact on every
architecture; the base is loaded once and comes out of it as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rankwise import adapters, models, rows, sources
from rankwise.data import Example, prepare
from rankwise.errors import RankwiseError
from rankwise.evaluate import evaluate
from rankwise.exports.adapter_files import Adapter
from rankwise.exports.bases import base_source, fit, shapes_of

MICRO_TOKENS = 4096


@dataclass(frozen=True)
class Losses:
    """Mean losses in nats per response token, all on the same rows."""

    data: str
    model: str
    rows: int
    tokens: int
    base: float
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Bench:
    """A base model and the rows that adapters on it are scored on."""

    base: models.Base
    data: str
    examples: tuple[Example, ...]

    def loss(self, folder: Path | None) -> tuple[float, int]:
        """Return the mean loss per response token under an adapter (None: the base alone), and the tokens.

        Raises:
            RankwiseError: PEFT cannot load the adapter whole, or a loss is not finite.

        Cost: one forward pass over the rows.
        """
        if folder is None:
            return self._scored(self.base.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            try:
                adapted = PeftModel.from_pretrained(self.base.model, str(folder))
            except (RuntimeError, ValueError, UserWarning) as error:
                models.load.cache_clear()  # what PEFT got done may still be on that base
                said = " ".join(str(error).split("\n")[:2])
                raise RankwiseError(f"PEFT does not load {folder} onto {self.base.source}: {said}") from None
        try:
            return self._scored(adapted)
        finally:
            adapters.detach(adapted)

    def _scored(self, model: Any) -> tuple[float, int]:
        try:
            metrics = evaluate(model, self.examples, micro_tokens=MICRO_TOKENS).metrics
        except FloatingPointError as error:
            raise RankwiseError(f"The loss cannot be told: {error}.") from None
        return float(metrics["loss"]), int(metrics["tokens"])


def open_bench(
    adapter: Adapter,
    data: str,
    *,
    model: str | None,
    count: int,
    max_length: int,
    note: Callable[[str], None],
) -> Bench:
    """Load an adapter's base model and the first rows of a data source, in the order of their hashes.

    Args:
        adapter: tells its base, unless `model` does, and must fit it.
        data: `file:`, `pypi:` or `hf:` source of rows, or a path.
        model: source of the base model; None takes the adapter's own `base_model_name_or_path`.
        count: rows at most, after near-duplicates are dropped.
        max_length: tokens per row; responses are cut there.
        note: hears what is being done.

    Raises:
        RankwiseError: a source that cannot be had, no usable rows, or a base that the adapter does not fit.
    """
    if count < 1:
        raise RankwiseError(f"rows must be 1 or more; got {count}.")
    if adapter.declared.task_type not in (None, "CAUSAL_LM"):
        raise RankwiseError(
            f"A loss per response token needs a causal language model; the adapter's task_type is "
            f"{adapter.declared.task_type!r}. Leave --data out."
        )
    read = rows.read_rows(sources.fetch(data, kind="data").path)
    source = base_source(adapter, model)
    note(f"loading {source}")
    base = models.load(source, "fp32", "cuda" if torch.cuda.is_available() else "cpu")
    fit(adapter, shapes_of(base.model), source)
    prepared = prepare(
        read, base.tokenizer, train=0, validation=0, test=0, reserved=0, max_length=max_length, source=data
    )
    examples = prepared.splits.pool[:count]
    if not examples:
        raise RankwiseError(f"{data} holds no row that can be scored: all {read.total} are rejected.")
    return Bench(base, data, examples)
