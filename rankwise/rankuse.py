"""How much of each module's allotted rank the trained update uses: the singular values of scale * B A."""

from __future__ import annotations

from typing import Any

import torch

from rankwise.adapters import lora_layers, read_back
from rankwise.lowrank import singular_values

SHARE = 0.9
"""Of an update's energy (its squared singular values); the units that hold it are the units in use."""

Columns = dict[str, list[Any]]


@torch.no_grad()
def rank_use(adapted: Any) -> Columns:
    """Return one row per adapted module, as columns.

    Returns:
        module: its name in the base model.
        rank: units allotted.
        stable_rank: sum of the squared singular values over the largest (Rudelson and Vershynin 2007): from 1
            to `rank`, and 0 for an update that is zero.
        units: the fewest singular directions that hold `SHARE` of the energy; 0 for a zero update.
        singular_values: of the update as it is added to the weight, falling; (rank,) each.

    Cost: two thin QR decompositions a module; 0.3 s for 210 modules of rank 8.
    """
    found: Columns = {name: [] for name in ("module", "rank", "stable_rank", "units", "singular_values")}
    layers = lora_layers(adapted)
    for name, (rank, scale) in read_back(adapted).items():
        a, b = (getattr(layers[name], part)["default"].weight for part in ("lora_A", "lora_B"))
        values = scale * singular_values(a, b)
        row = {"module": name, "rank": rank, "singular_values": values.tolist(), **_used(values)}
        for column, value in row.items():
            found[column].append(value)
    return found


def _used(values: torch.Tensor) -> dict[str, float | int]:
    energy = values.square()
    total = float(energy.sum())
    if not total:
        return {"stable_rank": 0.0, "units": 0}
    held = energy.cumsum(0) / total
    return {"stable_rank": total / float(energy[0]), "units": int((held < SHARE).sum()) + 1}


def summary(columns: Columns) -> dict[str, float] | None:
    """Return the mean over the modules that got a rank; None where none did.

    Returns:
        stable_rank: mean stable rank.
        units_share: mean share of the allotted units that hold `SHARE` of the energy.
    """
    rows = list(zip(columns["rank"], columns["stable_rank"], columns["units"], strict=True))
    if not rows:
        return None
    return {
        "stable_rank": sum(stable for _, stable, _ in rows) / len(rows),
        "units_share": sum(units / rank for rank, _, units in rows) / len(rows),
    }
