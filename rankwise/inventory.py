"""The adaptable modules of a model: name, layer, part, kind, shape, and what one unit of rank costs.

Everything after this room trusts these counts, so they are read from what a module *computes*
(`in_features`, `out_features`) and not from how its weight happens to be stored: Conv1D stores it
transposed, and 4-bit quantisation packs it into bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import RankwiseError, did_you_mean

KINDS = ("attention", "mlp", "other")
UNREACHABLE_LIMIT = 0.20
"""Share of the block weights that adapters may miss before a study must say that it accepts it."""

# Last name component -> (kind, part). Names whose meaning depends on where they stand are below.
KNOWN = {
    "q_proj": ("attention", "q"), "k_proj": ("attention", "k"), "v_proj": ("attention", "v"),
    "o_proj": ("attention", "o"), "qkv_proj": ("attention", "qkv"), "query_key_value": ("attention", "qkv"),
    "c_attn": ("attention", "qkv"), "q_attn": ("attention", "q"), "Wqkv": ("attention", "qkv"),
    "W_pack": ("attention", "qkv"), "wqkv": ("attention", "qkv"), "qkv": ("attention", "qkv"),
    "wq": ("attention", "q"), "wk": ("attention", "k"), "wv": ("attention", "v"),
    "query": ("attention", "q"), "key": ("attention", "k"), "value": ("attention", "v"),
    "gate_proj": ("mlp", "gate"), "up_proj": ("mlp", "up"), "down_proj": ("mlp", "down"),
    "gate_up_proj": ("mlp", "gate_up"), "shared_expert_gate": ("mlp", "shared_expert_gate"),
    "c_fc": ("mlp", "fc_in"), "fc_in": ("mlp", "fc_in"), "fc1": ("mlp", "fc_in"),
    "dense_h_to_4h": ("mlp", "fc_in"), "fc_out": ("mlp", "fc_out"), "fc2": ("mlp", "fc_out"),
    "dense_4h_to_h": ("mlp", "fc_out"), "w1": ("mlp", "gate"), "w2": ("mlp", "down"), "w3": ("mlp", "up"),
}  # fmt: skip

# Used by several families for both halves of a block (GPT-2 calls both outputs `c_proj`).
KNOWN_BY_PARENT = frozenset({"c_proj", "dense", "out_proj", "proj", "wo"})

_ATTENTION_PARENT = re.compile(r"attn|attention", re.IGNORECASE)
_STATE_SPACE_PARENT = re.compile(r"mamba|ssm|mixer|conv", re.IGNORECASE)
_MLP_PARENT = re.compile(r"mlp|ffn|feed_?forward|expert|moe|^ff$", re.IGNORECASE)
# A multimodal wrapper may hold a tower with as many layers as its language model.
_FOREIGN_TOWER = re.compile(r"vision|visual|image|audio|speech|encoder", re.IGNORECASE)
_DEPTH_NAMES = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_REGEX_MARKS = frozenset(r".^$*+?{}[]\|()")


@dataclass(frozen=True)
class Module:
    """One adaptable linear map `out_features x in_features` of a decoder block.

    `name` is its full dotted name in `model.named_modules()`, `path` the same name inside its
    block; `layer` is the block's index.
    """

    name: str
    layer: int
    part: str
    kind: str
    in_features: int
    out_features: int
    conv1d: bool = False
    path: str = ""

    @property
    def cost(self) -> int:
        """Trainable parameters of one unit of rank: a row of A (in) and a column of B (out)."""
        return self.in_features + self.out_features

    @property
    def max_rank(self) -> int:
        """The rank beyond which a low-rank update can express nothing more."""
        return min(self.in_features, self.out_features)

    @property
    def suffix(self) -> str:
        """The last name component, as PEFT's `target_modules` would take it."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Inventory:
    """All adaptable modules of a model in model order, and the share that none of them reaches.

    `base_parameters` counts unique parameters at their true shapes (tied once, packed ones
    unpacked). `unreachable` lists (name, numel) of block weights with two or more dimensions that
    are in no adaptable module. `lookalikes` are other modules whose names end in the name of an
    adaptable one, which PEFT would take for it.
    """

    modules: tuple[Module, ...]
    layers: int
    base_parameters: int
    unreachable: tuple[tuple[str, int], ...]
    unreachable_share: float
    notices: tuple[str, ...]
    architecture: str
    targets: str | tuple[str, ...] = "all"
    lookalikes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    def __getitem__(self, name: str) -> Module:
        """Return the module of that full name; RankwiseError with the nearest name if absent."""
        for module in self.modules:
            if module.name == name:
                return module
        raise RankwiseError(f"No adaptable module is called {name!r}.{did_you_mean(name, self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, in model order."""
        return tuple(module.name for module in self.modules)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The distinct last name components, in model order."""
        return tuple(dict.fromkeys(module.suffix for module in self.modules))

    @property
    def costs(self) -> dict[str, int]:
        """Parameters per unit of rank, by name."""
        return {module.name: module.cost for module in self.modules}

    @property
    def max_ranks(self) -> dict[str, int]:
        """Full rank, by name."""
        return {module.name: module.max_rank for module in self.modules}

    def cost(self, rank: int = 1) -> int:
        """Parameters of a uniform rank on every module (each at most its own full rank)."""
        return sum(module.cost * min(rank, module.max_rank) for module in self.modules)

    def select(self, targets: str | list[str] | tuple[str, ...]) -> Inventory:
        """Return the inventory of the target modules alone, in model order.

        Args:
            targets: "all", "attention", "mlp" or "other"; a name's end at a dot ("q_proj",
                "mlp.c_proj") or a full name; a regular expression that matches full names whole;
                or a list of those, of which every entry must match something.

        Raises:
            RankwiseError: an entry matches nothing, or is not a valid regular expression.
        """
        entries = [targets] if isinstance(targets, str) else list(targets)
        if not entries:
            raise RankwiseError(
                f"targets names no module; choose all, attention, mlp, or of {', '.join(self.suffixes)}."
            )
        chosen: set[str] = set()
        for entry in entries:
            chosen |= self._matches(entry)
        kept = tuple(module for module in self.modules if module.name in chosen)
        label = targets if isinstance(targets, str) else tuple(entries)
        return replace(self, modules=kept, targets=label)

    def _matches(self, entry: str) -> set[str]:
        if not isinstance(entry, str) or not entry:
            raise RankwiseError(
                f"A target must be a kind, a module suffix or a regular expression; got {entry!r}."
            )
        if entry == "all":
            return set(self.names)
        found = {m.name for m in self.modules if m.name == entry or m.name.endswith("." + entry)}
        if entry in KINDS:
            found = {m.name for m in self.modules if m.kind == entry}
        elif not found and _REGEX_MARKS & set(entry):
            try:
                pattern = re.compile(entry)
            except re.error as error:
                raise RankwiseError(
                    f"Target {entry!r} is not a valid regular expression: "
                    f"{error.msg} at position {error.pos}."
                ) from None
            found = {m.name for m in self.modules if pattern.fullmatch(m.name)}
        if not found:
            choices = [*self.suffixes, *dict.fromkeys(m.path for m in self.modules), *KINDS, "all"]
            raise RankwiseError(
                f"Target {entry!r} matches no adaptable module. The suffixes here are "
                f"{', '.join(self.suffixes)}; kinds are all, {', '.join(KINDS)}; a regular expression "
                f"must match a full name such as {self.modules[0].name!r}.{did_you_mean(entry, choices)}"
            )
        return found


def inventory(model: nn.Module, *, accept_unreachable: bool = False) -> Inventory:
    """List every `nn.Linear` and transformers `Conv1D` inside the decoder blocks of a model.

    The blocks are found by structure, so that a family need not be known. Nothing is computed on
    the weights: meta-device models work, and the cost is one walk over the module tree.

    Args:
        model: A causal language model, possibly nested in a multimodal wrapper; no adapters yet.
        accept_unreachable: Go on although adapters miss more than 20 % of the block weights
            (mixture-of-experts weights are 3-D tensors in transformers 5).

    Raises:
        RankwiseError: adapters are there already; no blocks or no linear maps are found; or more
            than 20 % of the block weights are unreachable and that was not accepted.
    """
    _refuse_adapters(model)
    names = {id(module): name for name, module in model.named_modules()}
    blocks, notices = _decoder_blocks(model)
    modules, linears, guesses = _adaptable(blocks, names)
    if not modules:
        raise RankwiseError("The decoder blocks hold no nn.Linear and no Conv1D: nothing for LoRA to adapt.")
    if guesses:
        shown = ", ".join(f"{name} as {kind}" for name, kind in guesses.items())
        notices.append(f"Kinds guessed from names, parents and shapes: {shown}.")
    sizes = _true_sizes(model)
    unreachable, share = _unreachable(model, blocks, linears, sizes)
    if unreachable:
        notice = _unreachable_notice(unreachable, share)
        if share > UNREACHABLE_LIMIT and not accept_unreachable:
            raise RankwiseError(
                f"{notice} The limit is {UNREACHABLE_LIMIT:.0%}; a study that wants this regardless "
                "says `accept_unreachable: true`."
            )
        notices.append(notice)
    return Inventory(
        modules=tuple(modules),
        layers=len(blocks),
        base_parameters=sum(sizes[id(p)] for p in model.parameters()),
        unreachable=tuple(unreachable),
        unreachable_share=share,
        notices=tuple(notices),
        architecture=type(model).__name__,
        lookalikes=_lookalikes({m.name for m in modules}, names.values()),
    )


def _refuse_adapters(model: nn.Module) -> None:
    # A tuner layer keeps the layer that it replaced as `base_layer`; listing both would count twice.
    carriers = [n for n, m in model.named_modules() if isinstance(getattr(m, "base_layer", None), nn.Module)]
    if carriers or hasattr(model, "get_base_model"):
        where = f" (for one, {carriers[0]})" if carriers else ""
        raise RankwiseError(
            f"This model already carries adapters{where}. Hand over the base model: "
            "`model.unload()` removes them, `model.merge_and_unload()` folds them in."
        )


def _adaptable_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear map that PEFT's LoRA can wrap, else None."""
    # nn.MultiheadAttention reads this one's weight without calling it: an adapter would do nothing.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _decoder_blocks(model: nn.Module) -> tuple[list[nn.Module], list[str]]:
    """Return the repeated blocks: the list with the depth that the config states, else the largest."""
    depth = _stated_depth(model)
    candidates = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not candidates:
        candidates = [(n, m) for n, m in model.named_modules() if _is_repeated(m)]
    ranked = []
    for name, container in candidates:
        blocks = list(container.children())
        if any(_adaptable_shape(m) for block in blocks for m in block.modules()):
            size = sum(p.numel() for p in container.parameters())
            ranked.append((len(blocks) == depth, not _FOREIGN_TOWER.search(name), size, name, blocks))
    if not ranked:
        raise RankwiseError(
            f"No decoder blocks found in {type(model).__name__}: rankwise looks for the torch.nn.ModuleList "
            "(or a Sequential of one class) whose children are the repeated layers with linear maps in them."
        )
    fits, _, _, name, blocks = max(ranked, key=lambda entry: entry[:3])
    notices = []
    if depth is not None and not fits:
        notices.append(
            f"The config states {depth} layers, yet the largest list of blocks has {len(blocks)}: {name}."
        )
    return blocks, notices


def _stated_depth(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        try:
            config = config.get_text_config()
        except ValueError:  # several text configs: none of them is the one
            return None
    values = (getattr(config, name, None) for name in _DEPTH_NAMES)
    return next((value for value in values if isinstance(value, int)), None)


def _is_repeated(module: nn.Module) -> bool:
    children = list(module.children())
    same = len({type(child) for child in children}) == 1
    return isinstance(module, nn.Sequential) and same and _adaptable_shape(children[0]) is None


def _adaptable(
    blocks: list[nn.Module], names: dict[int, str]
) -> tuple[list[Module], list[nn.Module], dict[str, str]]:
    """Return the adaptable modules, the torch modules behind them, and {name end: kind} of the guesses."""
    modules: list[Module] = []
    linears: list[nn.Module] = []
    guesses: dict[str, str] = {}
    seen: set[int] = set()
    for layer, block in enumerate(blocks):
        for path, linear in block.named_modules():
            shape = _adaptable_shape(linear)
            if shape is None or id(linear) in seen:
                continue
            seen.add(id(linear))
            kind, part, known = _classify(path, *shape)
            if not known:
                guesses[part] = kind
            modules.append(
                Module(names[id(linear)], layer, part, kind, *shape, isinstance(linear, Conv1D), path)
            )
            linears.append(linear)
    return modules, linears, guesses


def _classify(path: str, in_features: int, out_features: int) -> tuple[str, str, bool]:
    """Return (kind, part, whether the name is known) of a module at a path inside its block."""
    *parents, suffix = path.split(".")
    if suffix in KNOWN:
        return *KNOWN[suffix], True
    kind = _parent_kind(parents)
    if suffix in KNOWN_BY_PARENT and kind in ("attention", "mlp"):
        return kind, "o" if kind == "attention" else "fc_out", True
    kind = kind or _parent_kind([suffix])
    if kind is None:
        wide = max(in_features, out_features) / max(1, min(in_features, out_features))
        # A fused query-key-value map is three times as wide as deep; a feed-forward one mostly 2.5 to 4.
        kind = "attention" if out_features == 3 * in_features else "mlp" if 2 <= wide <= 8 else "other"
    return kind, suffix or "linear", False


def _parent_kind(components: list[str]) -> str | None:
    for component in reversed(components):
        if _ATTENTION_PARENT.search(component):
            return "attention"
        if _MLP_PARENT.search(component):
            return "mlp"
        if _STATE_SPACE_PARENT.search(component):
            return "other"
    return None


def _true_sizes(model: nn.Module) -> dict[int, int]:
    """Return {id(parameter): number of weights that it stands for}, whatever its packing."""
    sizes = {}
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        sizes[id(parameter)] = math.prod(shape) if shape is not None else parameter.numel()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and isinstance(module, nn.Linear):
            sizes[id(weight)] = module.in_features * module.out_features
    return sizes


def _unreachable(
    model: nn.Module, blocks: list[nn.Module], linears: list[nn.Module], sizes: dict[int, int]
) -> tuple[list[tuple[str, int]], float]:
    reached = {id(linear._parameters.get("weight")) for linear in linears}
    inside: dict[int, torch.Tensor] = {}
    for block in blocks:
        inside.update((id(p), p) for p in block.parameters() if p.dim() >= 2)
    missing = inside.keys() - reached
    missed = [(name, sizes[id(p)]) for name, p in model.named_parameters() if id(p) in missing]
    total = sum(sizes[key] for key in inside)
    return missed, sum(size for _, size in missed) / total if total else 0.0


def _unreachable_notice(unreachable: list[tuple[str, int]], share: float) -> str:
    largest = max(unreachable, key=lambda entry: entry[1])[0]
    return (
        f"No adapter reaches {share:.1%} of the weights in the decoder blocks "
        f"({len(unreachable)} tensors, the largest {largest})."
    )


def _lookalikes(targets: set[str], names: Iterable[str]) -> tuple[str, ...]:
    found = []
    for name in names:
        parts = name.split(".")
        if name not in targets and any(".".join(parts[i:]) in targets for i in range(1, len(parts))):
            found.append(name)
    return tuple(found)
