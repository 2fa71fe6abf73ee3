"""Everything that a paper may use: macros, tables and figures, made of the studies and their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rankwise.errors import RankwiseError
from rankwise.paper import tabulars
from rankwise.paper.groups import budgets, group_macros
from rankwise.paper.macros import Catalogue
from rankwise.paper.names import camel
from rankwise.paper.pictures import PICTURES, Drawn, drawn, heatmap
from rankwise.paper.quantities import arm_macros, overall_macros, study_macros
from rankwise.paper.studies import Told, told
from rankwise.paper.typeset import name
from rankwise.paper.verdicts import verdict_macros
from rankwise.tables import Results

TABLES: dict[str, Callable[[Results], str]] = {
    "arms": tabulars.arms_table,
    "contrasts": tabulars.contrasts_table,
    "ladders": tabulars.ladders_table,
    "rates": tabulars.rates_table,
    "runs": tabulars.runs_table,
}

HEAD = r"""% Made by `rankwise paper` from the records; changes are overwritten.
\newcommand{\notrun}{\textit{[not run yet]}}
\newcommand{\notyet}{\textit{[not known yet]}}
\newcommand{\notrunstudy}[1]{\textit{[The study} #1 \textit{has not been run yet. Its results appear here once
its records exist.]}}
"""


@dataclass(frozen=True)
class Piece:
    r"""A table or figure that `\input{generated/NAME}` shows.

    Attributes:
        name: of its file, without the ending.
        source: what it shows, in words.
        make: returns its files, each by name.
    """

    name: str
    source: str
    make: Callable[[], dict[str, bytes]]


@dataclass(frozen=True)
class Offer:
    """What the studies have to offer, and their names.

    Attributes:
        macros: every macro.
        pieces: name -> table or figure.
        studies: as told.
        arms: of all studies.
    """

    macros: Catalogue
    pieces: dict[str, Piece]
    studies: list[Told]
    arms: frozenset[str]

    def lines(self, word: str = "") -> list[str]:
        """Return every macro and piece whose name holds the word, each with its value and source."""
        found = [
            rf"\{m.name}  {m.body}  ({', '.join(filter(None, (m.source, m.unit, m.form)))})"
            for m in self.macros.macros.values()
            if word.lower() in m.name.lower()
        ]
        pieces = (p for p in self.pieces.values() if word.lower() in p.name.lower())
        return found + [rf"\input{{generated/{p.name}}}  ({p.source})" for p in pieces]


def offer(studies: Path, results: Path, named: Sequence[str] | None = None) -> Offer:
    """Return everything that a paper on these studies may use.

    Args:
        studies: folder of study files.
        results: folder of the records.
        named: the studies that the paper is about, in its order; sums and the table of studies are of these
            alone, so that records of others, such as a quickstart, change nothing. By default all.

    Raises:
        RankwiseError: a faulty study, unreadable records, or two values that would have one name.

    Cost: about a second for 300 runs; tables and figures are made when they are asked for.
    """
    found = told(studies, results)
    macros = Catalogue()
    for study in found:
        for source in (study_macros, arm_macros, group_macros, verdict_macros):
            for macro in source(study):
                macros.add(macro)
    told_of = found if named is None else [s for name_ in named for s in found if s.name == name_]
    for macro in overall_macros(told_of):
        macros.add(macro)
    pieces = [
        Piece("studies", "the designs", partial(_text, "studies", partial(tabulars.studies_table, told_of)))
    ]
    for study in found:
        pieces += _pieces(study)
    by_name: dict[str, Piece] = {}
    for piece in pieces:
        if piece.name in by_name:
            raise RankwiseError(f"two pieces would both be called {piece.name}; rename an arm or a study.")
        by_name[piece.name] = piece
    arms = frozenset(arm for study in found if study.config for arm in study.config.arms)
    return Offer(macros, by_name, found, arms)


def _pieces(study: Told) -> list[Piece]:
    found = []
    for kind, table in TABLES.items():
        found.append(_table(study, kind, table))
    for budget, arms in budgets(study.config).items() if study.config else ():
        kind = f"arms-{camel(budget)}"
        found.append(_table(study, kind, partial(tabulars.arms_table, arms=arms)))
    for kind, picture in PICTURES.items():
        found.append(_picture(study, f"fig-{kind}", picture))
    for arm in study.config.arms if study.config else ():
        found.append(_picture(study, f"fig-ranks-{camel(arm)}", partial(heatmap, arm=arm)))
    return found


def _table(study: Told, kind: str, table: Callable[[Results], str]) -> Piece:
    stem = f"{study.name}-{kind}"
    make = partial(_missing, study, stem)
    if study.results is not None:
        make = partial(_text, stem, partial(table, study.results))
    return Piece(stem, f"{study.name}: table {kind}", make)


def _picture(study: Told, kind: str, picture: Callable[[Results], Drawn]) -> Piece:
    stem = f"{study.name}-{kind}"
    make = partial(_missing, study, stem)
    if study.results is not None:
        make = partial(_figure, study.results, stem, picture)
    return Piece(stem, f"{study.name}: figure {kind}", make)


def _missing(study: Told, stem: str) -> dict[str, bytes]:
    return {f"{stem}.tex": f"\\notrunstudy{{{name(study.name)}}}\n".encode()}


def _text(stem: str, make: Callable[[], str]) -> dict[str, bytes]:
    return {f"{stem}.tex": make().encode()}


def _figure(results: Results, stem: str, picture: Callable[[Results], Drawn]) -> dict[str, bytes]:
    return drawn(picture(results), stem)
