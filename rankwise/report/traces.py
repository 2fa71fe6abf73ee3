"""What the report's pictures share: their form, and names and numbers as plotly shows them.

A trace carries the place of its arm in the study (`arm`), by which the page filters and opens it. Colours are
names (see `marks`). Names from studies are escaped, as plotly reads a kind of HTML in its texts.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

from rankwise.figures.look import shown
from rankwise.report.columns import NOTHING
from rankwise.report.marks import colour

Trace = dict[str, Any]
Line = tuple[int, tuple[str, ...]]
FAILED = "failed runs"
"""Heading of the column that tells, in a table of means over the runs that are done, what they leave out."""


@dataclass(frozen=True)
class Picture:
    """A picture with its text.

    Attributes:
        key: its name within the page.
        title: its heading.
        about: what is drawn and how to read it.
        traces: plotly's; colours by name.
        layout: plotly's.
        lines: of a vertical list, from the top: {"key", "arm", "label"}; None for a picture with two axes.
        columns: headings of its table.
        table: one line per row: the arm's place, and its cells.
    """

    key: str
    title: str
    about: str
    traces: list[Trace]
    layout: dict[str, Any]
    columns: tuple[str, ...]
    table: Sequence[Line]
    lines: list[dict[str, Any]] | None = None

    @property
    def drawn(self) -> bool:
        """Whether there is a number to draw, not only words that say that there is none."""
        return any(trace.get("mode") != "text" for trace in self.traces)


def label(name: str, width: int = 34, lines: int = 2) -> str:
    """Return a name as plotly shows it as it is: shortened, wrapped, escaped."""
    return html.escape(shown(name, width, lines), quote=False).replace("\n", "<br>")


def short(value: float) -> float:
    """Return a number with the digits that a picture can show, to keep the page small."""
    return float(f"{value:.6g}")


def form(value: float | None, how: str = ".4f") -> str:
    """Format a number, or a dash."""
    return NOTHING if value is None else format(value, how)


def interval(low: float | None, high: float | None, how: str = ".4f") -> str:
    """Format "low to high", or a dash."""
    return NOTHING if low is None or high is None else f"{low:{how}} to {high:{how}}"


def hover(name: str, *texts: str) -> str:
    """Return what is shown where the pointer is: a name, and lines of text."""
    return "<br>".join([f"<b>{label(name)}</b>", *(html.escape(text, quote=False) for text in texts)])


def error_bar(axis: str, mean: float, low: float | None, high: float | None, strategy: str) -> Trace:
    """Return the interval of one point along an axis, "x" or "y"; nothing where there is none."""
    if low is None or high is None:
        return {}
    bar = {"type": "data", "symmetric": False, "array": [short(high - mean)],
           "arrayminus": [short(mean - low)], "color": colour(strategy), "thickness": 1.3,
           "width": 0}  # fmt: skip
    return {f"error_{axis}": bar}


def by_arm(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Return arm -> its rows, in the order of the rows."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row.arm, []).append(row)
    return found


def log_room(values: Sequence[float]) -> list[float]:
    """Return the range of a logarithmic axis that holds the values with some room."""
    low, high = log10(min(values)), log10(max(values))
    room = max(0.08 * (high - low), 0.15)
    return [round(low - room, 4), round(high + room, 4)]
