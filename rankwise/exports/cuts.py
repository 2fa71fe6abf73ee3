"""Updates cut to a rank and stored in a precision, and what both cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rankwise import lowrank
from rankwise.errors import RankwiseError, one_of
from rankwise.exports.adapter_files import Adapter, Update
from rankwise.exports.programs import every

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative difference of a module's update that is rounding: 1e-5 as the formats promise in fp32; in half
precision two factors are rounded, each value by half a unit in its last place: 2^-9 (bf16) or 2^-12 (fp16) of
the power of two above it."""


@dataclass(frozen=True)
class ExportedModule:
    """One module: what it had, and what truncation costs it.

    `lost` is the share of its energy (squared singular values) that is gone, `error` the relative Frobenius
    distance of the update, its root; both are 0 where nothing was cut. `rank_before` is 0 where zeros were
    filled in.
    """

    name: str
    rank_before: int
    rank_after: int
    scale_before: float
    lost: float
    error: float


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a precision by its name, or as it is; None stays None.

    Raises:
        RankwiseError: no such precision.
    """
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if str(dtype) not in DTYPES:
        raise RankwiseError(one_of("dtype", str(dtype), DTYPES))
    return DTYPES[str(dtype)]


def need_rank(max_rank: int | None) -> None:
    """Refuse a rank to cut to that makes no sense."""
    if max_rank is not None and max_rank < 1:
        raise RankwiseError(f"max_rank must be 1 or more; got {max_rank}.")


def cut(update: Update, max_rank: int | None) -> Update:
    """Return an update in double precision, cut to its best approximation where it has a larger rank.

    Cost: two QR decompositions and an SVD of (r, r) where it is cut.
    """
    a, b = update.a.double(), update.b.double()
    if max_rank is not None and update.rank > max_rank:
        a, b = lowrank.truncate(a, b, max_rank)
    return replace(update, a=a, b=b, declared_rank=None)


def stored(update: Update, dtype: torch.dtype) -> Update:
    """Return the update in the precision that is written.

    Raises:
        RankwiseError: it has values that the precision cannot hold.
    """
    a, b = update.a.to(dtype), update.b.to(dtype)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise RankwiseError(
            f"{update.name!r} holds values above the largest of {dtype}. Choose bf16 or fp32."
        )
    return replace(update, a=a, b=b)


def difference(there: Update, scale: float, wanted: Update) -> float:
    """Return the relative Frobenius distance of scale * b @ a from an update; inf where not finite.

    Cost: an SVD of (R, r + R) per call; neither product is formed.
    """
    a = torch.cat([there.a.double(), wanted.a.double()])
    b = torch.cat([scale * there.b.double(), -wanted.scale * wanted.b.double()], dim=1)
    if not torch.isfinite(a).all() or not torch.isfinite(b).all():
        return math.inf
    distance = float(lowrank.singular_values(a, b).norm())
    size = float(lowrank.singular_values(wanted.a, wanted.scale * wanted.b.double()).norm())
    return distance / size if size else (math.inf if distance else 0.0)


def costs_of(source: Adapter, cuts: Sequence[Update], zeros: Sequence[Update]) -> tuple[ExportedModule, ...]:
    """Return what cutting cost each module, in the order of their names.

    Args:
        source: as read.
        cuts: its updates, embeddings last, each cut or not.
        zeros: updates that were filled in.
    """
    found = [ExportedModule(update.name, 0, 0, 1.0, 0.0, 0.0) for update in zeros]
    for before, after in zip(every(source), cuts, strict=True):
        lost = 0.0
        if after.rank < before.rank:
            energy = lowrank.singular_values(before.a, before.b).square()
            lost = float(energy[after.rank :].sum() / energy.sum()) if energy.any() else 0.0
        found.append(
            ExportedModule(before.name, before.rank, after.rank, before.scale, lost, math.sqrt(lost))
        )
    return tuple(sorted(found, key=lambda module: module.name))


def cut_lines(modules: Sequence[ExportedModule]) -> list[str]:
    """Return what cutting cost as lines, the worst module first; none where nothing was lost."""
    worse = sorted((m for m in modules if m.lost), key=lambda m: -m.error)
    if not worse:
        return []
    at = max(m.rank_after for m in worse)
    return [
        f"cut to rank {at}: {len(worse)} modules; relative error, energy lost",
        *(f"  {m.name}: {m.error:.2%}, {m.lost:.2%} (rank {m.rank_before})" for m in worse),
    ]
