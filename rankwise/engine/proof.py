"""Whether a model may be packed: shown on the loaded model itself, never taken from its class.

Rows laid end to end must give the logits that each row gives by itself through the model's own code: with
rows longer than the model's attention window, with a common beginning, and with other rows beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rankwise.data import Example
from rankwise.engine import lora, loss, packing
from rankwise.engine.paths import Packed, Path, Plain, hidden_states
from rankwise.seeds import generator

BEGINNING = 12
"""Tokens that the rows of the proof begin with alike."""

LONGEST_WINDOW = 512
"""A longer window is narrowed for the proof, if that can be shown to take effect."""

NARROW = 32
NEAR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest root mean square of the difference, as a share of the logits' own spread."""


def choose(model: Any, wanted: str = "auto") -> Path:
    """Return the packed path if it is proven on this base model, else the plain one with a notice.

    Args:
        model: a Transformers causal language model without adapters.
        wanted: "auto", or "plain" to leave the proof out.

    Cost: two forward passes over about 150 tokens (more where the model has a window).
    """
    if wanted == "plain":
        return Plain()
    was_training = model.training
    model.eval()
    try:
        reason = failure(model)
        groups = [] if reason else lora.same_input_groups(model)
    finally:
        model.train(was_training)
    if reason is None:
        return Packed(groups)
    return Plain(f"{model.config.model_type} is trained on padded rows, which is slower: {reason}")


@torch.no_grad()
def failure(model: Any) -> str | None:
    """Return why a model cannot be packed, or None if packed logits equal separate ones."""
    if any(p.requires_grad for p in model.get_output_embeddings().parameters()):
        return "its output embeddings are trained"
    window = _window(model)
    narrowed = window is not None and window > LONGEST_WINDOW
    rows = _rows(model, NARROW if narrowed or window is None else window)
    if not narrowed:
        return _compare(model, rows)
    wide = _separate(model, rows)
    with _narrow(model):
        if _far(_separate(model, rows), wide) < NEAR[torch.float32]:
            return f"its attention window of {window} tokens could not be tested on shorter rows"
        return _compare(model, rows)


def _compare(model: Any, rows: list[Example]) -> str | None:
    path, alone = Packed(), _separate(model, rows)
    try:
        with path.installed(model):
            together = _packed(model, rows)
    except Exception as error:  # whatever a model's code raises here, it is a reason not to pack it
        lines = str(error).strip().splitlines()
        return f"packing it fails ({type(error).__name__}: {lines[0] if lines else ''})"
    far = _far(together, alone)
    if not far < NEAR.get(alone.dtype, 1e-4):
        return f"packed logits differ from separate ones by {far:.2g} of their spread"
    return None


def _separate(model: Any, rows: list[Example]) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    ids = [torch.from_numpy(row.input_ids).long().to(device)[None] for row in rows]
    return torch.cat([model(input_ids=i, use_cache=False).logits[0] for i in ids])


def _packed(model: Any, rows: list[Example]) -> torch.Tensor:
    pack = packing.pack(rows, model.get_input_embeddings().weight.device)
    hidden = hidden_states(model, pack)
    head = loss.head_of(model)
    spans = pack.spans[1:] if pack.shared else pack.spans
    parts = [torch.cat((hidden[: span.before], hidden[span.own])) for span in spans]
    return torch.cat([head.logits(part) for part in parts]).to(hidden.dtype)


def _far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the root mean square difference as a share of the wanted logits' spread over the vocabulary."""
    found, wanted = found.double(), wanted.double()
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((found - wanted).square().mean().sqrt() / spread)


def _rows(model: Any, window: int) -> list[Example]:
    """Return three rows with one beginning; the longest runs past `window` where positions allow."""
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    lengths = [BEGINNING + 9, min(window + BEGINNING + 21, limit), BEGINNING + 30]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = generator(0, "proof")
    ids = [draw.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
    for row in ids[1:]:
        row[:BEGINNING] = ids[0][:BEGINNING]
    return [Example(str(i), row, row, 0, len(row), 0, 0) for i, row in enumerate(ids)]


def _window(model: Any) -> int | None:
    """Return the model's attention window in tokens, if its config or a layer has one."""
    holders = [model.config, *model.modules()]
    found = [w for holder in holders if isinstance(w := getattr(holder, "sliding_window", None), int)]
    return max(found, default=None)


@contextmanager
def _narrow(model: Any) -> Iterator[None]:
    """Set every attention window to `NARROW` for a while."""
    holders = [h for h in (model.config, *model.modules()) if isinstance(_own(h), int)]
    before = [_own(holder) for holder in holders]
    try:
        for holder in holders:
            holder.sliding_window = NARROW
        yield
    finally:
        for holder, window in zip(holders, before, strict=True):
            holder.sliding_window = window


def _own(holder: Any) -> Any:
    return getattr(holder, "sliding_window", None)
