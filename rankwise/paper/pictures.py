"""Figures of a study as PDF, with the LaTeX that shows them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise import figures, figuretables
from rankwise.config import SCREENING_BELOW
from rankwise.figures.rows import Difference
from rankwise.paper.groups import budgets
from rankwise.tables import Results

FEW = 7
"""Pictures with a line per arm show no more than these."""

Drawn = tuple[Callable[..., Any] | tuple[Callable[..., Any], ...], Any, dict[str, Any]]


def few(results: Results) -> list[str]:
    """Return the arms that pictures with a line per arm show: the baseline and others of its budget."""
    config = results.config
    baseline = config.baseline or next(iter(config.arms))
    same = next((arms for arms in budgets(config).values() if baseline in arms), list(config.arms))
    return list(dict.fromkeys([baseline, *same]))[:FEW]


def differences(results: Results) -> list[Difference]:
    """Return the declared contrasts; without any, the arms of the baseline's budget minus the baseline."""
    config = results.config
    if config.contrasts:
        return figuretables.difference_rows(results)
    if config.baseline is None:
        return []
    same = next((arms for arms in budgets(config).values() if config.baseline in arms), list(config.arms))
    return [row for row in figuretables.baseline_differences(results) if row.arm in same]


def losses(results: Results) -> Drawn:
    """Return each arm's loss at its parameters, with its interval, or in a screening its range over seeds."""
    points = figuretables.loss_points(results)
    if results.config.seeds.reporting >= SCREENING_BELOW:
        return figures.loss_against_parameters, points, {}
    seen = {point.arm: list(results.losses(point.arm).values()) for point in points}
    ends = {arm: (min(v), max(v)) if len(v) > 1 else (None, None) for arm, v in seen.items()}
    # No frontier of means that were not tested: it would name winners.
    points = [replace(p, low=ends[p.arm][0], high=ends[p.arm][1], frontier=False) for p in points]
    return figures.loss_against_parameters, points, {"interval": "range over the seeds"}


def rates(results: Results) -> Drawn:
    """Return the validation loss by rate, as far as it is below the untouched model's.

    A rate that ruins the model would set the scale of the whole picture; the tables have every rate.
    """
    most = results.untouched_metrics().get("validation_loss", math.inf)
    points = [point for point in figuretables.rate_points(results) if point.arm in few(results)]
    return figures.learning_rates, [p for p in points if p.mean is None or p.mean < most], {}


PICTURES: dict[str, Callable[[Results], Drawn]] = {
    "losses": losses,
    "differences": lambda r: (figures.paired_differences, differences(r), {}),
    "rates": rates,
    "curves": lambda r: (figures.training_curves, *figuretables.smoothed_curves(r, few(r))),
    "use": lambda r: (figures.rank_use, figuretables.use_rows(r, few(r)), {}),
    "costs": lambda r: ((figures.times, figures.memory), figuretables.cost_rows(r), {}),
}
"""Kind -> what is drawn, by which functions, and their settings."""


def heatmap(results: Results, arm: str) -> Drawn:
    """Return the ranks of the arm's first finished run."""
    plans = results.plans(arm)
    return figures.rank_heatmap, figuretables.heat_cells(plans[0]) if plans else [], {}


def picture_bytes(found: Drawn, stem: str, form: str) -> bytes:
    """Return a picture as a file of this format holds it; equal rows and stems give equal bytes."""
    draw, rows, settings = found
    with tempfile.TemporaryDirectory() as folder:
        figure = figures.picture(draw, rows, **settings)
        return figures.save(figure, Path(folder) / stem, (form,))[0].read_bytes()


def drawn(found: Drawn, stem: str) -> dict[str, bytes]:
    """Return the PDF and the LaTeX that includes it, or LaTeX that says that there is nothing to draw yet."""
    if not found[1]:
        return {f"{stem}.tex": b"\\notyet{}\n"}
    image = picture_bytes(found, stem, "pdf")
    shown = f"\\includegraphics[width=\\linewidth]{{generated/{stem}.pdf}}\n"
    return {f"{stem}.tex": shown.encode(), f"{stem}.pdf": image}
