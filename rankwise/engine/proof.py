"""Whether a model may be packed: shown on the loaded model itself, never taken from its class.

Rows laid end to end must give the logits that each row gives by itself through the model's own code: with
rows longer than the model's attention window, with a common beginning, and with other rows beside them. Then
small adapters must get the loss and the gradients that the plain path gives them. All that is shown in fp32,
where only rounding is forgiven; packed, a model in half precision must then also come as near to its fp32
logits as it does by itself (bf16 alone moves SmolLM2's by 9 % of their spread: LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rankwise import adapters
from rankwise.data import Example
from rankwise.engine import lora, loss, packing
from rankwise.engine.paths import Packed, Path, Plain, hidden_states
from rankwise.inventory import inventory
from rankwise.seeds import generator
from rankwise.strategies import allocate

BEGINNING = 12
"""Tokens that the rows of the proof begin with alike."""

NARROW = 16
"""Longer attention windows are narrowed to this for the proof, if that can be shown to take effect."""

NEAR = 1e-4
"""Largest root mean square of the difference, as a share of the logits' own spread."""

NEAR_SLOPE = 1e-3
"""Largest norm of the difference between the adapters' gradients, as a share of their norm."""

ROUNDING = 2.0
"""How much farther from fp32 the packed logits of a half-precision model may be than its separate ones."""


def choose(model: Any, wanted: str = "auto") -> Path:
    """Return the packed path if it is proven on this base model, else the plain one with a notice.

    Args:
        model: a Transformers causal language model without adapters.
        wanted: "auto", or "plain" to leave the proof out.

    Cost: about ten forward passes over 100 tokens, and adapters of rank 1 put on and taken off.
    """
    if wanted == "plain":
        return Plain()
    was_training = model.training
    model.eval()
    try:
        with _single_precision(model) as was_half:
            reason = failure(model)
            groups = [] if reason else lora.same_input_groups(model)
            reason = reason or learning_failure(model, groups)
            truth = _separate(model, _rows(model, NARROW)) if was_half and not reason else None
        reason = reason if truth is None else rounding_failure(model, truth)
    except torch.OutOfMemoryError:
        reason = "its proof in fp32 needs more memory than there is"
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
    if getattr(model.config, "attention_chunk_size", None):
        return "its attention is chunked"
    window = _window(model)
    rows = _rows(model, NARROW if window is None else min(window, NARROW))
    if window is None or window <= NARROW:
        return _compare(model, rows)
    wide = _separate(model, rows)
    with _narrow(model):
        if _far(_separate(model, rows), wide) < 3 * NEAR:
            return f"its attention window of {window} tokens could not be tested on shorter rows"
        return _compare(model, rows)


@contextmanager
def _single_precision(model: Any) -> Iterator[bool]:
    """Hold half-precision weights as fp32 for a while; yield whether there were any. Bit-identical after."""
    halves = {p: p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    try:
        for parameter in halves:
            parameter.data = parameter.data.float()
        yield bool(halves)
    finally:
        for parameter, dtype in halves.items():
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def rounding_failure(model: Any, truth: torch.Tensor) -> str | None:
    """Return why half precision is not packed, or None if packed logits are as near to the fp32 ones."""
    rows, path = _rows(model, NARROW), Packed()
    own = _far(_separate(model, rows), truth)
    try:
        with path.installed(model):
            packed = _far(_packed(model, rows), truth)
    except Exception as error:  # whatever a model's code raises here, it is a reason not to pack it
        return _raised(error)
    if not packed < ROUNDING * own:
        return f"packed, its logits in half precision are {packed:.2g} from fp32, and by themselves {own:.2g}"
    return None


def _compare(model: Any, rows: list[Example]) -> str | None:
    path, alone = Packed(), _separate(model, rows)
    try:
        with path.installed(model):
            together = _packed(model, rows)
    except Exception as error:  # whatever a model's code raises here, it is a reason not to pack it
        return _raised(error)
    far = _far(together, alone)
    if not far < NEAR:
        return f"packed logits differ from separate ones by {far:.2g} of their spread"
    return None


def _raised(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"packing it fails ({type(error).__name__}: {lines[0] if lines else ''})"


def learning_failure(model: Any, groups: list[list[str]]) -> str | None:
    """Return why small adapters do not learn alike on both paths, or None if they do."""
    rows = _rows(model, NARROW)
    plan = allocate(inventory(model, accept_unreachable=True), strategy="uniform", budget="r=1")
    adapted = adapters.attach(model, plan, seed=0)
    try:
        for name, layer in adapters.lora_layers(adapted).items():
            b: Any = layer.lora_B[adapters.ADAPTER].weight
            drawn = generator(0, "proof", name).normal(0, 0.02, tuple(b.shape))
            b.data.copy_(torch.from_numpy(drawn))
        adapted.eval()  # dropout off: both paths draw it differently
        ways = [_losses_and_slopes(path, adapted, rows) for path in (Plain(), Packed(groups))]
    except Exception as error:  # as above
        return _raised(error)
    finally:
        adapters.detach(adapted)
    far = [float((packed - plain).norm() / plain.norm()) for plain, packed in zip(*ways, strict=True)]
    for what, found, limits in zip(("losses", "gradients"), far, (NEAR, NEAR_SLOPE), strict=True):
        if not found < limits:
            return f"packed {what} differ by {found:.2g} of their norm"
    return None


def _losses_and_slopes(path: Path, adapted: Any, rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of every row, and all adapters' gradients in one vector."""
    parameters = list(adapters.adapter_tensors(adapted).values())
    with torch.enable_grad(), path.installed(adapted):
        nll = path.score(adapted, rows).nll
        slopes = torch.autograd.grad(nll.sum(), parameters, allow_unused=True)
    parts = [s if s is not None else torch.zeros_like(p) for s, p in zip(slopes, parameters, strict=True)]
    return nll.detach().double(), torch.cat([part.double().flatten() for part in parts])


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
