"""Verdict words. They come from the tests' outcome by the report's own functions, never from prose."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from rankwise.config import SCREENING_BELOW, StudyConfig
from rankwise.contrasts import ContrastRow, contrast_rows
from rankwise.figuretables import difference_rows
from rankwise.paper.macros import Macro
from rankwise.paper.names import camel
from rankwise.paper.studies import Told
from rankwise.paper.typeset import NOT_RUN, chance, escaped, name, number
from rankwise.power import design_answers
from rankwise.recommend import recommend
from rankwise.report.opening import opening, state
from rankwise.tables import Results, arm_rows, count_of_seeds

NUMBERS = (
    ("Difference", "+.4f", "nats per token", lambda row: row.paired and row.paired.mean),
    ("Low", "+.4f", "nats per token", lambda row: row.paired and row.paired.low),
    ("High", "+.4f", "nats per token", lambda row: row.paired and row.paired.high),
    ("PHolm", ".3f", "", lambda row: row.p_holm),
    ("PFlip", ".3f", "", lambda row: row.paired and row.paired.p_sign_flip),
    ("Detectable", ".4f", "nats per token", lambda row: row.paired and row.paired.detectable),
)


def phrase(row: ContrastRow, seeds: int) -> str:
    """Return the words between two arms' names, from the verdict of `contrasts.contrast_rows`."""
    verdict, _, reason = row.verdict.partition(":")
    if verdict == "differs":
        return "differs from"
    if verdict.startswith("equivalent"):
        return "is equivalent within the margin to"
    if verdict.startswith("no difference shown"):
        return "is not shown to differ from"
    if verdict == "screening":
        return f"was not tested ({count_of_seeds(seeds)}) against"
    return f"has no verdict ({escaped(reason.strip() or verdict)}) against"


def sentence(row: ContrastRow, seeds: int) -> str:
    """Return a contrast in one sentence: its verdict, and the numbers that it rests on."""
    said = f"{name(row.arm)} {phrase(row, seeds)} {name(row.against)}"
    paired = row.paired
    if paired is None:
        return f"{said}."
    numbers = [
        f"mean difference {number(paired.mean, '+.4f')}",
        rf"95\,\% paired interval {number(paired.low, '+.4f')} to {number(paired.high, '+.4f')}",
    ]
    if not row.verdict.startswith(("screening", "no verdict")):
        numbers += [f"{chance(row.p_holm)} after Holm's adjustment"] if row.p_holm is not None else []
        if row.verdict.startswith("differs"):
            side = "lower" if paired.mean < 0 else "higher"
            said += f", with the {side} loss"
            if row.verdict.endswith("within the margin") and row.margin is not None:
                said += ", and lies within the margin of it"
                numbers.append(f"margin {number(row.margin, '.4f')}")
        elif row.verdict.startswith("equivalent") and row.margin is not None:
            numbers.append(f"margin {number(row.margin, '.4f')}")
        else:
            numbers.append(f"a difference of {number(paired.detectable, '.4f')} could have been seen")
    return f"{said} ({'; '.join(numbers)})."


def verdict_macros(study: Told) -> Iterator[Macro]:
    """Yield the study's sentences: what it finds, its state, each contrast, its ladders, its power."""
    results = study.results
    sentences: dict[str, Callable[[Results], str]] = {
        "Opening": lambda records: _said(opening(records)),
        "State": lambda records: _said(" ".join(state(records)) or "All runs are done."),
        "Verdicts": _all,
        "NotShown": _not_shown,
        "Advice": lambda records: _advice(records, whole=False),
        "AdviceAll": lambda records: _advice(records, whole=True),
    }
    for quantity, say in sentences.items():
        yield study.text(f"{NOT_RUN}." if results is None else say(results), quantity)
    body = "#1" if study.run else rf"\notrunstudy{{{name(study.name)}}}"
    yield study.text(body, "WhenRun", arguments=1)
    reported = results is not None and any(row.done for row in arm_rows(results))
    yield study.text("#1" if reported else "", "WhenReported", arguments=1)
    if study.config is not None:
        yield study.text(_design(study.config), "Design")
        yield from _contrasts(study, study.config)


def _design(config: StudyConfig) -> str:
    """Return what the design can see; of a screening nothing about verdicts, as it gives none."""
    seeds = config.seeds.reporting
    told = design_answers(seeds, len(config.contrasts))
    if seeds < SCREENING_BELOW:
        told = [text for text in told if "equivalent" not in text]
    return escaped(" ".join(f"{text[0].upper()}{text[1:]}" for text in told))


def _contrasts(study: Told, config: StudyConfig) -> Iterator[Macro]:
    pairs, seeds = config.pairs(), config.seeds.reporting
    rows = [None] * len(pairs) if study.results is None else contrast_rows(study.results)
    for (arm, against), row in zip(pairs, rows, strict=True):
        pair = f"{camel(arm)}Vs{camel(against)}"
        yield study.text(None if row is None else phrase(row, seeds), pair + "Verdict")
        yield study.text(f"{NOT_RUN}." if row is None else sentence(row, seeds), pair + "Sentence")
        for quantity, form, unit, take in NUMBERS:
            yield study.number(None if row is None else take(row), form, unit, pair + quantity)


def _all(results: Results) -> str:
    rows = contrast_rows(results)
    if not rows:
        return "No contrasts are declared, so nothing was tested."
    return " ".join(sentence(row, results.config.seeds.reporting) for row in rows)


def _not_shown(results: Results) -> str:
    """Return the tested contrasts that ended without a difference; the decision is the figures' own.

    Their numbers are in `Verdicts`, and are not said again.
    """
    rows = zip(contrast_rows(results), difference_rows(results), strict=True)
    tested = [row for row, drawn in rows if drawn.decided]
    found = [row for row in tested if not row.verdict.startswith("differs")]
    seeds = results.config.seeds.reporting
    if not tested:
        return "no contrast of it has a verdict."
    if not found:
        return "no tested contrast of it ended that way."
    lead = "(exploratory) " if results.index["exploratory"] else ""
    return lead + "; ".join(f"{name(r.arm)} {phrase(r, seeds)} {name(r.against)}" for r in found) + "."


def _said(text: str) -> str:
    """Return a sentence of the report's as LaTeX, with true quotes, and true minus signs before numbers."""
    quoted = re.sub(r"(?<!\w)'([^']+)'(?!\w)", "\u2018\\1\u2019", text)
    return re.sub(r"(?<![\w}-])-(?=[0-9])", r"\\ensuremath{-}", escaped(quoted))


def _advice(results: Results, whole: bool) -> str:
    if not results.config.ladders:
        return "The study declares no ladder."
    answer = recommend(results)
    return _said(" ".join(answer.sentences()) if whole else answer.sentence())
