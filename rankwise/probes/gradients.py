"""The gradient G of the mean loss per label token by every frozen weight, reduced to a few numbers each.

G is a sum over tokens of (gradient of the output) x (input). Either it is accumulated, for as many modules at
a time as an allowance of memory holds ("exact"); or two random projections are, and never G ("sketch").

Shapes: N tokens of a micro-batch, G (out, in) for Linear and Conv1D alike, k and l sizes of a sketch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from rankwise.data import Example
from rankwise.engine.batches import label_count
from rankwise.errors import RankwiseError, one_of
from rankwise.evidence import Cost, Evidence, Kind
from rankwise.inventory import Inventory, Module
from rankwise.probes.spectra import CO_RANGE, RANGE, Spectrum, gaussian, sketched_spectrum, spectrum
from rankwise.probes.watch import Setting, labelled, still, sweep, token_count, watching

ONE_PASS = 512 << 20
"""Bytes of fp32 gradients that are held at once rather than measured in several passes."""

GROUP = 256 << 20
"""Bytes of fp32 gradients of one pass, where there are several."""

METHODS = ("auto", "exact", "sketch")

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Numbers = dict[str, torch.Tensor]
"""Quantity -> value of one module."""


def measure_gradients(setting: Setting) -> Evidence:
    """Return singular values, right singular vectors and Frobenius norm of every module's G.

    Options:
        method: "exact"; "sketch", one pass whatever the size, every number an estimate; "auto", exact where
            one pass holds all gradients, else sketch.
        allowance: bytes of gradients held at once by "exact".

    Raises:
        RankwiseError: a bad option, no row with labels, a loss that is not finite.

    Cost: a forward and a backward pass and 2·N·in·out operations per module for "exact", times the number
    of groups of modules (the backward only down to the group); 2·N·(in + out)·(k + l) for "sketch".
    """
    method, allowance = _options(setting, METHODS)
    passes = groups(setting.inventory, allowance)
    if method == "auto":
        method = "exact" if len(passes) == 1 else "sketch"
    if method == "sketch":
        return _measure(setting, "gradients", method, [setting.inventory.modules], Sketches(setting.seed))

    def reduce(module: Module, gradient: torch.Tensor) -> Numbers:
        return _numbers(spectrum(gradient, setting.seed))

    return _measure(setting, "gradients", method, passes, Sums(reduce))


def measure_importance(setting: Setting) -> Evidence:
    """Return mean|W * G| of every module (GoRA, arXiv 2502.12171), always exact; see `measure_gradients`.

    Raises:
        RankwiseError: as there; or a module's weight is not plain numbers (quantised).
    """
    for module in setting.inventory:
        _refuse_packed_weight(module, setting.model.get_submodule(module.name))
    _, allowance = _options(setting, ("auto", "exact"))

    def reduce(module: Module, gradient: torch.Tensor) -> Numbers:
        weight = setting.model.get_submodule(module.name).weight.detach()
        return {"mean_absolute": gradient.mul_(weight.t() if module.conv1d else weight).abs_().mean()}

    return _measure(setting, "importance", "exact", groups(setting.inventory, allowance), Sums(reduce))


def _refuse_packed_weight(module: Module, layer: Any) -> None:
    """Refuse a weight whose stored numbers are not its own: 4-bit ones are bytes in another shape."""
    weight = layer.weight.t() if module.conv1d else layer.weight
    if weight.shape != (module.out_features, module.in_features) or weight.dtype not in PLAIN:
        raise RankwiseError(
            "The importance probe multiplies the gradient with the weight, which must be stored as plain "
            f"numbers; {module.name} is a quantised {type(layer).__name__}. Load the base unquantised, or "
            "choose a strategy that does not need it."
        )


def _options(setting: Setting, methods: Sequence[str]) -> tuple[str, int]:
    """Return (method, bytes of gradients held at once), checked."""
    options = setting.options
    if unknown := set(options) - {"method", "allowance"}:
        raise RankwiseError(
            f"Gradient probes take the options method and allowance; got {', '.join(sorted(unknown))}."
        )
    method = options.get("method", "auto")
    if method not in methods:
        raise RankwiseError(one_of("method", method, methods))
    whole = sum(_bytes(module) for module in setting.inventory)
    allowance = options.get("allowance", ONE_PASS if whole <= ONE_PASS else GROUP)
    if isinstance(allowance, bool) or not isinstance(allowance, int) or allowance < 1:
        raise RankwiseError(
            f"Option allowance must be a whole number of bytes, 1 or more; got {allowance!r}."
        )
    return method, allowance


def _bytes(module: Module) -> int:
    return 4 * module.in_features * module.out_features


def groups(inventory: Inventory, allowance: int) -> list[list[Module]]:
    """Cut the modules, from the top, into runs whose fp32 gradients fit the allowance (one at least)."""
    made: list[list[Module]] = []
    room = 0
    for module in reversed(inventory.modules):
        if not made or _bytes(module) > room:
            made.append([])
            room = allowance
        made[-1].append(module)
        room -= _bytes(module)
    return made


class Gather(Protocol):
    """Takes what `watching` catches, and gives each module's numbers after a pass."""

    def begin(self, module: Module, device: torch.device) -> None:
        """Make room for a module before the pass: among activations it would fragment the heap."""

    def add(self, name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        """Take one call's input (N, in) and output gradient (N, out)."""

    def finish(self, module: Module) -> Numbers:
        """Return a module's numbers and forget what was gathered of it."""


@dataclass
class Sums:
    """G itself, in fp32, until it is reduced."""

    reduce: Callable[[Module, torch.Tensor], Numbers]
    found: dict[str, torch.Tensor] = field(default_factory=dict)

    def begin(self, module: Module, device: torch.device) -> None:
        """Set G to zero."""
        self.found[module.name] = torch.zeros(module.out_features, module.in_features, device=device)

    def add(self, name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add g^T x."""
        self.found[name].addmm_(g.float().t(), x.float())

    def finish(self, module: Module) -> Numbers:
        """Reduce a module's G; it is zero where the module was not called."""
        return self.reduce(module, self.found.pop(module.name))


class Sketches:
    """Y = G Omega and Z = Psi G of each module, straight from inputs and output gradients.

    Omega (in, k) and Psi (l, out) are standard Gaussian, common to all modules of that width (arXiv
    1609.00048, Sec. 3). A module whose sketch would be larger than G is summed exactly.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._draws: dict[tuple[str, int], torch.Tensor] = {}
        self._found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._small = Sums(lambda module, gradient: _numbers(spectrum(gradient, seed)))

    def begin(self, module: Module, device: torch.device) -> None:
        """Set Y and Z to zero."""
        i, o = module.in_features, module.out_features
        if RANGE * o + CO_RANGE * i >= i * o:
            return self._small.begin(module, device)
        for side, width, shape in (("domain", i, (i, RANGE)), ("range", o, (CO_RANGE, o))):
            if (side, width) not in self._draws:
                self._draws[side, width] = gaussian(*shape, self.seed, "sketch", side, width).to(device)
        self._found[module.name] = (
            torch.zeros(o, RANGE, device=device), torch.zeros(CO_RANGE, i, device=device)
        )  # fmt: skip
        return None

    def add(self, name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        """Add g^T (x Omega) and (g Psi^T)^T x."""
        if name not in self._found:
            return self._small.add(name, x, g)
        (y, z), low, g = self._found[name], self._projected(x), g.float()
        y.addmm_(g.t(), low)
        z.addmm_((g @ self._drawn("range", g).t()).t(), x.float())
        return None

    def finish(self, module: Module) -> Numbers:
        """Return a module's numbers and forget its sketch."""
        self._last = None
        if module.name not in self._found:
            return self._small.finish(module)
        y, z = self._found.pop(module.name)
        return _numbers(sketched_spectrum(y, z, self._drawn("range", y.t())))

    def _projected(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Omega; modules that read the same input follow each other, and share it."""
        key = x.data_ptr(), x.shape
        if self._last is None or (self._last[0].data_ptr(), self._last[0].shape) != key:
            self._last = x, x.float() @ self._drawn("domain", x)  # holding x keeps its address its own
        return self._last[1]

    def _drawn(self, side: str, like: torch.Tensor) -> torch.Tensor:
        """Return Omega (in, k), or Psi (l, out) for the range, on the device of what it multiplies."""
        return self._draws[side, like.shape[1]].to(like.device)


def _numbers(found: Spectrum) -> Numbers:
    return {"singular_values": found.values, "right_vectors": found.right, "norm": found.norm}


def _measure(
    setting: Setting, kind: Kind, method: str, passes: Sequence[Sequence[Module]], gather: Gather
) -> Evidence:
    """Sweep once for each group of modules, reducing a group before the next one begins."""
    began = time.perf_counter()
    rows = labelled(setting.rows)
    batches = setting.engine.batches(rows, setting.micro_tokens)
    labels, tokens = label_count(rows), token_count(rows)
    done, values = 0, {module.name: Numbers() for module in setting.inventory}

    def on_batch(batch: Sequence[Example]) -> None:
        nonlocal done
        done += token_count(batch)
        setting.on_progress(done, tokens * len(passes))

    with still(setting.model), setting.engine.installed(setting.model):
        for group in passes:
            for module in group:
                gather.begin(module, _device(setting.model, module))
            with watching(setting.model, [module.name for module in group], gather.add):
                sweep(setting.model, setting.engine, batches, [labels] * len(batches), on_batch)
            for module in group:
                values[module.name] = gather.finish(module)
    cost = Cost(
        tokens * len(passes), _backward_tokens(setting.inventory, passes, tokens), len(passes),
        time.perf_counter() - began,
    )  # fmt: skip
    about = {"method": method, "rows": len(rows), "tokens": tokens, "label_tokens": labels}
    return Evidence(kind, by_quantity(values), cost, about)


def _device(model: Any, module: Module) -> torch.device:
    return next(model.get_submodule(module.name).parameters()).device


def _backward_tokens(inventory: Inventory, passes: Sequence[Sequence[Module]], tokens: int) -> int:
    """Return tokens passed backward; a pass that ends above the lowest layer counts by the layers it took."""
    depth = max(1, max(module.layer for module in inventory) + 1)
    lowest = (min(module.layer for module in group) for group in passes)
    return sum(round(tokens * (depth - layer) / depth) for layer in lowest)


def by_quantity(values: Mapping[str, Numbers]) -> dict[str, dict[str, np.ndarray]]:
    """Turn module -> quantity -> tensor into quantity -> module -> float32 array."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, numbers in values.items():
        for quantity, number in numbers.items():
            array = number.detach().to("cpu", torch.float32).numpy()
            found.setdefault(quantity, {})[name] = np.ascontiguousarray(array).reshape(array.shape)
    return found
