"""How each program scales the adapter that it loads, followed from its source, and what that does to it.

An emulator takes an adapter as it is stored and returns the factor by which the program multiplies b @ a of
each module, or why it does not load it. Nothing is run: the rules are read from the sources below.

- PEFT 0.21.2: `peft/utils/other.py` (`get_pattern_key`), `peft/tuners/lora/model.py` and `layer.py`.
- vLLM 0.33.0 and 0.32.0 (wheels): `vllm/lora/peft_helper.py`, `lora_weights.py`, `lora_model.py`,
  `layers/column_parallel_linear.py`, `vllm/config/lora.py`. 0.31.0 and before read no patterns.
- TGI 3.3.7 (commit db931fcf): `server/text_generation_server/adapters/lora.py`, `models/__init__.py`,
  `utils/adapter.py`; `pad_rank` as in `utils/sgmv.py` of 3.0.0 (since then in kernels-community/punica-sgmv).
- SGLang 0.5.23 (wheel): `sglang/srt/lora/lora.py`, `mem_pool.py`, `utils.py`, `lora_config.py`.
- llama.cpp: `src/llama-adapter.h` (215841fc), `src/llama-adapter.cpp` (0650ea8c),
  `convert_lora_to_gguf.py` (0b03adaa), `conversion/gpt2.py` (5535795b).

Whether a server can adapt a base model at all is not looked at, with one exception: GPT-2's Conv1D.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rankwise import lowrank
from rankwise.exports.adapter_files import Adapter, Update

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be: `MaxLoRARanks` in vllm/config/lora.py, 0.33.0."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Siblings that servers hold as one layer (vLLM's `packed_modules_mapping` of most model families)."""

TGI_LAYERS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "c_proj", "c_fc",
)  # fmt: skip
"""In the order in which TGI loads them, which matters (see `tgi`)."""

SAME = 1e-6
"""Relative difference of two scales that is rounding."""

_TGI_NAME = re.compile(
    r"model\.layers\.(?P<layer>\d+)\."
    r"(?:self_attn\.(?:q|k|v|qkv|o)_proj|mlp\.(?:gate_proj|up_proj|down_proj|c_fc|c_proj))"
)
_GPT2 = re.compile(r"(?:.*\.)?h\.\d+\.(?:attn|mlp)\.(?:c_attn|c_proj|c_fc)")


@dataclass(frozen=True)
class Applied:
    """What one program does with an adapter.

    Attributes:
        scales: module -> factor on its b @ a, embeddings included; 0 where it leaves the module out.
        refusal: why it does not load the adapter, in which case `scales` is empty; None if it does.
        dropped: other tensors of the adapter that it leaves out.
        notices: what else a reader must know.
    """

    scales: Mapping[str, float] = field(default_factory=dict)
    refusal: str | None = None
    dropped: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A program, the version that is followed, its rule in words, and the rule itself."""

    name: str
    version: str
    rule: str
    apply: Callable[[Adapter], Applied]


@dataclass(frozen=True)
class Verdict:
    """How a program serves an adapter.

    Attributes:
        program: its name.
        version: that is followed.
        verdict: right, wrong or refused.
        why: the rule that it applies, or its refusal.
        modules: adapted modules, embeddings included.
        wrong: how many of them get another scale than their own (those whose update is zero aside).
        smallest: ratio of applied to true scale over the modules; None where nothing is loaded.
        largest: the same.
        mean: the same.
        worst: the module whose ratio is farthest from 1; None if none is wrong.
        error: Frobenius norm of what is missing from or too much in all updates, relative to that of all.
        notices: what else a reader must know.
    """

    program: str
    version: str
    verdict: Literal["right", "wrong", "refused"]
    why: str
    modules: int
    wrong: int = 0
    smallest: float | None = None
    largest: float | None = None
    mean: float | None = None
    worst: str | None = None
    error: float | None = None
    notices: tuple[str, ...] = ()


# --- the programs ----------------------------------------------------------------------------------


def peft(adapter: Adapter) -> Applied:
    r"""PEFT: alpha_m/r_m, or alpha_m/sqrt(r_m) under rsLoRA, by patterns.

    A pattern key matches as `(.*\.)?(key)$`, the first match wins, else `r` and `lora_alpha` hold. A tensor
    of another rank than that does not load (a size mismatch).
    """
    wrong = [u for u in every(adapter) if u.declared_rank is not None and u.rank != u.declared_rank]
    if wrong:
        return Applied(
            refusal=f"size mismatch: {wrong[0].name} has rank {wrong[0].rank} in its tensors and "
            f"{wrong[0].declared_rank} in the configuration ({len(wrong)} such modules)"
        )
    return Applied({u.name: adapter.declared.scale(u.name, u.rank) for u in every(adapter)})


def vllm(adapter: Adapter, *, max_lora_rank: int | None = None) -> Applied:
    """Since vLLM 0.32: PEFT's rule, patterns and rsLoRA included (`PEFTHelper.get_rank_and_scaling`).

    The rank that alpha is divided by is the declared one. Siblings that are fused and have no adapter are
    left as they are (`PackedLoRALayerWeights.pack`, `set_lora`). The adapter is refused if its largest rank
    is above `--max-lora-rank`, if `modules_to_save` names anything but a classifier, for tensors other than
    LoRA's, and for features that change what an adapter means.

    Args:
        adapter: as stored.
        max_lora_rank: of the server; None takes the smallest value that is allowed and large enough.
    """
    declared, config = adapter.declared, adapter.config
    largest = max(declared.r, *declared.rank_pattern.values(), *(u.rank for u in every(adapter)))
    unsupported = [key for key in ("alora_invocation_tokens", "layer_replication") if config.get(key)]
    if unsupported:
        return Applied(refusal=f"vLLM does not support {' and '.join(unsupported)}")
    if refusal := _vllm_refusal(adapter, largest, max_lora_rank):
        return Applied(refusal=refusal)
    scales = {}
    for update in every(adapter):
        rank = _first_match(declared.rank_pattern, update.name, declared.r)
        alpha = _first_match(declared.alpha_pattern, update.name, declared.lora_alpha)
        scales[update.name] = alpha / (math.sqrt(rank) if declared.use_rslora else rank)
    return Applied(scales, notices=_no_gpt2(adapter, "vLLM 0.33.0 has no LoRA for GPT-2"))


def vllm_before_patterns(adapter: Adapter, *, max_lora_rank: int | None = None) -> Applied:
    """Up to vLLM 0.31: one lora_alpha/r, or lora_alpha/sqrt(r) under rsLoRA; patterns are not read.

    Tensors of other ranks than `r` load, up to `--max-lora-rank` (`set_lora` copies what there is).

    Args:
        adapter: as stored.
        max_lora_rank: of the server; None takes the smallest value that is allowed and large enough.
    """
    declared = adapter.declared
    largest = max(declared.r, *(u.rank for u in every(adapter)))
    if refusal := _vllm_refusal(adapter, largest, max_lora_rank):
        return Applied(refusal=refusal)
    scale = declared.lora_alpha / (math.sqrt(declared.r) if declared.use_rslora else declared.r)
    return Applied(
        {u.name: scale for u in every(adapter)},
        notices=_no_gpt2(adapter, "vLLM has no LoRA for GPT-2"),
    )


def tgi(adapter: Adapter, *, layers: int | None = None) -> Applied:
    """TGI: one lora_alpha/r (or sqrt), for the kinds of module that every layer has in the adapter.

    - A kind of module that one layer lacks is left out in all layers (`prepare_weights` returns None).
    - Ranks of one kind are stacked: after padding to 8, 16, 32, 48, ... they must be equal.
    - After the first kind `config.r` becomes that padded rank, so all later kinds are scaled by it.
    - Other modules (embeddings, the head, names that are not `model.layers.N...`) are left out.

    Args:
        adapter: as stored.
        layers: of the model; None takes the largest layer number in the adapter.
    """
    declared = adapter.declared
    kinds: dict[str, dict[int, Update]] = {}
    for update in adapter.updates:
        if match := _TGI_NAME.fullmatch(update.name):
            kinds.setdefault(update.name.rpartition(".")[2], {})[int(match["layer"])] = update
    count = layers or 1 + max((layer for held in kinds.values() for layer in held), default=-1)
    scales = {update.name: 0.0 for update in every(adapter)}
    rank = declared.r
    for kind in TGI_LAYERS:
        held = kinds.get(kind, {})
        if not held or set(held) != set(range(count)):
            continue
        padded = sorted({tgi_rank(update.rank) for update in held.values()})
        if len(padded) > 1:
            return Applied(
                refusal=f"{kind} has ranks {', '.join(map(str, padded))} after padding in different layers, "
                "and stacks them"
            )
        scale = declared.lora_alpha / (math.sqrt(rank) if declared.use_rslora else rank)
        scales |= {update.name: scale for update in held.values()}
        rank = padded[0]
    return Applied(scales, dropped=extras(adapter))


def tgi_rank(rank: int) -> int:
    """Return the rank to which TGI's kernels pad: 8, or else the next multiple of 16 (one GPU)."""
    return 8 if rank <= 8 else math.ceil(rank / 16) * 16


def sglang(adapter: Adapter) -> Applied:
    """SGLang: one lora_alpha/r; neither patterns nor rsLoRA are read.

    It refuses tensors of another rank than `r` (an assertion on buffer shapes), a `target_modules` that is a
    regular expression, k or v without q and q without v in one layer, and up without gate (orphans match no
    buffer). A missing k, and an up missing beside a gate, are zero-filled by SGLang itself.
    """
    declared = adapter.declared
    if isinstance(declared.target_modules, str) and declared.target_modules not in ("all", "all-linear"):
        return Applied(refusal="target_modules must be a list, or the text all-linear")
    for update in every(adapter):
        if update.rank != declared.r:
            return Applied(
                refusal=f"LoRA buffer shape: {update.name} has rank {update.rank}, and r is {declared.r}"
            )
    names = {update.name for update in adapter.updates}
    for name in sorted(names):
        if orphan := _sglang_orphan(name, names):
            return Applied(refusal=orphan)
    scale = declared.lora_alpha / declared.r
    return Applied({u.name: scale for u in every(adapter)}, dropped=extras(adapter))


def llama_cpp(adapter: Adapter) -> Applied:
    """llama.cpp: lora_alpha over each tensor's own rank (`get_scale`); 1 where lora_alpha is 0.

    `convert_lora_to_gguf.py` writes `lora_alpha` alone: patterns and rsLoRA are not read. It stops at tensors
    other than LoRA's (norms aside, which llama.cpp then leaves out). For GPT-2 it turns A and B, as for a
    Conv1D weight, though PEFT stores them as for a Linear: such a file does not load, or is wrong where
    in = out.
    """
    norms = [name for name in adapter.extras if re.search(r"_layernorm|\.norm", name)]
    if alien := sorted(set(extras(adapter)) - set(norms)):
        return Applied(refusal=f"its converter stops at {alien[0]}, which is neither lora_A nor lora_B")
    alpha = adapter.declared.lora_alpha
    turned = _no_gpt2(
        adapter, "its own converter turns GPT-2's A and B wrongly: write the GGUF with rankwise export"
    )
    scales = {u.name: alpha / u.rank if alpha else 1.0 for u in every(adapter)}
    return Applied(scales, dropped=tuple(norms), notices=turned)


PROGRAMS: dict[str, Program] = {
    "peft": Program("PEFT", "0.21.2", "each module's own alpha and rank, by patterns", peft),
    "vllm": Program("vLLM", "0.32 to 0.33.0", "each module's own alpha and rank, by patterns", vllm),
    "vllm-0.31": Program("vLLM", "to 0.31", "one alpha/r; patterns are not read", vllm_before_patterns),
    "tgi": Program("TGI", "3.3.7", "one alpha/r, for kinds that every layer has; later kinds: padded r", tgi),
    "sglang": Program("SGLang", "0.5.23", "one alpha/r; patterns and rsLoRA are not read", sglang),
    "llama.cpp": Program(
        "llama.cpp", "215841fc", "one alpha over each tensor's own rank; no rsLoRA", llama_cpp
    ),
}
"""By the names that the command line takes."""


# --- judging ---------------------------------------------------------------------------------------


def every(adapter: Adapter) -> tuple[Update, ...]:
    """Return all updates: of linear maps and of embeddings."""
    return (*adapter.updates, *adapter.embeddings)


def extras(adapter: Adapter) -> tuple[str, ...]:
    """Return the names of the other tensors, copies of the base's embeddings (`base_layer`) aside."""
    return tuple(name for name in adapter.extras if ".base_layer." not in name)


def energies(updates: Iterable[Update]) -> dict[str, float]:
    """Return the squared Frobenius norm of b @ a of each module, its scale left out.

    Cost: two QR decompositions of the factors and an SVD of (r, r) per module.
    """
    return {u.name: float(lowrank.singular_values(u.a, u.b).square().sum()) for u in updates}


def judge(program: Program, adapter: Adapter, held: Mapping[str, float] | None = None) -> Verdict:
    """Say whether a program serves an adapter as PEFT's rule means it, and by how much it does not.

    The true scale of a module is alpha over the rank of its tensors. With ratio c = applied/true and
    E = ||s B A||^2 of each module, the error is sqrt(sum (c - 1)^2 E / sum E).

    Args:
        program: one of `PROGRAMS`.
        adapter: as stored.
        held: `energies` of its updates, if they are known already.
    """
    applied = program.apply(adapter)
    updates = every(adapter)
    base: dict[str, Any] = {"program": program.name, "version": program.version, "modules": len(updates)}
    if applied.refusal is not None:
        return Verdict(**base, verdict="refused", why=applied.refusal)
    held = energies(updates) if held is None else held
    live = [u for u in updates if held[u.name]] or list(updates)
    off = {u.name: applied.scales[u.name] - u.scale for u in live}
    wrong = [u for u in live if abs(off[u.name]) > SAME * abs(u.scale)]
    ratios = {u.name: applied.scales[u.name] / u.scale for u in live if u.scale}
    total = sum(u.scale**2 * held[u.name] for u in live)
    missed = sum(off[u.name] ** 2 * held[u.name] for u in wrong)
    why = program.rule
    if applied.dropped:
        why += f"; it leaves out {applied.dropped[0]}" + _more(len(applied.dropped) - 1)
    return Verdict(
        **base,
        verdict="wrong" if wrong or applied.dropped else "right",
        why=why,
        wrong=len(wrong),
        smallest=min(ratios.values(), default=None),
        largest=max(ratios.values(), default=None),
        mean=sum(ratios.values()) / len(ratios) if ratios else None,
        worst=max((u.name for u in wrong), key=lambda name: _distance(ratios.get(name)), default=None),
        error=math.sqrt(missed / total) if total else None,
        notices=applied.notices,
    )


# --- parts -----------------------------------------------------------------------------------------


def _first_match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Match as vLLM does (`_match_pattern`): a key fits the end of a name, from a dot on."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def vllm_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` that vLLM allows for a rank; None above the largest."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _vllm_refusal(adapter: Adapter, largest: int, max_lora_rank: int | None) -> str | None:
    limit = max_lora_rank or vllm_rank(largest)
    if limit is None or largest > limit:
        return f"LoRA rank {largest} is greater than max_lora_rank {limit or VLLM_RANKS[-1]}"
    heads = ("classifier", "score")
    if saved := [name for name in adapter.config.get("modules_to_save") or () if name not in heads]:
        return f"modules_to_save must be none; got {', '.join(saved)}"
    alien = [name for name in extras(adapter) if name.rpartition(".")[0].rpartition(".")[2] not in heads]
    return f"{alien[0]} is unsupported LoRA weight" if alien else None


def _sglang_orphan(name: str, names: set[str]) -> str | None:
    """Say why SGLang cannot fuse a module with its siblings, if it cannot."""
    parent, _, part = name.rpartition(".")
    stem = f"{parent}." if parent else ""
    if part in ("k_proj", "v_proj") and f"{stem}q_proj" not in names:
        return f"{name} stands without {stem}q_proj, with which it is fused"
    if part == "q_proj" and f"{stem}v_proj" not in names:
        return f"{name} stands without {stem}v_proj, with which it is fused"
    if part == "up_proj" and f"{stem}gate_proj" not in names:
        return f"{name} stands without {stem}gate_proj, with which it is fused"
    return None


def _no_gpt2(adapter: Adapter, notice: str) -> tuple[str, ...]:
    return (notice,) if any(_GPT2.fullmatch(update.name) for update in adapter.updates) else ()


def _distance(ratio: float | None) -> float:
    return math.inf if not ratio or ratio < 0 else abs(math.log(ratio))


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
