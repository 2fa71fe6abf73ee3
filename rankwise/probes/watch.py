"""Passes over calibration rows that catch each module's input and the gradient of its output.

The gradient of a frozen weight is the product of the two, so it needs no `requires_grad` on the weight, and
autograd goes no deeper than the lowest watched module.

Shapes: N tokens of a micro-batch (a common beginning counts once on the packed path).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rankwise.data import Example
from rankwise.engine.batches import label_count
from rankwise.engine.paths import Path as EnginePath
from rankwise.engine.plain import first_not_finite
from rankwise.errors import RankwiseError
from rankwise.evidence import Unmeasurable
from rankwise.inventory import Inventory


@dataclass(frozen=True)
class Setting:
    """What every probe is given: the arguments of `probes.evidence` that are of its concern.

    Attributes:
        model: the base model, without adapters; left as it was.
        inventory: the modules to measure.
        rows: calibration rows.
        engine: the way through the model, not installed.
        micro_tokens: tokens computed at once.
        seed: of random draws.
        options: of the probe.
        on_progress: hears (tokens done, tokens in all).
    """

    model: Any
    inventory: Inventory
    rows: Sequence[Example]
    engine: EnginePath
    micro_tokens: int
    seed: int
    options: Mapping[str, Any]
    on_progress: Callable[[int, int], None]


Catch = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Hears (module name, input (N, in_features), gradient of the output (N, out_features)) of one call."""


@contextmanager
def still(model: Any) -> Iterator[None]:
    """Hold a model in evaluation mode with every parameter frozen; put back each flag as it was."""
    modes = {module: module.training for module in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def watching(
    model: Any, names: Iterable[str], catch: Catch, called: Callable[[str], None] = lambda name: None
) -> Iterator[None]:
    """Catch input and output gradient of every call of the named modules while this lasts.

    Args:
        model: `still`, its engine installed.
        names: of linear modules, in `model.named_modules()`.
        catch: hears them in the backward pass, the last module first.
        called: hears the module's name in the forward pass, at every call that will be caught.

    Cost: every input is held until its gradient is there.
    """
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(_start).remove)
            stack.callback(module.register_forward_hook(partial(_hold, name, catch, called)).remove)
        yield


def _start(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let the graph begin here where nothing below asked for one."""
    if inputs[0].requires_grad or not torch.is_grad_enabled():
        return None
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _hold(
    name: str, catch: Catch, called: Callable[[str], None], module: Any, inputs: Any, output: torch.Tensor
) -> None:
    if not output.requires_grad:
        return
    held, version = [inputs[0]], inputs[0]._version

    def back(gradient: torch.Tensor) -> None:
        x = held.pop()  # the graph outlives this call; the input need not
        if x._version != version:
            raise RankwiseError(
                f"The probe cannot read the input of {name}: the model overwrites it once it was used."
            )
        catch(name, _flat(x.detach()), _flat(gradient))

    called(name)
    output.register_hook(back)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.flatten(0, -2)


def labelled(rows: Sequence[Example]) -> list[Example]:
    """Return the rows that have a label, which alone reach the loss.

    Raises:
        RankwiseError: none has one.
    """
    kept = [row for row in rows if label_count([row])]
    if not kept:
        raise RankwiseError(f"The probe needs rows with response tokens; none of {len(rows)} rows has any.")
    return kept


def token_count(rows: Iterable[Example]) -> int:
    """Return the tokens of some rows."""
    return sum(len(row.input_ids) for row in rows)


def sweep(
    model: Any,
    engine: EnginePath,
    batches: Sequence[Sequence[Example]],
    divisors: Sequence[int],
    on_batch: Callable[[Sequence[Example]], None],
) -> None:
    """Pass micro-batches forward and backward.

    Args:
        model: `still`, its engine installed.
        engine: the way through the model.
        batches: the rows of each micro-batch.
        divisors: for each micro-batch, what its summed loss is divided by.
        on_batch: called after each micro-batch.

    Raises:
        RankwiseError: a loss is not finite.
    """
    for batch, divisor in zip(batches, divisors, strict=True):
        with torch.enable_grad():
            loss = engine.score(model, batch).nll.sum() / divisor
            if not math.isfinite(value := loss.item()):
                where = first_not_finite(model, batch, engine.score)
                raise Unmeasurable(
                    f"The probe needs a finite loss on its calibration rows and got {value}; the first bad "
                    f"output is of {where}."
                )
            if loss.requires_grad:  # else no watched module was called, as experts may not be
                loss.backward()
        del loss  # else its graph would live on beside the next one
        on_batch(batch)
