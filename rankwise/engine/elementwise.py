"""RMSNorm, rotary positions and SwiGLU with less memory traffic, in a model's place while a run lasts.

A replacement is made only where it gives the model's own numbers and gradients on random input; what is not
known, or not frozen, is left as it is.

Shapes: N tokens, d features, H heads, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import SiLUActivation


class _RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w (arXiv 1910.07467, eq. 4); keeps x and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, inverse, weight = ctx.saved_tensors
        wide = x.float()
        d = gradients[0].float() * weight
        along = torch.linalg.vecdot(d, wide).unsqueeze(-1).mul_(inverse**3).div_(-x.shape[-1])
        return d.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None


class _Rotary(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin (RoFormer, arXiv 2104.09864); keeps cos and sin alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, -sin.roll(sin.shape[-1] // 2, -1)), None, None  # the transpose


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202, eq. 6); keeps its inputs alone, remakes silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        d_up = functional.silu(gate).mul_(gradients[0])
        return torch.ops.aten.silu_backward(gradients[0] * up, gate), d_up


@contextmanager
def lean(model: Any) -> Iterator[list[str]]:
    """Replace what is known for a while; yield the names of the replaced modules and functions."""
    known = {name: _norm(m) or _glu(m) for name, m in model.named_modules()}
    forwards = {name: forward for name, forward in known.items() if forward is not None}
    turns = {home: found for home in _homes(model) if (found := _rotary(home)) is not None}
    before = {home: getattr(sys.modules[home], ROTARY) for home in turns}
    try:
        for name, forward in forwards.items():
            model.get_submodule(name).forward = forward
        for home, function in turns.items():
            setattr(sys.modules[home], ROTARY, function)
        yield [*forwards, *turns]
    finally:
        for name in forwards:
            vars(model.get_submodule(name)).pop("forward", None)
        for home, function in before.items():
            setattr(sys.modules[home], ROTARY, function)


def _norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a fused forward for an RMSNorm, with weight w or, as Gemma has it, 1 + w."""
    weight: Any = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    known = type(module).__name__.endswith("RMSNorm") and eps is not None and weight is not None
    if not known or weight.requires_grad or weight.is_meta or not _ordinary(weight):
        return None

    def forward(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, factor, eps)

    factors = (lambda: weight.detach()), (lambda: 1 + weight.detach().float())

    def which() -> int | None:
        x = _random(weight, 3, weight.shape[0])
        alike = (_agree(module.forward, partial(forward, factor=factor()), x) for factor in factors)
        return next((i for i, found in enumerate(alike) if found), None)

    found = _shown(module, weight, which)
    return None if found is None else partial(forward, factor=factors[found]())


def _glu(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a lean forward for an MLP that is down(silu(gate(x)) * up(x))."""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) or hasattr(part, "get_base_layer") for part in parts):
        return None
    weight, act = next(module.parameters()), getattr(module, "act_fn", None)
    if weight.is_meta or not _ordinary(weight) or not isinstance(act, nn.SiLU | SiLUActivation):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))

    def alike() -> bool | None:
        return _agree(module.forward, forward, _random(weight, 1, 3, parts[0].in_features)) or None

    return forward if _shown(module, weight, alike) else None


_KNOWN: dict[Any, Any] = {}


def _shown(module: Any, weight: torch.Tensor, show: Callable[[], Any]) -> Any:
    """Return what `show` finds of a module, once for all of its class on this device and in this precision.

    Comparing every layer anew for each run would make a GPU wait some hundred times. That nothing is found
    (None) is not kept: the next model of the class may have sounder weights.
    """
    if "forward" in vars(module):
        return show()  # a forward of its own, not its class's
    parts = (type(part).__qualname__ for part in module.modules())
    key = (type(module), type(module).forward, weight.dtype, weight.device, *parts)
    if key not in _KNOWN and (found := show()) is not None:
        _KNOWN[key] = found
    return _KNOWN.get(key)


ROTARY = "apply_rotary_pos_emb"
"""Transformers' modeling files name their rotary function so; it is found where the attention layer is."""


def _homes(model: Any) -> set[str]:
    """Return the modeling files of the model's layers."""
    return {type(module).__module__ for module in model.modules()}


def _rotary(home: str) -> Callable[..., Any] | None:
    """Return a rotary function for a modeling file whose own one turns halves, as Llama's does."""
    own = getattr(sys.modules[home], ROTARY, None)
    if own is None:
        return None

    def rotary(q, k, cos, sin, *rest, **more):
        if rest or more or cos.shape[-1] != q.shape[-1] or not _ordinary(q):
            return own(q, k, cos, sin, *rest, **more)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)

    like = torch.empty(0)
    q, k = _random(like, 1, 4, 3, 8), _random(like, 1, 2, 3, 8)
    cos, sin = _random(like, 1, 3, 8).detach(), _random(like, 1, 3, 8).detach() * 0.5
    try:
        alike = all(
            _agree(lambda x, i=i: own(x, k, cos, sin)[i], lambda x, i=i: rotary(x, k, cos, sin)[i], q)
            for i in (0, 1)
        )
    except (TypeError, RuntimeError, ValueError):
        return None  # another signature: another function
    return rotary if alike else None


def _ordinary(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _random(like: torch.Tensor, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draw).to(like).requires_grad_()


def _agree(own: Callable[..., Any], ours: Callable[..., Any], x: torch.Tensor) -> bool:
    """Whether two functions have the same values and gradients at x, up to the rounding of its type."""
    near = 16 * torch.finfo(x.dtype).eps
    results = []
    for function in (own, ours):
        with torch.enable_grad():
            y = function(x)
            draw = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            slope = torch.autograd.grad(y, x, draw, allow_unused=True)[0] if y.requires_grad else None
        results.append((y.detach(), torch.zeros_like(x) if slope is None else slope))
    return all(a.shape == b.shape and torch.allclose(a, b, near, near) for a, b in zip(*results, strict=True))
