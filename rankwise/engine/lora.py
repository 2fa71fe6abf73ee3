"""The low-rank path, fused per group of modules that read the same input (q/k/v, gate/up).

PEFT's parameters, names and files stay; only its forward is replaced while a run lasts. One product makes
all low-rank activations of a group; every update is added in place, so that no full-size tensor is made for
it; backward needs the input and the low-rank activations alone. Where the frozen weights are bf16, so is this
path (PEFT's is fp32 there); parameters and their gradients stay fp32.

Shapes: N tokens, I in_features, O out_features, r rank, R ranks of the group in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters import ADAPTER, lora_layers


@dataclass(frozen=True)
class Map:
    """A frozen linear map and the scale of its update. `weight` is (O, I) for Linear and Conv1D alike."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float


def fusible(layer: Any) -> bool:
    """Whether a layer is plain LoRA on a plain Linear or Conv1D; anything else keeps PEFT's own forward."""
    base = layer.get_base_layer()
    return (
        type(layer) is LoraLinear
        and type(base) in (nn.Linear, Conv1D)
        and not base.weight.requires_grad
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and not layer.merged
        and not layer.disable_adapters
        and list(layer.active_adapters) == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
    )


@torch.no_grad()
def same_input_groups(model: Any) -> list[list[str]]:
    """Return the linear modules that read one and the same tensor, in the order in which they are called.

    Found by watching a forward pass over two tokens of the base model; modules that it does not call (experts
    that were not chosen) are in no group.
    """
    called: list[tuple[str, torch.Tensor]] = []
    kinds = (nn.Linear, Conv1D)
    handles = [
        module.register_forward_pre_hook(lambda m, inputs, name=name: called.append((name, inputs[0])))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        device = model.get_input_embeddings().weight.device
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    last: torch.Tensor | None = None
    for name, x in called:
        if x is not last:
            groups.append([])
        groups[-1].append(name)
        last = x
    return groups


@contextmanager
def fused(adapted: Any, groups: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Run the model's LoRA layers fused; yield the names of those left to PEFT's own forward.

    Args:
        adapted: a PEFT model.
        groups: names of modules that read the same input, in the order in which they are called.
    """
    layers = lora_layers(adapted)
    taken = {name: layer for name, layer in layers.items() if fusible(layer)}
    for names in groups:
        members = [taken[name] for name in names if name in taken]
        if members:
            _Group(members).install()
    try:
        yield [name for name, layer in layers.items() if "forward" not in vars(layer)]
    finally:
        for layer in taken.values():
            vars(layer).pop("forward", None)


class _Group:
    """Layers called in turn with one input: the first call computes all, the others pick theirs up."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def install(self) -> None:
        for index, layer in enumerate(self.layers):
            layer.forward = lambda x, index=index: self._call(index, x)

    def _call(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if x is not self._input or index not in self._outputs:
            members = range(len(self.layers)) if index == 0 else [index]
            # a checkpoint's recomputation may end within the call: nothing is noted before it
            outputs = forward([self.layers[i] for i in members], x)
            self._input, self._outputs = x, dict(zip(members, outputs, strict=True))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


def forward(layers: list[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return each layer's output for the same input, fused."""
    maps = tuple(_map(layer) for layer in layers)
    factors = [f[ADAPTER].weight for layer in layers for f in (layer.lora_A, layer.lora_B)]
    return _Fused.apply(x, maps, *factors)


def _map(layer: Any) -> Map:
    base = layer.get_base_layer()
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    return Map(weight, base.bias, float(layer.scaling[ADAPTER]))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, maps: tuple[Map, ...], *factors: torch.Tensor) -> Any:
        flat = x.reshape(-1, x.shape[-1])  # (N, I)
        down = torch.cat([a.to(x.dtype) for a in factors[::2]])  # (R, I)
        low = torch.mm(flat, down.t())  # (N, R)
        outputs = []
        for m, part, b in zip(maps, _split(low, factors), factors[1::2], strict=True):
            y = x.new_empty(*x.shape[:-1], m.weight.shape[0])  # no view: models may change it in place
            out = y.view(-1, m.weight.shape[0])
            if m.bias is None:
                torch.mm(flat, m.weight.t(), out=out)
            else:
                torch.addmm(m.bias, flat, m.weight.t(), out=out)
            out.addmm_(part, b.to(x.dtype).t(), alpha=m.scale)
            outputs.append(y)
        ctx.save_for_backward(flat, low, *factors)
        ctx.maps = maps
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        flat, low, *factors = ctx.saved_tensors
        flats = [g.reshape(-1, g.shape[-1]) for g in gradients]  # (N, O)
        d_low = torch.empty_like(low)
        d_ups = []
        for m, g, part, d_part, b in zip(
            ctx.maps, flats, _split(low, factors), _split(d_low, factors), factors[1::2], strict=True
        ):
            d_part.copy_(torch.mm(g, b.to(g.dtype)).mul_(m.scale))
            d_ups.append(torch.mm(part.t(), g).t().mul_(m.scale).to(b.dtype))  # twice as fast as g.t() @ part
        d_down = torch.mm(d_low.t(), flat)  # (R, I)
        d_downs = d_down.to(factors[0].dtype).split([a.shape[0] for a in factors[::2]])
        d_x = None
        if ctx.needs_input_grad[0]:
            down = torch.cat([a.to(flat.dtype) for a in factors[::2]])
            d_x = torch.mm(d_low, down)
            for m, g in zip(ctx.maps, flats, strict=True):
                d_x.addmm_(g, m.weight)
            d_x = d_x.view(*gradients[0].shape[:-1], -1)
        return d_x, None, *(f for pair in zip(d_downs, d_ups, strict=True) for f in pair)


def _split(low: torch.Tensor, factors: Any) -> tuple[torch.Tensor, ...]:
    """Cut (N, R) into each module's (N, r)."""
    return low.split([a.shape[0] for a in factors[::2]], dim=1)
