"""What every page stands on: the studies, where the documents lie, and links between the two."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rankwise.contrasts import differences
from rankwise.memorybank.cases import Asked, Case, all_cases
from rankwise.memorybank.text import Marked, code, link
from rankwise.recommend import Recommendation, recommend


@dataclass(frozen=True)
class Ground:
    """What every page stands on.

    Attributes:
        asked: the studies, by name.
        results: folder of the records.
        folder: of the documents.
    """

    asked: Sequence[Asked]
    results: Path
    folder: Path

    @cached_property
    def cases(self) -> list[Case]:
        """Every study at every number of rows."""
        return list(all_cases(self.asked))

    @cached_property
    def begun(self) -> list[Case]:
        """Those that have records."""
        return [case for case in self.cases if case.results is not None]

    @cached_property
    def reported(self) -> list[Case]:
        """Those with a finished reporting run: whole ones first, then seeds enough, then what confirms."""
        found = [case for case in self.begun if case.reported]
        done = {case.name: sum(row.done for row in case.arms) for case in found}
        return sorted(
            found,
            key=lambda c: (c.state != "whole", c.screens, not c.config.confirmatory, -done[c.name], c.name),
        )

    @cached_property
    def advice(self) -> dict[str, Recommendation]:
        """Name -> the recommendation of a study that declares ladders and has a reporting run."""
        return {c.name: recommend(c.results) for c in self.reported if c.results and c.results.config.ladders}

    def study(self, one: Case | Asked, text: str = "") -> Marked:
        """Return a link to the study's file."""
        return link(text or one.config.name, one.path, self.folder)

    def records(self, case: Case, text: str = "records") -> Marked:
        """Return a link to the folder of its records."""
        return link(text, self.results / case.name, self.folder) if case.results else Marked("none yet")

    def run(self, case: Case, run_id: str) -> Marked:
        """Return a link to one run's record."""
        assert case.results is not None
        return link(run_id, self.results / case.name / "runs" / run_id, self.folder)

    def command(self, words: str, one: Case | Asked, more: str = "") -> Marked:
        """Return a command about a study's file, as it is typed in the folder above the documents."""
        place = Path(os.path.relpath(one.path, self.folder.parent)).as_posix()
        return code(f"rankwise {words} {place}{' ' if more else ''}{more}")


def against(case: Case, arm: str, other: str) -> tuple[float, int] | None:
    """Return (mean difference of the primary metric, common seeds), or None with no seed in common."""
    assert case.results is not None
    found = differences(case.results, arm, other)
    return (sum(found) / len(found), len(found)) if found else None
