"""What a study tells while it works. This observer is silent; `terminal.StudyProgress` draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.grid import Grid, Planned
    from rankwise.store import Store


class Observer:
    """Hears how a study goes on."""

    def grid(self, grid: Grid, store: Store, work: dict[str, int]) -> None:
        """Hear the list of runs, which may have grown, and the work of each by run id."""

    def started(self, planned: Planned, work: int) -> None:
        """Hear that a run begins."""

    def work(self, planned: Planned, units: int) -> None:
        """Hear that this much more of a run's work is done; several runs may be under way."""

    def finished(self, planned: Planned, status: str) -> None:
        """Hear that a run has ended, done or failed."""

    def waiting(self, runs: int) -> None:
        """Hear that all pending runs are in other processes' hands."""

    def note(self, text: str) -> None:
        """Hear a sentence for the reader, such as how the work is shared."""
