"""What a LoRA step needs in floating-point operations, and what this machine's matrix units can give.

Derivation, per optimizer step; a product of (m, k) and (k, n) is 2*m*k*n operations:
    P   weights of the frozen linear maps inside the decoder blocks
    L   parameters of the adapters
    V*d weights of the head (vocabulary times width)
    D   width of the queries (heads times head size), n layers
    forward through the frozen maps                              2*P    a token
    backward through them, to their inputs alone                 2*P    a token
      (but not below the lowest adapted block: nothing there learns. The maps that read the embedding
      itself, q/k/v of block 0, need no gradient to their inputs either: subtracted as `P_first`)
    adapters: forward, gradient to inputs, gradient to weights   6*L    a token
    head: logits, and their gradient to the hidden states        4*V*d  a label token (others need no logits)
    causal attention: q*k, p*v, four products backward           6 * 2 * D * T(T+1)/2  a layer, a row of T
Not counted, because the step does not need it: padding, logits without a label, recomputation, gradients of
frozen weights. Elementwise work is not counted either: the ceiling is that of matrix products.
(The last block could also be spared at positions without a label, about 1 % of it all: not subtracted.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

CEILING_TOKENS = 2048
"""Rows of the measured products: tokens that are computed at once."""


@dataclass(frozen=True)
class Shape:
    """The letters of the derivation above."""

    frozen: int  # P
    first: int  # P_first
    adapters: int  # L
    vocabulary: int  # V
    width: int  # d
    queries: int  # D
    layers: int  # n


def shape_of(model: Any, modules: Iterable[Any], adapters: int) -> Shape:
    """Read the letters off a model whose every block is adapted.

    Args:
        model: the base model, for its configuration.
        modules: the adapted modules, as `rankwise.inventory` lists them.
        adapters: trainable parameters.
    """
    config = model.config.get_text_config()
    listed = list(modules)
    first = [m for m in listed if m.layer == 0 and m.kind == "attention" and m.part in ("q", "k", "v", "qkv")]
    heads = config.num_attention_heads
    return Shape(
        frozen=sum(m.in_features * m.out_features for m in listed),
        first=sum(m.in_features * m.out_features for m in first),
        adapters=adapters,
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        queries=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        layers=config.num_hidden_layers,
    )


def needed(shape: Shape, lengths: Iterable[int], label_tokens: int) -> int:
    """Return the operations that training on rows of these lengths needs, once each."""
    rows = list(lengths)
    per_token = 4 * shape.frozen - 2 * shape.first + 6 * shape.adapters
    attention = 6 * shape.layers * shape.queries * sum(t * (t + 1) for t in rows)
    return per_token * sum(rows) + attention + 4 * shape.vocabulary * shape.width * label_tokens


def ceiling(job: dict[str, Any]) -> dict[str, Any]:
    """Measure matrix products `x @ w.T` at the model's shapes: GFLOP/s by precision and shape.

    The job names `shapes` (out, in) and `seconds` to spend on each.
    """
    from rankwise import machine
    from rankwise.config import TrainConfig

    train = TrainConfig(learning_rates=(1e-3,))
    device = machine.device_for(train)
    machine.threads_for(train)
    machine.keep_freed_memory()
    found: dict[str, Any] = {}
    for name in ("fp32", "bf16"):
        kind = machine.torch_dtype(name)
        for out, inner in job["shapes"]:
            x = torch.randn(CEILING_TOKENS, inner, device=device).to(kind)
            w = torch.randn(out, inner, device=device).to(kind)
            found.setdefault(name, {})[f"{CEILING_TOKENS}x{inner}x{out}"] = _rate(x, w, job["seconds"])
    return found


@torch.no_grad()
def _rate(x: torch.Tensor, w: torch.Tensor, seconds: float) -> float:
    """Return the median GFLOP/s of the product over about that many seconds, the first two runs aside."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 7 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        functional.linear(x, w)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * x.shape[0] * x.shape[1] * w.shape[0] / statistics.median(times[2:]) / 1e9


def best(ceilings: list[dict[str, Any]]) -> dict[str, float]:
    """Return GFLOP/s by precision: the median over rounds of every shape, then the fastest shape."""
    names = {name for one in ceilings for name in one if name in ("fp32", "bf16")}
    return {
        name: max(statistics.median(one[name][shape] for one in ceilings) for shape in ceilings[0][name])
        for name in sorted(names)
    }
