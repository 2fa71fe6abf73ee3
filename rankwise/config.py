"""The study as frozen models, its canonical JSON, and the faults that lie between its fields.

One model is at once the configuration, its documentation (`rankwise study schema`) and its units.
Cross-checks that need more than one field return `Fault`s, so that all of them are shown at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rankwise.errors import did_you_mean

NUMERICS = 2
"""Raised by hand when results may change; part of every run's name (see tests/test_golden.py)."""

MOST_PROCESSES = 64
"""That may share the runs of a study on one machine."""

SCREENING_BELOW = 6
"""With fewer reporting seeds than this a study screens: it states numbers and no verdict."""


class Frozen(BaseModel):
    """Immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _share(value: Any) -> Any:
    """Read "5%" as 0.05; leave anything else to pydantic."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


def _not_boolean(value: Any) -> Any:
    """Refuse true and false, which Python would take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Number = Annotated[float, BeforeValidator(_not_boolean), Field(allow_inf_nan=False)]
Share = Annotated[Number, BeforeValidator(_share)]
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[Whole, Field(ge=1)]
Rate = Annotated[Number, Field(gt=0)]
Below1 = Annotated[Number, Field(ge=0, lt=1)]
Targets = str | tuple[str, ...]


class ScaleRule(Frozen):
    """How a module's LoRA scale follows its rank r: the update is `scaling(r) * B @ A`.

    `constant` (value s): every module is scaled by s, so alpha = s*r.
    `alpha` (value alpha): scale alpha/r, PEFT's default rule.
    `rslora` (value alpha): scale alpha/sqrt(r) (rsLoRA, arXiv 2312.03732), written as a plain
    alpha of alpha*sqrt(r), because `use_rslora` together with patterns blocks some conversions.
    """

    rule: Literal["constant", "rslora", "alpha"] = "constant"
    value: Number = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _named_value(self) -> ScaleRule:
        if self.rule != "constant" and "value" not in self.model_fields_set:
            raise ValueError(f"the rule {self.rule} needs its alpha as value, such as 16 or 32")
        return self

    def scaling(self, rank: int) -> float:
        """Return the factor in front of B @ A for a module of this rank (>= 1)."""
        return {
            "constant": self.value,
            "rslora": self.value / math.sqrt(rank),
            "alpha": self.value / rank,
        }[self.rule]

    def alpha(self, rank: int) -> float:
        """Return the `lora_alpha` that makes PEFT's alpha/r equal `scaling(rank)`."""
        return {
            "constant": self.value * rank,
            "rslora": self.value * math.sqrt(rank),
            "alpha": self.value,
        }[self.rule]

    def __str__(self) -> str:
        return f"{self.rule} {self.value:g}"


class DataConfig(Frozen):
    """Where the rows come from and how many go where. Counts are rows after deduplication."""

    source: str = Field(description="hf:, pypi: or file: source of JSON, JSONL, Parquet or text rows")
    train: Count = Field(description="training rows, redrawn from the pool by each seed")
    validation: Count = Field(default=64, description="rows on which learning rates are chosen")
    test: Count = Field(
        default=400, description="rows that reporting runs are scored on, common to all seeds"
    )
    reserved: Whole = Field(default=250, ge=0, description="rows that only a confirmatory study opens, once")
    max_length: Annotated[Whole, Field(ge=8)] = Field(
        default=256, description="tokens per example; responses are cut"
    )
    calibration: Count = Field(
        default=32, description="training rows that probes look at: the first of each seed's draw"
    )
    prompt: Literal["auto", "chat", "human"] = Field(
        default="auto", description="chat: the tokenizer's template; human: Human/Assistant text"
    )


class TrainConfig(Frozen):
    """How every arm is trained. Nothing here differs between arms except the tuned learning rate."""

    epochs: Count = Field(default=1, description="passes over the training rows")
    step_tokens: Count | None = Field(
        default=None, description="tokens per optimizer step (rows are added while they fit)"
    )
    step_examples: Count | None = Field(
        default=None, description="rows per optimizer step, instead of step_tokens"
    )
    micro_tokens: Count = Field(
        default=1024, description="tokens computed at once (padded ones on the plain path); bounds memory"
    )
    max_steps: Count | None = Field(default=None, description="stop after this many optimizer steps")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[Share, Field(ge=0, lt=1)] = Field(default=0.1, description="share of steps")
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = Field(
        description="one rate: used as declared, not tuned. Several: the grid on which each arm is tuned"
    )
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    clip: Annotated[Number, Field(gt=0)] | None = Field(
        default=1.0, description="gradient norm limit; null for none"
    )
    dropout: Below1 = Field(default=0.0, description="on the adapters' inputs")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of the frozen weights; auto is bf16 where the processor has it"
    )
    gradient_checkpointing: bool = False
    engine: Literal["auto", "plain"] = Field(
        default="auto",
        description="auto packs rows where the model proves that it can; plain pads them (slower)",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[Count, Field(le=1024)] | None = Field(
        default=None, description="CPU threads; null takes what PyTorch finds"
    )


class SeedsConfig(Frozen):
    """How many seeds choose the learning rate, and how many are reported. They never overlap."""

    tuning: Whole = Field(default=2, ge=0, le=1000)
    # tuning seeds are counted from 1000; none at all leaves it at tuning the rates
    reporting: Whole = Field(default=8, ge=0, le=1000)
    first: Whole = Field(
        default=0, ge=0, le=999, exclude_if=lambda first: not first,
        description="the first reporting seed: a study that follows another has seeds of its own",
    )  # fmt: skip

    @property
    def reported(self) -> range:
        """The reporting seeds."""
        return range(self.first, self.first + self.reporting)


class ArmConfig(Frozen):
    """One strategy with its budget, scale rule and learning-rate policy."""

    strategy: str
    budget: Annotated[str | int | None, BeforeValidator(_not_boolean)] = Field(
        default=None, description='trainable parameters: "r=8", "1.2M", "0.5%", 300000'
    )
    match: Literal["budget", "none"] = Field(
        default="budget", description="none keeps a formula's own ranks (outside the equal-budget comparison)"
    )
    targets: Targets | None = Field(default=None, description="overrides the study's targets for this arm")
    scale: ScaleRule | None = Field(default=None, description="overrides the study's scale rule")
    learning_rate: Rate | None = Field(default=None, description="fixes this arm's rate instead of tuning it")
    init: Literal["default", "eva", "gradient"] = Field(
        default="default",
        description="start of A: PEFT's default, the inputs' or the gradient's leading directions (B is 0)",
    )
    loraplus_lr_ratio: Annotated[Number, Field(ge=1)] = Field(
        default=1.0, description="learning rate of B over that of A (LoRA+)"
    )
    base: Whole | None = Field(default=None, description="the formulas' base rank")
    min: Whole | None = Field(default=None, description="the formulas' lowest rank")
    max: Whole | None = Field(default=None, description="the formulas' highest rank")
    of: str | None = Field(default=None, description="reversed: the strategy whose layers are mirrored")
    ranks: dict[str, Whole] | list[Whole] | str | None = Field(
        default=None, description="custom: ranks per layer, module or kind, or a JSON file that holds them"
    )

    factor: Annotated[Number, Field(gt=1, le=64)] | None = Field(
        default=None, description="adalora, shrink: parameters at the start over those at the end"
    )
    every: Count | None = Field(
        default=None, description="adalora, grow_prune: optimizer steps between two moves"
    )
    warm_share: Annotated[Share, Field(gt=0, lt=1)] | None = Field(
        default=None, description="sensitivity: share of the steps before ranks are chosen"
    )
    move_share: Annotated[Share, Field(gt=0, le=1)] | None = Field(
        default=None, description="grow_prune: share of the budget that may move at a time"
    )
    refit_share: Annotated[Share, Field(gt=0, lt=1)] | None = Field(
        default=None, description="shrink: share of the steps after the truncation"
    )

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's own options, those that were given."""
        return {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}


OPTIONS = (
    "base", "min", "max", "of", "ranks", "factor", "every", "warm_share", "move_share", "refit_share",
)  # fmt: skip
"""Keys of an arm that are its strategy's own; which of them a strategy takes, `STRATEGIES` says."""


class MeasureConfig(Frozen):
    """What the untouched model and reporting runs are measured by beyond the loss on test rows."""

    general_text: str | None = Field(
        default=None, description="hf:, pypi: or file: source of general text, to measure forgetting on"
    )
    general_rows: Count = Field(default=32, description="rows of that text, at most; cut at data.max_length")
    generate: Whole = Field(
        default=0, ge=0, description="test rows answered by greedy decoding: ROUGE-L and chrF; 0 for none"
    )
    generate_tokens: Count = Field(default=64, description="tokens of an answer, at most")


class StudyConfig(Frozen):
    """Arms x seeds on one model and one data set."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    model: str = Field(description="hf:, pypi: or file: source of a causal language model")
    data: DataConfig
    targets: Targets = Field(
        default="all", description="attention, mlp, all, suffixes, or a regular expression"
    )
    scale: ScaleRule = ScaleRule()
    train: TrainConfig
    seeds: SeedsConfig = SeedsConfig()
    primary: Literal["test_loss"] = "test_loss"
    margin: Annotated[Share, Field(gt=0, lt=1)] = Field(
        default=0.05, description="of equivalence, as a share of the baseline's gain over the untouched model"
    )
    baseline: str | None = Field(default=None, description="the arm that contrasts are made against")
    contrasts: tuple[str, ...] = Field(default=(), description='arm names, or "arm vs other"')
    # The next three came later. Left out where they say nothing, they leave the names of older records alone.
    ladders: dict[str, tuple[str, ...]] = Field(
        default={},
        description="name -> arms, of which `recommend` names the cheapest that is good enough",
        exclude_if=lambda ladders: not ladders,
    )
    measure: MeasureConfig = Field(default=MeasureConfig(), exclude_if=lambda value: value == MeasureConfig())
    train_examples: tuple[Count, ...] = Field(
        default=(),
        description="the study once for each of these numbers of training rows, instead of data.train",
        exclude_if=lambda sizes: not sizes,
    )
    confirmatory: bool = Field(default=False, description="opens the reserved rows, once")
    accept_unreachable: bool = Field(
        default=False, description="go on although more than 20 %% of the weights cannot be adapted"
    )
    arms: Annotated[dict[str, ArmConfig], Field(min_length=1)]

    @property
    def tuned(self) -> bool:
        """Whether learning rates are chosen on validation rather than declared."""
        return len(self.train.learning_rates) > 1

    def pairs(self) -> list[tuple[str, str]]:
        """The declared contrasts as (arm, against)."""
        split = (re.split(r"\s+vs\s+", text.strip(), maxsplit=1) for text in self.contrasts)
        return [(p[0], p[1] if len(p) == 2 else str(self.baseline)) for p in split]


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a study file: where it is (a path of keys) and what the rule is."""

    path: tuple[str | int, ...]
    message: str


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of the value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def cross_faults(study: StudyConfig) -> list[Fault]:
    """Return the faults that lie between fields (names that refer to nothing, missing partners)."""
    faults = [*_contrast_faults(study), *_ladder_faults(study), *_arm_faults(study)]
    rates = study.train.learning_rates
    if len(set(rates)) < len(rates):
        faults.append(Fault(("train", "learning_rates"), "a rate stands here twice; one rate is no grid."))
    if study.seeds.first + study.seeds.reporting > 1000:
        rule = "reporting seeds end below 1000, where tuning seeds begin."
        faults.append(Fault(("seeds", "first"), rule))
    if len(set(study.train_examples)) < len(study.train_examples):
        faults.append(Fault(("train_examples",), "a number of rows stands here twice."))
    if study.train_examples and study.confirmatory:
        rule = "a confirmatory study asks one question of the reserved rows: leave train_examples out."
        faults.append(Fault(("train_examples",), rule))
    if (study.train.step_tokens is None) == (study.train.step_examples is None):
        faults.append(Fault(("train",), "give exactly one of step_tokens and step_examples."))
    if study.tuned and study.seeds.tuning == 0:
        faults.append(
            Fault(("seeds", "tuning"), "several learning_rates need tuning seeds (2 is usual); got 0.")
        )
    return faults


def _contrast_faults(study: StudyConfig) -> list[Fault]:
    faults: list[Fault] = []
    arms = list(study.arms)
    if study.baseline is not None and study.baseline not in study.arms:
        faults.append(Fault(("baseline",), _no_arm(study.baseline, arms)))
    if study.contrasts and study.baseline is None:
        faults.append(
            Fault(("contrasts",), "contrasts need a baseline: name one of the arms as `baseline:`.")
        )
    for index, (arm, against) in enumerate(study.pairs()):
        for name in (arm, against):
            if name not in study.arms and name != str(study.baseline):  # that one is told above
                faults.append(Fault(("contrasts", index), _no_arm(name, arms)))
        if arm == against:
            faults.append(Fault(("contrasts", index), f"an arm cannot be compared with itself: {arm!r}."))
    pairs = study.pairs()
    if len(set(pairs)) < len(pairs):
        faults.append(
            Fault(("contrasts",), "a contrast stands here twice; each counts in Holm's adjustment.")
        )
    return faults


def _arm_faults(study: StudyConfig) -> list[Fault]:
    faults = []
    for name, config in study.arms.items():
        if config.match == "budget" and config.budget is None:
            rule = "an arm needs a budget, such as `budget: r=8`, or `match: none` for its own ranks."
            faults.append(Fault(("arms", name), rule))
        if config.strategy == "adalora" and config.init != "default":
            rule = "adalora has a start of its own (arXiv 2303.10512): leave `init` out."
            faults.append(Fault(("arms", name, "init"), rule))
        if config.match == "none" and config.budget is not None:
            rule = (
                f"`match: none` keeps the formula's own ranks, so `budget: {config.budget}` would be ignored."
            )
            faults.append(Fault(("arms", name, "budget"), rule))
    return faults


def _ladder_faults(study: StudyConfig) -> list[Fault]:
    faults: list[Fault] = []
    for ladder, arms in study.ladders.items():
        faults += [
            Fault(("ladders", ladder), _no_arm(arm, list(study.arms)))
            for arm in arms
            if arm not in study.arms
        ]
        if len(set(arms)) < max(2, len(arms)):
            rule = f"a ladder is two or more arms, each once; got {', '.join(arms) or 'none'}."
            faults.append(Fault(("ladders", ladder), rule))
    if study.ladders and study.baseline is None:
        rule = "a ladder needs a baseline: its margin is a share of the baseline's gain."
        faults.append(Fault(("ladders",), rule))
    return faults


def _no_arm(name: str, arms: list[str]) -> str:
    return f"no arm is called {name!r}; the arms are {', '.join(arms)}.{did_you_mean(name, arms)}"
