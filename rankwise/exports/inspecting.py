"""Anyone's adapter, looked at: what its tensors hold, what it declares, which programs serve it rightly.

Nothing is loaded but the adapter; the base model's shapes are compared where they can be had without its
weights. See `programs` for the rules that are emulated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peft.utils.other import get_pattern_key
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from rankwise import lowrank
from rankwise.errors import RankwiseError, visible
from rankwise.exports.adapter_files import PREFIX, Adapter, Update, read_adapter
from rankwise.exports.bases import Shapes, fit, shapes_of, skeleton
from rankwise.exports.programs import PROGRAMS, Verdict, every, judge
from rankwise.plans import short

SHARE = 0.9
"""Of an update's energy (its squared singular values); the units that hold it are the units in use."""

_PLAIN_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*", re.ASCII)


@dataclass(frozen=True)
class InspectedModule:
    """One adapted module.

    Attributes:
        name: in the base model.
        in_features: of the module.
        out_features: of the module.
        rank: of its tensors.
        declared_rank: that the configuration gives it.
        alpha: that the configuration gives it.
        scale: alpha over the rank of the tensors (or its root): what the adapter was trained with.
        energy: squared Frobenius norm of s B A.
        units: the fewest singular directions that hold `SHARE` of the energy; 0 for a zero update.
        stable_rank: energy over the largest squared singular value; 0 for a zero update.
        embedding: whether it is an embedding.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    declared_rank: int
    alpha: float
    scale: float
    energy: float
    units: int
    stable_rank: float
    embedding: bool

    @property
    def parameters(self) -> int:
        """Parameters stored."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class Inspection:
    """What an adapter folder holds and how programs serve it.

    Attributes:
        adapter: the folder.
        base: the model that it names; None if it names none.
        r: as declared, where no pattern says otherwise.
        lora_alpha: the same.
        use_rslora: whether alpha is divided by the root of the rank.
        modules: in the order of their names, embeddings last.
        idle: field -> pattern keys that are the first match of no module.
        extras: names of other tensors.
        dtypes: of the factors.
        size: of the weights file, bytes.
        verdicts: one per program, by the names of `programs.PROGRAMS`.
        notices: what else a reader must know.
    """

    adapter: Path
    base: str | None
    r: int
    lora_alpha: float
    use_rslora: bool
    modules: tuple[InspectedModule, ...]
    idle: Mapping[str, tuple[str, ...]]
    extras: tuple[str, ...]
    dtypes: tuple[str, ...]
    size: int
    verdicts: Mapping[str, Verdict]
    notices: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Parameters of A and B, embeddings included."""
        return sum(module.parameters for module in self.modules)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        modules = [{**asdict(module), "parameters": module.parameters} for module in self.modules]
        fields = {
            **asdict(self), "adapter": str(self.adapter), "modules": modules, "parameters": self.parameters,
        }  # fmt: skip
        return json.loads(json.dumps(fields))

    def table(self) -> Table:
        """Return a row per program: whether it serves the adapter rightly, and by how much it does not."""
        return verdict_table(f"{self.adapter.name}: served by", self.verdicts)

    def ranks(self) -> Table:
        """Return a row per kind of module: ranks, scales, the share of the units in use, parameters."""
        kinds: dict[str, list[InspectedModule]] = {}
        for module in self.modules:
            kinds.setdefault(module.name.rpartition(".")[2], []).append(module)
        table = _table(f"{self.adapter.name}: as stored")
        for head in ("part", "modules", "rank", "declared", "scale", "in use", "params"):
            table.add_column(head, justify="left" if head == "part" else "right", no_wrap=True)
        for kind, held in kinds.items():
            table.add_row(
                _shown(kind),
                str(len(held)),
                _span([m.rank for m in held]),
                _span([m.declared_rank for m in held]),
                _span([m.scale for m in held]),
                f"{sum(m.units for m in held) / sum(m.rank for m in held):.0%}",
                short(sum(m.parameters for m in held)),
            )
        return table

    def summary(self) -> str:
        """Return the findings as sentences, one a line."""
        ranks, scales = [m.rank for m in self.modules], [m.scale for m in self.modules]
        units = sum(m.units for m in self.modules)
        lines = [
            f"{len(self.modules)} modules, {self.parameters:,} parameters in {', '.join(self.dtypes)}: "
            f"rank {_span(ranks)}, scale {_span(scales)}{' (rsLoRA)' if self.use_rslora else ''}",
            f"{units} of {sum(ranks)} units of rank hold {SHARE:.0%} of the energy of each module",
        ]
        if any(self.idle.values()) and len(set(ranks)) == 1:
            lines.append(f"every module has rank {ranks[0]}: the patterns that match nothing changed nothing")
        lines += [_sentence(verdict) for verdict in self.verdicts.values()]
        return "\n".join([*lines, *self.notices])


def inspect_adapter(folder: str | Path, *, model: str | None = None) -> Inspection:
    """Compare an adapter's tensors with its configuration, and with the rules of the programs that load it.

    Args:
        folder: of adapter_config.json and adapter_model.safetensors.
        model: source of the base model, whose shapes are then compared; None compares them where the
            adapter names a folder on this machine.

    Raises:
        RankwiseError: an adapter that cannot be read (`read_checked`), or that does not fit the base.

    Cost: two QR decompositions and an SVD of (r, r) per module; of the base, its configuration alone.
    """
    checked = read_checked(folder, model)
    adapter = checked.adapter
    modules = tuple(_inspected(adapter, update) for update in every(adapter))
    held = {m.name: m.energy / m.scale**2 if m.scale else 0.0 for m in modules}
    declared = adapter.declared
    return Inspection(
        adapter=adapter.folder,
        base=declared.base_model_name_or_path,
        r=declared.r,
        lora_alpha=declared.lora_alpha,
        use_rslora=declared.use_rslora,
        modules=modules,
        idle=_idle(adapter),
        extras=tuple(adapter.extras),
        dtypes=tuple(
            sorted({str(t.dtype).removeprefix("torch.") for u in every(adapter) for t in (u.a, u.b)})
        ),
        size=adapter.size,
        verdicts={name: judge(program, adapter, held) for name, program in PROGRAMS.items()},
        notices=checked.notices,
    )


class Checked(NamedTuple):
    """An adapter that was read, and its base as far as that can be had without its weights.

    Attributes:
        adapter: as read.
        base: the model on PyTorch's meta device; None where it cannot be had.
        shapes: of the base's modules; None without it.
        notices: what a reader must know of adapter and base.
    """

    adapter: Adapter
    base: Any | None
    shapes: Shapes | None
    notices: tuple[str, ...]


def read_checked(folder: str | Path, model: str | None) -> Checked:
    """Read an adapter as `read_adapter` does, and refuse more that no program should be given.

    Raises:
        RankwiseError: whatever `read_adapter` refuses; names of tensors that are no dotted module names;
            a base of other shapes or without a module.
    """
    adapter = read_adapter(folder)
    for name in (*(PREFIX + update.name for update in every(adapter)), *adapter.extras):
        if not _PLAIN_NAME.fullmatch(name):
            raise RankwiseError(
                f"{adapter.folder}: a tensor must be called by a dotted name of letters, digits, _ and -; "
                f"got {visible(name)!r}."
            )
    base = skeleton(adapter, model)
    shapes = None if base is None else shapes_of(base)
    notices = () if shapes is None else fit(adapter, shapes, model)
    return Checked(adapter, base, shapes, (*adapter.notices, *notices))


def verdict_table(title: str, verdicts: Mapping[str, Verdict]) -> Table:
    """Return verdicts as a table, a row per program, safe for a terminal."""
    table = _table(title)
    table.caption = (
        "ratio: applied over true scale, over the modules; error: of the whole update. Their rules:"
    )
    table.caption_justify = "left"
    for head in ("program", "version", "serves it", "wrong", "ratio", "mean", "error"):
        table.add_column(head, justify="left" if head in ("program", "version") else "right", no_wrap=True)
    for verdict in verdicts.values():
        known = verdict.smallest is not None
        table.add_row(
            _shown(verdict.program),
            _shown(verdict.version),
            verdict.verdict,
            f"{verdict.wrong}/{verdict.modules}" if known else "",
            _span([verdict.smallest, verdict.largest]) if known else "",
            f"{verdict.mean:.3g}" if known else "",
            "" if verdict.error is None else f"{verdict.error:.1%}",
        )
    rules = [
        f"{verdict.program} {verdict.version}: {'; '.join([verdict.why, *verdict.notices])}"
        for verdict in verdicts.values()
    ]
    table.caption += "".join("\n" + _shown(rule) for rule in rules)
    return table


# --- parts -----------------------------------------------------------------------------------------


def _inspected(adapter: Adapter, update: Update) -> InspectedModule:
    energy = lowrank.singular_values(update.a, update.scale * update.b.double()).square()
    total = float(energy.sum())
    return InspectedModule(
        name=update.name,
        in_features=update.a.shape[1],
        out_features=update.b.shape[0],
        rank=update.rank,
        declared_rank=adapter.declared.rank(update.name),
        alpha=adapter.declared.alpha(update.name),
        scale=update.scale,
        energy=total,
        units=int((energy.cumsum(0) / total < SHARE).sum()) + 1 if total else 0,
        stable_rank=total / float(energy[0]) if total else 0.0,
        embedding=update.embedding,
    )


def _idle(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    names = [update.name for update in every(adapter)]
    found = {}
    for field in ("rank_pattern", "alpha_pattern"):
        keys = list(getattr(adapter.declared, field))
        used = {get_pattern_key(keys, name) for name in names}
        found[field] = tuple(key for key in keys if key not in used)
    return found


def _sentence(verdict: Verdict) -> str:
    name = f"{verdict.program} ({verdict.version})"
    if verdict.verdict == "refused":
        return f"{name} does not load it: {verdict.why}"
    if verdict.verdict == "right":
        return f"{name} serves it rightly"
    if not verdict.wrong:
        return f"{name} serves it wrongly: {verdict.why}"
    span = (
        "" if verdict.smallest is None else f" ({_span([verdict.smallest, verdict.largest])} times their own)"
    )
    error = "" if verdict.error is None else f", an error of {verdict.error:.1%} of the whole update"
    return (
        f"{name} serves it wrongly: another scale for {verdict.wrong} of {verdict.modules} modules{span}"
        f"{error}; {verdict.why}"
    )


def _table(title: str) -> Table:
    return Table(title=_shown(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _shown(text: str) -> str:
    return escape(visible(text))


def _span(values: Any) -> str:
    form: Callable[[Any], str] = lambda value: str(value) if isinstance(value, int) else f"{value:.3g}"  # noqa: E731
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"
