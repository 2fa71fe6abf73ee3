"""A plan becomes PEFT adapters on the model, and the ranks are read back from the tensors as proof."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from rankwise import sources
from rankwise.errors import RankwiseError
from rankwise.plans import RankPlan
from rankwise.seeds import generator

ADAPTER = "default"


def attach(
    model: Any,
    plan: RankPlan,
    *,
    seed: int,
    dropout: float = 0.0,
    directions: Mapping[str, np.ndarray] | None = None,
) -> PeftModel:
    """Put the plan's adapters on the model and prove that they are the plan's.

    A starts uniform in +-1/sqrt(in_features) (PEFT's default), drawn from (seed, module name) row by row,
    so that a lower rank's A is the top of a higher rank's. B starts at zero. Adapters are fp32.

    Args:
        model: the base model.
        plan: ranks and scale rule.
        seed: of the draws.
        dropout: on the adapters' inputs.
        directions: module name -> (k, in_features): A's first k rows start along these instead, as long as a
            drawn row is on average (1/sqrt(3)), so that directions alone differ.

    Raises:
        RankwiseError: when the built ranks, scales or parameters are not the plan's.

    Cost: one pass over the adapters' parameters; the base weights are not touched.
    """
    adapted = get_peft_model(model, plan.lora_config(dropout=dropout), autocast_adapter_dtype=True)
    _name_base(adapted, plan.model)
    for name, layer in lora_layers(adapted).items():
        _initialise(layer, name, seed, (directions or {}).get(name))
    verify(adapted, plan)
    return adapted


def detach(adapted: PeftModel) -> Any:
    """Take the adapters off and return the base model, its weights bit-identical to before."""
    base = adapted.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config  # PEFT leaves it behind and warns about a second adapter next time
    return base


def lora_layers(adapted: Any) -> dict[str, LoraLayer]:
    """Return the adapted layers by their module name in the base model."""
    root = adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted
    return {name: module for name, module in root.named_modules() if isinstance(module, LoraLayer)}


def read_back(adapted: Any) -> dict[str, tuple[int, float]]:
    """Return (rank, scale) of every adapted module as its tensors and forward pass have them."""
    found = {}
    for name, layer in lora_layers(adapted).items():
        a, b = _factors(layer)
        if a.shape[0] != b.shape[1]:
            raise RankwiseError(f"{name}: A has rank {a.shape[0]} and B has rank {b.shape[1]}.")
        found[name] = (a.shape[0], float(layer.scaling[ADAPTER]))
    return found


def verify(adapted: Any, plan: RankPlan) -> None:
    """Compare what was built with the plan: ranks, scales, and the trainable parameters and their count.

    Raises:
        RankwiseError: naming the modules that differ.
    """
    built = read_back(adapted)
    wanted = {name: (rank, plan.scale.scaling(rank)) for name, rank in plan.ranks.items() if rank > 0}
    wrong = [name for name in sorted(built.keys() | wanted.keys()) if not _same(built, wanted, name)]
    if wrong:
        shown = "; ".join(f"{n}: built {built.get(n)}, planned {wanted.get(n)}" for n in wrong[:5])
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise RankwiseError(f"the built (rank, scale) differ from the plan in {shown}{more}.")
    idle = [name for name, layer in lora_layers(adapted).items() if not _at_work(layer)]
    if idle:
        more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
        raise RankwiseError(f"built, but not active and trainable: {', '.join(idle[:5])}{more}.")
    counted = trainable_parameters(adapted)
    if counted != plan.parameters:
        raise RankwiseError(
            f"the built model trains {counted:,} parameters; the plan has {plan.parameters:,}."
        )


def trainable_parameters(model: Any) -> int:
    """Count the parameters that require a gradient, on the model itself."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_tensors(adapted: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by name, in model order."""
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def save(adapted: PeftModel, folder: Path) -> int:
    """Write a PEFT adapter folder (safetensors) and return its size in bytes."""
    # "auto" would ask a hub whether the base's vocabulary changed; it never does here
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    return sum(f.stat().st_size for f in folder.iterdir())


@contextmanager
def saved(base: Any, folder: Path) -> Iterator[PeftModel]:
    """Yield the base with an adapter as it was saved, then take it off again."""
    adapted = PeftModel.from_pretrained(base, str(folder))
    try:
        yield adapted
    finally:
        detach(adapted)


def _factors(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, in_features) and B (out_features, rank)."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # type: ignore[return-value]


def _at_work(layer: LoraLayer) -> bool:
    """Whether the layer adds its A and B to the forward pass, unmerged, and both are trainable."""
    on = not layer.disable_adapters and not layer.merged and list(layer.active_adapters) == [ADAPTER]
    return on and all(factor.requires_grad for factor in _factors(layer))


def drawn_rows(
    name: str, seed: int, rank: int, in_features: int, directions: np.ndarray | None = None
) -> np.ndarray:
    """Return the first `rank` rows that A of a module starts with, (rank, in_features) float32.

    `directions`, (k, in_features): the first k rows lie along these instead (see `attach`).
    """
    bound = 1 / math.sqrt(in_features)
    draws = generator(seed, "lora_A", name).uniform(-bound, bound, size=(rank, in_features))
    rows = draws.astype(np.float32)
    if directions is not None:
        given = np.asarray(directions[:rank], dtype=np.float32)
        norms = np.linalg.norm(given, axis=1, keepdims=True)
        usable = norms[:, 0] > 0
        rows[: len(given)][usable] = given[usable] / norms[usable] / math.sqrt(3)
    return rows


def _name_base(adapted: PeftModel, source: str) -> None:
    """Let the adapter of a hub's model name it there, not by this machine's copy, which nobody else has."""
    if not source.startswith("hf:"):
        return
    place, config = sources.parse(source), adapted.peft_config[ADAPTER]
    if place.path is None:
        config.base_model_name_or_path, config.revision = place.name, place.version


def _initialise(layer: LoraLayer, name: str, seed: int, directions: np.ndarray | None) -> None:
    a, b = _factors(layer)
    rows = drawn_rows(name, seed, a.shape[0], a.shape[1], directions)
    with torch.no_grad():
        a.copy_(torch.from_numpy(rows))
        b.zero_()


def _same(built: Mapping[str, tuple[int, float]], wanted: Mapping[str, tuple[int, float]], name: str) -> bool:
    if name not in built or name not in wanted:
        return False
    return built[name][0] == wanted[name][0] and math.isclose(built[name][1], wanted[name][1], rel_tol=1e-9)
