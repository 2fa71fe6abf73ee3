"""The spectra of the frozen weights: no rows, no forward pass."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from peft.utils.integrations import dequantize_module_weight

from rankwise.errors import RankwiseError
from rankwise.evidence import Cost, Evidence
from rankwise.inventory import Module
from rankwise.probes.spectra import LIMIT
from rankwise.probes.watch import Setting
from rankwise.seeds import derive

EXACT_UP_TO = 1024
"""Smaller side of a weight up to which its eigenvalues are computed whole, in float64."""

SKETCH, ITERATIONS = 4 * LIMIT, 8
"""Directions and power iterations of the randomised SVD of larger ones."""


@torch.no_grad()
def measure_weights(setting: Setting) -> Evidence:
    """Return the 64 largest singular values and the Frobenius norm of every frozen weight W (out, in).

    Exact up to a smaller side of 1,024; above, by a randomised SVD (Halko, Martinsson, Tropp 2011, arXiv
    0909.4061, Alg. 4.4) drawn from (seed, module name), at worst 0.1 % too small, on a weight without any
    structure. The gradient probe's shorter one would miss up to 8 % here, as spectra of weights are flat.
    Quantised weights are dequantised one at a time, by PEFT. `rows`, `engine` and `micro_tokens` are not
    used; there are no options.

    Raises:
        RankwiseError: any option; a weight that cannot be had as floating-point numbers, or is not finite.

    Cost: per module out·in·min(out, in) multiplications in float64 where exact, else 18·out·in·256 in fp32;
    4 s for SmolLM2-135M on two cores. Memory: two copies of one weight, the second in float64.
    """
    if setting.options:
        raise RankwiseError(f"The weights probe takes no options; got {', '.join(sorted(setting.options))}.")
    started = time.perf_counter()
    values: dict[str, dict[str, np.ndarray]] = {"singular_values": {}, "norm": {}}
    for done, module in enumerate(setting.inventory, start=1):
        weight = weight_of(setting.model, module)
        draw = derive(setting.seed, "weights", module.name)
        values["singular_values"][module.name] = _largest(weight, draw)
        values["norm"][module.name] = np.asarray(torch.linalg.vector_norm(weight).item(), np.float32)
        setting.on_progress(done, len(setting.inventory))
    return Evidence("weights", values, Cost(seconds=time.perf_counter() - started), {})


def weight_of(model: Any, module: Module) -> torch.Tensor:
    """Return a module's weight as (out_features, in_features), in fp32.

    Raises:
        RankwiseError: the layer does not offer it so (the text names its type), or it is not finite.
    """
    layer = model.get_submodule(module.name)
    try:
        found = dequantize_module_weight(layer)
        weight = (found.t() if module.conv1d else found).detach()
        usable = weight.is_floating_point() and not weight.is_meta
    except (AttributeError, TypeError, ValueError, ImportError):
        usable = False
    if not usable or tuple(weight.shape) != (module.out_features, module.in_features):
        raise RankwiseError(
            f"The weights probe needs the weights as floating-point numbers; {module.name} is a "
            f"{type(layer).__name__}, whose weight cannot be dequantised here or is not loaded. Load the "
            "base unquantised, or choose a strategy without this probe."
        )
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise RankwiseError(f"The weight of {module.name} holds numbers that are not finite.")
    return weight


def _largest(weight: torch.Tensor, seed: int) -> np.ndarray:
    """Return the largest singular values, falling, as float32."""
    if min(weight.shape) > EXACT_UP_TO:
        places = [weight.device.index or 0] if weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices=places):
            torch.manual_seed(seed)
            values = torch.svd_lowrank(weight, q=SKETCH, niter=ITERATIONS)[1]
    else:
        # the Gram matrix squares the values, which float64 holds; many times faster than a full decomposition
        wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().t()
        values = torch.linalg.eigvalsh(wide @ wide.t()).flip(0).clamp(min=0).sqrt()
    found: np.ndarray = values[:LIMIT].float().cpu().numpy()
    return found
