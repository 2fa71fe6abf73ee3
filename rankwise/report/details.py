"""What opens when an arm is clicked: its plan, its training curves, the test rows it wins and loses most."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps

from rankwise import figuretables
from rankwise.contrasts import ContrastRow, contrast_rows
from rankwise.errors import RankwiseError
from rankwise.figures.ranks import COLOURS
from rankwise.figures.rows import HeatCell, RankUse
from rankwise.report.marks import known
from rankwise.report.traces import by_arm, form, interval, short
from rankwise.tables import ArmRow, Results, arm_rows

SHOWN = 8
"""Rows won and rows lost that an arm lists, each."""
STOPS = 12
"""Of the colour scale of ranks."""


def arm_details(
    results: Results, data_text: Mapping[str, tuple[str, str]] | None = None
) -> list[dict[str, Any]]:
    """Return one entry per arm, in the study's order, as the page's JSON.

    Args:
        results: The study.
        data_text: Row hash -> prompt and response; only the rows that are listed are put in.
    """
    use = by_arm(figuretables.use_rows(results))
    contrasts = contrast_rows(results)
    return [_arm(results, row, contrasts, use.get(row.arm, []), data_text) for row in arm_rows(results)]


def _arm(
    results: Results,
    row: ArmRow,
    contrasts: Sequence[ContrastRow],
    use: Sequence[RankUse],
    data_text: Mapping[str, tuple[str, str]] | None,
) -> dict[str, Any]:
    config = results.config.arms[row.arm]
    return {
        "name": row.arm,
        "strategy": config.strategy,
        "look": known(config.strategy),
        "budget": budget_of(results, row.arm),
        "facts": _facts(results, row, contrasts),
        "plans": _plans(results, row.arm),
        "curve": _curve(results, row.arm),
        "use": [[r.module, r.allotted, short(r.used)] for r in use],
        **_examples(results, row.arm, data_text),
    }


def budget_of(results: Results, arm: str) -> str:
    """Return the arm's budget as the study states it, or that it keeps its formula's ranks."""
    budget = results.config.arms[arm].budget
    return "own ranks" if budget is None else str(budget)


def _facts(results: Results, row: ArmRow, contrasts: Sequence[ContrastRow]) -> list[tuple[str, str]]:
    config = results.config.arms[row.arm]
    facts = [
        ("strategy", config.strategy),
        ("budget", budget_of(results, row.arm)),
        ("options", ", ".join(f"{name} {value}" for name, value in config.options.items())),
        ("targets", str(config.targets or results.config.targets)),
        ("start of A", config.init if config.init != "default" else ""),
        ("scale rule", row.scale),
        ("ranks", ends(row.ranks)),
        ("parameters", ends(row.parameters)),
        ("learning rate", "" if row.rate is None else f"{row.rate:g} ({row.rate_how})"),
        ("seeds", f"{row.done} of {row.wanted} done" + (f", {row.failed} failed" if row.failed else "")),
        ("test loss", "" if row.loss is None else f"{row.loss:.4f} (sd {form(row.loss_sd)})"),
        ("gain over the untouched model", "" if row.gain is None else f"{row.gain:.4f}"),
    ]
    facts += [
        (f"{c.arm} against {c.against}", _verdict(c)) for c in contrasts if row.arm in (c.arm, c.against)
    ]
    return [fact for fact in facts if fact[1]]


def _verdict(row: ContrastRow) -> str:
    return row.verdict + (f" ({interval(row.paired.low, row.paired.high, '+.4f')})" if row.paired else "")


def ends(values: tuple[int, int] | None) -> str:
    """Format "8", or "4 to 16" where the ends differ; empty where there is nothing."""
    if values is None:
        return ""
    return f"{values[0]:,}" if values[0] == values[1] else f"{values[0]:,} to {values[1]:,}"


# --- the plan ---------------------------------------------------------------------------------


def _plans(results: Results, arm: str) -> list[dict[str, Any]]:
    """Return the arm's different plans and their seeds; those of tuning runs if there is no other."""
    for role, whose in (("reporting", "seed"), ("tuning", "tuning seed")):
        seeds: dict[str, list[int]] = defaultdict(list)
        kept: dict[str, dict[str, Any]] = {}
        for seed, record in sorted(results.of(arm, role).items()):
            plan = results.store.plan(record["run_id"])
            if plan is not None and "modules" in plan:
                same = json.dumps(plan["ranks"], sort_keys=True)
                seeds[same].append(seed)
                kept.setdefault(same, plan)
        if kept:
            return [_plan(plan, _whose(whose, seeds[same])) for same, plan in kept.items()]
    return []


def _whose(what: str, seeds: Sequence[int]) -> str:
    return f"{what}{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def _plan(plan: Mapping[str, Any], whose: str) -> dict[str, Any]:
    cells = figuretables.heat_cells(plan)
    layers = sorted({cell.layer for cell in cells})
    parts = list(dict.fromkeys(cell.part for cell in cells))
    found = {(cell.part, cell.layer): cell for cell in cells}
    z = [[_rank(found.get((part, layer))) for layer in layers] for part in parts]
    texts = {
        f"{parts.index(cell.part)},{layers.index(cell.layer)}": cell.text
        for cell in cells if cell.text != f"{cell.rank:g}"
    }  # fmt: skip
    highest = max((cell.rank for cell in cells), default=1) or 1
    return {"whose": whose, "parts": parts, "layers": layers, "z": z, "texts": texts,
            "highest": short(highest), "step": max(1, round(highest / 5)),
            "scale": _scale(highest)}  # fmt: skip


def _rank(cell: HeatCell | None) -> float | None:
    if cell is None:
        return None
    return int(cell.rank) if float(cell.rank).is_integer() else short(cell.rank)


def _scale(highest: float) -> list[tuple[float, str]]:
    """Return plotly's colour scale from 0 to the highest rank; below rank 1 / 2 it is paper: no adapter."""
    shades, edge = colormaps[COLOURS], min(0.5 / highest, 0.5)
    found = [(0.0, "@paper"), (edge, "@paper")]
    for i in range(STOPS):
        at = edge + (1 - edge) * i / (STOPS - 1)
        red, green, blue, _ = (round(255 * part) for part in shades(at))
        found.append((round(at, 4), f"rgb({red},{green},{blue})"))
    return found


# --- curves and examples ----------------------------------------------------------------------


def _curve(results: Results, arm: str) -> dict[str, list[float]] | None:
    points = figuretables.curve_points(results, [arm])
    if not points:
        return None
    curve: dict[str, list[float]] = {"x": [p.x for p in points], "mean": [short(p.mean) for p in points]}
    within = [p for p in points if p.low is not None and p.high is not None]
    if within:
        curve["bx"] = [p.x for p in within]
        curve["low"] = [short(p.low) for p in within if p.low is not None]
        curve["high"] = [short(p.high) for p in within if p.high is not None]
    return curve


def _examples(results: Results, arm: str, data_text: Mapping[str, tuple[str, str]] | None) -> dict[str, Any]:
    baseline = results.config.baseline
    if baseline is None:
        return {"why": "The study names no baseline to compare test rows with."}
    if arm == baseline:
        return {"why": "This arm is the baseline."}
    try:
        summary = figuretables.example_rows(results, arm, baseline)
        rows = row_differences(results, arm, baseline)
    except RankwiseError as error:
        return {"why": str(error)}
    except (OSError, ValueError) as error:  # the rest of the report does not need these rows
        return {"why": f"The losses of single rows cannot be read ({error})."}
    ordered = sorted(rows.items(), key=lambda item: (item[1], item[0]))
    won = [(row, short(value)) for row, value in ordered[:SHOWN] if value < 0]
    lost = [(row, short(value)) for row, value in ordered[::-1][:SHOWN] if value > 0]
    listed = [row for row, _ in (*won, *lost)]
    texts = {row: data_text[row] for row in listed if row in data_text} if data_text else {}
    told = (
        f"{summary.better} test rows have a lower loss per token than with {baseline}, {summary.worse} a "
        f"higher one; each the mean over {summary.seeds} seed{'' if summary.seeds == 1 else 's'}."
    )
    return {"differences": [float(f"{d:.4g}") for d in summary.differences], "told": told, "won": won,
            "lost": lost, "texts": texts}  # fmt: skip


def row_differences(results: Results, arm: str, against: str) -> dict[str, float]:
    """Return row hash -> loss per token, arm minus the other, the mean over their common seeds."""
    seeds = sorted(results.losses(arm).keys() & results.losses(against).keys())
    found: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        mine, other = (_row_losses(results, results.of(name)[seed]["run_id"]) for name in (arm, against))
        for row in mine.keys() & other.keys():
            found[row].append(mine[row] - other[row])
    return {row: statistics.fmean(values) for row, values in found.items()}


def _row_losses(results: Results, run_id: str) -> dict[str, float]:
    import pyarrow.parquet as pq

    table = pq.read_table(
        results.store.path(run_id) / "examples.parquet", columns=["row_hash", "nll", "tokens"]
    )
    rows = zip(*(table.column(name).to_pylist() for name in ("row_hash", "nll", "tokens")), strict=True)
    return {row: nll / tokens for row, nll, tokens in rows if tokens}
