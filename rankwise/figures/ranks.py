"""Pictures of a plan and of what it costs: rank heatmap, rank allotted against used, time, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rankwise.figures.look import BLACK, GREY, Width, key, look_of, marked, narrow, sample, shown, styled
from rankwise.figures.rows import Cost, HeatCell, RankUse

COLOURS = "cividis"
"""Made for colour-blind readers (Nunez et al. 2018), and its lightness grows evenly, also in grey."""


@styled
def rank_heatmap(rows: Sequence[HeatCell], ax: Axes, *, title: str = "") -> Axes:
    """Draw ranks as layers x modules: layers across a wide figure, down a narrow one.

    A rank of 0 is a white cell with a 0; a module that the plan does not name is left empty.
    """
    layers, parts = sorted({row.layer for row in rows}), list(dict.fromkeys(row.part for row in rows))
    across = not narrow(ax)
    shape = (len(parts), len(layers)) if across else (len(layers), len(parts))
    grid = np.full(np.maximum(shape, 1), np.nan)
    highest = max((row.rank for row in rows), default=1) or 1
    shades = colormaps[COLOURS].with_extremes(bad="white")
    size = min(6.0, 5.2 * 30 / max(len(layers), 30)) if across else 6.0
    for row in rows:
        place = (parts.index(row.part), layers.index(row.layer))
        y, x = place if across else place[::-1]
        if row.rank > 0:
            grid[y, x] = row.rank
        red, green, blue, _ = shades(row.rank / highest)
        dark = row.rank > 0 and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "parse_math": False}
        ax.text(x, y, row.text, color="white" if dark else BLACK, **words)
    image = ax.imshow(grid, cmap=shades, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
    _grid_lines(ax, shape)
    names = [shown(part, 20, 1) for part in parts]
    step = max(1, -(-len(layers) // 40))
    for axis, labels, other in ((ax.yaxis, names, False), (ax.xaxis, names, True)):
        if across != other:
            axis.set_ticks(range(len(parts)), labels, parse_math=False, rotation=90 if other else 0)
        else:
            axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    (ax.set_xlabel if across else ax.set_ylabel)("layer")
    if title:
        ax.set_title(shown(title, 90 if across else 40, 2), loc="left", parse_math=False)
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, fraction=0.04, pad=0.01 if across else 0.02)
    bar.set_label("rank")
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bar.outline.set_visible(False)
    return ax


def _grid_lines(ax: Axes, shape: tuple[int, int]) -> None:
    ax.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.8)
    ax.tick_params(which="both", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


@styled
def rank_use(rows: Sequence[RankUse], ax: Axes, *, measure: str = "stable rank of the update") -> Axes:
    """Draw each module's rank used against the rank that it was allotted; on the diagonal all is used."""
    most = max((row.allotted for row in rows), default=1)
    ax.plot([0, most], [0, most], color=GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
    arms: dict[str, list[RankUse]] = {}
    for row in rows:
        arms.setdefault(row.arm, []).append(row)
    for arm, points in arms.items():
        look = {**look_of(points[0].strategy), "markersize": 4, "alpha": 0.75}
        across, up = [p.allotted for p in points], [p.used for p in points]
        ax.plot(across, up, linestyle="none", markerfacecolor="none", label=arm, **look)
    highest = max((row.used for row in rows), default=0) or 1
    ax.set_ylim(-0.05 * highest, 1.08 * highest)  # the diagonal may leave the picture
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("rank allotted")
    ax.set_ylabel(f"rank used ({shown(measure, 60, 1)})")
    ax.grid()
    samples = [
        (sample(p[0].strategy, markerfacecolor="none"), marked(arm, p[0].failed)) for arm, p in arms.items()
    ]
    key(ax, [*samples, (sample("", (0, (4, 2)), marker="None", linewidth=0.8), "all of it used")])
    return ax


@styled
def times(rows: Sequence[Cost], ax: Axes) -> Axes:
    """Draw the seconds of a run as a bar per arm: probe, training, evaluation."""
    spans: list[tuple[str, list[float], dict[str, Any]]] = [
        ("probe", [row.probe_seconds for row in rows], {"facecolor": "white", "hatch": "//////"}),
        ("training", [row.train_seconds for row in rows], {"facecolor": "#9E9E9E"}),
        ("evaluation", [row.evaluation_seconds for row in rows], {"facecolor": "white"}),
    ]
    left = np.zeros(len(rows))
    edge: dict[str, Any] = {"edgecolor": "#404040", "linewidth": 0.5, "height": 0.7}
    for _, seconds, face in spans:
        ax.barh(range(len(rows)), seconds, left=left, **edge, **face)
        left = left + np.asarray(seconds)  # where the next bar begins; no number is shown for it
    _arm_axis(rows, ax)
    ax.set_xlabel("time of a run (s)")
    figure = ax.get_figure(root=True)
    assert figure is not None
    handles = [Patch(edgecolor="#404040", linewidth=0.5, **face) for _, _, face in spans]
    figure.legend(handles, [name for name, _, _ in spans], loc="outside upper left", ncols=3)
    return ax


@styled
def memory(rows: Sequence[Cost], ax: Axes) -> Axes:
    """Draw each arm's highest peak of memory, in GiB, as its strategy's marker."""
    for y, row in enumerate(rows):
        gib = row.peak_bytes / 2**30
        ax.plot([0, gib], [y, y], color="#D0D0D0", linewidth=0.8, zorder=1)
        ax.plot([gib], [y], linestyle="none", label=row.arm, zorder=2, **look_of(row.strategy))
    _arm_axis(rows, ax)
    ax.set_xlim(left=0)
    ax.set_xlabel("peak memory (GiB)")
    return ax


def cost_room(width: Width) -> int:
    """Return the characters of a line of an arm's name beside its bar."""
    return 20 if width == "single" else 34


def _arm_axis(rows: Sequence[Cost], ax: Axes) -> None:
    room = cost_room("single" if narrow(ax) else "double")
    names = [shown(marked(row.arm, row.failed), room) for row in rows]
    ax.set_yticks(range(len(rows)), names, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x")
