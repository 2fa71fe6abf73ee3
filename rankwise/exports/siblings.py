"""Zeros for the modules that servers expect beside adapted ones.

vLLM and SGLang hold q, k and v as one layer, and gate and up; SGLang refuses an adapter that has k without q.
TGI leaves a kind of module out unless every layer has it. A zero update of rank 1 puts that right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rankwise.exports.adapter_files import Adapter, Update
from rankwise.exports.bases import Shapes
from rankwise.exports.programs import FUSED

_LAYER = re.compile(r"(?P<before>(?:.*\.)?layers)\.(?P<layer>\d+)\.(?P<after>.+)")


def zero_updates(
    adapter: Adapter, shapes: Shapes | None, *, every_layer: bool
) -> tuple[list[Update], tuple[str, ...]]:
    """Return zero updates of rank 1 for absent siblings, and a notice on those whose shape is unknown.

    Args:
        adapter: as read.
        shapes: of its base, if they are known: what is not there is then not filled.
        every_layer: also fill, in every layer, each kind of module that one layer has.
    """
    known = {update.name: (update.a.shape[1], update.b.shape[0]) for update in adapter.updates}
    absent = [name for name in _siblings(known) if shapes is None or name in shapes]
    if every_layer:
        absent += [name for name in _other_layers([*known, *absent], shapes) if name not in absent]
    zeros, unknown = [], []
    for name in absent:
        shape = shapes[name] if shapes is not None else _shape(name, known)
        if shape is None:
            unknown.append(name)
        else:
            zeros.append(Update(name, torch.zeros(1, shape[0]), torch.zeros(shape[1], 1), 1.0))
    if not unknown:
        return zeros, ()
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    return zeros, (
        f"not filled with zeros, as nothing tells whether they are there and in which shape: "
        f"{', '.join(unknown[:3])}{more}; name the base with --model",
    )


def _siblings(names: Mapping[str, Any]) -> list[str]:
    """Return the modules that servers fuse with one of these, and that are not among them."""
    found: dict[str, None] = {}
    for name in names:
        parent, dot, part = name.rpartition(".")
        for group in FUSED:
            if part in group:
                found |= dict.fromkeys(f"{parent}{dot}{other}" for other in group)
    return [name for name in found if name not in names]


def _other_layers(names: Sequence[str], shapes: Shapes | None) -> list[str]:
    """Return what is missing for every layer to have each kind of module that one of them has."""
    split = [match for match in map(_LAYER.fullmatch, shapes or names) if match]
    count = 1 + max((int(match["layer"]) for match in split), default=-1)
    found: dict[str, None] = {}
    for match in filter(None, map(_LAYER.fullmatch, names)):
        for layer in range(count):
            found[f"{match['before']}.{layer}.{match['after']}"] = None
    return [name for name in found if name not in names and (shapes is None or name in shapes)]


def _shape(name: str, known: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Tell the shape of an absent module from those of an adapter, if they tell it.

    The same module of other layers tells it, if all have one shape there; v tells k and the reverse, gate
    tells up. Whether there is a gate beside an up, and how wide q is, nothing tells.
    """
    parent, dot, part = name.rpartition(".")
    alike = _starred(name)
    elsewhere = {shape for other, shape in known.items() if _starred(other) == alike}
    if elsewhere:
        return elsewhere.pop() if len(elsewhere) == 1 else None
    twin = {"k_proj": "v_proj", "v_proj": "k_proj", "up_proj": "gate_proj"}.get(part)
    return known.get(f"{parent}{dot}{twin}") if twin else None


def _starred(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return f"{match['before']}.*.{match['after']}" if match else name
