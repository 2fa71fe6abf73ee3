"""Cross-entropy from hidden states: logits at label positions only, in chunks, never all at once.

The gradient to the hidden states is made on the way forward, while a chunk's probabilities are at hand, and
scaled by each position's upstream gradient on the way back; it is exact because a position's loss depends on
its own hidden state alone. (The idea of Liger's fused linear cross-entropy, arXiv 2410.10989; own code.)

Shapes: P label positions, C of a chunk, d hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

CHUNK_BYTES = 32 << 20
"""Size of a chunk's logits; larger ones leave the cache and gain nothing (LOG.md)."""

CHUNK_BYTES_GPU = 256 << 20
"""The same on a GPU, where small products cost more to start than to compute."""


@dataclass(frozen=True)
class Head:
    """How a model turns its last hidden states into logits.

    Attributes:
        weight: (V, d), frozen.
        bias: (V,) or None, frozen.
        scale: logits are multiplied by it (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (..., V): the plain reference."""
        raw = functional.linear(hidden, self.weight, self.bias).float() * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def head_of(model: Any) -> Head:
    """Return the head of a Transformers causal language model; the proof at load shows that it is right."""
    output, config = model.get_output_embeddings(), model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(output.weight, getattr(output, "bias", None), scale, softcap)


def plain_loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each position, (P,), from full logits: the reference of `chunked_loss`."""
    return functional.cross_entropy(head.logits(hidden), targets, reduction="none")


def chunked_loss(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each position's loss in nats, (P,), and whether the model ranks its label first, (P,).

    Args:
        hidden: last hidden states at the label positions, (P, d).
        head: the model's head; no gradient reaches it.
        targets: label tokens, (P,).

    Cost: 2·P·d·V multiplications forward, as many for the gradient; memory of one chunk of logits.
    """
    return _Chunked.apply(hidden, head, targets)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> Any:
        wanted = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        room = CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES_GPU
        size = max(1, room // (4 * head.weight.shape[0]))
        buffer = hidden.new_empty(min(size, len(hidden)), head.weight.shape[0])
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = torch.mm(hidden[part], head.weight.t(), out=buffer[: len(hidden[part])])
            losses[part], correct[part], slope = _of_chunk(logits, head, targets[part], wanted)
            if gradient is not None:
                torch.mm(slope.to(hidden.dtype), head.weight, out=gradient[part])
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(gradient)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(gradient.dtype), None, None


def _of_chunk(logits: torch.Tensor, head: Head, targets: torch.Tensor, wanted: bool) -> Any:
    """Return (losses, correct, gradient to the raw logits); overwrites `logits` where it is fp32.

    The log-sum-exp is read off the softmax: with m the largest logit and p its probability it is m - log p,
    and p is at least 1/V. The label's logit is taken from m first, as both may be large beside the loss.
    """
    if head.bias is not None:
        logits += head.bias
    logits = logits.float()
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        bend = 1 - logits**2  # the slope of tanh
        logits *= head.softcap
    top, best = logits.max(dim=-1)
    hit = logits.gather(1, targets[:, None])[:, 0]
    weights = torch.softmax(logits, dim=-1, out=logits)
    losses = (top - hit) - weights.gather(1, best[:, None])[:, 0].log()
    if wanted:
        weights.scatter_add_(1, targets[:, None], weights.new_full((len(targets), 1), -1.0))
        if head.softcap is not None:
            weights *= bend
        if head.scale != 1.0:
            weights *= head.scale
    return losses, best == targets, weights
