"""Values as LaTeX: numbers with their units, and text from records that stays text."""

from __future__ import annotations

import re

from rankwise.report.exports import latex

NOT_RUN = r"\notrun{}"
"""Stands for everything of a study that has no finished run."""
NOT_YET = r"\notyet{}"
"""Stands for a value that a begun study does not have yet."""

BEYOND = {
    "–": "--", "—": "---", "−": r"\ensuremath{-}", "…": r"\dots{}", "×": r"\ensuremath{\times}",  # noqa: RUF001
    "α": r"\ensuremath{\alpha}", "√": r"\ensuremath{\surd}", "·": r"\ensuremath{\cdot}",  # noqa: RUF001
    "’": "'", "‘": "`", "“": "``", "”": "''", "\u00a0": "~",  # noqa: RUF001
}  # fmt: skip
"""Characters beyond ASCII that the program's own sentences may hold."""
UNITS = {"%": r"\,\%", "s": r"\,s", "h": r"\,h", "GB": r"\,GB", "MB": r"\,MB", "tokens/s": r"\,tokens/s"}
"""Units that are typeset behind the number; any other unit is only told in the comment."""


def escaped(text: str) -> str:
    r"""Return text that pdflatex typesets as it is; letters that it may lack appear as their code, U+4E2D."""
    return "".join(map(_character, latex(text))).replace(r"\textquotesingle{}", "'")


def _character(c: str) -> str:
    if c.isascii():
        return c
    if c in BEYOND:
        return BEYOND[c]
    return c if "\u00c0" <= c <= "\u00ff" and c not in "\u00d7\u00f7" else rf"\texttt{{U+{ord(c):04X}}}"


def name(text: str) -> str:
    """Return the name of an arm or study in typewriter letters, with places where a line may break."""
    parts = [part for found in re.split(r"(?<=[-@._/+ ])", text) for part in _pieces(found)]
    breakable = r"\allowbreak{}".join(map(escaped, parts))
    return rf"\texttt{{{breakable}}}"


def _pieces(text: str, longest: int = 14) -> list[str]:
    return [text[i : i + longest] for i in range(0, len(text), longest)]


def number(value: float, form: str, unit: str = "") -> str:
    """Return a number in a format of Python's, with a true minus and its unit, in text and in formulas."""
    text = format(value, form)
    if text[0] in "+-":
        text = rf"\ensuremath{{{text}}}"
    return text + UNITS.get(unit, "")


def chance(p: float) -> str:
    """Return a p-value with three decimals; below that, that it is below."""
    return r"\ensuremath{p<0.001}" if p < 0.0005 else rf"\ensuremath{{p={p:.3f}}}"


def ends(pair: tuple[int, int] | None) -> str | None:
    """Return "4" or "0--37" for the lowest and highest of whole numbers; None for none."""
    if pair is None:
        return None
    low, high = (f"{end:,}" for end in pair)
    return low if low == high else f"{low}--{high}"
