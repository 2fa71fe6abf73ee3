"""From a model and a strategy to a plan, for people who bring their own trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rankwise.config import ScaleRule
from rankwise.errors import RankwiseError
from rankwise.plans import RankPlan
from rankwise.strategies import allocate, resolve
from rankwise.studyfaults import check_form
from rankwise.studyfile import read_ranks, yaml_value


@dataclass(frozen=True)
class Found:
    """A plan, and what its reader must know."""

    plan: RankPlan
    notices: tuple[str, ...]


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
) -> Found:
    """Plan ranks for a model named by its source; only its configuration is read.

    Args:
        source: hf:, pypi: or file: text.
        strategy: a name in `STRATEGIES`.
        budget: such as "r=8"; None with match "none".
        match: "budget" or "none".
        targets: kinds, suffixes or one regular expression; None for all.
        scale: "rule:value".
        options: "key=value" texts, the strategy's own.
        seed: for strategies that draw.
        accept_unreachable: go on although over 20 % of the weights cannot be adapted.

    Raises:
        RankwiseError: for any argument that breaks its rule.
    """
    rule, settings = parse_scale(scale), parse_options(options or ())
    resolve(strategy, settings, seed)
    if budget is not None:
        if match == "none":
            raise RankwiseError(
                f"--match none keeps the formula's own ranks, so --budget {budget} would be ignored; "
                "leave one of them out."
            )
        check_form(budget)
    # Here, so that a mistyped argument is told at once: these two load PyTorch.
    from rankwise import models
    from rankwise.inventory import inventory

    found = inventory(models.skeleton(source), accept_unreachable=accept_unreachable)
    chosen = found.select("all" if not targets else targets[0] if len(targets) == 1 else list(targets))
    plan = allocate(
        chosen,
        strategy=strategy,
        budget=budget,
        match=match,  # type: ignore[arg-type]
        scale=rule,
        options=settings,
        seed=seed,
        model=source,
    )
    return Found(plan, tuple(plan.provenance["notices"]))


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
