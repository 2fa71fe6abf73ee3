"""Pictures of what a plan costs and uses: time, memory, rank allotted against rank used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.figures.look import marked
from rankwise.figures.rows import Cost, RankUse
from rankwise.report.marks import marker
from rankwise.report.traces import FAILED, Picture, Trace, by_arm, form, hover, label, short

MOST_POINTS = 2500
"""Of rank use in one picture; with more, only each arm's own page draws them."""


def _cost_lines(key: str, rows: Sequence[Cost], place: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {"key": f"{key}{i}", "arm": place[row.arm], "label": label(marked(row.arm, row.failed), 28)}
        for i, row in enumerate(rows)
    ]


def times(rows: Sequence[Cost], place: Mapping[str, int]) -> Picture:
    """Draw the seconds of a run as a bar per arm: probe, training, evaluation."""
    lines = _cost_lines("times", rows, place)
    kinds = (("probe", "probe_seconds"), ("training", "train_seconds"), ("evaluation", "evaluation_seconds"))
    paints = {"probe": "@probe", "training": "@train", "evaluation": "@evaluation"}
    traces: list[Trace] = []
    for line, row in zip(lines, rows, strict=True):
        for kind, name in kinds:
            seconds = getattr(row, name)
            traces.append({
                "type": "bar", "orientation": "h", "arm": line["arm"], "y": [line["key"]],
                "x": [short(seconds)],
                "name": kind, "legendgroup": kind, "showlegend": line is lines[0], "hoverinfo": "text",
                "hovertext": [hover(marked(row.arm, row.failed), f"{kind} {seconds:.1f} s")],
                "marker": {"color": paints[kind], "line": {"color": "@edge", "width": 0.5}},
            })  # fmt: skip
    table = [
        (place[r.arm], (r.arm, *(form(getattr(r, name), ".1f") for _, name in kinds), str(r.failed)))
        for r in rows
    ]
    layout = {"barmode": "stack", "xaxis": {"title": {"text": "seconds of a run"}}, "showlegend": True,
              "hovermode": "closest"}  # fmt: skip
    about = "What a finished run of each arm took, the median over its seeds. A probe is paid once per seed."
    columns = ("arm", "probe (s)", "training (s)", "evaluation (s)", FAILED)
    return Picture("times", "Time", about, traces, layout, columns, table, lines)


def memory(rows: Sequence[Cost], place: Mapping[str, int]) -> Picture:
    """Draw each arm's highest peak of memory."""
    lines = _cost_lines("memory", rows, place)
    traces: list[Trace] = [
        {"type": "scatter", "mode": "markers", "arm": line["arm"], "y": [line["key"]],
         "x": [short(row.peak_bytes / 2**30)], "marker": marker(row.strategy, "", 9), "hoverinfo": "text",
         "hovertext": [hover(marked(row.arm, row.failed), f"{row.peak_bytes / 2**30:.2f} GiB")]}
        for line, row in zip(lines, rows, strict=True)
    ]  # fmt: skip
    table = [(place[row.arm], (row.arm, f"{row.peak_bytes / 2**30:.2f}", str(row.failed))) for row in rows]
    layout = {
        "xaxis": {"title": {"text": "peak memory (GiB)"}, "rangemode": "tozero"},
        "hovermode": "closest",
    }
    about = (
        "The highest peak over the arm's finished runs, the model included: the device's, or else the "
        "process's."
    )
    return Picture("memory", "Memory", about, traces, layout, ("arm", "peak (GiB)", FAILED), table, lines)


def rank_use(rows: Sequence[RankUse], place: Mapping[str, int]) -> Picture:
    """Draw each module's rank used against the rank that it was allotted."""
    few = rows if len(rows) <= MOST_POINTS else []
    traces: list[Trace] = []
    for arm, points in by_arm(few).items():
        name = marked(arm, points[0].failed)
        told = [hover(name, p.module, f"allotted {p.allotted}", f"used {p.used:.2f}") for p in points]
        look = marker(points[0].strategy, "-open", 7, opacity=0.75)
        traces.append({"type": "scatter", "mode": "markers", "arm": place[arm], "marker": look,
                       "x": [p.allotted for p in points], "y": [short(p.used) for p in points],
                       "hoverinfo": "text", "hovertext": told})  # fmt: skip
    if traces:
        most = max(row.allotted for row in few)
        traces.append({"type": "scatter", "mode": "lines", "x": [0, most], "y": [0, most],
                       "hoverinfo": "skip", "line": {"color": "@muted", "dash": "dash"}})  # fmt: skip
    table = [(place[r.arm], (r.arm, r.module, str(r.allotted), f"{r.used:.2f}", str(r.failed))) for r in few]
    about = (
        "How much of each module's allotted rank the trained update uses; on the dashed line it is all used."
    )
    layout = {"xaxis": {"title": {"text": "rank allotted"}}, "hovermode": "closest",
              "yaxis": {"title": {"text": "rank used (stable rank)"}}}  # fmt: skip
    columns = ("arm", "module", "allotted", "used", FAILED)
    return Picture("use", "Rank allotted against rank used", about, traces, layout, columns, table)
