"""The grid of a study: which runs it asks for, as far as the evidence so far decides.

First the untouched model and the tuning runs; then, once every arm's learning rate is chosen, the
reporting runs. Read from the store each time, so that several processes see the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise import selection
from rankwise.config import ArmConfig, StudyConfig, digest
from rankwise.run import needed
from rankwise.runconfig import Context, Measured, Role, RunConfig
from rankwise.store import Store
from rankwise.studyfile import StudyFile

FIRST_TUNING_SEED = 1000
"""Tuning seeds count from here, reporting seeds from 0, so that they never meet."""

Losses = dict[str, dict[float, list[float | None]]]
"""arm -> rate -> one validation loss per tuning seed; None for a run that diverged."""


@dataclass(frozen=True)
class Planned:
    """A run and its place in the study."""

    arm: str
    role: Role
    seed: int
    rate: float | None
    run: RunConfig

    @property
    def run_id(self) -> str:
        """Return the run's name in the store."""
        return self.run.run_id


@dataclass(frozen=True)
class Study:
    """A study file with everything it names loaded, and its store.

    Attributes:
        only: the arms whose runs this sitting does; empty for all of them.
    """

    file: StudyFile
    context: Context
    store: Store
    only: tuple[str, ...] = ()

    @property
    def config(self) -> StudyConfig:
        """Return the study's configuration."""
        return self.file.config


def run_config(study: Study, arm: str, role: Role, seed: int, rate: float) -> RunConfig:
    """Return the configuration of one run of an arm, with nothing left to be resolved."""
    config, context = study.config, study.context
    wanted: ArmConfig = config.arms[arm]
    run = RunConfig(
        role=role,
        model=context.base.fingerprint,
        data=context.prepared.fingerprint,
        confirmatory=config.confirmatory and role == "reporting",
        train_rows=config.data.train,
        study_targets=config.targets,
        targets=config.targets if wanted.targets is None else wanted.targets,
        strategy=wanted.strategy,
        options=wanted.options,
        budget=wanted.budget,
        match=wanted.match,
        scale=wanted.scale or config.scale,
        init=wanted.init,
        loraplus_lr_ratio=wanted.loraplus_lr_ratio,
        train=config.train.model_copy(update={"learning_rates": (rate,)}),
        seed=seed,
        device=context.device,
        dtype=context.dtype,
        threads=context.threads,
        engine=context.engine.name,
    )
    looks = {"calibration": config.data.calibration} if any(needed(run).values()) else {}
    return run.model_copy(update={**looks, "measure": measured(study) if role == "reporting" else None})


def measured(study: Study) -> Measured | None:
    """Return what the untouched model and reporting runs are measured by beyond their loss."""
    wanted, rows = study.config.measure, study.context.general
    if not rows and not wanted.generate:
        return None
    names = {"rows": [row.row_hash for row in rows], "max_length": study.config.data.max_length}
    return Measured(
        general=digest(names) if rows else None,
        generate=wanted.generate,
        generate_tokens=wanted.generate_tokens if wanted.generate else 0,
    )


def untouched_run(study: Study) -> Planned:
    """Return the run that scores the model as it is, without adapters."""
    config, context = study.config, study.context
    fixed = {"step_examples": 1, "learning_rates": (1.0,), "micro_tokens": config.train.micro_tokens}
    run = RunConfig(
        role="untouched",
        model=context.base.fingerprint,
        data=context.prepared.fingerprint,
        confirmatory=config.confirmatory,
        strategy="none",
        train=type(config.train).model_validate(fixed),  # what training would do is no part of this run
        seed=0,
        device=context.device,
        dtype=context.dtype,
        threads=context.threads,
        engine=context.engine.name,
        measure=measured(study),
    )
    return Planned("untouched", "untouched", 0, None, run)


@dataclass(frozen=True)
class Grid:
    """The runs known so far, each arm's learning rate, and whether tuning will still add runs."""

    runs: list[Planned]
    rates: dict[str, dict[str, Any]]
    unfinished: bool

    def of(self, arms: tuple[str, ...]) -> Grid:
        """Return the runs of these arms and of the untouched model; without arms, the whole grid."""
        kept = [p for p in self.runs if not arms or p.arm in arms or p.role == "untouched"]
        return Grid(kept, self.rates, self.unfinished)

    def pending(self, store: Store) -> list[Planned]:
        """Return the runs that have no record yet, each name once."""
        return list({p.run_id: p for p in self.runs if not store.has(p.run_id)}.values())


def grid(study: Study) -> Grid:
    """Return the study's grid as the store's records decide it."""
    tuning, losses, complete = _tuning(study)
    rates = {arm: _rate(study, arm, losses, complete) for arm in study.config.arms}
    runs = [untouched_run(study), *tuning]
    if complete:
        runs += [
            Planned(
                arm,
                "reporting",
                seed,
                choice["rate"],
                run_config(study, arm, "reporting", seed, choice["rate"]),
            )
            for seed in study.config.seeds.reported
            for arm, choice in rates.items()
            if choice["rate"] is not None
        ]
    return Grid(runs, rates, not complete)


def _rate(study: Study, arm: str, losses: Losses, complete: bool) -> dict[str, Any]:
    """Return the arm's learning rate (None while unknown, or when every rate diverged) and how it came."""
    fixed = study.config.arms[arm].learning_rate
    if arm not in losses:
        return {"rate": fixed or study.config.train.learning_rates[0], "how": "declared"}
    return {
        "rate": selection.choose(losses[arm]) if complete else None,
        "how": "tuned",
        "at_edge": complete and selection.at_edge(losses[arm]),
        "grid": [{"rate": rate, "losses": found} for rate, found in sorted(losses[arm].items())],
    }


def _tuning(study: Study) -> tuple[list[Planned], Losses, bool]:
    """Return the tuning runs on the grid as far as it had to be extended, and whether they are all in."""
    config = study.config
    arms = [arm for arm, wanted in config.arms.items() if config.tuned and wanted.learning_rate is None]
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + config.seeds.tuning)
    rates = list(config.train.learning_rates)
    while True:
        runs = [
            Planned(arm, "tuning", seed, rate, run_config(study, arm, "tuning", seed, rate))
            for seed in seeds
            for rate in rates
            for arm in arms
        ]
        losses: Losses = {arm: {rate: [] for rate in rates} for arm in arms}
        for planned in runs:
            if study.store.has(planned.run_id):
                losses[planned.arm][planned.rate or 0.0].append(_validation_loss(study.store, planned.run_id))
        if any(len(found) < len(seeds) for by_rate in losses.values() for found in by_rate.values()):
            return runs, losses, False
        added = {selection.extension(by_rate) for by_rate in losses.values()} - {None, *rates}
        if not added:
            return runs, losses, True
        rates += sorted(rate for rate in added if rate is not None)


def _validation_loss(store: Store, run_id: str) -> float | None:
    record = store.record(run_id)
    return record["train_info"]["metrics"]["validation_loss"] if record["status"] == "done" else None
