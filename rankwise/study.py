"""A study: opened with everything it names, then run until no run is pending.

Several processes may work on one study: each claims runs, and takes over those of a process that died.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from rankwise import execution, generation, machine, models, sources
from rankwise.config import Fault, digest
from rankwise.engine import proof
from rankwise.errors import RankwiseError
from rankwise.grid import FIRST_TUNING_SEED, Grid, Planned, Study, grid, run_config
from rankwise.inventory import inventory
from rankwise.observer import Observer
from rankwise.run import execute, plan_for, work_of
from rankwise.runconfig import Context, Role
from rankwise.store import Store, read_json, write_json
from rankwise.studydata import general_rows, prepare_data, read_data
from rankwise.studyfaults import gather
from rankwise.studyfile import read_study

WAIT_SECONDS = 1.0


def open_study(path: Path, results: Path, overrides: tuple[str, ...] = ()) -> Study:
    """Read a study, load its model and data, and check that every arm can be planned.

    Raises:
        RankwiseError: for any fault of the file, a source that cannot be had, or a plan that cannot be
            made, each with its line; the cheap ones come first, and those of all arms at once.
    """
    file = read_study(path, overrides)
    config = file.config
    store = Store(results, config.name)
    faults: list[Fault] = []
    with gather(faults, "data", "source"):
        found = read_data(file)
    with gather(faults, "model"):
        sources.fetch(config.model, kind="model", relative_to=path.parent)
    with gather(faults, "train", "device"):
        device = machine.device_for(config.train)
    file.refuse(faults)
    dtype, threads = machine.dtype_for(config.train, device), machine.threads_for(config.train)
    machine.keep_freed_memory()
    with file.at("model"):
        base = models.load(config.model, dtype, device, path.parent)
        modules = inventory(base.model, accept_unreachable=config.accept_unreachable)
    engine = proof.choose(base.model, config.train.engine)
    with file.at("data"):
        prepared = prepare_data(file, found, base.tokenizer)
    with file.at("measure", "general_text"):
        general = general_rows(file, base.tokenizer)
    context = Context(config, base, prepared, modules, device, dtype, threads, engine, general)
    study = execution.settled(Study(file, context, store))
    faults = plan_faults(study)
    scored = context.test_rows(config.confirmatory)
    if config.measure.generate and scored and not generation.askable(scored, 1):
        rule = "measure.generate needs test rows with a prompt; these are plain text. Set it to 0."
        faults.append(Fault(("measure", "generate"), rule))
    if config.confirmatory and not prepared.splits.reserved:
        faults.append(Fault(("confirmatory",), "there are no reserved rows to open; give data.reserved."))
    file.refuse(faults)
    return study


def plan_faults(study: Study) -> list[Fault]:
    """Return one fault for every arm whose plan cannot be made on this model."""
    faults: list[Fault] = []
    with gather(faults, "targets"):
        study.context.inventory.select(study.config.targets)
    for name in study.config.arms if not faults else ():
        try:
            plan_for(run_config(study, name, "reporting", 0, 1e-3), study.context.inventory, "")
        except RankwiseError as error:
            faults.append(Fault(("arms", name), str(error)))
    return faults


# --- the loop -------------------------------------------------------------------------------


def run_study(
    study: Study, observer: Observer, *, checkpoint_seconds: float = 30.0, retry_failed: bool = False
) -> dict[str, Any]:
    """Do every pending run of the study in this process and return its index (see `write_index`)."""
    prepare(study, retry_failed=retry_failed)
    return work_through(study, observer, checkpoint_seconds=checkpoint_seconds, retry_failed=retry_failed)


def prepare(study: Study, *, retry_failed: bool = False) -> None:
    """Open the store, declare the study, and put failed runs back if they are to be tried again."""
    study.store.open()
    with FileLock(study.store.results / ".locks" / "declared.lock"):  # two studies may start at once
        _open_reserved(study)
        _declare(study)
    if retry_failed:
        for run_id in {planned.run_id for planned in grid(study).runs}:
            with study.store.claim(run_id) as mine:
                if mine and study.store.has(run_id) and study.store.record(run_id)["status"] == "failed":
                    study.store.discard(run_id)


def work_through(
    study: Study, observer: Observer, *, checkpoint_seconds: float, retry_failed: bool
) -> dict[str, Any]:
    """Claim and do runs until none is pending, in a study that is prepared; return its index.

    Where the study is about some arms only, theirs: they are not reported before the other arms' rates are
    tuned, since a grid is extended for all arms alike.
    Runs that another process holds are left to it and waited for; if that process dies, they are taken
    over from their last checkpoint.
    """
    while True:
        now = grid(study)
        index = write_index(study, now)
        mine = now.of(study.only)
        observer.grid(mine, study.store, {p.run_id: work_of(p.run, study.context) for p in mine.runs})
        pending = mine.pending(study.store)
        if not pending and (study.only or not now.unfinished):
            return index
        advanced = [_do(study, p, observer, checkpoint_seconds, retry_failed) for p in pending]
        if pending and not any(advanced):
            observer.waiting(len(pending))
            time.sleep(WAIT_SECONDS)


def _do(
    study: Study, planned: Planned, observer: Observer, checkpoint_seconds: float, retry_failed: bool = False
) -> bool:
    """Do one run if nobody else holds it; return whether the study is now further on."""
    store, run_id = study.store, planned.run_id
    with store.claim(run_id) as mine:
        if not mine:
            return False
        if store.has(run_id):
            return True
        observer.started(planned, work_of(planned.run, study.context))
        if store.adopt(run_id, failed=not retry_failed):
            status = str(store.record(run_id)["status"])
        else:
            status = execute(
                planned.run,
                study.context,
                store,
                arm=planned.arm,
                checkpoint_seconds=checkpoint_seconds,
                on_work=lambda units: observer.work(planned, units),
            )
    observer.finished(planned, status)
    return True


def train_one(study: Study, arm: str, seed: int, rate: float | None, observer: Observer) -> Planned:
    """Do one run. At the arm's own rate it is a reporting run; at any other it sees validation rows only.

    Otherwise a rate could be picked on the test rows.
    """
    study.file.need_arm(arm)
    if not 0 <= seed < FIRST_TUNING_SEED:
        raise RankwiseError(
            f"--seed is a reporting seed, from 0 to {FIRST_TUNING_SEED - 1} (tuning seeds count from "
            f"{FIRST_TUNING_SEED}); got {seed}."
        )
    if rate is not None and not 0 < rate < math.inf:
        raise RankwiseError(f"--rate is a learning rate above 0, such as 0.001; got {rate}.")
    own = grid(study).rates[arm]["rate"]
    role: Role = "reporting" if rate in (None, own) else "tuning"
    rate = rate or own
    if rate is None:
        raise RankwiseError(
            f"the rate of arm {arm!r} is not tuned yet: run `rankwise study run {study.file.path}` first, "
            "or give --rate."
        )
    study.store.open()
    with FileLock(study.store.results / ".locks" / "declared.lock"):  # two studies may start at once
        _open_reserved(study)
        _declare(study)
    planned = Planned(arm, role, seed, rate, run_config(study, arm, role, seed, rate))
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
            "engine": context.engine.name,
            "notices": context.notices,
        },
        "exploratory": _declared(study) != declaration(study),
        "tuning_unfinished": now.unfinished,
        "rates": now.rates,
        "runs": [
            {"arm": p.arm, "role": p.role, "seed": p.seed, "rate": p.rate, "run_id": p.run_id}
            for p in now.runs
        ],
    }
    write_json(study.store.folder / "study.json", index)
    return index


def declaration(study: Study) -> dict[str, Any]:
    """Return what must be declared before anything runs: all that decides the numbers and the verdicts.

    Seeds are among it, since adding them until something shows is exploring too. Sources are there by
    their content, so that a mirror of the same bytes is no change.
    """
    declared = study.config.model_dump(mode="json", exclude={"name": True, "model": True, "data": {"source"}})
    return declared | {
        "model": study.context.base.fingerprint,
        "rows": study.context.prepared.fingerprint,
    }


def _declare(study: Study) -> None:
    """Write `declared.json` once, before the first run; later changes make the study exploratory."""
    path = study.store.folder / "declared.json"
    if not path.exists():
        write_json(path, declaration(study))


def _declared(study: Study) -> Any:
    path = study.store.folder / "declared.json"
    remedy = "Restore it, or delete it to declare anew what the study file says now."
    return read_json(path, (), remedy) if path.exists() else declaration(study)


def _note_rows(study: Study) -> None:
    """Add the rows that this study may train or score on to `rows.json`: hashes, never text."""
    path = study.store.folder / "rows.json"
    remedy = "It notes which rows the study used: restore it."
    before = read_json(path, ("rows",), remedy)["rows"] if path.exists() else []
    splits = study.context.prepared.splits
    now = {row.row_hash for part in (splits.pool, splits.validation, splits.test) for row in part}
    if not now <= set(before):
        write_json(path, {"rows": sorted(now | set(before))})


def _open_reserved(study: Study) -> None:
    """Note which rows the study uses; a confirmatory one opens the reserved rows, if none was seen before."""
    if not study.config.confirmatory:
        _note_rows(study)
        return
    rows = sorted(row.row_hash for row in study.context.prepared.splits.reserved)
    for path in sorted(study.store.results.glob("*/rows.json")):
        used = read_json(path, ("rows",), "It notes which rows the study used: restore it.")["rows"]
        if seen := set(rows) & set(used):
            raise RankwiseError(
                f"{len(seen)} of the {len(rows)} reserved rows were used by study {path.parent.name!r} "
                f"({path}); rows that have been seen cannot confirm. Studies on the same data need the same "
                "data.reserved."
            )
    config = digest(study.config.model_dump(mode="json"))
    mine = {"study": study.config.name, "config": config, "rows": rows}
    remedy = "It notes which study has seen the reserved rows: restore it."
    for path in sorted(study.store.results.glob("reserved-*.json")):
        opened = read_json(path, ("study", "config", "rows"), remedy)
        if opened != mine and not set(rows).isdisjoint(opened["rows"]):
            raise RankwiseError(
                f"the reserved rows of this data were opened before, by study {opened['study']!r} ({path}); "
                "rows that have been seen cannot confirm a second time."
            )
    _note_rows(study)
    write_json(study.store.results / f"reserved-{digest(rows)}.json", mine)
