"""Pictures of a number that changes with another: training, learning rates, amounts of data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from rankwise.figures.look import BLACK, DASHES, GREY, fills, key, look_of, marked, note, sample, styled
from rankwise.figures.rows import RatePoint, SeriesPoint

Point = TypeVar("Point", bound=SeriesPoint)
BANDS = 6
"""With more arms than this, bands would hide each other; the lines alone are drawn."""
MANY = 12
"""With more arms than this, lines are thin and markers few."""


@styled
def training_curves(
    rows: Sequence[SeriesPoint], ax: Axes, *, band: str = "range over seeds", smoothing: str = ""
) -> Axes:
    """Draw the training loss by optimizer step: the mean over seeds, and a band for up to 6 arms.

    `band` says what low and high are; `smoothing` how the rows were smoothed, if they were.
    """
    _series(rows, ax, every=True, band=band)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(f"training loss (nats per token{', ' + smoothing if smoothing else ''})")
    return ax


@styled
def data_size(rows: Sequence[SeriesPoint], ax: Axes, *, band: str = "95 % interval") -> Axes:
    """Draw the test loss by the number of training rows, on a logarithmic axis; failures at their point."""
    _series(rows, ax, every=False, band=band)
    _ticks_at_points(rows, ax)
    for row in rows:
        if row.failed:
            beside: dict[str, Any] = {"xytext": (4, 2), "textcoords": "offset points"}
            note(ax, row.x, row.mean, f"{row.failed} failed", **beside, ha="left", va="bottom")
    ax.set_xlabel("training rows")
    ax.set_ylabel("test loss (nats per token)")
    return ax


@styled
def learning_rates(rows: Sequence[RatePoint], ax: Axes, *, band: str = "range over seeds") -> Axes:
    """Draw the validation loss by learning rate; the chosen rate is ringed, a diverged one a cross on top."""
    _series([row for row in rows if row.mean is not None], ax, every=False, band=band, of=rows)
    _ticks_at_points(rows, ax)
    figure = ax.get_figure(root=True)
    assert figure is not None
    seen: Counter[float] = Counter()
    size = 8 if len(_by_arm(rows)) <= MANY else 5
    for row in rows:
        if row.mean is None:
            beside = ScaledTranslation(-5 * seen[row.x] / 72, 0, figure.dpi_scale_trans)
            top: dict[str, Any] = {"transform": ax.get_xaxis_transform() + beside, "clip_on": False}
            ax.plot([row.x], [1.0], marker="x", color=look_of(row.strategy)["color"], markersize=4, **top)
            seen[row.x] += 1
        elif row.chosen:
            ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": BLACK, "linestyle": "none"}
            ax.plot([row.x], [row.mean], marker="o", markersize=size, markeredgewidth=0.7, zorder=5, **ring)
    if seen:
        place: dict[str, Any] = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points"}
        note(ax, max(seen), 1.0, "diverged", xytext=(4, 4), ha="right", annotation_clip=False, **place)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("validation loss (nats per token)")
    return ax


def _by_arm(rows: Sequence[Point]) -> Mapping[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for row in rows:
        found.setdefault(row.arm, []).append(row)
    return found


def _series(
    rows: Sequence[SeriesPoint],
    ax: Axes,
    *,
    every: bool,
    band: str,
    of: Sequence[SeriesPoint] | None = None,
) -> None:
    """Draw one line per arm; markers at all points, or at some of them where `every` step is a point."""
    arms = _by_arm(rows)
    known = rows if of is None else of
    groups = {group: DASHES[i % len(DASHES)] for i, group in enumerate(dict.fromkeys(r.group for r in known))}
    fill = fills(row.variant for row in known)
    banded = len(arms) <= BANDS and any(row.low is not None for row in rows)
    for place, (arm, points) in enumerate(arms.items()):
        look, dashes = look_of(points[0].strategy), groups[points[0].group]
        x = [point.x for point in points]
        if banded:
            within = [p for p in points if p.low is not None and p.high is not None]
            low, high = [p.low for p in within], [p.high for p in within]
            shade: dict[str, Any] = {"facecolor": look["color"], "alpha": 0.16, "linewidth": 0}
            ax.fill_between([p.x for p in within], low, high, **shade)  # type: ignore[arg-type]
        # Markers start at different points, so that those of lines lying on each other are all seen.
        gap = max(1, len(x) // (8 if len(arms) <= MANY else 3))
        marks = (place % gap, gap) if every else None
        thin = {} if len(arms) <= MANY else {"linewidth": 0.6, "markersize": 3}
        look = {**look, "fillstyle": fill[points[0].variant], "markerfacecoloralt": "white", **thin}
        ax.plot(x, [p.mean for p in points], linestyle=dashes, markevery=marks, label=arm, **look)
    ax.grid(axis="y")
    _legend(known, ax, groups, every=every, band=f"band: {band}" if banded else "")


def _legend(
    known: Sequence[SeriesPoint], ax: Axes, groups: dict[str, Any], *, every: bool, band: str
) -> None:
    """Draw the key: arms, the dashes of their budgets, the band, the ring of a chosen rate."""
    fill = fills(row.variant for row in known)

    def named(arm: str, row: SeriesPoint) -> str:
        return marked(arm, row.failed) if every else arm  # else each point has failures of its own

    strategies = {arm: points[0] for arm, points in _by_arm(known).items()}
    entries: list[tuple[Any, str]] = [
        (sample(row.strategy, groups[row.group], fillstyle=fill[row.variant]), named(arm, row))
        for arm, row in strategies.items()
    ]
    if len(groups) > 1:
        lines: dict[str, Any] = {"color": GREY, "linewidth": 1.0}
        entries += [
            (Line2D([], [], linestyle=dashes, **lines), group or "ranks of its own")
            for group, dashes in groups.items()
        ]
    if band:
        entries.append((Line2D([], [], color=GREY, linewidth=6, alpha=0.3), band))
    if any(isinstance(row, RatePoint) and row.chosen for row in known):
        ring = Line2D([], [], marker="o", markersize=7, color=BLACK, markerfacecolor="none", linestyle="none")
        entries.append((ring, "chosen"))
    key(ax, entries)


def _ticks_at_points(rows: Sequence[SeriesPoint], ax: Axes) -> None:
    """Set a logarithmic axis whose ticks are the values that were tried."""
    ax.set_xscale("log")
    ticks = sorted({row.x for row in rows})
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _plain(x)))
    if ticks:  # also where every run diverged, which leaves no line to scale the axis by
        ax.set_xlim(ticks[0] * 0.8, ticks[-1] * 1.25)


def _plain(value: float) -> str:
    """Return 200 as 200, 0.003 as 3e-3."""
    if value >= 0.1:
        return f"{value:g}"
    digits, _, power = f"{value:e}".partition("e")
    return f"{float(digits):g}e{int(power)}"
