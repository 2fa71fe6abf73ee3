"""The questions that the earlier study left open, each with what the evidence says so far."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from rankwise import contrasts, datasizes, power, stats
from rankwise.config import SCREENING_BELOW
from rankwise.memorybank.cases import Case, machines
from rankwise.memorybank.ground import Ground, against
from rankwise.memorybank.text import Marked, code, listed, md
from rankwise.report.details import budget_of
from rankwise.report.opening import count
from rankwise.report.results import MEASURED
from rankwise.tables import ArmRow, count_of_seeds

LOWEST = 4
"""Arms that are named for a budget."""
DESIGNS = (SCREENING_BELOW, 8, 12, 20)
"""Numbers of seeds for which the detectable difference is told."""
METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "token_accuracy": ("token accuracy", "{:.1%}".format),
    "bits_per_byte": ("bits per byte", "{:.3f}".format),
    **{name: (heading, write) for name, (heading, _, write) in MEASURED.items()
       if name in ("forgetting", "rouge_l", "chrf", "rank_used")},
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question with its answers, which are Markdown."""

    asks: str
    answers: list[Marked]


def questions(ground: Ground) -> list[Question]:
    """Return the earlier study's open questions in its order (facts, section 1)."""
    return [
        Question("Which subset size?", _rows(ground)),
        Question("Which metrics beyond loss and perplexity?", _metrics(ground)),
        Question("How many runs does a valid comparison take?", _runs(ground)),
        Question("Which strategies first?", _strategies(ground)),
        Question("Is there a GPU?", _device(ground)),
    ]


def _rows(ground: Ground) -> list[Marked]:
    lines = []
    for one in ground.asked:
        if not one.config.train_examples:
            continue
        sizes = ", ".join(map(str, sorted(one.config.train_examples)))
        said = " ".join(datasizes.told(one.by_size)) if one.by_size else "It has not begun."
        lines.append(
            md("{study} asks it at {sizes} rows. {said}", study=ground.study(one), sizes=sizes, said=said)
        )
    if not lines:
        lines.append(md("No answer yet: no study file asks it over several numbers of rows ({key}).",
                        key=code("train_examples")))  # fmt: skip
    used = [
        md("{study} {train}", study=ground.study(case), train=case.config.data.train)
        for case in ground.reported if case.rows is None
    ]  # fmt: skip
    return (
        [*lines, md("Training rows of the other studies with results: {used}.", used=Marked(", ".join(used)))]
        if used
        else lines
    )


def _metrics(ground: Ground) -> list[Marked]:
    lines = []
    for case in ground.reported:
        spans = [_span(case.arms, name) for name in METRICS]
        found = [span for span in spans if span]
        rest = [METRICS[name][0] for name, span in zip(METRICS, spans, strict=True) if not span]
        lines.append(md(
            "{study} ({records}), from the lowest to the highest mean of an arm: {found}.{rest}",
            study=ground.study(case), records=ground.records(case), found="; ".join(found) or "nothing",
            rest=f" Not measured there: {', '.join(rest)}." if rest else "",
        ))  # fmt: skip
    waiting = [
        case
        for case in ground.cases
        if not case.reported and case.config.measure != type(case.config.measure)()
    ]
    lines += [md("{study} will measure forgetting or greedy answers; it has no reporting run yet.",
                 study=ground.study(case)) for case in waiting]  # fmt: skip
    return lines or [Marked("No answer yet: no reporting run has finished.")]


def _span(rows: list[ArmRow], name: str) -> str:
    heading, write = METRICS[name]
    values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    return f"{heading} {write(min(values))} to {write(max(values))}" if values else ""


def _runs(ground: Ground) -> list[Marked]:
    sizes = ", ".join(f"{stats.detectable_effect(n):.2f} with {n}" for n in DESIGNS)
    lines = [md(
        "By design: under {few} seeds there is no verdict. A paired t-test finds, in 80 of 100 studies at "
        "5 %, a difference of so many SDs of the seed-to-seed differences: {sizes} seeds.",
        few=SCREENING_BELOW, sizes=sizes,
    )]  # fmt: skip
    return lines + [line for case in ground.reported for line in _spread(ground, case)]


def _spread(ground: Ground, case: Case) -> list[Marked]:
    """Return how differences to the baseline vary from seed to seed, and what that asks of a study."""
    assert case.results is not None
    baseline = case.results.config.baseline
    if baseline is None:
        return []
    found = {arm: contrasts.differences(case.results, arm, baseline) for arm in case.results.config.arms}
    sds = [statistics.stdev(d) for arm, d in found.items() if arm != baseline and len(d) > 1]
    if not sds or not statistics.median(sds) > 0:
        return []
    sd, most = statistics.median(sds), max(map(len, found.values()))
    sizes = ", ".join(f"{stats.detectable_effect(n) * sd:.4f} with {n}" for n in DESIGNS)
    rough = f" An SD of {count_of_seeds(most)} at most is a rough guess." if most < SCREENING_BELOW else ""
    return [md(
        "{study} ({records}): differences to {baseline} have an SD of {sd} over seeds in the median of "
        "{arms}, so that it takes a difference of {sizes} seeds.{margin}{rough}", study=ground.study(case),
        records=ground.records(case), baseline=code(baseline), sd=f"{sd:.4f}", arms=count(len(sds), "arm"),
        sizes=sizes, margin=_margin(case, sd), rough=rough,
    )]  # fmt: skip


def _margin(case: Case, sd: float) -> str:
    assert case.results is not None
    band = contrasts.margin(case.results)
    if band is None:
        return ""
    needed = power.seeds_for_equivalent(band, sd)
    takes = (
        f"about {count_of_seeds(max(needed, SCREENING_BELOW))}" if needed else "more seeds than can be run"
    )
    pair = f"two arms without a difference lie within its margin of {band:.4f}"
    return f" To show that {pair} takes {takes} (one pair)."


def _strategies(ground: Ground) -> list[Marked]:
    lines = []
    for case in ground.reported:
        assert case.results is not None
        if case.screens or not case.results.config.contrasts:
            lines += _lowest(ground, case)
        else:
            lines.append(md("{study} ({records}): {said}", study=ground.study(case),
                            records=ground.records(case), said=case.told(case.said)))  # fmt: skip
    lines += [
        md("{study}: {said}", study=ground.study(case), said=case.told(ground.advice[case.name].sentence()))
        for case in ground.reported
        if case.name in ground.advice
    ]
    return lines or [Marked("No answer yet: no reporting run has finished.")]


def _lowest(ground: Ground, case: Case) -> list[Marked]:
    """Return the arms with the lowest mean difference to the control of their budget; numbers, no verdict."""
    assert case.results is not None
    groups: dict[str, list[str]] = defaultdict(list)
    for arm in case.results.config.arms:
        groups[budget_of(case.results, arm)].append(arm)
    lines = []
    for budget, arms in groups.items():
        config = case.results.config
        other = next((own for arm in arms if (own := contrasts.control(config, arm)) in arms), None)
        found = {arm: against(case, arm, other) for arm in arms if other and arm != other}
        apart = sorted((mean, arm, n) for arm, pair in found.items() if pair for mean, n in [pair])
        if not apart or other is None or case.config.seeds.reporting < 2:
            continue
        named = [
            md("{arm} {mean} ({n})", arm=code(arm), mean=f"{mean:+.4f}", n=count_of_seeds(n))
            for mean, arm, n in apart
        ]
        most = len(named) if len(named) <= LOWEST + 1 else LOWEST
        lines.append(md(
            "{study} ({records}), budget {budget}, mean loss minus that of {other} over common seeds, lowest "
            "{first}: {named}. An order over {seeds} at most, and no verdict.", study=ground.study(case),
            records=ground.records(case), budget=code(budget), other=code(other),
            first=f"{most} of {len(named)}" if most < len(named) else "first",
            named=Marked(", ".join(named[:most])), seeds=count_of_seeds(case.config.seeds.reporting),
        ))  # fmt: skip
    return lines


def _device(ground: Ground) -> list[Marked]:
    found = machines(ground.cases)
    if not found:
        return [Marked("No record says so yet.")]
    runs = sum(one[3] for one in found)
    on_cards = sum(one[3] for one in found if one[0] != "cpu")
    where = Marked("[progress](progress.md) names the machines")
    if not on_cards:
        return [md("No run has had one, of {runs}; {where}.", runs=count(runs, "run"), where=where)]
    cards = listed([device for device, *_ in found if device != "cpu"])
    return [md("{on} of {runs} had one ({cards}); {where}.", on=f"{on_cards:,}", runs=count(runs, "run"),
               cards=cards, where=where)]  # fmt: skip
