"""The studies that a paper can speak of: their files, and their records as far as there are any."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rankwise.config import SCREENING_BELOW, StudyConfig
from rankwise.datasizes import read_begun
from rankwise.errors import RankwiseError
from rankwise.paper.macros import Macro
from rankwise.paper.names import macro_name
from rankwise.paper.typeset import NOT_RUN, NOT_YET, number
from rankwise.tables import Results

EXPECTED = ("confirmatory",)
"""Studies that a paper may speak of before their files are written: this one follows from the others."""


@dataclass(frozen=True)
class Told:
    """One study.

    Attributes:
        name: as its file says.
        config: as it ran, or else as its file says; None where there is no file yet.
        results: its records; None before its first finished reporting run or untouched model.
        changed: whether the file has changed since the last run.
    """

    name: str
    config: StudyConfig | None = None
    results: Results | None = None
    changed: bool = False

    @property
    def run(self) -> bool:
        """Whether there are records."""
        return self.results is not None

    @property
    def screening(self) -> bool:
        """Whether it has too few seeds for verdicts."""
        return self.config is not None and self.config.seeds.reporting < SCREENING_BELOW

    def number(self, value: float | None, form: str, unit: str, *names: str) -> Macro:
        """Return the macro of a number; without one it says that the study has not run, or not so far.

        Args:
            value: the number.
            form: its precision, as Python's format.
            unit: short ones are typeset behind the number, others told in the comment.
            names: of an arm or a group, if it is one's, and last the quantity.
        """
        body = self._missing if value is None or math.isnan(value) else number(value, form, unit)
        return Macro(macro_name(self.name, *names), body, self._source(names), unit, form)

    def text(self, body: str | None, *names: str, arguments: int = 0) -> Macro:
        """Return the macro of LaTeX text; None says that the study has not run, or not so far."""
        body = self._missing if body is None else body
        return Macro(macro_name(self.name, *names), body, self._source(names), arguments=arguments)

    @property
    def _missing(self) -> str:
        return NOT_YET if self.run else NOT_RUN

    def _source(self, names: tuple[str, ...]) -> str:
        return f"{self.name}: {', '.join(names)}"


def told(studies: Path, results: Path) -> list[Told]:
    """Return every study of a folder of files, by name; a study over several sizes gives one for each.

    Raises:
        RankwiseError: the folder has no study, one of them is faulty, or records cannot be read.
    """
    files = sorted([*studies.glob("*.yaml"), *studies.glob("*.yml")])
    if not files:
        raise RankwiseError(f"no study file (*.yaml) lies in {studies}; choose the folder with --studies.")
    found: dict[str, Told] = {}
    for path in files:
        for config, records in read_begun(path, results):
            if config.name in found:
                raise RankwiseError(f"{path}: another study of {studies} is called {config.name!r} too.")
            found[config.name] = _of(config, records)
    for name in EXPECTED:
        found.setdefault(name, Told(name))
    return list(found.values())


def _of(config: StudyConfig, records: Results | None) -> Told:
    if records is None or not records.records:
        return Told(config.name, config)
    return Told(config.name, records.config, records, records.config != config)
