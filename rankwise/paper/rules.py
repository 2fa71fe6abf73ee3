r"""The rules that hand-written text keeps. What each means is told in its docstring and in `RULES`.

What a macro of one's own is defined as counts as typed, wherever it stands; lengths, such as 4pt, do not.
Text that TeX reads as a name, not as words, is exempt from all of them: the arguments of \label, \ref and its
kin, \cite and its kin, \input, \includegraphics with its options, \bibliography, \url, \href's address,
\begin and \end, \arm and \study. Comments are no text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rankwise.errors import nearest
from rankwise.paper.macros import Catalogue
from rankwise.paper.names import looks_like_ours, macro_name
from rankwise.paper.sources import DEFINED, STUDY, Paper, Place, Source

RULES = {
    "number": "a digit outside a macro; in results files also a number as a word",
    "verdict": "a word of a verdict outside a verdict macro",
    "picture": "a picture in a results file that no record made",
    "undefined": "a macro, piece, arm, study, label or file that does not exist",
    "unused": "a macro, piece, label or file that nothing uses",
    "citation": "a key that references.bib lacks, or an entry of it that nothing cites",
    "space": "a macro that swallows the blank behind it",
    "stale": "a generated piece that does not match the records",
    "overfull": "a box that sticks out of the page",
}
"""Rule -> what breaks it."""

BY_HAND = ("introduction", "related_work", "method")
"""Files in which digits may be typed: they hold formulas, definitions and what others have published."""
RESULTS = ("abstract", "results", "negative", "appendix", "limitations", "conclusion")
"""Files whose names begin so report results: neither digits nor numbers as words, nor "differs" by hand."""

NAMES = re.compile(
    r"\\(?:label|(?:eq|auto|page|name)?ref|cite[a-z]*|input|includegraphics|bibliography|bibliographystyle|url|href"
    r"|begin|end|arm|study)\*?(?:\[[^\]]*\])*\{[^{}]*\}"
)
DIGIT = re.compile(r"[0-9][0-9.,]*")
NUMBER_WORDS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|dozen"
    "|twice|thrice|half|halves|quarter|quarters"
)
NUMBER_WORD = re.compile(rf"(?<![\\A-Za-z])(?:{NUMBER_WORDS})(?![A-Za-z])", re.IGNORECASE)
VERDICT = re.compile(
    r"(?<![\\A-Za-z])(?:better|best|worse|worst|outperform\w*|(?:in)?significan\w*|equivalent\w*|superior\w*"
    r"|inferior|beats?|beaten)(?![A-Za-z])",
    re.IGNORECASE,
)
FINDING = re.compile(
    r"(?<![\\A-Za-z])(?:differ(?:s|ed)?|wins?|won|improve[sd]?|improvements?)(?![A-Za-z])", re.IGNORECASE
)
DEFINITION = re.compile(
    r"\\(?:(?:re|provide)?newcommand|DeclareRobustCommand)\*?\s*\{?\\[A-Za-z]+\}?(?:\[[^\]]*\])*\s*(?=\{)"
    r"|\\[egx]?def\\[A-Za-z]+[^{}]*(?=\{)"
)
TYPED = re.compile(r"(?<![#0-9.])[0-9][0-9.,]*(?![0-9.,]|\s*(?:pt|em|ex|cm|mm|in|bp|sp|pc)(?![A-Za-z]))")
"""A number that is neither an argument (#1) nor a length (4pt)."""
GRAPHICS = re.compile(r"\\includegraphics")
ARM = re.compile(r"\\arm\{([^{}]*)\}")


@dataclass(frozen=True)
class Fault:
    """Something that breaks a rule: where, which, and what is there."""

    place: Place
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.rule}: {self.text}"


def masked(text: str) -> str:
    """Return the text with names that are no words blanked, lines kept."""
    return NAMES.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def text_faults(paper: Paper) -> Iterator[Fault]:
    """Yield what breaks the rules of numbers and verdicts."""
    for source in paper.sources:
        body = masked(source.text)
        results = source.stem.startswith(RESULTS)
        yield from _defined_faults(source, body)
        if source.stem not in BY_HAND:
            yield from _matches(source, body, DIGIT, "number", "typed by hand; numbers come from macros")
        yield from _matches(source, body, VERDICT, "verdict", "a verdict comes from a verdict macro")
        if results:
            yield from _matches(
                source, body, NUMBER_WORD, "number", "a number as a word; numbers come from macros"
            )
            yield from _matches(source, body, FINDING, "verdict", "a finding comes from a verdict macro")
            why = "pictures of results are pieces of generated/"
            yield from _matches(source, source.text, GRAPHICS, "picture", why)


def _defined_faults(source: Source, body: str) -> Iterator[Fault]:
    """Yield numbers and verdicts in definitions that the other rules do not read: a macro can carry both."""
    for match in DEFINITION.finditer(body):
        start, end = match.end(), _closing(body, match.end())
        if source.stem in BY_HAND or start < source.body:
            yield from _matches(
                source,
                body,
                TYPED,
                "number",
                "a number in a definition; numbers come from macros",
                start,
                end,
            )
        if start < source.body:
            why = "a verdict in a definition; it comes from a verdict macro"
            yield from _matches(source, body, VERDICT, "verdict", why, start, end)


def _closing(text: str, start: int) -> int:
    """Return where the group that opens at `start` closes; the end of the text where it does not."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0) * (text[place - 1] != "\\")
        if depth == 0:
            return place
    return len(text)


def _matches(
    source: Source, body: str, pattern: re.Pattern[str], rule: str, why: str, start: int | None = None,
    end: int | None = None,
) -> Iterator[Fault]:  # fmt: skip
    for match in pattern.finditer(
        body, source.body if start is None else start, len(body) if end is None else end
    ):
        yield Fault(
            source.at(match.start()), rule, f"{match[0]!r} in {_excerpt(source, match.start())!r}: {why}"
        )


def _excerpt(source: Source, offset: int) -> str:
    start = source.text.rfind("\n", 0, offset) + 1
    end = source.text.find("\n", offset)
    line = source.text[start : end if end >= 0 else None]
    left = max(0, offset - start - 20)
    return line[left : left + 50].strip()


def name_faults(
    paper: Paper, macros: Catalogue, pieces: set[str], arms: set[str], studies: set[str]
) -> Iterator[Fault]:
    """Yield macros, pieces, arms, studies and files that do not exist, and those that nothing uses."""
    defined = {name: place for name, place in paper.found(DEFINED)}
    used = paper.words()
    for word, place in used:
        if word not in defined and word not in macros.macros and _meant(word, macros, studies):
            yield Fault(place, "undefined", f"no macro \\{word}{_near(word, macros.macros)}")
    words = {word for word, _ in used}
    for word, place in defined.items():
        if word in macros.macros:
            yield Fault(
                place, "unused", f"\\{word} is defined by hand, and the catalogue has one of that name"
            )
        elif word not in words:
            yield Fault(place, "unused", f"\\{word} is defined and never used")
    for what, found, known in (
        ("piece generated/", paper.pieces(), pieces), ("arm ", paper.found(ARM), arms),
        ("study ", paper.found(STUDY), studies),
    ):  # fmt: skip
        for text, place in found:
            if text not in known and "#" not in text:
                yield Fault(place, "undefined", f"no {what}{text}{_near(text, known)}")
    for target, place in paper.missing:
        yield Fault(place, "undefined", f"no file {target}")
    for path in paper.strangers:
        yield Fault(Place(path, 1), "unused", "no file of the paper reads this one")


def _meant(word: str, macros: Catalogue, studies: set[str]) -> bool:
    r"""Whether a control word was meant for the catalogue; TeX has some of that form, such as \lVert."""
    if not looks_like_ours(word):
        return False
    begins = {macro_name(study) for study in studies} | {"paper"}
    return (
        any(re.match(rf"{begin}[A-Z]", word) for begin in begins) or nearest(word, macros.macros) is not None
    )


def _near(text: str, known: object) -> str:
    near = nearest(text, list(known))  # type: ignore[call-overload]
    return "" if near is None else f"; did you mean {near}?"


def space_faults(paper: Paper, macros: Catalogue) -> Iterator[Fault]:
    """Yield macros without arguments that a blank or an end of line follows: TeX drops that blank."""
    pattern = re.compile(r"\\([a-z]+[A-Z][A-Za-z]*)(?=[ \t\n])")
    for source in paper.sources:
        for match in pattern.finditer(source.text):
            macro = macros.macros.get(match[1])
            if macro is not None and not macro.arguments:
                yield Fault(
                    source.at(match.start()),
                    "space",
                    f"write \\{match[1]}{{}}: TeX drops the blank behind it",
                )
