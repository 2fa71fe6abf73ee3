"""An adapter that plain PEFT loads as it was meant: each module's rank and alpha by an anchored pattern.

Patterns as people write them (`q_proj`, `layers.1.mlp`) match more, or less, than was meant, and unmatched
ones only warn. Here every key is a module's whole name, escaped, behind `^`, and PEFT itself loads the result
and is asked what it built. For PEFT, vLLM 0.32 and later, and trainers; `uniform` is for all servers.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from rich.table import Table

from rankwise import adapters
from rankwise.errors import RankwiseError, visible
from rankwise.exports.adapter_files import (
    Adapter,
    Update,
    read_adapter,
    write_adapter,
)
from rankwise.exports.card import write_card
from rankwise.exports.cuts import ExportedModule, costs_of, cut, cut_lines, dtype_of, need_rank, stored
from rankwise.exports.inspecting import read_checked, verdict_table
from rankwise.exports.places import need_new, written_aside
from rankwise.exports.programs import PROGRAMS, Verdict, every, judge


@dataclass(frozen=True)
class Patterned:
    """What a `peft` export did.

    Attributes:
        adapter: the folder that was read.
        out: the folder that was written.
        ranks: module -> rank that PEFT built.
        scales: module -> scale that PEFT applies.
        patterns: keys of rank_pattern and alpha_pattern together.
        modules: what truncation cost, in the order of their names.
        bytes_before: size of the weights file.
        bytes_after: the same afterwards.
        loaded_on: what PEFT loaded it onto, in words.
        verdicts: how each program serves what was written.
        notices: what a reader must know.
    """

    adapter: Path
    out: Path
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    patterns: int
    modules: tuple[ExportedModule, ...]
    bytes_before: int
    bytes_after: int
    loaded_on: str
    verdicts: Mapping[str, Verdict]
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))

    def table(self) -> Table:
        """Return a row per program: whether it serves what was written."""
        return verdict_table(f"{self.out.name}: served by", self.verdicts)

    def summary(self) -> str:
        """Return what was done as sentences, one a line."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        lines = [
            f"rank {low if low == high else f'{low} to {high}'} on {len(self.ranks)} modules, "
            f"{self.patterns} anchored patterns, no rsLoRA; weights file {self.bytes_before / 1e6:,.2f} MB "
            f"before, {self.bytes_after / 1e6:,.2f} MB after",
            *cut_lines(self.modules),
            _checked(self.loaded_on),
        ]
        if wrong := [f"{v.program} {v.version}" for v in self.verdicts.values() if v.verdict != "right"]:
            lines.append(f"not served rightly by {', '.join(wrong)}: try --format uniform")
        return "\n".join([*lines, *self.notices, f"written to {self.out}"])


def export_peft(
    adapter: str | Path,
    out: str | Path,
    *,
    max_rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    model: str | None = None,
) -> Patterned:
    """Write an adapter whose every rank and scale plain PEFT takes from anchored patterns.

    Args:
        adapter: folder of adapter_config.json and adapter_model.safetensors.
        out: a new or empty folder.
        max_rank: updates of a larger rank are cut to it by SVD, each to its best approximation.
        dtype: fp32, bf16 or fp16; None keeps that of each tensor.
        model: source of the base model; None takes the local folder that the adapter names, and where there
            is none, a stand-in with the adapter's modules alone.

    Raises:
        RankwiseError: an adapter that `read_checked` refuses, a rank or dtype that makes no sense, a folder
            that would be overwritten, or a result that PEFT does not load as written. Nothing is left.

    Cost: PEFT builds the adapter once on a base without weights (seconds for hundreds of modules).
    """
    target = Path(out)
    kind = dtype_of(dtype)
    need_rank(max_rank)
    need_new(target)
    source, base, _, notices = read_checked(adapter, model)
    cuts = [cut(update, max_rank) for update in every(source)]
    written = [stored(c, kind or u.b.dtype) for c, u in zip(cuts, every(source), strict=True)]
    with written_aside(target) as aside:
        size = write_patterned(aside, source, written)
        again = read_adapter(aside)
        built = prove_loads(aside, again, base)
        verdicts = {name: judge(program, again) for name, program in PROGRAMS.items()}
        onto = "the base" if base is not None else "a stand-in with its modules alone"
        write_card(
            aside, source, format="peft", written=written, ranks={u.name: u.rank for u in written},
            notes=[_checked(onto), *notices],
        )  # fmt: skip
    declared = again.declared
    return Patterned(
        adapter=source.folder,
        out=target,
        ranks={name: rank for name, (rank, _) in built.items()},
        scales={name: scale for name, (_, scale) in built.items()},
        patterns=len(declared.rank_pattern) + len(declared.alpha_pattern),
        modules=costs_of(source, cuts, ()),
        bytes_before=source.size,
        bytes_after=size,
        loaded_on=onto,
        verdicts=verdicts,
        notices=notices,
    )


def write_patterned(folder: Path, source: Adapter, written: Sequence[Update]) -> int:
    """Write updates, embeddings among them, with anchored patterns; return the weights file's bytes."""
    embeddings = tuple(update for update in written if update.embedding)
    return write_adapter(
        folder, replace(source, embeddings=embeddings), [u for u in written if not u.embedding]
    )


def prove_loads(folder: Path, adapter: Adapter, base: Any | None) -> dict[str, tuple[int, float]]:
    """Load a folder with PEFT and compare what it built with the file: modules, ranks, scales, shapes.

    Args:
        folder: as written.
        adapter: the same, as read by rankwise.
        base: the base model, its weights not needed; None makes a stand-in of the adapter's modules.

    Returns:
        Module -> (rank, scale), as PEFT's layers have them.

    Raises:
        RankwiseError: PEFT refuses it, warns about keys of its own, or builds something else.
    """
    config = LoraConfig.from_pretrained(str(folder))
    if base is None:
        config.task_type = None  # a class for the task would ask the stand-in for more than modules
        config.modules_to_save = config.trainable_token_indices = None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(
                _stand_in(adapter) if base is None else base, str(folder), config=config
            )
        except Exception as error:  # PEFT raises many kinds, each of which means the same here
            raise RankwiseError(f"PEFT does not load the result: {why(error)}") from error
    said = [str(warning.message) for warning in heard]
    if amiss := [text for text in said if "did not match" in text or "missing adapter keys" in text]:
        raise RankwiseError(f"PEFT warns about the result: {amiss[0]}")
    wanted, layers = {u.name: u for u in every(adapter)}, adapters.lora_layers(loaded)
    if other := sorted(set(layers) ^ set(wanted)):
        raise RankwiseError(f"PEFT adapts other modules than the result has: {other[0]}.")
    built = {name: _built(layer, wanted[name]) for name, layer in layers.items()}
    for name, (rank, scale) in built.items():
        if rank != wanted[name].rank or not math.isclose(scale, wanted[name].scale, rel_tol=1e-9):
            raise RankwiseError(
                f"PEFT builds {name!r} with rank {rank} and scale {scale:.6g}; meant are "
                f"{wanted[name].rank} and {wanted[name].scale:.6g}."
            )
    return built


def why(error: Exception) -> str:
    """Return what an error of another program says, in a line: the first that is no heading, where one is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return visible(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])


def _checked(loaded_on: str) -> str:
    return f"checked: PEFT loads it onto {loaded_on} with every rank, scale and shape as written"


def _stand_in(adapter: Adapter) -> torch.nn.Module:
    """Return modules without weights under the names and of the shapes that the adapter has."""
    root = torch.nn.Module()
    root.config = {"model_type": "custom"}  # type: ignore[assignment]  # PEFT asks for one
    for update in every(adapter):
        *parents, last = update.name.split(".")
        at = root
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        into, out = update.a.shape[1], update.b.shape[0]
        layer = torch.nn.Embedding if update.embedding else torch.nn.Linear
        at.add_module(last, layer(into, out, device="meta"))
    return root


def _built(layer: LoraLayer, wanted: Update) -> tuple[int, float]:
    """Return the rank and scale that PEFT's layer has, after comparing its shapes with the file's."""
    name = adapters.ADAPTER
    if wanted.embedding:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if a.shape != wanted.a.shape or b.shape != wanted.b.shape:
        raise RankwiseError(f"PEFT builds {wanted.name!r} of other shapes than the file's.")
    return a.shape[0], float(layer.scaling[name])
