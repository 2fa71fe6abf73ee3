"""A model that someone else loaded, lent for a measurement and given back exactly as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from rankwise.engine import proof
from rankwise.engine.paths import Path as EnginePath
from rankwise.engine.paths import Plain
from rankwise.errors import RankwiseError

PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Where PyTorch keeps hooks of single tensors; an optimizer that steps in backward is one."""


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """Freeze a model for a while, in evaluation mode; give it back exactly as it was, whatever happens.

    Kept: weights (they stay in their own memory), gradients, requires_grad, hooks, every module's flags,
    attributes and children, the configurations, and PyTorch's random generators. Meanwhile gradient
    checkpointing is off and hooks of single parameters do not fire; hooks of modules run, as they may be part
    of what the model computes. Not kept: what a forward pass in evaluation mode writes into a buffer.

    Args:
        model: a Transformers causal language model without adapters, its weights loaded.

    Raises:
        RankwiseError: weights are on PyTorch's meta device.

    Cost: one walk over modules and parameters; no weight is copied.
    """
    parameters = list(model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        raise RankwiseError(
            "Looking at data needs the weights, and some of this model's are on PyTorch's meta device (not "
            "loaded, or offloaded to disk). Load all of them."
        )
    places = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(place.index or 0 for place in places)))
        stack.enter_context(torch.inference_mode(False))  # the caller may be inside of one
        stack.enter_context(torch.enable_grad())
        for parameter in parameters:
            stack.callback(_parameter_keeper(parameter))
        for holder in _holders(model):
            stack.callback(_keeper(holder))
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                module.gradient_checkpointing = False
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None
        yield


def engine_for(model: Any) -> EnginePath:
    """Return the packed path where it is proven on a `borrowed` model, else the plain one.

    Half precision, several devices and quantised layers take the plain path: proving the packed one would
    hold a second copy of the weights in fp32, or move them.
    """
    parameters = list(model.parameters())
    whole = all(parameter.dtype == torch.float32 for parameter in parameters)
    if not whole or len({parameter.device for parameter in parameters}) > 1 or _has_moved(model):
        return Plain()
    return proof.choose(model)


def _has_moved(model: Any) -> bool:
    """Whether another library spreads the model's modules over devices, or has quantised them."""
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    return spread or getattr(model, "hf_quantizer", None) is not None


def _holders(model: Any) -> list[Any]:
    """Return everything that has attributes to keep: modules, and configurations with those inside them."""
    found = {id(module): module for module in model.modules()}
    waiting = [getattr(m, name, None) for m in model.modules() for name in ("config", "generation_config")]
    while waiting:
        one = waiting.pop()
        if hasattr(one, "to_dict") and hasattr(one, "__dict__") and id(one) not in found:
            found[id(one)] = one
            waiting += vars(one).values()
    return list(found.values())


def _keeper(holder: Any) -> Callable[[], None]:
    """Return a function that gives an object its present class and attributes back.

    Dicts, lists and sets are refilled in place: a hook's handle finds its hook in the very dict.
    """
    kind, kept = type(holder), dict(vars(holder))
    filled = [(value, copy.copy(value)) for value in kept.values() if isinstance(value, dict | list | set)]

    def restore() -> None:
        if type(holder) is not kind:
            holder.__class__ = kind
        vars(holder).clear()
        vars(holder).update(kept)
        for container, content in filled:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)

    return restore


def _parameter_keeper(parameter: Any) -> Callable[[], None]:
    """Return a function that gives a parameter its present memory, gradient, flag and hooks back.

    The hooks come off until then, as a flag that they need is taken away.
    """
    memory, gradient, flag = parameter.data, parameter.grad, parameter.requires_grad
    hooks = {name: getattr(parameter, name, None) for name in PARAMETER_HOOKS}
    for name in (name for name, found in hooks.items() if found):
        setattr(parameter, name, None)

    def restore() -> None:
        if parameter.data_ptr() != memory.data_ptr():
            parameter.data = memory
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)
        parameter.grad = gradient
        for name in (name for name, found in hooks.items() if found):
            setattr(parameter, name, hooks[name])

    return restore
