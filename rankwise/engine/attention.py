"""Attention over rows laid end to end, registered with Transformers under the name `NAME`.

A token sees its own row up to itself (and its layer's window), and the tokens that all rows begin with.

Shapes: H query heads, K key/value heads, D head size, N tokens of the pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import AttentionInterface

from rankwise.engine.packing import Pack, Span

NAME = "rankwise_packed"
BLOCK = 128
"""Queries computed at once by the blocked kernel: keys past a block's end are never touched."""

KEPT = 512
"""Up to this many tokens seen, a row's probabilities are kept for the backward; past it they are remade."""

WHOLE = 4096
"""Up to this many tokens a GPU computes a pack in one call under a mask: starting a kernel costs more there
than the scores that the mask throws away. Longer packs go row by row."""

KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Those that take a mask; cuDNN's would be planned anew for every length."""

KNOWN = {"is_causal", "position_ids", "use_cache", "output_attentions", "cache_position", "layer_idx"}
"""Arguments that models pass along and that change nothing here; any other one is refused."""


class Unsupported(Exception):
    """The model asks its attention for something that this function does not do."""


class _Current:
    """The pack being computed: models do not hand unknown arguments down to their attention."""

    pack: Pack | None = None


def use(pack: Pack) -> None:
    """Make `pack` the one that the next forward and its backward are about."""
    _Current.pack = pack


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention's output, (1, N, H, D), as Transformers' attention functions do.

    Args:
        module: the attention layer (unused).
        query: (1, H, N, D).
        key: (1, K, N, D).
        value: (1, K, N, D).
        attention_mask: must be None; the current pack says who sees whom.
        scaling: factor of the scores; 1/sqrt(D) unless given.
        dropout: of the probabilities.
        sliding_window: a token sees at most this many tokens, itself included.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118).
        others: whatever else the model hands down.

    Raises:
        Unsupported: for a mask, or an argument that may change the result.
    """
    pack = _Current.pack
    strange = sorted(k for k, v in others.items() if v is not None and k not in KNOWN)
    if pack is None or attention_mask is not None or strange or query.shape[2] != pack.tokens:
        raise Unsupported(f"attention_mask {type(attention_mask).__name__}, arguments {strange}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _blocked(query, dropout, softcap):
        return _Blocked.apply(query, key, value, pack, scale, sliding_window).unsqueeze(0), None
    if _whole(query, softcap):
        return at_once(query, key, value, pack, scale, dropout, sliding_window), None
    return by_rows(query, key, value, pack, scale, dropout, sliding_window, softcap), None


def _blocked(query: torch.Tensor, dropout: float, softcap: float | None) -> bool:
    """Whether the blocked kernel takes it: it was measured faster than SDPA for fp32 on CPU (LOG.md)."""
    return query.device.type == "cpu" and query.dtype == torch.float32 and not dropout and softcap is None


def _whole(query: torch.Tensor, softcap: float | None) -> bool:
    return query.device.type == "cuda" and query.shape[2] <= WHOLE and softcap is None


def at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """All rows in one call of SDPA, kept apart by a mask: one kernel instead of several for each row."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    mask = pack.mask_of_all(window, query.dtype)
    with sdpa_kernel(KERNELS):
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    return out.transpose(1, 2)


def by_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Row by row through PyTorch's SDPA; the reference of the others."""
    grouped = query.shape[1] != key.shape[1]
    parts = []
    seen = [span.seen for span in pack.spans]
    keys, values = (pack.seen_by_all(t, 2).split(seen, 2) for t in (key, value))
    queries = query.split([span.length for span in pack.spans], 2)
    for span, q, k, v in zip(pack.spans, queries, keys, values, strict=True):
        if softcap is not None:
            parts.append(_capped(q, k, v, pack.mask(span, window), scale, dropout, softcap))
            continue
        causal = not span.before and not _cut(span, window)
        mask = None if causal else pack.mask(span, window).to(q)
        parts.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2)


def _cut(span: Span, window: int | None) -> bool:
    """Whether the window hides something that the row would otherwise see."""
    return window is not None and window < span.seen


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    dropout: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores, written out: SDPA has no such argument."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) + mask.to(q)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return functional.dropout(weights, p=dropout) @ v


class _Blocked(torch.autograd.Function):
    """Causal attention of every row in blocks of queries, on matrix products; one node for the whole pack.

    M is what the rows see, laid end to end: the common beginning stands there once per row.
    """

    @staticmethod
    def forward(ctx: Any, query, key, value, pack: Pack, scale: float, window: int | None):
        q, k, v = _laid_out(query, key, value, pack, scale)
        out = torch.empty_like(q)
        kept: list[torch.Tensor | None] = []
        keep = any(ctx.needs_input_grad[:3])
        for span, first, last, seen in _blocks(pack):
            weights = _weights(q, k, pack, span, first, last, seen, window)
            out[:, first:last] = torch.bmm(weights, v[:, seen])
            kept.append(weights if keep and span.seen <= KEPT else None)
        ctx.save_for_backward(query, key, value, *kept)  # freed with the graph, and seen by checkpointing
        ctx.rest = pack, scale, window
        return out.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        pack, scale, window = ctx.rest
        q, k, v = _laid_out(query, key, value, pack, scale)
        d_out = gradients[0].transpose(0, 1).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (span, first, last, seen), held in zip(_blocks(pack), kept, strict=True):
            weights = _weights(q, k, pack, span, first, last, seen, window) if held is None else held
            d_part = d_out[:, first:last]
            dv[:, seen] += torch.bmm(weights.transpose(1, 2), d_part)
            d_weights = torch.bmm(d_part, v[:, seen].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            torch.mul(torch.bmm(d_scores, k[:, seen]), scale, out=dq[:, first:last])
            dk[:, seen] += torch.bmm(d_scores.transpose(1, 2), q[:, first:last])
        dk, dv = (pack.gathered(_ungrouped(t, key.shape[1]), 1) for t in (dk, dv))
        return dq.unsqueeze(0), dk.unsqueeze(0), dv.unsqueeze(0), None, None, None


def _laid_out(query, key, value, pack: Pack, scale: float):
    """Return scaled q (H, N, D), k and v (H, M, D), contiguous, key/value heads repeated."""
    groups = query.shape[1] // key.shape[1]
    k, v = (pack.seen_by_all(t[0], 1).repeat_interleave(groups, dim=0) for t in (key, value))
    return (query[0] * scale).contiguous(), k.contiguous(), v.contiguous()


def _ungrouped(gradient: torch.Tensor, heads: int) -> torch.Tensor:
    """Sum the gradients of the repeated heads: (H, M, D) -> (K, M, D)."""
    return gradient if gradient.shape[0] == heads else gradient.unflatten(0, (heads, -1)).sum(1)


def _blocks(pack: Pack) -> Iterator[tuple[Span, int, int, slice]]:
    """Yield (row's span, first query, last query, keys that they see) over the pack; keys count in M."""
    place = 0
    for span in pack.spans:
        for start in range(0, span.length, BLOCK):
            end = min(start + BLOCK, span.length)
            yield span, span.start + start, span.start + end, slice(place, place + span.before + end)
        place += span.seen


def _weights(
    q, k, pack: Pack, span: Span, first: int, last: int, seen: slice, window: int | None
) -> torch.Tensor:
    """Return the probabilities of a block of queries, (H, queries, keys)."""
    scores = torch.bmm(q[:, first:last], k[:, seen].transpose(1, 2))
    begin, end = first - span.start, last - span.start
    known = 0 if _cut(span, window) else span.before + begin  # without a window all see what came before
    scores[:, :, known:] += pack.mask(span, window)[begin:end, known : span.before + end]
    return torch.softmax(scores, dim=-1, out=scores)


AttentionInterface.register(NAME, packed_attention)
