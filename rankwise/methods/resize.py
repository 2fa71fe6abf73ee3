"""A saved training state with other ranks: values and AdamW moments, on tensors alone.

Shapes: r rank, I in_features, O out_features; A (r, I), B (O, r); a module's update is s B A. G (O, I) is the
loss's gradient by the frozen weight, so dL/dB = s G A^T and dL/dA = s B^T G.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from rankwise import lowrank
from rankwise.adapters import ADAPTER, drawn_rows
from rankwise.checkpoint import Saved
from rankwise.plans import PlanModule, RankPlan

State = dict[str, torch.Tensor]
"""One factor: value, exp_avg, exp_avg_sq, and step of shape (1,), as `checkpoint.Saved` has them."""


@dataclass(frozen=True)
class Factors:
    """The two factors of a module, with their AdamW moments."""

    a: State
    b: State

    @property
    def rank(self) -> int:
        """Return r."""
        return int(self.a["value"].shape[0])


def key(module: str, factor: str) -> str:
    """Return the name that PEFT gives a module's factor ("A" or "B")."""
    return f"base_model.model.{module}.lora_{factor}.{ADAPTER}.weight"


def factors(saved: Saved, module: str) -> Factors | None:
    """Return a module's factors, or None where it has no adapter."""
    if key(module, "A") not in saved.parameters:
        return None
    return Factors(saved.parameters[key(module, "A")], saved.parameters[key(module, "B")])


def grow(found: Factors | None, rows: torch.Tensor, out_features: int, ratio: float = 1.0) -> Factors:
    """Return a module with further units of rank that change nothing yet: A's are drawn, B's are zero.

    First moments of new units are zero. Second moments start at the mean of the module's present units: AdamW
    keeps one step count per tensor, so from zero a new unit would move up to six times as far as its
    neighbours for tens of steps (0.65 / sqrt(0.01) in the tenth under betas of 0.9 and 0.999).

    Args:
        found: the module's factors, or None where it has no adapter; it then starts at AdamW's step 0.
        rows: A as it would start at the new rank, (r, I); those beyond the present rank are taken.
        out_features: O.
        ratio: present scale over new scale; B takes it up, so that s B A stays the same.
    """
    if found is None:
        return Factors(_fresh(rows.clone()), _fresh(rows.new_zeros(out_features, rows.shape[0])))
    new = rows[found.rank :]
    none = rows.new_zeros(out_features, len(new))
    a, b = found.a, _rescaled(found.b, ratio)
    return Factors(
        a
        | {
            "value": torch.cat([a["value"], new.to(a["value"])]),
            "exp_avg": torch.cat([a["exp_avg"], torch.zeros_like(new)]),
            "exp_avg_sq": torch.cat([a["exp_avg_sq"], a["exp_avg_sq"].mean(0, keepdim=True).expand_as(new)]),
        },
        b
        | {
            "value": torch.cat([b["value"], none], 1),
            "exp_avg": torch.cat([b["exp_avg"], none], 1),
            "exp_avg_sq": torch.cat(
                [b["exp_avg_sq"], b["exp_avg_sq"].mean(1, keepdim=True).expand_as(none)], 1
            ),
        },
    )


def prune(found: Factors, rank: int, ratio: float = 1.0) -> Factors | None:
    """Return a module cut to a lower rank: the best approximation of its B A (Eckart-Young).

    With B A = U S V the new factors are A' = p V[:k] and B' = U[:k] S[:k] / p, where p is the root mean
    square of the lengths of A's rows: AdamW's steps do not depend on the size of a gradient, so A stays as
    long, and learns as fast, as it did. Both are linear in the old ones, A' = L A and B' = B R, hence
    dL/dB' = dL/dB L^T and dL/dA' = R^T dL/dA: first moments are carried over exactly, second moments by the
    squared maps (as if the units' gradients were uncorrelated). Where B is zero the first rows are kept.

    Args:
        found: the module's factors.
        rank: k, below the present rank; at 0 the adapter goes (None).
        ratio: present scale over new scale; B takes it up.

    Cost: one SVD of thin factors and one pseudo-inverse of A, O((I + O) r^2).
    """
    if rank == 0:
        return None
    a, b = found.a["value"].double(), found.b["value"].double()
    if not b.any():
        left = torch.eye(rank, found.rank, dtype=torch.float64)
        right = left.t()
    else:
        v = lowrank.svd(a, b).v[:rank]
        length = a.square().sum(1).mean().sqrt()
        left = length * v @ torch.linalg.pinv(a)  # L (k, r)
        right = a @ v.t() / length  # R (r, k)
    cut = Factors(
        found.a
        | {
            "value": _like(left @ a, found.a),
            "exp_avg": _like(right.t() @ found.a["exp_avg"].double(), found.a),
            "exp_avg_sq": _like(right.t().square() @ found.a["exp_avg_sq"].double(), found.a),
        },
        found.b
        | {
            "value": _like(b @ right, found.b),
            "exp_avg": _like(found.b["exp_avg"].double() @ left.t(), found.b),
            "exp_avg_sq": _like(found.b["exp_avg_sq"].double() @ left.t().square(), found.b),
        },
    )
    return Factors(cut.a, _rescaled(cut.b, ratio))


@torch.no_grad()
def resize(
    saved: Saved,
    before: RankPlan,
    after: RankPlan,
    seed: int,
    directions: Mapping[str, np.ndarray] | None = None,
) -> Saved:
    """Return the state of training under another plan; modules whose rank stays are left as they are.

    Args:
        saved: the state under `before`; it is not changed.
        before: the plan that it was trained with.
        after: the same modules and scale rule, other ranks.
        seed: the run's, for the rows of A that are new.
        directions: along which A's rows start, as `adapters.attach` takes them.
    """
    parameters: dict[str, State] = {}
    for module in after.modules:
        was, rank, found = before.ranks[module.name], after.ranks[module.name], factors(saved, module.name)
        if rank != was:
            ratio = before.scale.scaling(was) / after.scale.scaling(rank) if was and rank else 1.0
            given = (directions or {}).get(module.name)
            found = _resized(found, module, rank, ratio, seed, given)
        if found is not None:
            parameters |= {key(module.name, "A"): found.a, key(module.name, "B"): found.b}
    return replace(saved, parameters=parameters)


def _resized(
    found: Factors | None,
    module: PlanModule,
    rank: int,
    ratio: float,
    seed: int,
    directions: np.ndarray | None,
) -> Factors | None:
    if found is not None and rank < found.rank:
        return prune(found, rank, ratio)
    rows = drawn_rows(module.name, seed, rank, module.in_features, directions)
    return grow(found, torch.from_numpy(rows), module.out_features, ratio)


def _rescaled(b: State, ratio: float) -> State:
    """Return B under a scale of s / ratio: its gradient shrinks as it grows."""
    if ratio == 1:
        return b
    return b | {
        "value": b["value"] * ratio,
        "exp_avg": b["exp_avg"] / ratio,
        "exp_avg_sq": b["exp_avg_sq"] / ratio**2,
    }


def _fresh(value: torch.Tensor) -> State:
    zero = torch.zeros_like(value)
    return {"value": value, "exp_avg": zero, "exp_avg_sq": zero.clone(), "step": torch.zeros(1)}


def _like(tensor: torch.Tensor, state: State) -> torch.Tensor:
    return tensor.to(state["value"].dtype)
