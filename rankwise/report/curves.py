"""Pictures of a number that changes with another: training, learning rates, amounts of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.figures.look import marked
from rankwise.figures.rows import RatePoint, SeriesPoint
from rankwise.report.marks import colour, dashes, fills, marker
from rankwise.report.traces import FAILED, Picture, Trace, by_arm, form, hover, interval, log_room, short


def _series(rows: Sequence[SeriesPoint], place: Mapping[str, int], what: str, *, marks: bool) -> list[Trace]:
    """Return one line per arm: dashes by budget, markers by strategy and variant."""
    arms = by_arm(rows)
    dash, fill = dashes(row.group for row in rows), fills(row.variant for row in rows)
    traces: list[Trace] = []
    for arm, points in arms.items():
        points = [point for point in points if point.mean is not None]
        first = next(iter(arms[arm]))
        told = [
            hover(
                marked(arm, p.failed), f"{what} {p.x:g}", f"loss {p.mean:.4f}",
                *([] if p.low is None else [f"{interval(p.low, p.high)} over the seeds"]),
            )
            for p in points
        ]  # fmt: skip
        line = {
            "color": colour(first.strategy),
            "width": 1.6 if len(arms) <= 12 else 1.1,
            "dash": dash[first.group],
        }
        traces.append({
            "type": "scatter", "mode": "lines+markers" if marks else "lines", "arm": place.get(arm),
            "line": line,
            "x": [p.x for p in points], "y": [short(p.mean) for p in points], "hoverinfo": "text",
            "hovertext": told, "marker": marker(first.strategy, fill[first.variant], 7),
        })  # fmt: skip
    return traces


def rates(rows: Sequence[RatePoint], place: Mapping[str, int]) -> Picture:
    """Draw the validation loss by learning rate; the chosen rate is ringed, a diverged one a cross on top."""
    traces = _series(rows, place, "rate", marks=True)
    means = [row.mean for row in rows if row.mean is not None]
    for row in rows:
        if row.mean is None:
            marks = {"symbol": "x-thin", "size": 9, "line": {"color": colour(row.strategy), "width": 2}}
            traces.append({"type": "scatter", "mode": "markers", "arm": place[row.arm], "x": [row.x],
                           "y": [short(max(means, default=0.0))], "marker": marks, "hoverinfo": "text",
                           "hovertext": [hover(row.arm, f"rate {row.x:g}", "diverged")]})  # fmt: skip
        elif row.chosen:
            ring = {"symbol": "circle-open", "size": 14, "color": "@ink", "line": {"width": 1.2}}
            traces.append({"type": "scatter", "mode": "markers", "arm": place[row.arm], "x": [row.x],
                           "y": [short(row.mean)], "marker": ring, "hoverinfo": "skip"})  # fmt: skip
    table = [
        (place[r.arm], (r.arm, f"{r.x:g}", "diverged" if r.mean is None else form(r.mean),
                        interval(r.low, r.high), "yes" if r.chosen else "no")) for r in rows
    ]  # fmt: skip
    about = (
        "Validation loss of each learning rate that was tried, the mean over the tuning seeds. Ringed: the "
        "rate that was chosen. A cross at the top: a run diverged, so there is no number."
    )
    layout = {"xaxis": _tried(rows, "learning rate"), "hovermode": "closest",
              "yaxis": {"title": {"text": "validation loss (nats per token)"}}}  # fmt: skip
    columns = ("arm", "rate", "validation loss", "range over seeds", "chosen")
    return Picture("rates", "Sensitivity to the learning rate", about, traces, layout, columns, table)


def _tried(rows: Sequence[SeriesPoint], title: str) -> dict[str, Any]:
    ticks = sorted({row.x for row in rows})
    axis = {"type": "log", "title": {"text": title}, "tickvals": ticks, "ticktext": [f"{x:g}" for x in ticks]}
    return {**axis, "range": log_room(ticks)} if ticks else axis


def training(rows: Sequence[SeriesPoint], place: Mapping[str, int]) -> Picture:
    """Draw the training loss by optimizer step, one line per arm."""
    ends = [(arm, points[0], points[-1]) for arm, points in by_arm(rows).items()]
    table = [
        (
            place[arm],
            (arm, f"{first.x:g}", form(first.mean), f"{last.x:g}", form(last.mean), str(last.failed)),
        )
        for arm, first, last in ends
    ]
    about = (
        "Training loss by optimizer step, the mean over the reporting seeds that reached the step; the range "
        "over seeds is drawn where an arm is opened. A run that failed counts up to the step where it did."
    )
    layout = {"xaxis": {"title": {"text": "optimizer step"}}, "hovermode": "closest",
              "yaxis": {"title": {"text": "training loss (nats per token)"}}}  # fmt: skip
    columns = ("arm", "first step", "loss there", "last step", "loss there", FAILED)
    traces = _series(rows, place, "step", marks=False)
    return Picture("curves", "Training curves", about, traces, layout, columns, table)


def sizes(rows: Sequence[SeriesPoint], place: Mapping[str, int]) -> Picture:
    """Draw the test loss by the number of training rows."""
    rows = [row for row in rows if row.arm in place]
    table = [
        (place[r.arm], (r.arm, f"{r.x:,.0f}", form(r.mean), interval(r.low, r.high), str(r.failed)))
        for r in rows
    ]
    about = "Mean test loss by the number of training rows, with the 95 % t-interval in the table."
    layout = {"xaxis": _tried(rows, "training rows"), "hovermode": "closest",
              "yaxis": {"title": {"text": "test loss (nats per token)"}}}  # fmt: skip
    columns = ("arm", "training rows", "test loss", "95 % interval", FAILED)
    traces = _series(rows, place, "training rows", marks=True)
    return Picture("sizes", "Amount of data", about, traces, layout, columns, table)
