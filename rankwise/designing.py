"""The study files that `auto` writes, text a person can read, change and run; and what records tell it.

A pilot tells rates, spread and prices; any study that was begun tells what is left of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rankwise import execution, selection, sizing
from rankwise.errors import RankwiseError
from rankwise.grid import FIRST_TUNING_SEED, Grid, Planned, Study, grid, run_config
from rankwise.run import TRAIN_COST, probe_work, work_of
from rankwise.store import read_json
from rankwise.tables import Results

MARGIN = 0.05
BASELINE = 16
"""The largest rank: what it gains is what there is to lose."""


def pilot(model: str, data: str, counts: Mapping[str, int], max_length: int) -> str:
    """Return the pilot's study file: the rates of the ladder's two ends, on validation rows."""
    arms = {f"uniform@r{rank}": {"strategy": "uniform", "budget": f"r={rank}"} for rank in sizing.PILOT_RANKS}
    calibration = min(sizing.CALIBRATION, counts["train"])
    study = {
        "name": "pilot",
        "model": model,
        "data": {"source": data, **counts, "max_length": max_length, "calibration": calibration},
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


def study(pilot_file: Path, which: int, design: sizing.Design, first: int) -> str:
    """Return the study file of a design; everything else is the pilot's, whose runs it takes over."""
    found: dict[str, Any] = yaml.safe_load(pilot_file.read_text())
    uniform = {f"uniform@r{r}": {"strategy": "uniform", "budget": f"r={r}"} for r in design.uniform}
    spectral = {f"spectral@r{r}": {"strategy": "spectral", "budget": f"r={r}"} for r in design.spectral}
    largest = f"uniform@r{max(design.uniform)}"
    seeds = {"tuning": sizing.PILOT_SEEDS, "reporting": design.seeds, **({"first": first} if first else {})}
    ladders = {"uniform": list(uniform), **({"spectral": [*spectral, largest]} if spectral else {})}
    found |= {"name": f"study-{which}", "seeds": seeds, "ladders": ladders, "arms": uniform | spectral}
    return _text("Written by `rankwise auto` after its pilot, before any of its reporting runs.", found)


def _text(head: str, tree: dict[str, Any]) -> str:
    return f"# {head}\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


@dataclass(frozen=True)
class Told:
    """What a pilot told.

    Attributes:
        rates: the best rate by rank.
        sd: of the seeds' paired differences between the two ranks, pooled over pairs of rates, each with its
            own mean: either rank's best, and as many steps of the grid below it (above it training grows
            unsteady, and the study will not be there). A few degrees of freedom, so it is rough; nan where
            there are none.
        gain: the untouched model's validation loss minus that of the largest rank at its best rate.
        tried: how many rates.
    """

    rates: dict[int, float]
    sd: float
    gain: float
    tried: int


def told(results: Results) -> Told:
    """Read a finished pilot.

    Raises:
        RankwiseError: every rate of an arm diverged, or the untouched model could not be scored.
    """
    before = results.untouched_metrics().get("validation_loss")
    if before is None:
        raise RankwiseError(
            "the model without an adapter could not be scored, so nothing can be compared with it: "
            f"{'; '.join(results.failures())}."
        )
    losses = {rank: _by_rate(results, rank) for rank in sizing.PILOT_RANKS}
    rates = {}
    for rank, found in losses.items():
        best = selection.choose(found)
        if best is None:
            raise RankwiseError(
                f"in the pilot every rate of uniform@r{rank} diverged ({', '.join(map(str, found))}), so "
                "there is nothing to build a study on. Write a study file with lower rates instead."
            )
        rates[rank] = best
    small, large = (_from_best(losses[rank], rates[rank]) for rank in sizing.PILOT_RANKS)
    squares, freedom = 0.0, 0
    for mine, theirs in zip(small, large, strict=False):
        apart = [a - b for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
        if len(apart) > 1:
            squares += sum((d - statistics.fmean(apart)) ** 2 for d in apart)
            freedom += len(apart) - 1
    top = max(sizing.PILOT_RANKS)
    reached = [loss for loss in losses[top][rates[top]] if loss is not None]
    sd = math.sqrt(squares / freedom) if freedom else math.nan
    return Told(rates, sd, before - statistics.fmean(reached), len(losses[top]))


def _by_rate(results: Results, rank: int) -> dict[float, list[float | None]]:
    return {one["rate"]: one["losses"] for one in results.index["rates"][f"uniform@r{rank}"]["grid"]}


def _from_best(by_rate: Mapping[float, list[float | None]], best: float) -> list[list[float | None]]:
    """Return the losses of the best rate and of those below it, going down."""
    return [by_rate[rate] for rate in sorted(by_rate, reverse=True) if rate <= best]


def price(study: Study, results: Results, tried: int) -> sizing.Price:
    """Return what runs take here, from the pilot's own records and the number of processes it used."""
    took = [
        record["run_info"]["total_time"]
        for run in results.index["runs"]
        if run["role"] == "tuning" and (record := results.records.get(run["run_id"]))
    ]
    tuning = statistics.fmean(took) / processes(study)
    arm = next(iter(study.config.arms))
    runs = [run_config(study, arm, role, 0, 1e-3) for role in ("tuning", "reporting")]
    work = [work_of(run, study.context) for run in runs]
    calibration = runs[0].model_copy(update={"calibration": study.config.data.calibration})
    return sizing.Price(
        tuning=tuning,
        reporting=tuning * work[1] / work[0],
        probe=tuning * probe_work(calibration, study.context) / work[0],
        rates=tried,
    )


def processes(study: Study) -> int:
    """Return how many processes share the study's runs, as far as that was chosen; else 1."""
    kept = execution.kept(study.store)
    return kept.processes if kept else 1


# --- what an opened study still takes -------------------------------------------------------------


def left(study: Study) -> list[int]:
    """Return the work of every run that a study still has to do (`run.work_of`), as far as can be foreseen.

    Runs that another study of its folder has are taken over and cost nothing. While rates are tuned, one more
    than is declared is expected, as in `sizing.Price`.
    """
    now = grid(study)
    runs = [p for p in [*now.runs, *_one_more_rate(study, now)] if _record(study, p.run_id) is None]
    return execution.works(study, replace(now, runs=runs))


def _one_more_rate(study: Study, now: Grid) -> list[Planned]:
    """Return the runs of the rate that tuning may yet add; none where it has ended or has added one."""
    declared, seeds = study.config.train.learning_rates, study.config.seeds.tuning
    tuned = [arm for arm, rate in now.rates.items() if rate["how"] == "tuned"]
    if not now.unfinished or len(now.rates[tuned[0]]["grid"]) > len(declared):
        return []
    rate = selection.half_decade(max(declared), +1)
    return [
        Planned(arm, "tuning", seed, rate, run_config(study, arm, "tuning", seed, rate))
        for arm in tuned
        for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
    ]


def _record(study: Study, run_id: str) -> dict[str, Any] | None:
    """Return a run's record from this study or another of its folder, which has the same one."""
    for path in sorted(study.store.results.glob(f"*/runs/{run_id}/result.json")):
        return read_json(path, ("status", "run_info"), f"Delete the folder {path.parent} to run it again.")
    return None


def speed(study: Study) -> float | None:
    """Return trained tokens per second of all processes, by the records' own times; None without records.

    The median over runs that ended well: a machine that slept through one, or a run that was resumed and
    knows but its last part, would bend a mean.
    """
    found = []
    for planned in grid(study).runs:
        record = None if planned.role == "untouched" else _record(study, planned.run_id)
        if record is not None and record["status"] == "done":
            found.append(work_of(planned.run, study.context) / TRAIN_COST / record["run_info"]["total_time"])
    return processes(study) * statistics.median(found) if found else None


def duration(study: Study, works: Sequence[int], tokens_per_second: float) -> float:
    """Return the seconds of these runs on the study's processes, which together train at this speed."""
    return execution.seconds(works, processes(study), tokens_per_second)


# --- what it cannot show --------------------------------------------------------------------------


def limits(design: sizing.Design, rows: int, seconds: float) -> list[str]:
    """Return plainly what this study cannot show.

    Args:
        design: what will be run.
        rows: of training.
        seconds: that are left.
    """
    lines = [
        f"What this cannot show: how plans compare when trained on more than {rows} rows once, or on "
        "other data; ranks that matter only after longer training will look alike here."
    ]
    if not design.spectral:
        lines.append("Only uniform plans are compared: there is no time for plans that follow the gradients.")
    if not design.enough:
        lines.append(
            f"Even the smallest study takes some {design.seconds:,.0f} s, and {max(0.0, seconds):,.0f} "
            "s are left: it goes on past the time. It can be stopped and resumed."
        )
    return lines
