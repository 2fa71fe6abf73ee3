"""What is known: the earlier study's questions, then every study's numbers as its report has them."""

from __future__ import annotations

from typing import Any

from rankwise import datasizes
from rankwise.memorybank.cases import Asked, Case
from rankwise.memorybank.ground import Ground
from rankwise.memorybank.questions import questions
from rankwise.memorybank.text import Marked, code, joined, table
from rankwise.report.opening import notes, state
from rankwise.report.results import Lines, contrast_lines, result_lines

RESULT = ("arm", "loss", "sd", "gain", "seeds", "parameters", "ranks", "rate")
CONTRAST = ("arm", "against", "verdict", "difference", "95 % interval", "p Holm", "could see")
"""Columns of the report's tables that stand here too."""


def knowledge(ground: Ground) -> dict[str, Any]:
    """Return what the template of the page needs."""
    return {"questions": questions(ground), "numbers": [_numbers(ground, case) for case in ground.reported]}


def _numbers(ground: Ground, case: Case) -> dict[str, Any]:
    assert case.results is not None
    results = case.results
    lines = result_lines(results)
    compared = contrast_lines(results) if results.config.contrasts else None
    owner = next(one for one in ground.asked if case in one.cases)
    advice = ground.advice.get(case.name)
    return {
        "name": case.name, "study": ground.study(case, "study"), "records": ground.records(case),
        "said": joined([case.told(case.said), *state(results)]),
        "table": _table(lines, RESULT), "shared": lines.shared,
        "contrasts": _table(compared, CONTRAST) if compared else None,
        "margin": compared.shared if compared else "",
        "advice": [case.told(line) for line in advice.sentences()] if advice else [],
        "sizes": datasizes.told(owner.by_size) if _largest(owner, case) else [],
        "notes": [*(line for line in notes(results) if not line.startswith(("probes,", "* "))),
                  *(f"note: {notice}" for notice in results.index["resolved"]["notices"])],
    }  # fmt: skip


def _largest(owner: Asked, case: Case) -> bool:
    """Whether this is the case under which the sizes are compared, so that they are told once."""
    return bool(owner.by_size) and case.rows == max(owner.by_size)


def _table(lines: Lines, wanted: tuple[str, ...]) -> Marked:
    """Return the wanted columns of a table of the report, as far as it has them; arms as code."""
    places = [i for name in wanted for i, (heading, _) in enumerate(lines.columns) if heading == name]
    rows = [[_cell(lines.columns[i][0], cells[i], place) for i in places] for place, cells in lines.rows]
    headings = [lines.columns[i][0] for i in places]
    return table(headings, rows, [lines.numeric[i] for i in places])


def _cell(heading: str, text: str, place: int | None) -> str:
    if heading not in ("arm", "against") or place is None:
        return text
    name = text.removesuffix(" *")
    return Marked(f"{code(name)} \\*") if name != text else code(name)
