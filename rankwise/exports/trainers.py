"""A plan for another trainer: the YAML or the Python lines that make axolotl, TRL or Unsloth follow it.

What is written builds new adapters of the planned ranks and scales; no trained weights are carried. Targets
are one regular expression of whole names: PEFT matches a string whole (`match_target_against_key` in
peft/utils/other.py, 0.20.0), a list by the ends of names, which would need exclusions that axolotl has no
field for. Pattern keys are anchored and escaped. Every text that comes from a plan or an adapter is quoted by
`yaml.safe_dump` or `repr`, or, in comments, rid of control characters: none of it can become code.

What the trainers do with the fields was read in their releases:

- axolotl 0.18.0 and 0.19.0: utils/schemas/peft.py lines 53 to 79 (ranks and alphas are whole numbers), and
  loaders/adapter.py lines 140 to 202, where both patterns reach PEFT as they are. `lora_exclude_modules` is
  read there but is no field of the schema, so it never arrives. 0.17.0 has neither pattern.
- TRL 1.16.0: trainer/sft_trainer.py line 870 hands `peft_config` to `get_peft_model` as it is.
- Unsloth 2026.10.9: `get_peft_model` (models/llama.py line 4569, models/vision.py line 4910) hands further
  arguments to `LoraConfig`. Where FastLanguageModel takes its general path, a list of targets is read as last
  components of names, and whole names fail; before 2026.10.5 the Llama path took a string apart.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pprint import pformat
from typing import Any

import yaml

from rankwise import sources
from rankwise.errors import RankwiseError, one_of, visible
from rankwise.exports.adapter_files import Adapter, read_adapter
from rankwise.exports.declared import Declared
from rankwise.exports.origins import base_of, hub_id
from rankwise.exports.places import need_new_file, new_file
from rankwise.exports.programs import every
from rankwise.plans import RankPlan, patterns, whole_alpha


@dataclass(frozen=True)
class Trainer:
    """A trainer that can follow a plan: the file it takes, and the versions that it needs for that."""

    name: str
    suffix: str
    needs: Mapping[str, str]
    why: str
    how: tuple[str, ...]

    @property
    def needed(self) -> str:
        """The versions and the reason, as a sentence."""
        versions = ", ".join(f"{package} {version} or newer" for package, version in self.needs.items())
        return f"needs {versions}: {self.why}"


TRAINERS = {
    "axolotl": Trainer(
        "axolotl", ".yaml", {"axolotl": "0.18.0"},
        "it is the first with lora_rank_pattern and lora_alpha_pattern",
        ("Put these lines into an axolotl configuration, in place of its own of these names.",),
    ),
    "trl": Trainer(
        "TRL", ".py", {"trl": "0.4.2", "peft": "0.15.0"},
        "SFTTrainer takes peft_config from there on, and older PEFT matches no anchored pattern",
        ("Import sft_trainer from here, or give peft_config to a trainer of your own.",),
    ),
    "unsloth": Trainer(
        "Unsloth", ".py", {"unsloth": "2026.10.5", "peft": "0.18.0"},
        "older Unsloth takes a pattern of targets apart letter by letter, and newer ones want that PEFT",
        (
            "Import adapted from here and call it on what FastLanguageModel.from_pretrained returned.",
            "Unsloth has no arguments for patterns and hands them on to PEFT; adapted checks what was built.",
            "It may say that it cannot patch layers in which some of q, k, v (or gate, up, down) have no",
            "adapter: that costs speed and changes no result.",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ExportedPlan:
    """What an export for a trainer wrote.

    Attributes:
        source: the plan file or adapter folder that was read.
        out: the file that was written.
        trainer: axolotl, trl or unsloth.
        needs: package -> oldest version that follows the file.
        why: the reason for these versions.
        base: the base model's id on the Hub; None where it is not there.
        ranks: module -> rank, of every adapted module.
        scales: module -> factor in front of B A.
        parameters: trainable ones of the adapters.
        notices: what a reader must know.
    """

    source: Path
    out: Path
    trainer: str
    needs: Mapping[str, str]
    why: str
    base: str | None
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    parameters: int
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))

    def summary(self) -> str:
        """Return what was done as sentences, one a line."""
        lines = [_size(self), TRAINERS[self.trainer].needed, *self.notices, f"written to {self.out}"]
        return "\n".join(map(visible, lines))


@dataclass(frozen=True)
class _Wanted:
    """What the trainer must build, and what is known of the base model."""

    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    conv1d: bool  # whether the weights are stored transposed
    parameters: int
    title: str
    base: str  # as it is named; empty if it is not
    hub: tuple[str, str | None] | None  # id and revision on the Hub
    embeddings: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def export_trainer(
    trainer: str, source: str | Path, out: str | Path, *, dropout: float = 0.0
) -> ExportedPlan:
    """Write the lines with which a trainer builds adapters of the ranks and scales of a plan.

    Args:
        trainer: axolotl, trl or unsloth.
        source: a plan file, or the folder of anyone's PEFT LoRA adapter: its ranks by its tensors, its scales
            by its configuration.
        out: a new file, `.yaml` for axolotl and `.py` for the others.
        dropout: probability of dropping an input of A.

    Raises:
        RankwiseError: an unknown trainer, a wrong suffix, a file that is there already, a source that is
            neither plan nor sound adapter, or a plan that the trainer cannot express. Nothing is left behind.

    Cost: one read of the source; no model is loaded.
    """
    if trainer not in TRAINERS:
        raise RankwiseError(one_of("trainer", trainer, TRAINERS))
    if not 0 <= dropout < 1:
        raise RankwiseError(f"dropout must be from 0 to below 1; got {dropout!r}.")
    kind, source, target = TRAINERS[trainer], Path(source), Path(out)
    need_new_file(target, kind.suffix, f"A file for {kind.name}")
    wanted = _of_adapter(read_adapter(source)) if source.is_dir() else _of_plan(RankPlan.load(source))
    if trainer == "unsloth":
        _need_projections(wanted)
    settings = _settings(wanted, float(dropout), whole=trainer == "axolotl")
    plan = _resolved(wanted, settings)
    text = _axolotl(wanted, settings) if trainer == "axolotl" else _python(trainer, settings, plan)
    with new_file(target) as aside:
        aside.write_text(_head(kind, wanted) + text, encoding="utf-8")
    return ExportedPlan(
        source, target, trainer, kind.needs, kind.why, wanted.hub[0] if wanted.hub else None,
        wanted.ranks, wanted.scales, wanted.parameters, wanted.notices,
    )  # fmt: skip


def _of_plan(plan: RankPlan) -> _Wanted:
    used = [module for module in plan.modules if plan.ranks[module.name]]
    if not used:
        raise RankwiseError("Every rank of this plan is 0, so there is no adapter to train.")
    ranks = {module.name: plan.ranks[module.name] for module in used}
    return _Wanted(
        ranks, {name: plan.scale.scaling(rank) for name, rank in ranks.items()},
        all(module.conv1d for module in used), plan.parameters,
        title=f"the plan {plan.strategy}", base=plan.model, hub=_hub(plan.model),
    )  # fmt: skip


def _of_adapter(adapter: Adapter) -> _Wanted:
    updates, declared, base = every(adapter), adapter.declared, base_of(adapter, None)
    notices = list(adapter.notices)
    if adapter.extras:
        notices.append(
            f"what the adapter trained whole, such as {next(iter(adapter.extras))}, is no part of a plan: "
            "name it to the trainer yourself"
        )
    if declared.task_type not in (None, "CAUSAL_LM"):
        notices.append(f"the adapter is of task type {declared.task_type}; this trains a CAUSAL_LM")
    return _Wanted(
        {update.name: update.rank for update in updates}, {update.name: update.scale for update in updates},
        bool(adapter.config.get("fan_in_fan_out")), sum(update.parameters for update in updates),
        title=f"the adapter {adapter.folder.name}", base=declared.base_model_name_or_path or "",
        hub=(base.hub, base.revision) if base.hub else None,
        embeddings=tuple(update.name for update in adapter.embeddings), notices=tuple(notices),
    )  # fmt: skip


def _hub(model: str) -> tuple[str, str | None] | None:
    """Return id and revision of a plan's model, if it is a whole repository on the Hub."""
    if not model.startswith("hf:"):
        return (model, None) if hub_id(model) and not Path(model).exists() else None
    try:
        source = sources.parse(model)
    except RankwiseError:
        return None
    return (source.name, source.version) if source.name and source.path is None else None


def _need_projections(wanted: _Wanted) -> None:
    """Refuse what Unsloth does not train by LoRA: `_redirect_embedding_targets` in its models/_utils.py."""
    heads = [name for name in wanted.ranks if name.rpartition(".")[2] in ("embed_tokens", "lm_head")]
    if found := [*wanted.embeddings, *heads]:
        raise RankwiseError(
            f"Unsloth trains embeddings and the head whole or not at all; the source adapts {found[0]!r} by "
            "LoRA. Choose the trainer trl or axolotl."
        )


def _settings(wanted: _Wanted, dropout: float, *, whole: bool) -> dict[str, Any]:
    """Return the fields of `LoraConfig`."""
    alphas, rslora = _alphas(wanted, whole=whole)
    return {
        **patterns(wanted.ranks, alphas),
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "fan_in_fan_out": wanted.conv1d,
        "target_modules": _targets(wanted.ranks),
    }


def _alphas(wanted: _Wanted, *, whole: bool) -> tuple[dict[str, int | float], bool]:
    """Return each module's alpha, and whether it is divided by the root of the rank (rsLoRA, 2312.03732).

    Raises:
        RankwiseError: the trainer takes whole alphas only, and neither way gives them.
    """
    plain = {name: whole_alpha(scale * wanted.ranks[name]) for name, scale in wanted.scales.items()}
    if not whole:
        return plain, False
    rooted = {n: whole_alpha(scale * math.sqrt(wanted.ranks[n])) for n, scale in wanted.scales.items()}
    for alphas, rslora in ((plain, False), (rooted, True)):
        if all(isinstance(alpha, int) and alpha >= 1 for alpha in alphas.values()):
            return alphas, rslora
    name = next(name for name, alpha in plain.items() if not (isinstance(alpha, int) and alpha >= 1))
    raise RankwiseError(
        f"axolotl takes alphas that are whole numbers from 1 on; {name!r} has rank {wanted.ranks[name]} and "
        f"scale {wanted.scales[name]:g}, an alpha of {plain[name]:g}. Choose a scale rule with whole alphas, "
        "such as constant 2, or the trainer trl or unsloth."
    )


_LAYER = re.compile(r"(?P<before>.+?)\.(?P<layer>[0-9]+)\.(?P<after>.+)", re.DOTALL)


def _targets(names: Iterable[str]) -> str:
    """Return a regular expression that matches exactly these names: an alternative per kind of module."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        key: tuple[str, ...] = (match["before"], match["after"]) if match else (name,)
        groups.setdefault(key, []).append(match["layer"] if match else "")
    found = []
    for key, layers in groups.items():
        number = layers[0] if len(layers) == 1 else f"(?:{'|'.join(layers)})"
        found.append(rf"\.{number}\.".join(map(re.escape, key)))
    return "|".join(found)


def _resolved(wanted: _Wanted, settings: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Return the rank and the scale of every module by PEFT's rules, which must be what is wanted.

    Raises:
        RankwiseError: they are not, as with a name and the same name with a line break behind it.
    """
    declared = Declared.model_validate(settings)
    found = {name: (declared.rank(name), declared.scale(name, declared.rank(name))) for name in wanted.ranks}
    for name, (rank, scale) in found.items():
        same = rank == wanted.ranks[name] and math.isclose(scale, wanted.scales[name], rel_tol=1e-9)
        if not same or not re.fullmatch(settings["target_modules"], name):
            raise RankwiseError(f"PEFT's patterns cannot tell the module {name!r} from others of the source.")
    return found


def _size(of: _Wanted | ExportedPlan) -> str:
    low, high = min(of.ranks.values()), max(of.ranks.values())
    return f"{len(of.ranks)} modules, ranks {low} to {high}, {of.parameters:,} trainable parameters"


def _head(trainer: Trainer, wanted: _Wanted) -> str:
    lines = (
        f"Written by rankwise for {trainer.name}: ranks and scales of {wanted.title}, not its weights.",
        _size(wanted),
        f"base model: {wanted.base or 'not named'}",
        trainer.needed,
        *trainer.how,
        *wanted.notices,
    )
    return "".join(f"# {visible(line)}\n" for line in lines)


def _axolotl(wanted: _Wanted, settings: Mapping[str, Any]) -> str:
    fields = {
        **dict(zip(("base_model", "revision_of_model"), wanted.hub or (), strict=False)),
        "adapter": "lora",
        "lora_r": settings["r"],
        "lora_alpha": settings["lora_alpha"],
        "lora_dropout": settings["lora_dropout"],
        "peft_use_rslora": settings["use_rslora"],
        "lora_fan_in_fan_out": settings["fan_in_fan_out"],
        "lora_target_linear": False,  # true would adapt every linear map as well
        "lora_target_modules": settings["target_modules"],
        "lora_rank_pattern": settings["rank_pattern"],
        "lora_alpha_pattern": settings["alpha_pattern"],
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    text = yaml.safe_dump(fields, sort_keys=False, width=10**6)
    assert yaml.safe_load(text) == fields
    return text


_CHECK = '''

def check(model):
    """Raise if the adapters that PEFT built on a model are not the plan's."""
    layers = model.get_base_model().named_modules()
    built = {n: (m.r["default"], m.scaling["default"]) for n, m in layers if hasattr(m, "lora_A")}
    for name in [*PLAN, *built]:
        if built.get(name) != PLAN.get(name):
            raise ValueError(f"{name!r}: built (rank, scale) {built.get(name)}, planned {PLAN.get(name)}")
'''
_USES = {
    "trl": '''
peft_config = LoraConfig(**SETTINGS)


def sft_trainer(model, **arguments):
    """Return TRL's SFTTrainer with the plan's adapters; arguments are its own."""
    from trl import SFTTrainer

    trainer = SFTTrainer(model=model, peft_config=peft_config, **arguments)
    check(trainer.model)
    return trainer
''',
    "unsloth": '''

def adapted(model, **arguments):
    """Return the model with the plan's adapters; arguments are further ones of get_peft_model."""
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(model, **SETTINGS, **arguments)
    check(model)
    return model
''',
}


def _python(trainer: str, settings: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    if trainer == "trl":  # Unsloth sets it itself
        settings = {"task_type": "CAUSAL_LM", **settings}
    text = (
        f"{'from peft import LoraConfig' * (trainer == 'trl')}\n\n"
        f"SETTINGS = {pformat(settings, width=100, sort_dicts=False)}\n\n"
        "# module -> (rank, factor in front of its update)\n"
        f"PLAN = {pformat(plan, width=100, sort_dicts=False)}\n"
    )
    values = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    assert [ast.literal_eval(value) for value in values] == [settings, plan]
    return text + _CHECK + _USES[trainer]
