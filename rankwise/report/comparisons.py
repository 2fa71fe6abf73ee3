"""Pictures that compare arms: loss against parameters, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.figures.rows import Difference, LossPoint
from rankwise.report.marks import fills, marker
from rankwise.report.traces import (
    FAILED,
    Picture,
    Trace,
    error_bar,
    form,
    hover,
    interval,
    label,
    log_room,
    short,
)
from rankwise.tables import SAME

SPREAD = 0.9
"""Octaves over which arms of nearly equal parameters are spread, at most; budgets differ by one or more."""


def loss_picture(points: Sequence[LossPoint], place: Mapping[str, int]) -> Picture:
    """Draw each arm's loss with its interval at its parameters, and the frontier that the rows mark."""
    fill = fills(point.variant for point in points)
    drawn = _spread(points)
    traces: list[Trace] = []
    best = sorted((p for p in points if p.frontier), key=lambda p: p.parameters)
    if best:
        line = {"color": "@muted", "width": 1.2, "dash": "dash", "shape": "hv"}
        traces.append({"type": "scatter", "mode": "lines", "line": line, "hoverinfo": "skip",
                       "x": [drawn[p.arm] for p in best], "y": [short(p.loss) for p in best]})  # fmt: skip
    for p in points:
        ring = {"line": {"width": 2, "color": "@ink"}} if p.frontier else {}
        failed = f"{p.failed} of its runs failed" if p.failed else ""
        told = [
            f"{p.parameters:,} parameters",
            f"loss {p.loss:.4f}",
            f"95 % interval {interval(p.low, p.high)}",
        ]
        told += [text for text in (p.variant, "on the frontier" if p.frontier else "", failed) if text]
        traces.append({
            "type": "scatter", "mode": "markers", "arm": place[p.arm],
            "x": [drawn[p.arm]], "y": [short(p.loss)],
            "marker": marker(p.strategy, fill[p.variant], 10, **ring), "hoverinfo": "text",
            "hovertext": [hover(p.arm, *told)], **error_bar("y", p.loss, p.low, p.high, p.strategy),
        })  # fmt: skip
    ticks = [cluster[len(cluster) // 2].parameters for cluster in _clusters(points)]
    axis = {"type": "log", "title": {"text": "trainable parameters"}, "tickvals": ticks,
            "ticktext": [_count(tick) for tick in ticks]}  # fmt: skip
    if points:
        axis["range"] = log_room([*drawn.values()])
    table = [
        (place[p.arm], (p.arm, f"{p.parameters:,}", form(p.loss), interval(p.low, p.high),
                        "yes" if p.frontier else "no", str(p.failed))) for p in points
    ]  # fmt: skip
    about = (
        "Mean test loss over the reporting seeds at the arm's parameters, with its 95 % t-interval. "
        "Dashed: the frontier of the means; arms on it are ringed, and it stays when arms are filtered. "
        "Arms of nearly equal parameters are spread sideways. An interval is of one arm by itself; only "
        "paired differences say whether two arms differ."
    )
    columns = ("arm", "parameters", "test loss", "95 % interval", "on the frontier", FAILED)
    layout = {
        "xaxis": axis,
        "yaxis": {"title": {"text": "test loss (nats per token)"}},
        "hovermode": "closest",
    }
    return Picture("losses", "Loss against parameters", about, traces, layout, columns, table)


def _clusters(points: Sequence[LossPoint]) -> list[list[LossPoint]]:
    """Return the points in groups whose parameters differ by what counts as equal from one to the next."""
    found: list[list[LossPoint]] = []
    for point in sorted(points, key=lambda p: p.parameters):
        if found and point.parameters <= SAME * found[-1][-1].parameters:
            found[-1].append(point)
        else:
            found.append([point])
    return [sorted(cluster, key=lambda p: p.loss) for cluster in found]


def _spread(points: Sequence[LossPoint]) -> dict[str, float]:
    """Return arm -> where it is drawn: beside the others of nearly its parameters."""
    found = {}
    clusters = _clusters(points)
    for cluster in clusters:
        middle = cluster[len(cluster) // 2].parameters
        step = min(SPREAD / max(1, len(cluster) - 1), 0.1)
        for i, point in enumerate(cluster):
            shift = (i - (len(cluster) - 1) / 2) * step
            found[point.arm] = short(point.parameters if len(cluster) == 1 else middle * 2**shift)
    return found


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def forest(key: str, title: str, rows: Sequence[Difference], place: Mapping[str, int]) -> Picture:
    """Draw one line per paired difference, and the band of equivalence; `key` is contrasts or baseline."""
    one = len({row.against for row in rows}) == 1
    lines, traces, table = [], [], []
    for i, row in enumerate(rows):
        name = row.arm if one else f"{row.arm} − {row.against}"  # noqa: RUF001 (a minus)
        lines.append({"key": f"{key}{i}", "arm": place[row.arm], "label": label(name, 28)})
        table.append((place[row.arm], (row.arm, row.against, form(row.mean, "+.4f"),
                                       interval(row.low, row.high, "+.4f"), row.verdict)))  # fmt: skip
        trace: Trace = {"type": "scatter", "mode": "markers", "arm": place[row.arm], "y": [f"{key}{i}"]}
        if row.mean is None:  # no point, only its words
            words = {"mode": "text", "x": [0], "text": [label(row.verdict, 60, 1)], "hoverinfo": "skip"}
            traces.append({**trace, **words, "textposition": "middle right", "textfont": {"color": "@muted"}})
            continue
        told = [f"minus {row.against}", f"difference {row.mean:+.4f}",
                f"95 % interval {interval(row.low, row.high, '+.4f')}", row.verdict]  # fmt: skip
        fill = "" if row.decided else "-open"
        traces.append({**trace, "x": [short(row.mean)], "marker": marker(row.strategy, fill, 9),
                       "hoverinfo": "text", "hovertext": [hover(row.arm, *told)],
                       **error_bar("x", row.mean, row.low, row.high, row.strategy)})  # fmt: skip
    margin = next((row.margin for row in rows if row.margin is not None), None)
    whose = f" minus {label(rows[0].against, 30, 1)}" if one else ", arm minus the other"
    shapes: list[dict[str, Any]] = [upright(0, 0, "@ink")]
    said = ""
    if margin is not None:
        shapes.insert(0, upright(-margin, margin, "@edge", "@band"))
        said = f" The band is the margin of equivalence, {margin:.4f} to either side."
    layout = {"xaxis": {"title": {"text": f"test loss{whose}"}, "zeroline": False}, "shapes": shapes,
              "hovermode": "closest"}  # fmt: skip
    about = {
        "contrasts": "Paired differences over the seeds with 95 % paired t-intervals; hollow: no verdict.",
        "baseline": "For looking only: mean paired differences with 95 % paired t-intervals, none of them "
        "declared here and none with a verdict.",
    }[key]
    columns = ("arm", "against", "difference", "95 % interval", "verdict")
    return Picture(key, title, about + said, traces, layout, columns, table, lines)


def upright(low: float, high: float, edge: str, fill: str | None = None) -> dict[str, Any]:
    """Return a band, or a line, over the whole height and below the points."""
    line = {"color": edge, "width": 1 if fill is None else 0.5}
    kind = {"type": "line"} if fill is None else {"type": "rect", "fillcolor": fill}
    return {**kind, "x0": low, "x1": high, "y0": 0, "y1": 1, "yref": "paper", "line": line,
            "layer": "between" if fill is None else "below"}  # fmt: skip
