"""The state of a training run in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rankwise.aside import replacing

KEYS = ("value", "exp_avg", "exp_avg_sq", "step")


@dataclass
class Saved:
    """A run between two optimizer steps.

    Attributes:
        step: optimizer steps done.
        seconds: time spent, over all sittings.
        parameters: name -> value, exp_avg, exp_avg_sq (AdamW's moments, shaped like the value) and step (1,).
        extra: further tensors, a training method's own.
        about: JSON, a training method's own: present ranks, moves so far.
    """

    step: int
    seconds: float
    parameters: dict[str, dict[str, torch.Tensor]]
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Saved | None:
    """Return what was saved, or None."""
    if not path.exists():
        return None
    parameters: dict[str, dict[str, torch.Tensor]] = {}
    extra: dict[str, torch.Tensor] = {}
    with safe_open(path, "pt") as file:
        told = file.metadata()
        for key in file.keys():
            what, _, name = key.partition(".")
            if what in KEYS:
                parameters.setdefault(name, {})[what] = file.get_tensor(key)
            else:
                extra[name] = file.get_tensor(key)
    return Saved(
        int(told["step"]), float(told["seconds"]), parameters, extra, json.loads(told.get("about", "{}"))
    )


def write(path: Path, saved: Saved) -> None:
    """Write a state; a reader sees the old file or the new one."""
    tensors = {
        f"{what}.{name}": tensor for name, found in saved.parameters.items() for what, tensor in found.items()
    }
    tensors |= {f"extra.{name}": tensor for name, tensor in saved.extra.items()}
    about = {
        "step": str(saved.step),
        "seconds": repr(saved.seconds),
        "about": json.dumps(saved.about, allow_nan=False),
    }
    with replacing(path) as aside:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, aside, about)


def gather(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the state of parameters and of their AdamW moments, as `Saved.parameters`."""
    found = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        found[name] = {
            "value": parameter.detach(),
            "step": state["step"].reshape(1),
            **{key: state[key] for key in ("exp_avg", "exp_avg_sq")},
        }
    return found


@torch.no_grad()
def restore(
    saved: Saved, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put a saved state into parameters and optimizer."""
    for name, parameter in parameters.items():
        found = saved.parameters[name]
        parameter.copy_(found["value"])
        # the fused optimizer counts steps on the parameter's own device
        state = {key: found[key].to(parameter.device) for key in ("exp_avg", "exp_avg_sq", "step")}
        optimizer.state[parameter] = state | {"step": state["step"].reshape(())}
