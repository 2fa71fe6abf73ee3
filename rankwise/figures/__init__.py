"""Pictures of a study: tidy rows and axes in, axes out. Nothing is computed while drawing.

    rows.py          what is drawn: every number, interval and mark
    look.py          colours, markers, fonts, widths; `save`
    comparisons.py   loss against parameters, paired differences, gains and losses by example
    curves.py        training, learning rates, amounts of data
    ranks.py         rank heatmap, rank allotted against used, time and memory

`rankwise.figuretables` makes the rows from records. `picture` makes a figure of a fitting height:

    save(picture(paired_differences, difference_rows(results)), "differences")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from rankwise.figures.comparisons import example_differences, loss_against_parameters, paired_differences
from rankwise.figures.curves import data_size, learning_rates, training_curves
from rankwise.figures.look import (
    KEY_WIDTH,
    LINE,
    LOOKS,
    WIDTHS,
    Width,
    canvas,
    marked,
    save,
    shown,
    style,
)
from rankwise.figures.ranks import cost_room, memory, rank_heatmap, rank_use, times
from rankwise.figures.rows import Difference

__all__ = [
    "LOOKS",
    "WIDTHS",
    "canvas",
    "data_size",
    "example_differences",
    "learning_rates",
    "loss_against_parameters",
    "memory",
    "paired_differences",
    "picture",
    "rank_heatmap",
    "rank_use",
    "save",
    "style",
    "times",
    "training_curves",
]


def picture(
    draw: Callable[..., Any] | Sequence[Callable[..., Any]],
    rows: Any,
    width: Width = "double",
    height: float | None = None,
    **settings: Any,
) -> Figure:
    """Draw rows in a new figure, as high as their number asks for (or `height` inches).

    Args:
        draw: one drawing function of this package, or several that share rows and vertical axis, such
            as `(times, memory)`.
        rows: what the function takes.
        width: "single" (3.35 inches) or "double" (6.9).
        height: inches.
        settings: further arguments of the function.

    Raises:
        RankwiseError: an unknown width.
    """
    functions = [draw] if callable(draw) else list(draw)
    figure, axes = canvas(
        width, _height(functions[0], rows, width) if height is None else height, len(functions)
    )
    for function, ax in zip(functions, axes, strict=True):
        function(rows, ax, **settings)
    return figure


def _height(draw: Callable[..., Any], rows: Any, width: Width) -> float:
    if draw is example_differences:
        return 2.2
    if draw is rank_heatmap:
        layers, parts = len({row.layer for row in rows}), len({row.part for row in rows})
        return 0.9 + LINE * max(3, parts) * 1.2 if width == "double" else 1.2 + 0.9 * LINE * max(4, layers)
    if draw is paired_differences:
        return 1.0 + max(2, len(rows)) * _forest_line(rows, width)
    if draw in (times, memory):
        names = {marked(row.arm, row.failed) for row in rows}
        lines = max((shown(name, cost_room(width)).count("\n") for name in names), default=0) + 1
        return 0.8 + max(2, len(rows)) * (LINE if lines == 1 else 0.06 + 0.113 * lines)
    if draw is loss_against_parameters:
        names = {f"{row.strategy} ({row.variant})" for row in rows}
    else:
        names = set({row.arm: marked(row.arm, row.failed) for row in rows}.values())
    lines = 3 + sum(shown(name, KEY_WIDTH).count("\n") + 1 for name in names)
    if width == "single":
        return 2.2 + 0.75 * LINE * ((lines + 1) // 2)
    return max(2.6, 0.3 + 0.75 * LINE * (lines if len(names) <= 24 else (lines + 1) // 2))


def _forest_line(rows: Sequence[Difference], width: Width) -> float:
    """Return the inches that a contrast's names and verdict take."""

    def lines(text: str, room: int) -> int:
        return shown(text, room).count("\n") + 1

    one = len({row.against for row in rows}) == 1
    names = [row.arm if one else f"{row.arm} - {row.against}" for row in rows]
    pairs = list(zip(names, (row.verdict for row in rows), strict=True))
    if width == "single":
        return 0.06 + 0.113 * max((lines(n, 28) + lines(f"({v})", 28) for n, v in pairs), default=1)
    return 0.065 + 0.113 * max((max(lines(n, 34), lines(v, 48)) for n, v in pairs), default=1)
