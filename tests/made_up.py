"""A made-up study with names and rows that are hostile to HTML, LaTeX and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.store import Store
from rankwise.tables import Results

ROOT = Path(__file__).parent.parent
EVIL = "<script>alert(1)</script>"
TEX = "\\input{x} $x^2$ & 50% | `a` _b_"
LOSSES = {"uniform": 2.0, "spectral": 1.9, EVIL: 2.001, TEX: 1.95}
DATA_TEXT = {f"h{i}": (f"{EVIL} prompt {i}", f"{TEX} response {i}") for i in range(4)}


def made_up(
    folder: Path,
    *,
    seeds: int = 6,
    wanted: int | None = None,
    arms: tuple[str, ...] = tuple(LOSSES),
    failed: dict[str, int] | None = None,
    tuning: bool = False,
    **changes: Any,
) -> Results:
    """A study of 4 arms, two of them with names that are code elsewhere; `failed`: arm -> its failed seed."""
    place = folder / "made-up"
    noise = np.random.default_rng(0).normal(0, 0.004, (len(arms), max(seeds, 1)))
    runs = [record(place, "untouched", "untouched", 0, 3.0)]
    for i, arm in enumerate(arms):
        for seed in range(seeds):
            loss = None if (failed or {}).get(arm) == seed else LOSSES[arm] + float(noise[i, seed])
            short = f"arm{i}"  # records lie in folders, whose names are hashes
            run = record(place, short, "reporting", seed, loss)
            if loss is not None:
                (place / "runs" / run["run_id"] / "plan.json").write_text(json.dumps(plan_of(i)))
            runs.append({**run, "arm": arm})
    grid = [{"rate": 1e-3, "losses": [2.1]}, {"rate": 3e-3, "losses": [None]}]
    strategies = {"uniform": "uniform", "spectral": "spectral", EVIL: "eva", TEX: "gora"}
    config = {
        "name": "made-up", "model": "file:<img src=x onerror=alert(2)>",
        "data": {"source": "file:rows.json", "train": 8, "validation": 4, "test": 4, "reserved": 4},
        "train": {"step_examples": 4, "learning_rates": [1e-3, 3e-3]},
        "seeds": {"tuning": 1, "reporting": wanted or max(seeds, 1)}, "baseline": "uniform",
        "contrasts": [arm for arm in arms if arm in ("spectral", EVIL)],
        "arms": {arm: {"strategy": strategies[arm], "budget": "r=8" if arm == TEX else "r=2"}
                 for arm in arms},
        **changes,
    }  # fmt: skip
    index = {
        "config": config,
        "resolved": {"device": "cpu", "dtype": "fp32", "threads": 1, "engine": "plain",
                     "model": "f1", "data": "f2", "notices": ["2 of 20 rows are cut at max_length."]},
        "exploratory": False, "tuning_unfinished": tuning, "runs": runs,
        "rates": {arm: {"rate": None if tuning else 1e-3, "how": "tuned", "at_edge": arm == "spectral",
                        "grid": grid} for arm in arms},
    }  # fmt: skip
    (place / "store.json").write_text('{"format": 1}')
    (place / "study.json").write_text(json.dumps(index))
    return Results(Store(folder, "made-up"))


def record(folder: Path, name: str, role: str, seed: int, loss: float | None) -> dict[str, Any]:
    """Write a run's record, as `run` does; the loss of test row i is the run's + i / 10 at 2 tokens each."""
    place = folder / "runs" / f"{name}-{seed}"
    place.mkdir(parents=True)
    info: dict[str, Any] = {"status": "failed", "metrics": {}, "num_trainable_params": 100}
    if loss is not None:
        info = {
            "metrics": {"test_loss": loss, "test_token_accuracy": 0.5, "test_bits_per_byte": 1.0,
                        "test_tokens": 8, "general_loss": loss + 1},
            "num_trainable_params": 100 + seed, "train_time": 10.0 + seed, "evaluation_time": 1.0,
            "tokens_per_second": 1.0, "process_peak_bytes": 2**30 + seed, "file_size": 1000, "probes": [],
            "rank_use": {"stable_rank": 1.5, "units_share": 0.5},
        }  # fmt: skip
        rows = {"row_hash": [f"h{i}" for i in range(4)], "nll": [2 * (loss + i / 10) for i in range(4)]}
        pq.write_table(pa.table({**rows, "tokens": [2] * 4}), place / "examples.parquet")
        used = {"module": ["layers.0.q", "layers.1.q"], "rank": [2, 4], "stable_rank": [1.25, 1.5 + seed]}
        pq.write_table(pa.table(used), place / "rank_use.parquet")
        steps = [{"step": step, "loss": loss + 1 - step / 10, "seconds": 1.5} for step in range(6)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    failure = None if loss is not None else {"step": 3, "reason": "diverged"}
    whole = {"run_id": place.name, "status": "failed" if failure else "done", "failure": failure}
    (place / "result.json").write_text(json.dumps({**whole, "train_info": info}))
    return {"arm": name, "role": role, "seed": seed, "rate": 1e-3, "run_id": place.name}


def plan_of(arm: int) -> dict[str, Any]:
    names = [(f"layers.{layer}.{part}", layer, part) for layer in range(3) for part in ("q", "v<b>")]
    return {
        "ranks": {name: (layer + arm) % 4 for name, layer, _ in names}, "budget": 100,
        "modules": [{"name": name, "layer": layer, "part": part} for name, layer, part in names],
    }  # fmt: skip
