"""Rows of figures: means, intervals and marks are those of the records, computed here another way."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats

from rankwise import figures
from rankwise.contrasts import contrast_rows
from rankwise.errors import RankwiseError
from rankwise.figures.rows import (
    HeatCell,
)
from rankwise.figuretables import (
    baseline_differences,
    cost_rows,
    curve_points,
    difference_rows,
    example_rows,
    heat_cells,
    loss_points,
    rate_points,
    size_points,
    smoothed_curves,
)
from rankwise.paper.pictures import PICTURES
from rankwise.store import Store
from rankwise.tables import Results
from tests.test_figures import words

ARMS = {"uniform": 2.0, "spectral": 1.9, "alpha": 1.95}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A made-up study of 3 arms and 6 seeds, of which alpha's last has failed."""
    folder = tmp_path_factory.mktemp("made-up") / "tiny"
    noise = np.random.default_rng(0).normal(0, 0.01, (3, 6)).tolist()
    runs = [record(folder, "untouched", "untouched", 0, 3.0)]
    for (arm, loss), of_arm in zip(ARMS.items(), noise, strict=True):
        for seed, error in enumerate(of_arm):
            failed = arm == "alpha" and seed == 5
            runs.append(record(folder, arm, "reporting", seed, None if failed else loss + error))
    grid = [{"rate": 1e-3, "losses": [2.1, 2.3]}, {"rate": 3e-3, "losses": [2.0, None]}]
    index = {
        "config": {
            "name": "tiny", "model": "file:m", "data": {"source": "file:rows.json", "train": 8,
            "validation": 4, "test": 4, "reserved": 4, "max_length": 64},
            "train": {"step_examples": 4, "learning_rates": [1e-3]},
            "seeds": {"tuning": 0, "reporting": 6}, "baseline": "uniform", "contrasts": ["spectral", "alpha"],
            "arms": {"uniform": {"strategy": "uniform", "budget": "r=2"},
                     "spectral": {"strategy": "spectral", "budget": "r=2"},
                     "alpha": {"strategy": "uniform", "budget": "r=8",
                               "scale": {"rule": "alpha", "value": 16}}},
        },
        "resolved": {"notices": []}, "exploratory": False, "tuning_unfinished": False, "runs": runs,
        "rates": {arm: {"rate": 1e-3, "how": "tuned", "grid": grid} for arm in ARMS},
    }  # fmt: skip
    (folder / "store.json").write_text('{"format": 1}')
    (folder / "study.json").write_text(json.dumps(index))
    return Results(Store(folder.parent, "tiny"))


def record(folder: Path, arm: str, role: str, seed: int, loss: float | None) -> dict[str, Any]:
    """Write a run's record; the loss of test row i is the run's + i / 10 at 2 tokens each."""
    name = f"{arm}-{seed}"
    place = folder / "runs" / name
    place.mkdir(parents=True)
    info: dict[str, Any] = {"status": "failed", "metrics": {}, "num_trainable_params": 100}
    if loss is not None:
        info = {
            "metrics": {"test_loss": loss, "test_token_accuracy": 0.5, "test_bits_per_byte": 1.0},
            "num_trainable_params": 400 if arm == "alpha" else 100 + seed,
            "train_time": 10.0 + seed, "evaluation_time": 1.0, "tokens_per_second": 1.0,
            "process_peak_bytes": 2**30 + seed,
            "probes": [{"kind": "gradients", "cost": {"seconds": 4.0}}] if arm == "spectral" else [],
        }  # fmt: skip
        nll = [2 * (loss + row / 10) for row in range(4)]
        order = [0, 1, 2, 3] if seed % 2 else [3, 2, 1, 0]  # rows are matched by hash, not by place
        table = {"row_hash": [f"h{i}" for i in order], "nll": [nll[i] for i in order], "tokens": [2] * 4}
        pq.write_table(pa.table(table), place / "examples.parquet")
        steps = [{"step": step, "loss": loss + 1 - step / 10} for step in range(6 if seed else 3)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    failure = None if loss is not None else {"step": 3, "reason": "diverged"}
    whole = {
        "run_id": name,
        "status": "failed" if failure else "done",
        "failure": failure,
        "train_info": info,
    }
    (place / "result.json").write_text(json.dumps(whole))
    return {"arm": arm, "role": role, "seed": seed, "rate": 1e-3, "run_id": name}


def test_loss_points_hold_means_t_intervals_failures_and_the_frontier(results: Results):
    uniform, spectral, alpha = loss_points(results)
    losses = list(results.losses("uniform").values())
    interval = scipy.stats.t.interval(0.95, 5, loc=np.mean(losses), scale=scipy.stats.sem(losses))
    assert (uniform.loss, uniform.low, uniform.high) == pytest.approx((np.mean(losses), *interval))
    assert (uniform.parameters, alpha.parameters) == (102, 400)  # the mean of 100..105, to even
    assert [point.failed for point in (uniform, spectral, alpha)] == [0, 0, 1]
    assert (uniform.variant, alpha.variant) == ("", "scale alpha 16")
    # alpha costs four times as much and is worse than spectral; uniform is worse at an equal cost.
    assert [point.frontier for point in (uniform, spectral, alpha)] == [False, True, False]


def test_differences_are_those_of_the_tables(results: Results):
    rows, tables = difference_rows(results), contrast_rows(results)
    for row, table in zip(rows, tables, strict=True):
        assert table.paired is not None
        assert (row.mean, row.low, row.high) == (table.paired.mean, table.paired.low, table.paired.high)
        assert (row.verdict, row.margin) == (table.verdict, table.margin)
    assert [row.decided for row in rows] == [True, False]
    everyone = baseline_differences(results)
    assert [row.arm for row in everyone] == ["spectral", "alpha"]
    assert everyone[0].mean == pytest.approx(rows[0].mean)
    assert everyone[1].verdict == "no verdict: 1 run failed"
    assert not any(row.decided for row in everyone)


def test_curves_rates_costs_and_examples_come_from_the_records(results: Results):
    points = {point.x: point for point in curve_points(results, ["spectral"])}
    losses = list(results.losses("spectral").values())
    assert sorted(points) == [0, 1, 2, 3, 4, 5]
    assert points[0].mean == pytest.approx(statistics.fmean(losses) + 1)
    assert (points[0].low, points[0].high) == pytest.approx((min(losses) + 1, max(losses) + 1))
    assert points[5].mean == pytest.approx(statistics.fmean(losses[1:]) + 0.5)  # seed 0 ended before
    smooth = {point.x: point.mean for point in curve_points(results, ["spectral"], smooth=2)}
    assert smooth[2] == pytest.approx(points[2].mean + 0.05) and smooth[0] == pytest.approx(points[0].mean)

    low, high = rate_points(results)[:2]
    assert (low.x, low.mean, low.low, low.high, low.chosen) == (1e-3, pytest.approx(2.2), 2.1, 2.3, True)
    assert (high.mean, high.chosen) == (None, False)  # one of two seeds diverged: no number

    cost = cost_rows(results)[1]
    assert (cost.probe_seconds, cost.train_seconds, cost.evaluation_seconds) == (4.0, 12.5, 1.0)
    assert cost.peak_bytes == 2**30 + 5

    found = example_rows(results, "spectral", "uniform")
    pairs = [a - b for a, b in zip(losses, results.losses("uniform").values(), strict=True)]
    assert found.differences == pytest.approx([statistics.fmean(pairs)] * 4)
    assert (found.better, found.worse, found.seeds) == (4, 0, 6)
    assert example_rows(results, "alpha", "uniform").seeds == 5
    with pytest.raises(RankwiseError, match="Did you mean 'spectral'"):
        example_rows(results, "spectrl", "uniform")

    sizes = [point for point in size_points({200: results, 100: results}) if point.arm == "spectral"]
    assert [(point.x, point.mean) for point in sizes] == [
        (100, pytest.approx(statistics.fmean(losses))), (200, pytest.approx(statistics.fmean(losses))),
    ]  # fmt: skip


def test_one_run_that_other_work_slowed_is_not_its_arms_cost(
    results: Results, monkeypatch: pytest.MonkeyPatch
):
    run = next(run for run in results.index["runs"] if (run["arm"], run["seed"]) == ("spectral", 5))
    info = results.records[run["run_id"]]["train_info"]
    monkeypatch.setitem(info, "train_time", 100 * info["train_time"])
    assert cost_rows(results)[1].train_seconds == 12.5


def test_rows_of_means_count_the_runs_that_they_leave_out(results: Results):
    for rows in (cost_rows(results), curve_points(results), size_points({200: results})):
        assert {row.arm: row.failed for row in rows} == {"uniform": 0, "spectral": 0, "alpha": 1}


def test_a_smoothed_curve_brings_the_words_that_say_so(results: Results):
    for steps in (2, 5):
        points, settings = smoothed_curves(results, ["spectral"], steps)
        assert points == curve_points(results, ["spectral"], smooth=steps)
        figure = figures.picture(figures.training_curves, points, **settings)
        assert f"training loss (nats per token, mean of {steps} steps)" in words(figure)
    draw, points, settings = PICTURES["curves"](results)  # of the paper
    assert points[:6] == curve_points(results, ["uniform"], smooth=5)
    assert "training loss (nats per token, mean of 5 steps)" in words(
        figures.picture(draw, points, **settings)
    )


def test_heat_cells_give_mean_and_range_of_modules_that_share_a_place():
    modules = [("a", 0, "q"), ("b", 0, "experts"), ("c", 0, "experts"), ("d", 1, "q")]
    plan = {
        "ranks": {"a": 8, "b": 2, "c": 4, "d": 0},
        "modules": [{"name": n, "layer": layer, "part": part} for n, layer, part in modules],
    }
    cells = heat_cells(plan)
    assert cells == [HeatCell(0, "q", 8, "8"), HeatCell(0, "experts", 3, "2–4"), HeatCell(1, "q", 0, "0")]  # noqa: RUF001
    figure = figures.picture(figures.rank_heatmap, cells)
    assert math.isnan(figure.axes[0].images[0].get_array().filled(np.nan)[0, 1])  # a 0 is white, not dark
    assert {"8", "2–4", "0"} <= set(words(figure))  # noqa: RUF001


def test_a_study_without_a_baseline_has_no_differences(results: Results, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "config", results.config.model_copy(update={"baseline": None}))
    with pytest.raises(RankwiseError, match="names no baseline"):
        baseline_differences(results)


def test_real_rows_of_every_kind_can_be_drawn(results: Results, tmp_path: Path):
    for draw, rows in (
        (figures.loss_against_parameters, loss_points(results)),
        (figures.paired_differences, difference_rows(results)),
        (figures.learning_rates, rate_points(results)),
        (figures.loss_against_parameters, [replace(loss_points(results)[0], low=None, high=None)]),
        (figures.training_curves, []),
        (figures.loss_against_parameters, []),
        (figures.paired_differences, []),
        (figures.rank_heatmap, []),
    ):
        figures.save(figures.picture(draw, rows), tmp_path / "any", ["png"])
