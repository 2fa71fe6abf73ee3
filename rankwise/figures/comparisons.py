"""Pictures that compare arms: loss against parameters, paired differences, gains and losses by example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from rankwise.figures.look import (
    BLACK,
    BLUE,
    GREY,
    VERMILLION,
    fills,
    key,
    look_of,
    narrow,
    note,
    sample,
    shown,
    styled,
)
from rankwise.figures.rows import Difference, ExampleDifferences, LossPoint

LOSS = "test loss (nats per token)"


@styled
def loss_against_parameters(rows: Sequence[LossPoint], ax: Axes, *, interval: str = "95 % interval") -> Axes:
    """Draw each arm's loss with its interval at its parameters, and the frontier that the rows mark.

    Arms of nearly equal parameters are shifted sideways by some points, to be told apart; their data
    keep the true numbers. `interval` says what low and high are.
    """
    fill = fills(row.variant for row in rows)
    room = 62 if narrow(ax) else 105
    for cluster in _clusters(rows):
        step = min(7.0, room / max(1, len(cluster) - 1))
        for i, row in enumerate(cluster):
            _loss_point(row, ax, (i - (len(cluster) - 1) / 2) * step, fill[row.variant])
    best = sorted((row for row in rows if row.frontier), key=lambda row: row.parameters)
    ax.plot(
        [row.parameters for row in best],
        [row.loss for row in best],
        drawstyle="steps-post",
        color=GREY,
        linewidth=0.9,
        linestyle=(0, (4, 2)),
        zorder=1,
        label="frontier",
    )
    _parameter_axis(rows, ax)
    ax.set_ylabel(LOSS)
    ax.grid(axis="y")
    entries: list[tuple[Any, str]] = [
        (sample(strategy, fillstyle=fill[variant]), strategy + (f" ({variant})" if variant else ""))
        for strategy, variant in dict.fromkeys((row.strategy, row.variant) for row in rows)
    ]
    if best:
        line = Line2D([], [], color=GREY, linestyle=(0, (4, 2)), linewidth=0.9)
        entries.append((line, "frontier of the means"))
    if any(row.low is not None for row in rows):
        entries.append((Line2D([], [], color=GREY, marker="|", linewidth=0.8), interval))
    key(ax, entries)
    return ax


def _clusters(rows: Sequence[LossPoint]) -> list[list[LossPoint]]:
    """Return the rows in groups whose parameters differ by less than a tenth from one to the next."""
    found: list[list[LossPoint]] = []
    for row in sorted(rows, key=lambda row: row.parameters):
        if found and row.parameters < 1.1 * found[-1][-1].parameters:
            found[-1].append(row)
        else:
            found.append([row])
    return [sorted(cluster, key=lambda row: row.loss) for cluster in found]


def _loss_point(row: LossPoint, ax: Axes, shift: float, fill: str) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None
    beside = ax.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
    look = look_of(row.strategy)
    if row.low is not None and row.high is not None:
        ax.plot(
            [row.parameters] * 2,
            [row.low, row.high],
            color=look["color"],
            linewidth=0.8,
            transform=beside,
            zorder=2,
        )
    ring = {"markeredgecolor": BLACK, "markersize": 6, "zorder": 4} if row.frontier else {"zorder": 3}
    look = {**look, "fillstyle": fill, "markerfacecoloralt": "white", **ring}
    ax.plot([row.parameters], [row.loss], linestyle="none", label=row.arm, transform=beside, **look)
    if row.frontier:
        low = row.loss if row.low is None else row.low
        # The best of a group is its leftmost, so words that end there cross no other interval.
        side = (shift, "center") if narrow(ax) else (shift + 5, "right")
        place: dict[str, Any] = {"xytext": (side[0], -6), "textcoords": "offset points", "ha": side[1]}
        note(ax, row.parameters, low, shown(row.arm, 18), va="top", **place)
    if row.failed:
        high = row.loss if row.high is None else row.high
        place = {"xytext": (shift, 3), "textcoords": "offset points", "rotation": 90}
        note(ax, row.parameters, high, f"{row.failed} failed", **place, ha="center", va="bottom")


def _parameter_axis(rows: Sequence[LossPoint], ax: Axes) -> None:
    """Set a logarithmic axis with a tick at each group, and room for the points beside it."""
    ax.set_xscale("log")
    ticks = [cluster[-1].parameters for cluster in _clusters(rows)]
    ax.set_xticks([], minor=True)
    ax.set_xticks(ticks, [_count(tick) for tick in ticks])
    # Shifted points do not widen the axes by themselves, nor do the words left of the first group's best.
    beside = 2.0 if len(ticks) < 4 else 1.3
    ax.set_xlim(min((row.parameters for row in rows), default=1) / 2, max(ticks, default=10) * beside)
    ends = [end for row in rows for end in (row.loss, row.low, row.high) if end is not None]
    if ends:
        room = 0.1 * (max(ends) - min(ends)) or 0.05
        ax.set_ylim(min(ends) - 1.3 * room, max(ends) + room)
    ax.set_xlabel("trainable parameters")


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


@styled
def paired_differences(
    rows: Sequence[Difference], ax: Axes, *, interval: str = "95 % paired t-interval"
) -> Axes:
    """Draw a forest plot: a line per contrast, the band of equivalence if any, and each verdict in words.

    A contrast without a verdict is hollow; one without a difference has no point, only its words.
    """
    tight = narrow(ax)
    ax.axvline(0, color=BLACK, linewidth=0.7, zorder=1)
    margin = next((row.margin for row in rows if row.margin is not None), None)
    if margin is not None:
        ax.axvspan(-margin, margin, facecolor="#E9E9E9", edgecolor="#BBBBBB", linewidth=0.5, zorder=0)
    for y, row in enumerate(rows):
        _difference(row, ax, y)
        if not tight:
            words = {"color": BLACK if row.decided else "#595959", "va": "center", "annotation_clip": False}
            note(ax, 1.02, y, shown(row.verdict, 48), xycoords=ax.get_yaxis_transform(), **words)
    against = {row.against for row in rows}
    ax.set_yticks(range(len(rows)), [_contrast(row, len(against) == 1, tight) for row in rows])
    for tick in ax.get_yticklabels():
        tick.set_parse_math(False)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x")
    whose = f" minus {shown(against.pop(), 30, 1)}" if len(against) == 1 else ", arm minus the other"
    ax.set_xlabel(f"{LOSS}{whose}" if not tight else f"test loss{whose}\n(nats per token)")
    entries: list[tuple[Any, str]] = [(Line2D([], [], color=GREY, marker="o", linewidth=0.9), interval)]
    if any(not row.decided for row in rows):
        mark = Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linewidth=0.9)
        entries.append((mark, "no verdict"))
    if margin is not None:
        entries.append((Patch(facecolor="#E9E9E9", edgecolor="#BBBBBB"), "margin of equivalence"))
    figure = ax.get_figure(root=True)
    assert figure is not None
    handles, names = zip(*entries, strict=True)
    figure.legend(handles, names, loc="outside upper left", ncols=1 if tight else 3)
    return ax


def _difference(row: Difference, ax: Axes, y: int) -> None:
    if row.mean is None:
        return
    look = look_of(row.strategy)
    if row.low is not None and row.high is not None:
        ax.plot([row.low, row.high], [y, y], color=look["color"], linewidth=1.1, zorder=2)
    inside = {} if row.decided else {"markerfacecolor": "white"}
    ax.plot([row.mean], [y], linestyle="none", label=row.arm, zorder=3, **{**look, **inside})


def _contrast(row: Difference, one_baseline: bool, tight: bool) -> str:
    name = row.arm if one_baseline else f"{row.arm} − {row.against}"  # noqa: RUF001 (a minus)
    if not tight:
        return shown(name, 34)
    return f"{shown(name, 28)}\n({shown(row.verdict, 28)})"


@styled
def example_differences(rows: ExampleDifferences, ax: Axes) -> Axes:
    """Draw the test rows from the arm's greatest gain to its greatest loss against the other arm."""
    values = np.asarray(rows.differences)
    places = np.arange(1, len(values) + 1)
    colours = [BLUE if value < 0 else VERMILLION for value in rows.differences]
    ax.bar(places, values, width=1.0, color=colours, edgecolor="white", linewidth=0.2)
    ax.axhline(0, color=BLACK, linewidth=0.7)
    ax.set_xlim(0.5, len(values) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel("test rows, from the greatest gain to the greatest loss")
    ax.set_ylabel("difference of loss\n(nats per token)")
    width = 40 if narrow(ax) else 90
    ax.set_title(shown(f"{rows.arm} minus {rows.against}", width, 2), loc="left", parse_math=False)
    many = "" if rows.seeds == 1 else f", mean of {rows.seeds} seeds"
    place: dict[str, Any] = {"transform": ax.transAxes, "fontsize": 6.5}
    ax.text(0.03, 0.9, f"{rows.better} rows better{many}", color=BLUE, **place)
    ax.text(0.97, 0.06, f"{rows.worse} rows worse{many}", color="#A84800", ha="right", **place)
    return ax
