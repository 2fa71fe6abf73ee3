"""The study files that `auto` writes, and what its pilot told. Text a person can read, change and run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rankwise import selection, sizing
from rankwise.grid import Study, run_config
from rankwise.run import work_of
from rankwise.tables import Results

MARGIN = 0.05
BASELINE = 16
"""The largest rank: what it gains is what there is to lose."""


def pilot(model: str, data: str, counts: Mapping[str, int], max_length: int) -> str:
    """Return the pilot's study file: the rates of the ladder's two ends, on validation rows."""
    arms = {f"uniform@r{rank}": {"strategy": "uniform", "budget": f"r={rank}"} for rank in sizing.PILOT_RANKS}
    study = {
        "name": "pilot",
        "model": model,
        "data": {"source": data, **counts, "max_length": max_length, "calibration": min(32, counts["train"])},
        "targets": "all",
        "scale": {"rule": "constant", "value": 2},
        "train": {
            "epochs": 1,
            "step_tokens": _step_tokens(counts["train"], max_length),
            "schedule": "cosine",
            "warmup": "10%",
            "learning_rates": list(sizing.PILOT_RATES),
        },
        "seeds": {"tuning": sizing.PILOT_SEEDS, "reporting": 0},
        "margin": f"{MARGIN:.0%}",
        "baseline": f"uniform@r{BASELINE}",
        "arms": arms,
    }
    return _text("The pilot of `rankwise auto`: none of its adapters is scored on a test row.", study)


def _step_tokens(train: int, max_length: int) -> int:
    """Return tokens per step for some 20 steps, between one row and 1,024 tokens."""
    return max(max_length, min(1024, train * max_length // 2 // 20))


def study(pilot_file: Path, which: int, design: sizing.Design, rates: Mapping[int, float], first: int) -> str:
    """Return the study file of a design; everything else is the pilot's."""
    found: dict[str, Any] = yaml.safe_load(pilot_file.read_text())
    uniform = {f"uniform@r{r}": {"strategy": "uniform", "budget": f"r={r}"} for r in design.uniform}
    spectral = {f"spectral@r{r}": {"strategy": "spectral", "budget": f"r={r}"} for r in design.spectral}
    if not design.tuned:
        for rank, rate in sizing.interpolated(design.uniform, rates).items():
            uniform[f"uniform@r{rank}"] |= {"learning_rate": rate}  # type: ignore[dict-item]
        found["train"]["learning_rates"] = [rates[min(rates)]]
    largest = f"uniform@r{max(design.uniform)}"
    found |= {
        "name": f"study-{which}",
        "seeds": {
            "tuning": sizing.PILOT_SEEDS if design.tuned else 0,
            "reporting": design.seeds,
            **({"first": first} if first else {}),
        },
        "ladders": {
            "uniform": list(uniform),
            **({"spectral": [*spectral, largest]} if spectral else {}),
        },
        "arms": uniform | spectral,
    }
    return _text("Written by `rankwise auto` after its pilot, before any of its reporting runs.", found)


def _text(head: str, tree: dict[str, Any]) -> str:
    return f"# {head}\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def told(results: Results) -> tuple[dict[int, float], float, float]:
    """Return the pilot's best rate by rank, the SD of the seeds' paired differences, and the gain.

    The SD is pooled over the rates that neither arm diverged at, each with its own mean: rates times
    (seeds - 1) degrees of freedom, so it is rough. Gain is the untouched model's validation loss minus that
    of the largest rank at its best rate.
    """
    losses: dict[int, dict[float, list[float | None]]] = {}
    for rank in sizing.PILOT_RANKS:
        tried = results.index["rates"][f"uniform@r{rank}"]["grid"]
        losses[rank] = {one["rate"]: one["losses"] for one in tried}
    best = {rank: selection.choose(found) for rank, found in losses.items()}
    small, large = (losses[rank] for rank in sizing.PILOT_RANKS)
    squares, freedom = 0.0, 0
    for rate in small.keys() & large.keys():
        pairs = list(zip(small[rate], large[rate], strict=True))
        apart = [a - b for a, b in pairs if a is not None and b is not None]
        if len(apart) == len(pairs) > 1:
            squares += sum((d - statistics.fmean(apart)) ** 2 for d in apart)
            freedom += len(apart) - 1
    rates = {rank: rate for rank, rate in best.items() if rate is not None}
    sd = math.sqrt(squares / freedom) if freedom else math.nan
    untouched = results.of("untouched", "untouched")[0]["train_info"]["metrics"]["validation_loss"]
    top = rates.get(max(sizing.PILOT_RANKS))
    reached = [loss for loss in large.get(top or 0.0, []) if loss is not None]
    return rates, sd, untouched - statistics.fmean(reached) if reached else 0.0


def reporting_over_tuning(study: Study) -> float:
    """Return the work of a reporting run over that of a tuning run."""
    arm = next(iter(study.config.arms))
    report, tune = (
        work_of(run_config(study, arm, role, 0, 1e-3), study.context) for role in ("reporting", "tuning")
    )
    return report / tune


def limits(design: sizing.Design, pilot_file: Path, seconds: float) -> list[str]:
    """Return plainly what so little time cannot show."""
    counts = yaml.safe_load(pilot_file.read_text())["data"]
    lines = [
        f"What this cannot show: how plans compare when trained on more than {counts['train']} rows once, or "
        "on other data; ranks that matter only after longer training will look alike here."
    ]
    if not design.tuned:
        lines.append(
            "Rates between rank 1 and rank 16 are interpolated, not tuned: a difference may be the rate's."
        )
    if not design.spectral:
        lines.append("Only uniform plans are compared: there is no time for plans that follow the gradients.")
    if not design.enough:
        lines.append(
            f"Even the smallest study takes about {design.seconds / 60:.0f} min, more than the "
            f"{max(0.0, seconds) / 60:.0f} that are left; it can be stopped and resumed."
        )
    return lines
