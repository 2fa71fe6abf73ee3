"""Anyone's PEFT LoRA adapter folder, read and written without its base model.

An adapter is a sum of low-rank updates: it adds `scale * b @ a` to the weight of each of its modules, with
a (rank, in_features) and b (out_features, rank). PEFT stores both so for `Linear` and for `Conv1D` alike.
Ranks come from the tensors; scales from the configuration, by PEFT's own matching rule. Whatever is not such
a sum on an untouched base (DoRA, trained biases, PiSSA, other PEFT types) is refused, for no arithmetic on
a and b would describe it. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rankwise.errors import RankwiseError
from rankwise.exports.declared import Declared, read_config, read_declared
from rankwise.plans import patterns

PREFIX = "base_model.model."
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KINDS = {
    (False, "A"): ".lora_A.weight", (False, "B"): ".lora_B.weight",
    (True, "A"): ".lora_embedding_A", (True, "B"): ".lora_embedding_B",
}  # fmt: skip
_FACTOR = re.compile(r"(?P<name>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))")


@dataclass(frozen=True, eq=False)
class Update:
    """What the adapter adds to one module's weight: `scale * b @ a`.

    Attributes:
        name: the module's full name in the base model.
        a: (rank, in_features); of an embedding (rank, tokens).
        b: (out_features, rank).
        scale: alpha/rank or alpha/sqrt(rank), with the rank of the tensors.
        declared_rank: the rank that the configuration gives the module; None for one that was made here.
        embedding: whether it adapts an embedding, whose inputs are single tokens.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    declared_rank: int | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Rank as stored."""
        return self.a.shape[0]

    @property
    def cost(self) -> int:
        """Parameters of one unit of rank: in_features + out_features."""
        return self.a.shape[1] + self.b.shape[0]

    @property
    def max_rank(self) -> int:
        """Full rank of the module."""
        return min(self.a.shape[1], self.b.shape[0])

    @property
    def parameters(self) -> int:
        """Parameters stored."""
        return self.a.numel() + self.b.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return both factors under their names in PEFT's file."""
        sides = {"A": self.a, "B": self.b}
        return {
            f"{PREFIX}{self.name}{_KINDS[self.embedding, side]}": tensor.contiguous()
            for side, tensor in sides.items()
        }


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter folder as it was read.

    Attributes:
        folder: where it lies.
        config: adapter_config.json, whole.
        declared: the part of it that ranks and scales follow from.
        updates: of linear maps, in the order of their names.
        embeddings: updates of embeddings.
        extras: other tensors (`modules_to_save`, trained tokens) by their names in the file.
        notices: what a reader must know, such as declared ranks that the tensors do not have.
        size: of the weights file, bytes.
    """

    folder: Path
    config: dict[str, Any]
    declared: Declared
    updates: tuple[Update, ...]
    embeddings: tuple[Update, ...]
    extras: dict[str, torch.Tensor]
    notices: tuple[str, ...]
    size: int

    @property
    def parameters(self) -> int:
        """Parameters of the updates of linear maps."""
        return sum(update.parameters for update in self.updates)


def read_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT LoRA adapter folder (adapter_config.json and adapter_model.safetensors).

    Raises:
        RankwiseError: files missing or damaged, a pickle instead of safetensors, an adapter that is not a sum
            of s B A on an untouched base, factors that do not fit each other, or values that are not finite.

    Cost: the weights file is read once and held in memory.
    """
    folder = Path(folder)
    _need_files(folder)
    config = read_config(folder / CONFIG_NAME)
    declared = read_declared(folder / CONFIG_NAME, config)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = _read_tensors(weights)
    pairs, extras = _sort_out(weights, tensors)
    try:
        found = [_update(declared, *key, factors) for key, factors in pairs.items()]
        unmatched = _unmatched(declared, [update.name for update in found])
    except re.error as error:
        raise RankwiseError(
            f"{folder / CONFIG_NAME}: a pattern key is no regular expression: {error}."
        ) from None
    if config.get("ensure_weight_tying") and any(update.embedding for update in found):
        raise RankwiseError(
            f"{folder}: with ensure_weight_tying the head shares the factors of the adapted embedding, and "
            "one cannot be changed without the other: not supported."
        )
    return Adapter(
        folder=folder,
        config=config,
        declared=declared,
        updates=tuple(update for update in found if not update.embedding),
        embeddings=tuple(update for update in found if update.embedding),
        extras=extras,
        notices=(*unmatched, *_mismatched(found)),
        size=weights.stat().st_size,
    )


def write_adapter(folder: Path, adapter: Adapter, updates: Sequence[Update]) -> int:
    """Write an adapter with new updates in place of its own; return the size of the weights file in bytes.

    Every module gets its rank and, as alpha = scale * rank, its scale by patterns that are anchored and
    escaped, without rsLoRA. Embeddings, extras and the other settings stay. What was written is read back
    and compared, by PEFT's rule, before this returns.

    Args:
        folder: exists and is empty.
        adapter: as read.
        updates: of some or all of its linear modules, each of rank 1 or more.
    """
    config = config_for(adapter, updates)
    tensors = dict(adapter.extras)
    for update in (*updates, *adapter.embeddings):
        tensors |= update.tensors()
    (folder / CONFIG_NAME).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    again = read_adapter(folder)
    wanted = {u.name: (u.rank, u.scale) for u in (*updates, *adapter.embeddings)}
    for update in (*again.updates, *again.embeddings):
        rank, scale = wanted.pop(update.name)
        if (update.rank, update.declared_rank) != (rank, rank) or not math.isclose(update.scale, scale):
            raise AssertionError(f"{update.name} reads back as rank {update.rank}, scale {update.scale}")
    assert not wanted
    return again.size


def config_for(adapter: Adapter, updates: Sequence[Update]) -> dict[str, Any]:
    """Return the configuration under which plain PEFT gives each update its rank and its scale."""
    every = [*updates, *adapter.embeddings]
    ranks = {update.name: update.rank for update in every}
    config = {
        **adapter.config,
        **patterns(ranks, {update.name: update.scale * update.rank for update in every}),
        "use_rslora": False,
        "init_lora_weights": True,  # a start of its own ("eva", "orthogonal") may refuse the new rank
    }
    for start in ("eva_config", "corda_config", "lora_ga_config", "loftq_config"):
        if start in config:
            config[start] = {} if start == "loftq_config" else None
    if set(ranks) != {update.name for update in (*adapter.updates, *adapter.embeddings)}:
        config |= {"target_modules": sorted(ranks), "layers_to_transform": None, "layers_pattern": None}
        config["exclude_modules"] = _exclusions(adapter, set(ranks))
    return config


# --- reading ---------------------------------------------------------------------------------------


def _need_files(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RankwiseError(f"An adapter is a folder with {CONFIG_NAME}; {folder} {what}.")
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" Its folders {', '.join(inside[:5])} hold one each." if inside else ""
        raise RankwiseError(f"An adapter is a folder with {CONFIG_NAME}; {folder} has none.{hint}")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        pickled = (folder / WEIGHTS_NAME).exists()
        why = (
            f"holds {WEIGHTS_NAME}, a pickle, which may run code when it is loaded. Convert it where you "
            "trust it: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
            if pickled
            else "has none"
        )
        raise RankwiseError(f"An adapter's weights are in {SAFETENSORS_WEIGHTS_NAME}; {folder} {why}.")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise RankwiseError(f"{path} is damaged or not a safetensors file: {error}.") from None


def _sort_out(
    path: Path, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[tuple[str, bool], dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return {(module, whether an embedding): {"A": a, "B": b}}, checked, and all other tensors."""
    pairs: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
    extras: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match and key.startswith(PREFIX):
            which = match["name"].removeprefix(PREFIX), match["embedding"] is not None
            pairs.setdefault(which, {})[match["linear"] or match["embedding"]] = tensor
        elif "lora_" in key:
            raise RankwiseError(
                f"{path}: {key!r} is no tensor of a plain LoRA adapter; those are called "
                f"{PREFIX}<module>.lora_A.weight and .lora_B.weight. Another method, or another tool's names?"
            )
        else:
            extras[key] = tensor
    if not any(not embedding for _, embedding in pairs):
        raise RankwiseError(f"{path} holds no lora_A and lora_B of any linear map.")
    for (name, _), factors in pairs.items():
        _check_factors(path, name, factors)
    return pairs, extras


def _check_factors(path: Path, name: str, factors: Mapping[str, torch.Tensor]) -> None:
    if missing := {"A", "B"} - set(factors):
        raise RankwiseError(f"{path}: lora_{missing.pop()} of {name!r} is missing.")
    a, b = factors["A"], factors["B"]
    shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or not a.numel() or not b.numel() or a.shape[0] != b.shape[1]:
        raise RankwiseError(f"{path}: of {name!r}, A must be (rank, in) and B (out, rank); got {shapes}.")
    for tensor in (a, b):
        if tensor.dtype not in FLOATS:
            raise RankwiseError(f"{path}: {name!r} must be float32, bfloat16 or float16; got {tensor.dtype}.")
        if not torch.isfinite(tensor).all():
            raise RankwiseError(f"{path}: {name!r} holds values that are not finite (NaN or infinity).")


def _update(declared: Declared, name: str, embedding: bool, factors: Mapping[str, torch.Tensor]) -> Update:
    a, b = factors["A"], factors["B"]
    return Update(name, a, b, declared.scale(name, a.shape[0]), declared.rank(name), embedding)


def _unmatched(declared: Declared, names: Sequence[str]) -> list[str]:
    """Name pattern keys that are the first match of no module: whoever wrote them meant something."""
    notices = []
    for field in ("rank_pattern", "alpha_pattern"):
        keys = list(getattr(declared, field))
        idle = sorted(set(keys) - {get_pattern_key(keys, name) for name in names})
        if idle:
            more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
            notices.append(f"{field} sets {', '.join(idle[:3])}{more}, which the adapter has no module for")
    return notices


def _mismatched(updates: Sequence[Update]) -> list[str]:
    wrong = [update for update in updates if update.rank != update.declared_rank]
    if not wrong:
        return []
    one = wrong[0]
    return [
        f"the configuration gives {len(wrong)} of {len(updates)} modules another rank than their tensors "
        f"have ({one.name}: {one.declared_rank}, not {one.rank}), which PEFT refuses to load; the rank of "
        "the tensors is taken, and alpha divided by it"
    ]


# --- writing ---------------------------------------------------------------------------------------


def _exclusions(adapter: Adapter, kept: set[str]) -> str | list[str] | None:
    """Return exclude_modules: as it was, and modules left out whose names end in the name of one kept."""
    was = adapter.declared.exclude_modules
    gone = {update.name for update in adapter.updates} - kept
    alike = sorted(name for name in gone if any(name.endswith(f".{other}") for other in kept))
    if not alike:
        return was
    if isinstance(was, str):
        return "|".join([f"(?:{was})", *map(re.escape, alike)])
    return [*(was or []), *alike]
