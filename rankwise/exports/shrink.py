"""Anyone's finished LoRA adapter, compressed: one global truncation of the singular values of its updates.

The value of the k-th unit of rank of module m is sigma_k(s_m B_m A_m)^2, so what a set of ranks keeps is the
sum of the squared singular values kept, and its loss the squared Frobenius distance of the whole update
(Eckart-Young, module by module). Units are bought by gain per parameter (`budget.solve_gains`), over all
modules at once, as in PARA (2604.27796) but under a budget of parameters. The data are not looked at:
energy measures the change of the weights, and only `data` tells what that does to the loss.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from rankwise import lowrank
from rankwise.budget import parse_budget, solve_gains
from rankwise.errors import RankwiseError, visible
from rankwise.exports.adapter_files import (
    Adapter,
    Update,
    read_adapter,
    write_adapter,
)
from rankwise.exports.losses import Losses, open_bench
from rankwise.exports.places import need_new, written_aside
from rankwise.plans import short

NOTHING = 1e-12
"""Singular values below this share of a module's largest are rounding or padding: they get no rank."""


@dataclass(frozen=True)
class ShrunkModule:
    """One module: `energy` is the sum of its squared singular values, `kept` that of those that are kept."""

    name: str
    cost: int
    rank_before: int
    rank_after: int
    energy: float
    kept: float


@dataclass(frozen=True)
class Shrunk:
    """What shrinking an adapter did.

    Attributes:
        adapter: the folder that was read.
        out: the folder that was written; None where there was nothing to do and no `out` was asked for.
        budget: parameters that the ranks may cost.
        modules: the linear maps, in the order of their names.
        changed: False if the adapter was within its budget already.
        bytes_before: size of the weights file.
        bytes_after: the same afterwards.
        losses: None without data.
        notices: what a reader must know.
    """

    adapter: Path
    out: Path | None
    budget: int
    modules: tuple[ShrunkModule, ...]
    changed: bool
    bytes_before: int
    bytes_after: int
    losses: Losses | None
    notices: tuple[str, ...]

    @property
    def parameters_before(self) -> int:
        """Parameters of A and B of the linear maps, as stored."""
        return sum(module.cost * module.rank_before for module in self.modules)

    @property
    def parameters_after(self) -> int:
        """The same afterwards: at most the budget."""
        return sum(module.cost * module.rank_after for module in self.modules)

    @property
    def energy_lost(self) -> float:
        """Share of all squared singular values that is gone."""
        return lost(self.modules)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        fields = {
            **asdict(self),
            "adapter": str(self.adapter),
            "out": None if self.out is None else str(self.out),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "energy_lost": self.energy_lost,
            "modules": [{**asdict(module), "energy_lost": lost([module])} for module in self.modules],
        }
        return json.loads(json.dumps(fields))

    def table(self) -> Table:
        """Return ranks (a row per layer, a column per part), with the energy lost at the edges."""
        places = _places([module.name for module in self.modules])
        parts = list(dict.fromkeys(part for _, part in places.values()))
        table = Table(
            title=escape(visible(f"{self.adapter.name}: ranks")), box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.caption, table.caption_justify = escape(visible(self._caption())), "left"
        table.show_footer = True
        table.add_column("layer", footer="all\nlost", justify="right", no_wrap=True)
        uniform = len({module.rank_before for module in self.modules}) == 1
        for part in parts:
            held = [m for m in self.modules if places[m.name][1] == part]
            footer = f"{short(_parameters(held))}\n{lost(held):.1%}"
            table.add_column(escape(visible(part)), footer=footer, justify="right", no_wrap=True)
        total = f"{short(self.parameters_after)}\n{self.energy_lost:.1%}"
        table.add_column("params", footer=total, justify="right", no_wrap=True)
        table.add_column("lost", justify="right", no_wrap=True)
        for layer in sorted({layer for layer, _ in places.values()}, key=lambda n: (n is None, n)):
            held = [m for m in self.modules if places[m.name][0] == layer]
            cells = [_cell([m for m in held if places[m.name][1] == part], uniform) for part in parts]
            name = "-" if layer is None else str(layer)
            table.add_row(name, *cells, short(_parameters(held)), f"{lost(held):.1%}")
        return table

    def _caption(self) -> str:
        ranks = sorted({module.rank_before for module in self.modules})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"rank before: {span}; lost: share of the squared singular values of s B A"

    def summary(self) -> str:
        """Return the totals as lines of text."""
        if not self.changed:
            copied = "nothing is written" if self.out is None else f"copied as it is to {self.out}"
            return (
                f"nothing to do: {self.parameters_before:,} parameters are within the budget of "
                f"{self.budget:,} already; {copied}"
            )
        lines = [
            f"parameters: {self.parameters_before:,} before, {self.parameters_after:,} after "
            f"(budget {self.budget:,})",
            f"energy lost: {self.energy_lost:.2%} of the sum of squared singular values",
            f"weights file: {self.bytes_before / 1e6:,.2f} MB before, {self.bytes_after / 1e6:,.2f} MB after",
        ]
        if found := self.losses:
            lines.append(
                f"loss per response token: {found.before:.4f} before, {found.after:.4f} after "
                f"({found.after - found.before:+.4f}); {found.base:.4f} without any adapter "
                f"({found.rows} rows, {found.tokens:,} tokens of {found.data})"
            )
        return "\n".join([*lines, f"written to {self.out}"])


def shrink_adapter(
    folder: str | Path,
    budget: str | int,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    rows: int = 64,
    max_length: int = 512,
    note: Callable[[str], None] = lambda text: None,
) -> Shrunk:
    """Truncate all updates of a PEFT LoRA adapter to a budget and write a new adapter folder.

    The budget is for A and B of the linear maps; embeddings' updates, `modules_to_save` and other tensors
    are carried over as they are (an embedding's inputs are single tokens, so its energy does not compare).
    The scales are folded in: the new adapter has scale 1 everywhere, and a module of rank 0 is not in it.

    Args:
        folder: of adapter_config.json and adapter_model.safetensors.
        budget: `r=2` (what rank 2 on each of the adapter's modules costs), `300k`, a number, or a share of
            the base's parameters such as `0.5%`, which needs `model`.
        out: a new or empty folder; None makes one beside the adapter, such as `adapter-r2`.
        model: source of the base model; None takes the one that the adapter names, where one is needed.
        data: source of rows; with it, losses are measured (see `Losses`).
        rows: of them at most.
        max_length: tokens per row.
        note: hears what is being done.

    Returns:
        What was kept and lost. If the adapter is within the budget, nothing is written, or a copy to `out`.

    Raises:
        RankwiseError: an adapter that cannot be read (`read_adapter`) or is all zero, a budget that makes no
            sense or buys no unit that carries anything, a folder that would be overwritten, bad data.

    Cost: per module two QR decompositions of its factors and an SVD of (r, r), twice; with data, the base
    model in fp32 and three forward passes over the rows.
    """
    folder = Path(folder)
    target = _target(folder, budget, out)
    adapter = read_adapter(folder)
    spectra = _spectra(adapter)
    amount = _amount(adapter, budget, model)
    if adapter.parameters <= amount:
        return _unchanged(adapter, spectra, amount, target if out is not None else None)
    ranks = _ranks(adapter, spectra, amount)
    need_new(target)
    bench = data and open_bench(adapter, data, model=model, count=rows, max_length=max_length, note=note)
    losses = None
    with written_aside(target) as aside:
        updates = [truncated(update, ranks[update.name]) for update in adapter.updates if ranks[update.name]]
        size = write_adapter(aside, adapter, updates)
        if bench:
            note(f"scoring {len(bench.examples)} rows: the base alone, then with either adapter")
            (base, tokens), (before, _), (after, _) = (bench.loss(at) for at in (None, folder, aside))
            losses = Losses(bench.data, bench.base.source, len(bench.examples), tokens, base, before, after)
    return Shrunk(
        adapter=folder,
        out=target,
        budget=amount,
        modules=_modules(adapter, spectra, ranks),
        changed=True,
        bytes_before=adapter.size,
        bytes_after=size,
        losses=losses,
        notices=(*adapter.notices, *_carried(adapter), *(bench.base.notices if bench else ())),
    )


def truncated(update: Update, rank: int) -> Update:
    """Return the best rank-`rank` approximation of an update, of scale 1 and in its own precision."""
    a, b = lowrank.truncate(update.a.double(), update.scale * update.b.double(), rank)
    return replace(update, a=a.to(update.a.dtype), b=b.to(update.b.dtype), scale=1.0, declared_rank=None)


def lost(modules: Sequence[ShrunkModule]) -> float:
    """Return 1 - kept/energy over some modules; 0 where there is no energy."""
    energy = sum(module.energy for module in modules)
    return max(0.0, 1 - sum(module.kept for module in modules) / energy) if energy else 0.0


# --- deciding --------------------------------------------------------------------------------------


def _target(folder: Path, budget: str | int, out: str | Path | None) -> Path:
    if out is not None:
        target = Path(out)
        need_new(target)
        return target
    written = re.sub(r"[^\w.-]", "", str(budget).replace("%", "pct"))
    resolved = folder.resolve()
    return resolved.with_name(f"{resolved.name}-{written}")


def _spectra(adapter: Adapter) -> dict[str, np.ndarray]:
    """Return the squared singular values of each module's update, without those that are rounding."""
    spectra = {}
    for update in adapter.updates:
        sigma = lowrank.singular_values(update.a, update.scale * update.b.double())
        spectra[update.name] = sigma[sigma > NOTHING * sigma[0]].square().numpy()
    if not any(map(len, spectra.values())):
        raise RankwiseError(
            f"{adapter.folder}: every update is zero (B = 0, as before training): there is nothing to keep."
        )
    return spectra


def _amount(adapter: Adapter, budget: str | int, model: str | None) -> int:
    base = 0
    if "%" in str(budget):
        if model is None:
            raise RankwiseError(
                f"Budget {str(budget)!r} is a share of the base model's parameters, which the adapter does "
                "not tell: name the base with --model, or give the budget as r=2 or a number of parameters."
            )
        from rankwise import models  # the only budget that needs a model
        from rankwise.inventory import inventory

        base = inventory(models.skeleton(model), accept_unreachable=True).base_parameters
    costs = {update.name: update.cost for update in adapter.updates}
    limits = {update.name: update.max_rank for update in adapter.updates}
    return parse_budget(budget, costs=costs, max_ranks=limits, base_parameters=base)


def _ranks(adapter: Adapter, spectra: dict[str, np.ndarray], amount: int) -> dict[str, int]:
    costs = {update.name: update.cost for update in adapter.updates}
    limits = {update.name: update.max_rank for update in adapter.updates}
    ranks = solve_gains(spectra, costs, amount, limits)
    if not any(ranks.values()):
        least = min(costs[name] for name, spectrum in spectra.items() if len(spectrum))
        raise RankwiseError(
            f"A budget of {amount:,} parameters is too small for one unit of rank of any module whose update "
            f"is not zero: the cheapest costs {least:,}."
        )
    return ranks


def _modules(
    adapter: Adapter, spectra: dict[str, np.ndarray], ranks: dict[str, int]
) -> tuple[ShrunkModule, ...]:
    return tuple(
        ShrunkModule(
            name=update.name,
            cost=update.cost,
            rank_before=update.rank,
            rank_after=ranks[update.name],
            energy=float(spectra[update.name].sum()),
            kept=float(spectra[update.name][: ranks[update.name]].sum()),
        )
        for update in adapter.updates
    )


def _unchanged(adapter: Adapter, spectra: dict[str, np.ndarray], amount: int, out: Path | None) -> Shrunk:
    if out is not None:
        with written_aside(out) as aside:
            for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                shutil.copyfile(adapter.folder / name, aside / name)
    return Shrunk(
        adapter=adapter.folder,
        out=out,
        budget=amount,
        modules=_modules(adapter, spectra, {update.name: update.rank for update in adapter.updates}),
        changed=False,
        bytes_before=adapter.size,
        bytes_after=adapter.size,
        losses=None,
        notices=adapter.notices,
    )


def _carried(adapter: Adapter) -> list[str]:
    """Say what is carried over unchanged and counts in no budget."""
    kinds = {
        "updates of embeddings": [tensor for u in adapter.embeddings for tensor in (u.a, u.b)],
        "other tensors (modules_to_save and the like)": list(adapter.extras.values()),
    }
    return [
        f"{what} are carried over unchanged, outside of the budget: {_count(tensors):,} parameters"
        for what, tensors in kinds.items()
        if tensors
    ]


def _count(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# --- showing ---------------------------------------------------------------------------------------


def _places(names: Sequence[str]) -> dict[str, tuple[int | None, str]]:
    """Return the layer (first number in the name) and the part (its shortest clear end) of each module."""
    split = {name: re.fullmatch(r"(?:.*?\.)??(\d+)\.(.+)", name) for name in names}
    paths = {name: re.sub(r"\b\d+\b", "*", m[2]) if m else name for name, m in split.items()}
    ends: dict[str, set[str]] = {}
    for path in paths.values():
        ends.setdefault(path.rpartition(".")[2], set()).add(path)
    places = {}
    for name, path in paths.items():
        end, match = path.rpartition(".")[2], split[name]
        label = end.removesuffix("_proj") if len(ends[end]) == 1 else path
        places[name] = (int(match[1]) if match else None, label)
    return places


def _cell(modules: Sequence[ShrunkModule], uniform: bool) -> str:
    after = _span([module.rank_after for module in modules])
    count = f"{len(modules)}x " if len(modules) > 1 else ""
    return count + (after if uniform else f"{_span([module.rank_before for module in modules])}>{after}")


def _span(ranks: Sequence[int]) -> str:
    if not ranks:
        return ""
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"


def _parameters(modules: Sequence[ShrunkModule]) -> int:
    return sum(module.cost * module.rank_after for module in modules)
