"""An adapter that every program scales alike: one rank, alpha equal to it, each module's scale inside its B.

Programs divide one alpha, or each module's own, by one rank, or by each tensor's own (see `programs`); no
alpha suits all of them where ranks differ. With scale * B in place of B, A and B padded with zeros to the
largest rank R, and r = lora_alpha = R without patterns or rsLoRA, each of these rules gives 1. The update
stays what it was, the file grows to R on every module.

The folder is written aside and proved before it is renamed: what each program would add to each weight is
compared with what the original adds.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.nn.functional import pad

from rankwise.errors import RankwiseError
from rankwise.exports.adapter_files import (
    Adapter,
    Update,
    read_adapter,
    write_adapter,
)
from rankwise.exports.card import write_card
from rankwise.exports.cuts import (
    TOLERANCE,
    ExportedModule,
    costs_of,
    cut,
    cut_lines,
    difference,
    dtype_of,
    need_rank,
    stored,
)
from rankwise.exports.inspecting import read_checked, verdict_table
from rankwise.exports.places import need_new, written_aside
from rankwise.exports.programs import PROGRAMS, Verdict, every, judge, tgi_rank, vllm_rank
from rankwise.exports.siblings import zero_updates


@dataclass(frozen=True)
class Exported:
    """What a uniform export did.

    Attributes:
        adapter: the folder that was read.
        out: the folder that was written.
        rank: of every module there; also its alpha.
        dtype: of the factors.
        modules: embeddings and filled ones included, in the order of their names.
        parameters_before: of A and B.
        parameters_after: the same afterwards.
        bytes_before: size of the weights file.
        bytes_after: the same afterwards.
        differences: program -> largest relative difference of a module's update from what was to be written.
        verdicts: how each program serves what was written.
        flags: program -> what its server needs on its command line.
        notices: what a reader must know.
    """

    adapter: Path
    out: Path
    rank: int
    dtype: str
    modules: tuple[ExportedModule, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    differences: Mapping[str, float]
    verdicts: Mapping[str, Verdict]
    flags: Mapping[str, str]
    notices: tuple[str, ...]

    @property
    def filled(self) -> tuple[str, ...]:
        """Names of the modules that were filled with zeros."""
        return tuple(module.name for module in self.modules if not module.rank_before)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return json.loads(json.dumps({**asdict(self), "filled": self.filled}, default=str))

    def table(self) -> Table:
        """Return a row per program: whether it serves what was written."""
        return verdict_table(f"{self.out.name}: served by", self.verdicts)

    def summary(self) -> str:
        """Return what was done as sentences, one a line."""
        lines = [
            f"rank {self.rank} = alpha on {len(self.modules)} modules, {self.dtype}; scales are inside B",
            f"parameters: {self.parameters_before:,} before, {self.parameters_after:,} after; "
            f"weights file {self.bytes_before / 1e6:,.2f} MB before, {self.bytes_after / 1e6:,.2f} MB after",
        ]
        if self.filled:
            lines.append(f"{len(self.filled)} modules without an update of their own hold zeros")
        lines += cut_lines(self.modules)
        lines.append(_checked(self.differences))
        lines += [f"{name}: {flags}" for name, flags in self.flags.items()]
        return "\n".join([*lines, *self.notices, f"written to {self.out}"])


def export_uniform(
    adapter: str | Path,
    out: str | Path,
    *,
    max_rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    model: str | None = None,
    tgi: bool = False,
) -> Exported:
    """Write an adapter of one rank and scale 1 that adds to every weight what the given one adds.

    Siblings that servers fuse (q/k/v, gate/up) are filled with zeros where one of them has no update, if
    their shapes can be told: by the base, by another layer, or by a sibling of the same shape.

    Args:
        adapter: folder of adapter_config.json and adapter_model.safetensors.
        out: a new or empty folder.
        max_rank: updates of a larger rank are cut to it by SVD, each to its best approximation.
        dtype: fp32, bf16 or fp16; None keeps that of each tensor.
        model: source of the base model, for shapes; None reads them where the adapter names a local folder.
        tgi: also do what TGI needs: the rank is padded to 8, 16, 32, 48, ..., and every layer gets every
            kind of module that one of them has.

    Returns:
        Sizes, costs of truncation, flags, and verdicts on what was written.

    Raises:
        RankwiseError: an adapter that `read_checked` refuses, a rank or dtype that makes no sense, a folder
            that would be overwritten, or a result that some program would serve wrongly. Nothing is left.

    Cost: per module an SVD of (R, r + R) for each rule that is checked; no base weights are read.
    """
    target = Path(out)
    kind = dtype_of(dtype)
    need_rank(max_rank)
    need_new(target)
    source, _, shapes, notices = read_checked(adapter, model)
    wanted = [_folded(update, max_rank) for update in every(source)]
    zeros, unknown = zero_updates(source, shapes, every_layer=tgi)
    rank = max(update.rank for update in wanted)
    rank = tgi_rank(rank) if tgi else rank
    written = _all_padded(source, (*wanted, *zeros), rank, kind)
    checked = [name for name in PROGRAMS if tgi or name != "tgi"]
    with written_aside(target) as aside:
        size = write_adapter(aside, _plain(source, written), [u for u in written if not u.embedding])
        again = read_adapter(aside)
        differences = _prove(again, (*wanted, *zeros), checked)
        verdicts = {name: judge(program, again) for name, program in PROGRAMS.items()}
        _need_right(verdicts, checked)
        said = (*notices, *unknown, *_refusals(verdicts, checked))
        write_card(
            aside, source, format="uniform", written=written,
            ranks={update.name: update.rank for update in wanted} | {update.name: 0 for update in zeros},
            notes=[_checked(differences), *said],
        )  # fmt: skip
    return Exported(
        adapter=source.folder,
        out=target,
        rank=rank,
        dtype=", ".join(sorted({str(u.b.dtype).removeprefix("torch.") for u in written})),
        modules=costs_of(source, wanted, zeros),
        parameters_before=sum(update.parameters for update in every(source)),
        parameters_after=sum(update.parameters for update in written),
        bytes_before=source.size,
        bytes_after=size,
        differences=differences,
        verdicts=verdicts,
        flags=_flags(target, rank, tgi),
        notices=said,
    )


# --- the tensors -----------------------------------------------------------------------------------


def _folded(update: Update, max_rank: int | None) -> Update:
    """Return an update of scale 1 in double precision, cut to a rank where it has more."""
    return cut(replace(update, b=update.scale * update.b.double(), scale=1.0), max_rank)


def _all_padded(
    source: Adapter, wanted: Sequence[Update], rank: int, dtype: torch.dtype | None
) -> list[Update]:
    """Return the updates at one rank, each in the precision that it had; zeros in that of most."""
    kinds = {update.name: dtype or update.b.dtype for update in every(source)}
    common = Counter(kinds.values()).most_common(1)[0][0]
    return [_padded(update, rank, kinds.get(update.name, common)) for update in wanted]


def _padded(update: Update, rank: int, dtype: torch.dtype) -> Update:
    """Return the update with rows of A and columns of B of zeros, in the precision that is stored."""
    more = rank - update.rank
    a, b = pad(update.a, (0, 0, 0, more)), pad(update.b, (0, more))
    return stored(replace(update, a=a, b=b), dtype)


# --- writing and proving ---------------------------------------------------------------------------


def _plain(source: Adapter, written: Sequence[Update]) -> Adapter:
    """Return the adapter whose settings `write_adapter` keeps: whole names in `target_modules` if need be.

    SGLang takes no regular expression there, and modules that are filled must be targets and not excluded.
    """
    names = sorted(update.name for update in written)
    filled = set(names) - {update.name for update in every(source)}
    config, declared = source.config, source.declared
    if filled or not isinstance(declared.target_modules, list):
        config = {**config, "target_modules": names, "layers_to_transform": None, "layers_pattern": None}
        if excluded := declared.exclude_modules:
            kept = _not_hitting(excluded, names)
            config |= {"exclude_modules": kept}
            declared = declared.model_copy(update={"exclude_modules": kept})
    embeddings = tuple(update for update in written if update.embedding)
    return replace(source, config=config, declared=declared, embeddings=embeddings)


def _not_hitting(excluded: str | list[str], names: Sequence[str]) -> str | list[str] | None:
    """Return `exclude_modules` without what would exclude one of these names, by PEFT's rule."""
    if isinstance(excluded, str):
        return None if any(re.fullmatch(excluded, name) for name in names) else excluded
    return [key for key in excluded if not any(f".{name}".endswith(f".{key}") for name in names)] or None


def _prove(again: Adapter, wanted: Sequence[Update], checked: Sequence[str]) -> dict[str, float]:
    """Compare what each program would add to each weight with what it should.

    Raises:
        RankwiseError: a difference is more than rounding.
    """
    held = {update.name: update for update in every(again)}
    assert set(held) == {update.name for update in wanted}
    seen: dict[tuple[str, float], float] = {}
    worst: dict[str, float] = {}
    for name in checked:
        applied = PROGRAMS[name].apply(again)
        for update in wanted if applied.refusal is None else ():
            there, scale = held[update.name], applied.scales[update.name]
            if (update.name, scale) not in seen:
                seen[update.name, scale] = difference(there, scale, update)
            off, allowed = seen[update.name, scale], TOLERANCE[there.b.dtype]
            if not off <= allowed:
                raise RankwiseError(
                    f"{PROGRAMS[name].name} would add to {update.name!r} what differs from the original's "
                    f"update by {off:.1e}; rounding to {there.b.dtype} explains {allowed:.0e}. Choose "
                    "another dtype, fp32 at best."
                )
            worst[name] = max(worst.get(name, 0.0), off)
    return worst


def _checked(differences: Mapping[str, float]) -> str:
    worst = max(differences.values())
    return f"checked under {len(differences)} rules of programs: updates within {worst:.1e}"


def _need_right(verdicts: Mapping[str, Verdict], checked: Sequence[str]) -> None:
    """Refuse what PEFT does not load, or what a program would scale wrongly."""
    if verdicts["peft"].verdict == "refused":
        raise RankwiseError(f"PEFT would not load the result: {verdicts['peft'].why}.")
    for verdict in (verdicts[name] for name in checked):
        if verdict.wrong:
            raise RankwiseError(f"{verdict.program} would scale {verdict.worst!r} wrongly in the result.")


def _refusals(verdicts: Mapping[str, Verdict], checked: Sequence[str]) -> list[str]:
    """Say which programs do not serve the result whole, for what no scale can mend."""
    amiss = [verdicts[name] for name in checked if verdicts[name].verdict != "right"]
    said = [f"{v.program} ({v.version}) {v.verdict}: {v.why}" for v in amiss]
    if "tgi" not in checked and verdicts["tgi"].verdict != "right":
        said.append("TGI does not serve this whole; --tgi pads and fills what it needs")
    return [*said, *dict.fromkeys(notice for name in checked for notice in verdicts[name].notices)]


def _flags(out: Path, rank: int, tgi: bool) -> dict[str, str]:
    """Return what each server needs to be told."""
    allowed, place = vllm_rank(rank), shlex.quote(str(out))
    vllm = (
        f"none: its largest --max-lora-rank is below {rank}; cut the adapter with --max-rank"
        if allowed is None
        else f"--enable-lora --max-lora-rank {allowed} --lora-modules NAME={place}"
    )
    return {
        "vLLM": vllm,
        "SGLang": f"--enable-lora --max-lora-rank {rank} --lora-paths NAME={place}",
        **({"TGI": f"--lora-adapters NAME={place}"} if tgi else {}),
    }
