"""From a study's records to the rows that figures draw: every mean and interval of a picture is made here."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rankwise import stats
from rankwise.contrasts import contrast_rows, differences, margin
from rankwise.errors import RankwiseError, one_of
from rankwise.figures.rows import (
    Cost,
    Difference,
    ExampleDifferences,
    HeatCell,
    LossPoint,
    RankUse,
    RatePoint,
    SeriesPoint,
)
from rankwise.tables import SAME, Results

Interval = tuple[float | None, float | None]


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the t-interval of the mean of independent values; (None, None) with fewer than 2."""
    if len(values) < 2:
        return None, None
    from scipy.stats import t  # here: reading a plan's cells needs no scipy

    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:  # scipy has no interval of width 0
        return mean, mean
    low, high = t.interval(level, len(values) - 1, mean, error)
    return float(low), float(high)


def _range(values: Sequence[float]) -> Interval:
    return (min(values), max(values)) if len(values) > 1 else (None, None)


def strategy_of(results: Results, arm: str) -> str:
    """Return the name of the arm's strategy, which decides its colour and marker."""
    if arm not in results.config.arms:
        raise RankwiseError(one_of("arm", arm, results.config.arms))
    return results.config.arms[arm].strategy


def _group(results: Results, arm: str) -> str:
    budget = results.config.arms[arm].budget
    return "" if budget is None else str(budget)


def _variant(results: Results, arm: str) -> str:
    scale = results.config.arms[arm].scale
    return "" if scale is None else f"scale {scale}"


def failed_runs(results: Results, arm: str) -> int:
    """Count the arm's failed reporting runs, which no mean holds."""
    return sum(record["status"] == "failed" for record in results.of(arm).values())


def loss_points(results: Results) -> list[LossPoint]:
    """Return each arm's mean loss with its 95 % t-interval over seeds, and which arms make the frontier.

    Parameters are the mean over seeds, rounded. Arms without a finished run are left out. An interval is
    of one arm by itself: arms share seeds, so only paired differences say whether two arms differ.
    """
    found = []
    for arm, config in results.config.arms.items():
        records = results.of(arm).values()
        done = [r["train_info"]["num_trainable_params"] for r in records if r["status"] == "done"]
        losses = list(results.losses(arm).values())
        if not losses:
            continue
        low, high = t_interval(losses)
        found.append(
            LossPoint(
                arm=arm,
                strategy=config.strategy,
                parameters=round(statistics.fmean(done)),
                loss=statistics.fmean(losses),
                low=low,
                high=high,
                failed=failed_runs(results, arm),
                variant=_variant(results, arm),
            )
        )
    return _with_frontier(found)


def _with_frontier(points: list[LossPoint]) -> list[LossPoint]:
    """Mark the arms that no arm beats in mean loss at no more than `SAME` times their parameters."""

    def beaten(one: LossPoint) -> bool:
        return any(
            other.parameters <= SAME * one.parameters
            and (other.loss < one.loss or (other.loss == one.loss and other.parameters < one.parameters))
            for other in points
        )

    return [replace(point, frontier=not beaten(point)) for point in points]


def difference_rows(results: Results) -> list[Difference]:
    """Return the declared contrasts as `tables.contrast_rows` decides them."""
    return [
        Difference(
            arm=row.arm,
            against=row.against,
            strategy=strategy_of(results, row.arm),
            mean=None if row.paired is None else row.paired.mean,
            low=None if row.paired is None else row.paired.low,
            high=None if row.paired is None else row.paired.high,
            margin=row.margin,
            verdict=row.verdict,
            decided=not row.verdict.startswith(("no verdict", "screening")),
        )
        for row in contrast_rows(results)
    ]


def baseline_differences(results: Results) -> list[Difference]:
    """Return every arm minus the baseline with 95 % paired t-intervals, for looking: none has a verdict.

    Raises:
        RankwiseError: the study names no baseline.
    """
    baseline = results.config.baseline
    if baseline is None:
        raise RankwiseError("the study names no baseline, so there are no differences to it.")
    band, found = margin(results), []
    for arm in results.config.arms:
        if arm == baseline:
            continue
        values = differences(results, arm, baseline)
        paired = stats.paired(values) if len(values) > 1 else None
        failed = failed_runs(results, arm)
        words = f"{failed} run{'s' * (failed > 1)} failed" if failed else "not declared"
        words = words if values or failed else "no seed in common yet"
        found.append(
            Difference(
                arm=arm,
                against=baseline,
                strategy=strategy_of(results, arm),
                mean=statistics.fmean(values) if values else None,
                low=None if paired is None else paired.low,
                high=None if paired is None else paired.high,
                margin=band,
                verdict=f"no verdict: {words}",
                decided=False,
            )
        )
    return found


def heat_cells(plan: Mapping[str, Any]) -> list[HeatCell]:
    """Return the cells of a `plan.json`; where modules share a layer and part, their mean and range."""
    places: dict[tuple[int, str], list[int]] = defaultdict(list)
    for module in plan["modules"]:
        places[module["layer"], module["part"]].append(plan["ranks"][module["name"]])
    return [
        HeatCell(
            layer,
            part,
            statistics.fmean(ranks),
            f"{ranks[0]}" if len(set(ranks)) == 1 else f"{min(ranks)}–{max(ranks)}",  # noqa: RUF001
        )
        for (layer, part), ranks in places.items()
    ]


def curve_points(results: Results, arms: Sequence[str] | None = None, smooth: int = 1) -> list[SeriesPoint]:
    """Return training loss by step: mean and range over the seeds that reached the step.

    Args:
        results: The study.
        arms: Which; by default all.
        smooth: Each run's loss is first averaged over this many steps up to the step.
    """
    found = []
    for arm in results.config.arms if arms is None else arms:
        steps: dict[int, list[float]] = defaultdict(list)
        for record in results.of(arm).values():
            losses = _step_losses(results, record["run_id"])
            for place, step in enumerate(losses):
                window = list(losses.values())[max(0, place - smooth + 1) : place + 1]
                steps[step].append(statistics.fmean(window))
        strategy, shared = strategy_of(results, arm), _shared(results, arm)
        for step, values in sorted(steps.items()):
            mean = statistics.fmean(values)
            found.append(SeriesPoint(arm, strategy, step, mean, *_range(values), **shared))
    return found


def smoothed_curves(
    results: Results, arms: Sequence[str] | None = None, steps: int = 5
) -> tuple[list[SeriesPoint], dict[str, str]]:
    """Return `curve_points` smoothed over so many steps, and the setting of the figure that says so."""
    return curve_points(results, arms, smooth=steps), {"smoothing": f"mean of {steps} steps"}


def _shared(results: Results, arm: str) -> dict[str, Any]:
    """Return what an arm's points of a curve have in common."""
    return {
        "group": _group(results, arm),
        "variant": _variant(results, arm),
        "failed": failed_runs(results, arm),
    }


def _step_losses(results: Results, run_id: str) -> dict[int, float]:
    entries = results.store.steps(run_id)
    return {entry["step"]: entry["loss"] for entry in entries if entry.get("loss") is not None}


def rate_points(results: Results) -> list[RatePoint]:
    """Return the validation loss of each rate that was tried: mean and range over the tuning seeds."""
    found = []
    for arm, choice in results.index["rates"].items():
        for tried in choice.get("grid") or ():
            losses = tried["losses"]
            if not losses:
                continue
            diverged = None in losses
            low, high = (None, None) if diverged else _range(losses)
            found.append(
                RatePoint(
                    arm=arm,
                    strategy=strategy_of(results, arm),
                    x=tried["rate"],
                    mean=None if diverged else statistics.fmean(losses),
                    low=low,
                    high=high,
                    group=_group(results, arm),
                    variant=_variant(results, arm),
                    chosen=tried["rate"] == choice["rate"],
                )
            )
    return found


def size_points(by_size: Mapping[int, Results]) -> list[SeriesPoint]:
    """Return the test loss by training rows, from one study per number of rows; 95 % t-intervals."""
    found = []
    for rows, results in sorted(by_size.items()):
        for arm, config in results.config.arms.items():
            losses = list(results.losses(arm).values())
            if losses:
                mean, ends = statistics.fmean(losses), t_interval(losses)
                found.append(SeriesPoint(arm, config.strategy, rows, mean, *ends, **_shared(results, arm)))
    return found


def use_rows(results: Results, arms: Sequence[str] | None = None) -> list[RankUse]:
    """Return the stable rank of every module's update, the mean over the seeds that gave it the same rank.

    Runs that were recorded before rank use was measured have none.
    """
    found = []
    for arm in results.config.arms if arms is None else arms:
        used: dict[tuple[str, int], list[float]] = defaultdict(list)
        for record in results.of(arm).values():
            path = results.store.path(record["run_id"]) / "rank_use.parquet"
            if path.exists():
                for row in results.store.table(record["run_id"], path.name).to_pylist():
                    used[row["module"], row["rank"]].append(row["stable_rank"])
        strategy, failed = strategy_of(results, arm), failed_runs(results, arm)
        found += [RankUse(arm, strategy, m, r, statistics.fmean(v), failed) for (m, r), v in used.items()]
    return found


def cost_rows(results: Results) -> list[Cost]:
    """Return what a finished run of each arm took: median seconds over seeds, and the highest peak of memory.

    The median, since a run that was slowed by other work says nothing of its arm. The peak is the device's
    where the record has it, else the process's, the model included.
    """
    found = []
    for arm, config in results.config.arms.items():
        done = [r["train_info"] for r in results.of(arm).values() if r["status"] == "done"]
        if not done:
            continue
        probes = [sum(p["cost"]["seconds"] for p in d.get("probes") or ()) for d in done]
        found.append(
            Cost(
                arm=arm,
                strategy=config.strategy,
                probe_seconds=statistics.median(probes),
                train_seconds=statistics.median(d["train_time"] for d in done),
                evaluation_seconds=statistics.median(d["evaluation_time"] for d in done),
                peak_bytes=max(d.get("device_peak_bytes", d["process_peak_bytes"]) for d in done),
                failed=failed_runs(results, arm),
            )
        )
    return found


def example_rows(results: Results, arm: str, against: str) -> ExampleDifferences:
    """Return the test rows' losses per token, arm minus the other, each the mean over their common seeds.

    Raises:
        RankwiseError: the arms have no finished seed in common, or were scored on different rows.
    """
    for name in (arm, against):
        strategy_of(results, name)
    seeds = sorted(results.losses(arm).keys() & results.losses(against).keys())
    if not seeds:
        raise RankwiseError(f"{arm} and {against} have no finished seed in common yet.")
    sums: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        mine, other = (_row_losses(results, name, seed) for name in (arm, against))
        if mine.keys() != other.keys():
            raise RankwiseError(f"{arm} and {against} were scored on different test rows (seed {seed}).")
        for row, loss in mine.items():
            sums[row].append(loss - other[row])
    means = sorted(statistics.fmean(values) for values in sums.values())
    better, worse = sum(m < 0 for m in means), sum(m > 0 for m in means)
    return ExampleDifferences(arm, against, tuple(means), better, worse, len(seeds))


def _row_losses(results: Results, arm: str, seed: int) -> dict[str, float]:
    """Return row hash -> loss per label token; rows without label tokens have none."""
    return {row: nll / tokens for row, (nll, tokens) in results.rows(arm, seed).items() if tokens}
