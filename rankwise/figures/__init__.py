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
from rankwise.figures.look import LINE, LOOKS, WIDTHS, Width, canvas, save, shown, style
from rankwise.figures.ranks import memory, rank_heatmap, rank_use, times

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
        return 0.9 + LINE * parts * 1.2 if width == "double" else 1.2 + 0.9 * LINE * layers
    if draw is paired_differences:
        lines = [shown(row.verdict, 28).count("\n") + shown(row.arm, 26).count("\n") + 2 for row in rows]
        return 0.9 + (0.8 * LINE * sum(lines) if width == "single" else LINE * 1.05 * len(rows))
    if draw in (times, memory):
        return 0.8 + LINE * len(rows)
    names = (
        {(r.strategy, r.variant) for r in rows} if draw is loss_against_parameters else {r.arm for r in rows}
    )
    return _beside(len(names) + 3, width)


def _beside(names: int, width: Width) -> float:
    """Return the height of a plot with a key: below it in one column, beside it in two."""
    if width == "single":
        return 2.2 + 0.75 * LINE * ((names + 1) // 2)
    return max(2.6, 0.3 + 0.75 * LINE * (names if names <= 26 else (names + 1) // 2))
