"""A study: opened with everything it names, then run until no run is pending.

Several processes may work on one study: each claims runs, and takes over those of a process that died.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rankwise import data, machine, models, rows, sources
from rankwise.config import ArmConfig, Fault, StudyConfig, digest
from rankwise.errors import RankwiseError, one_of
from rankwise.grid import Grid, Planned, Study, grid, run_config
from rankwise.inventory import inventory
from rankwise.run import Context, execute, plan_for, work_of
from rankwise.store import Store, write_json
from rankwise.strategies import resolve
from rankwise.studyfile import StudyFile, faults_error, load_study

WAIT_SECONDS = 1.0


class Observer:
    """What a study tells while it works. This one is silent; `terminal.StudyProgress` draws."""

    def grid(self, grid: Grid, store: Store, work: dict[str, int]) -> None:
        """Hear the list of runs, which may have grown, and the work of each by run id."""

    def started(self, planned: Planned, work: int) -> None:
        """Hear that a run begins."""

    def work(self, units: int) -> None:
        """Hear that this much of the present run's work is done."""

    def finished(self, planned: Planned, status: str) -> None:
        """Hear that a run has ended, done or failed."""

    def waiting(self, runs: int) -> None:
        """Hear that all pending runs are in other processes' hands."""


def read_study(path: Path, overrides: tuple[str, ...] = ()) -> StudyFile:
    """Read a study file and check everything that needs neither model nor data."""
    return load_study(path, overrides, check=arm_faults)


def arm_faults(tree: dict[str, Any]) -> list[Fault]:
    """Return the faults of a raw study's strategies: unknown ones, options they do not take."""
    arms = tree.get("arms")
    common = ArmConfig.model_fields.keys() - {"base", "min", "max", "of", "ranks"}
    faults = []
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        if not isinstance(arm, dict) or not isinstance(arm.get("strategy"), str):
            continue  # the schema says so
        options = {k: v for k, v in arm.items() if k in ArmConfig.model_fields and k not in common}
        try:
            resolve(arm["strategy"], options)
        except RankwiseError as error:
            faults.append(Fault(("arms", name), str(error)))
    return faults


def prepare_data(file: StudyFile, tokenizer: Any) -> data.Prepared:
    """Fetch, read, tokenise and split the study's rows."""
    wanted = file.config.data
    found = sources.fetch(wanted.source, kind="data", relative_to=file.path.parent)
    return data.prepare(
        rows.read_rows(found.path),
        tokenizer,
        train=wanted.train,
        validation=wanted.validation,
        test=wanted.test,
        reserved=wanted.reserved,
        max_length=wanted.max_length,
        prompt=wanted.prompt,
        source=wanted.source,
    )


def open_study(path: Path, results: Path, overrides: tuple[str, ...] = ()) -> Study:
    """Read a study, load its model and data, and check that every arm can be planned.

    Raises:
        RankwiseError: for any fault of the file, a source that cannot be had, or a plan that cannot be
            made; all such faults at once where they are independent.
    """
    file = read_study(path, overrides)
    config = file.config
    store = Store(results, config.name)
    device = machine.device_for(config.train)
    dtype, threads = machine.dtype_for(config.train, device), machine.threads_for(config.train)
    base = models.load(config.model, dtype, device, path.parent)
    prepared = prepare_data(file, base.tokenizer)
    if config.confirmatory and not prepared.splits.reserved:
        raise faults_error(
            path, file.lines, [Fault(("confirmatory",), "there are no reserved rows to open.")]
        )
    found = inventory(base.model, accept_unreachable=config.accept_unreachable)
    context = Context(config, base, prepared, found, device, dtype, threads)
    study = Study(file, context, store)
    if faults := plan_faults(study):
        raise faults_error(path, file.lines, faults)
    return study


def plan_faults(study: Study) -> list[Fault]:
    """Return one fault for every arm whose plan cannot be made on this model."""
    faults = []
    for name in study.config.arms:
        try:
            plan_for(run_config(study, name, "reporting", 0, 1e-3), study.context.inventory, "")
        except RankwiseError as error:
            faults.append(Fault(("arms", name), str(error)))
    return faults


# --- the loop -------------------------------------------------------------------------------


def run_study(
    study: Study, observer: Observer, *, checkpoint_seconds: float = 30.0, retry_failed: bool = False
) -> dict[str, Any]:
    """Do every pending run of the study and return its index (see `write_index`).

    Runs that another process holds are left to it and waited for; if that process dies, they are taken
    over from their last checkpoint.
    """
    study.store.open()
    _open_reserved(study)
    _declare(study)
    if retry_failed:
        for planned in grid(study).runs:
            if study.store.state(planned.run_id) == "failed":
                study.store.discard(planned.run_id)
    while True:
        now = grid(study)
        index = write_index(study, now)
        observer.grid(now, study.store, {p.run_id: work_of(p.run, study.context) for p in now.runs})
        pending = now.pending(study.store)
        if not pending and not now.unfinished:
            return index
        advanced = [_do(study, planned, observer, checkpoint_seconds) for planned in pending]
        if pending and not any(advanced):
            observer.waiting(len(pending))
            time.sleep(WAIT_SECONDS)


def _do(study: Study, planned: Planned, observer: Observer, checkpoint_seconds: float) -> bool:
    """Do one run if nobody else holds it; return whether the study is now further on."""
    store, run_id = study.store, planned.run_id
    with store.claim(run_id) as mine:
        if not mine:
            return False
        if store.has(run_id):
            return True
        observer.started(planned, work_of(planned.run, study.context))
        if store.adopt(run_id):
            status = str(store.record(run_id)["status"])
        else:
            status = execute(
                planned.run,
                study.context,
                store,
                arm=planned.arm,
                checkpoint_seconds=checkpoint_seconds,
                on_work=observer.work,
            )
    observer.finished(planned, status)
    return True


def train_one(study: Study, arm: str, seed: int, rate: float | None, observer: Observer) -> Planned:
    """Do one reporting run; the rate is the arm's tuned or declared one unless given."""
    if arm not in study.config.arms:
        raise RankwiseError(one_of("--arm", arm, study.config.arms))
    rate = rate or grid(study).rates[arm]["rate"]
    if rate is None:
        raise RankwiseError(
            f"the rate of arm {arm!r} is not tuned yet: run `rankwise study run {study.file.path}` first, "
            "or give --rate."
        )
    study.store.open()
    _open_reserved(study)
    planned = Planned(arm, "reporting", seed, rate, run_config(study, arm, "reporting", seed, rate))
    while not study.store.has(planned.run_id):
        if not _do(study, planned, observer, 30.0):
            observer.waiting(1)
            time.sleep(WAIT_SECONDS)
    return planned


def write_index(study: Study, now: Grid) -> dict[str, Any]:
    """Write `study.json`, the resolved study and where each of its runs lies; return it."""
    context = study.context
    index = {
        "config": study.config.model_dump(mode="json"),
        "resolved": {
            "device": context.device,
            "dtype": context.dtype,
            "threads": context.threads,
            "model": context.base.fingerprint,
            "data": context.prepared.fingerprint,
            "notices": [*context.base.notices, *context.inventory.notices, *context.prepared.notices],
        },
        "exploratory": _declared(study) != declaration(study.config),
        "tuning_unfinished": now.unfinished,
        "rates": now.rates,
        "runs": [
            {"arm": p.arm, "role": p.role, "seed": p.seed, "rate": p.rate, "run_id": p.run_id}
            for p in now.runs
        ],
    }
    write_json(study.store.folder / "study.json", index)
    return index


def declaration(config: StudyConfig) -> dict[str, Any]:
    """Return what must be declared before anything runs."""
    return {
        "primary": config.primary,
        "margin": config.margin,
        "baseline": config.baseline,
        "contrasts": list(config.contrasts),
    }


def _declare(study: Study) -> None:
    """Write `declared.json` once, before the first run; later changes make the study exploratory."""
    path = study.store.folder / "declared.json"
    if not path.exists():
        write_json(path, declaration(study.config))


def _declared(study: Study) -> Any:
    path = study.store.folder / "declared.json"
    return json.loads(path.read_text()) if path.exists() else declaration(study.config)


def _open_reserved(study: Study) -> None:
    """Note that this study opens the reserved rows of its data; refuse if another has."""
    if not study.config.confirmatory:
        return
    rows_opened = digest(sorted(row.row_hash for row in study.context.prepared.splits.reserved))
    path = study.store.results / f"reserved-{rows_opened}.json"
    mine = {"study": study.config.name, "config": digest(study.config.model_dump(mode="json"))}
    opened = json.loads(path.read_text()) if path.exists() else mine
    if opened != mine:
        raise RankwiseError(
            f"the reserved rows of this data were opened before, by study {opened.get('study')!r} ({path}); "
            "rows that have been seen cannot confirm a second time."
        )
    write_json(path, mine)
