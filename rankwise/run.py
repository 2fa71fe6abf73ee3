"""One run: a RunConfig becomes a record on disk (plan, read-back, training, evaluation)."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from rankwise import adapters, generation, machine, probes, rankuse
from rankwise.data import Example, training_rows
from rankwise.engine.batches import optimizer_steps
from rankwise.evaluate import Evaluation, evaluate
from rankwise.evidence import Evidence, Kind, Unmeasurable, stand_in
from rankwise.inventory import Inventory
from rankwise.methods import method_of
from rankwise.methods.session import Session
from rankwise.plans import RankPlan
from rankwise.runconfig import Context, RunConfig
from rankwise.store import FORMAT, Store, write_json
from rankwise.strategies import allocate, evidence_of, resolve
from rankwise.train import Diverged, Trained

TRAIN_COST = 3
"""Work of a trained token, in forward passes of one token: forward, and twice that backward."""


def plan_for(
    run: RunConfig, inventory: Inventory, model: str, evidence: Mapping[str, Evidence] | None = None
) -> RankPlan:
    """Return the plan that the run's arm asks for, or that its training starts from.

    Without evidence, strategies that look at data get a stand-in: the plan then only shows whether options
    and budget are sound.
    """
    modules = inventory.select(run.targets)
    kind = needed(run)["strategy"]
    shapes = {module.name: (module.in_features, module.out_features) for module in modules}
    probe = None if kind is None else stand_in(kind, shapes) if evidence is None else evidence[kind]
    return allocate(
        modules,
        study_targets_inventory=inventory.select(run.study_targets),
        strategy=run.strategy,
        budget=run.budget,
        match=run.match,
        scale=run.scale,
        options=run.options,
        seed=run.seed,
        model=model,
        probe=probe,
    )


def needed(run: RunConfig) -> dict[str, Kind | None]:
    """Return which probe the run's strategy reads, and which its initialisation."""
    _, options = resolve(run.strategy, run.options, run.seed)
    starts: dict[str, Kind | None] = {"default": None, "eva": "inputs", "gradient": "gradients"}
    return {"strategy": evidence_of(run.strategy, options), "init": starts[run.init]}


def evidence_for(
    run: RunConfig, context: Context, on_work: Callable[[int], None] = lambda units: None
) -> dict[str, Evidence]:
    """Measure what the run's strategy and initialisation read, or take it from the cache.

    The calibration rows are the first of the run's own training draw, so a seed redraws them too, and arms,
    rates and budgets of one seed share what is measured.
    """
    rows = training_rows(context.prepared, run.seed, min(run.calibration, run.train_rows))
    found: dict[str, Evidence] = {}
    for kind in probed(run):
        with _told(probe_work(run, context), on_work) as on_progress:
            found[kind] = probes.evidence(
                kind, context.base.model, context.inventory, rows, engine=context.engine,
                micro_tokens=run.train.micro_tokens, seed=run.seed, on_progress=on_progress,
                fingerprint=f"{run.model} {run.dtype} {run.device} {run.threads}",
            )  # fmt: skip
    return found


def probed(run: RunConfig) -> list[Kind]:
    """Return the probes that the run reads."""
    return [kind for kind in dict.fromkeys(needed(run).values()) if kind is not None]


def probe_work(run: RunConfig, context: Context) -> int:
    """Estimate one probe's work in forward passes of one token; none is spent where it is in the cache."""
    return int(TRAIN_COST * mean_tokens(context) * min(run.calibration, run.train_rows))


@contextmanager
def _told(work: int, on_work: Callable[[int], None]) -> Iterator[Callable[[int, int], None]]:
    """Pass progress on as units of work, `work` in all, whatever the probe tells."""
    told = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal told
        units = max(0, min(work, work * done // max(1, total)) - told)
        told += units
        on_work(units)

    yield on_progress
    on_work(work - told)


def directions_of(run: RunConfig, evidence: Mapping[str, Evidence]) -> Mapping[str, np.ndarray]:
    """Return the directions that A's rows start along; empty for PEFT's default."""
    quantity = {"eva": "components", "gradient": "right_vectors"}
    kind = needed(run)["init"]
    return {} if kind is None else evidence[kind].of(quantity[run.init])


def execute(
    run: RunConfig,
    context: Context,
    store: Store,
    *,
    arm: str,
    checkpoint_seconds: float = 30.0,
    on_work: Callable[[int], None] = lambda units: None,
) -> str:
    """Do the run (or what is left of it) and write its record; return its status, done or failed.

    The caller holds the run's claim. A run whose loss stops being finite is recorded as failed, with the
    step, the reason, the module and the last good metrics. Anything else that goes wrong leaves the run
    pending.
    """
    folder = store.partial(run.run_id)
    folder.mkdir(parents=True, exist_ok=True)
    machine.reset_peak_memory(context.device)
    started = time.time()
    staged = store.stage(run.run_id)
    log = folder / "metrics.jsonl"
    parts: dict[str, Any]
    try:
        if run.role == "untouched":
            with context.engine.installed(context.base.model):
                parts = _score(run, context, context.base.model, staged, on_work)
            parts["metrics"] |= _answer(run, context, context.base.model, staged)
        else:
            parts = _train_and_score(run, context, folder, staged, checkpoint_seconds, on_work)
        parts["status"] = "done"
    except Diverged as error:
        failure = {"step": error.step, "reason": error.reason, "last_metrics": error.last}
        parts = {"status": "failed", "metrics": {}, "failure": failure}
    except Unmeasurable as error:
        failure = {"step": 0, "reason": f"before training, {error}", "last_metrics": None}
        parts = {"status": "failed", "metrics": {}, "failure": failure}
    except FloatingPointError as error:
        steps = read_log(log) if log.exists() else []
        last = steps[-1] if steps else None
        failure = {"step": len(steps), "reason": f"in evaluation, {error}", "last_metrics": last}
        parts = {"status": "failed", "metrics": {}, "failure": failure}
    _write_record(run, context, staged, parts, arm=arm, started=started, log=log)
    store.finish(run.run_id, staged)
    return parts["status"]


def _train_and_score(
    run: RunConfig,
    context: Context,
    folder: Path,
    staged: Path,
    checkpoint_seconds: float,
    on_work: Callable[[int], None],
) -> dict[str, Any]:
    evidence = evidence_for(run, context, on_work)
    machine.reset_peak_memory(context.device)  # the probe's peak is whichever arm's that came first
    session = session_for(run, context, folder, evidence)
    session.plan.save(staged / "plan.json")  # a run that fails keeps what it started from
    session = replace(
        session,
        checkpoint_seconds=checkpoint_seconds,
        on_step=lambda entry: on_work(TRAIN_COST * entry["tokens"]),
    )
    with method_of(run.strategy)(session) as (adapted, outcome):
        outcome.plan.save(staged / "plan.json")
        parts = _score(run, context, adapted, staged, on_work)
        parts["unfused"] = len(context.engine.unfused)
        parts["adapter_bytes"] = adapters.save(adapted, staged / "adapter")
        parts["trainable"] = adapters.trainable_parameters(adapted)
        parts["rank_use"] = _rank_use(adapted, staged)
    if outcome.details:
        write_json(staged / "method.json", outcome.details)
    if run.measure is not None and run.measure.generate:
        with adapters.saved(context.base.model, staged / "adapter") as adapted:  # as its user will load it
            parts["metrics"] |= _answer(run, context, adapted, staged)
    summaries = [one.summary() for one in evidence.values()]
    return parts | {
        "trained": outcome.trained,
        "most_trainable": outcome.trained_parameters,
        "probes": summaries,
    }


def session_for(
    run: RunConfig, context: Context, folder: Path, evidence: Mapping[str, Evidence] | None = None
) -> Session:
    """Return the run's training; without evidence (for timing), on a stand-in plan and PEFT's start."""
    plan = plan_for(run, context.inventory, context.base.source, evidence)
    rows = training_rows(context.prepared, run.seed, run.train_rows)
    return Session(
        model=context.base.model,
        inventory=context.inventory.select(run.targets),
        plan=plan,
        engine=context.engine,
        steps=optimizer_steps(rows, run.train, run.seed),
        config=run.train,
        rate=run.train.learning_rates[0],
        seed=run.seed,
        folder=folder,
        directions=directions_of(run, evidence) if evidence is not None else {},
        b_ratio=run.loraplus_lr_ratio,
    )


def scored_splits(run: RunConfig, context: Context) -> dict[str, tuple[Example, ...]]:
    """Return the rows that a run of this role may see: tuning runs never touch the test rows."""
    test, validation = context.test_rows(run.confirmatory), context.prepared.splits.validation
    found = {
        "untouched": {"validation": validation, "test": test},
        "tuning": {"validation": validation},
        "reporting": {"test": test},
    }[run.role]
    return found | ({"general": context.general} if run.measure is not None and run.measure.general else {})


def _score(
    run: RunConfig, context: Context, model: Any, staged: Path, on_work: Callable[[int], None]
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    began = time.perf_counter()
    for split, rows in scored_splits(run, context).items():
        micro_tokens, engine = run.train.micro_tokens, context.engine
        result = evaluate(model, rows, micro_tokens=micro_tokens, engine=engine, on_tokens=on_work)
        metrics |= {f"{split}_{name}": value for name, value in result.metrics.items()}
        _write_examples(staged / ("examples.parquet" if split == "test" else f"{split}.parquet"), result)
    return {"metrics": metrics, "evaluation_seconds": time.perf_counter() - began}


def _write_examples(path: Path, result: Evaluation) -> None:
    pyarrow.parquet.write_table(pyarrow.table(result.examples), path)


def _rank_use(adapted: Any, staged: Path) -> dict[str, float] | None:
    """Write how much of its rank each module uses; return the summary."""
    columns = rankuse.rank_use(adapted)
    pyarrow.parquet.write_table(pyarrow.table(columns), staged / "rank_use.parquet")
    return rankuse.summary(columns)


def _answer(run: RunConfig, context: Context, model: Any, staged: Path) -> dict[str, float]:
    """Answer the fixed rows and write each one's scores, never text; return the metrics that are wanted."""
    if run.measure is None or not run.measure.generate:
        return {}
    rows = generation.askable(context.test_rows(run.confirmatory), run.measure.generate)
    tokens, tokenizer = run.measure.generate_tokens, context.base.tokenizer
    found = generation.answers(model, tokenizer, rows, tokens=tokens)
    metrics, each = generation.quality(found, generation.references(tokenizer, rows, tokens=tokens))
    columns = {"row_hash": [row.row_hash for row in rows], **each}
    pyarrow.parquet.write_table(pyarrow.table(columns), staged / "answers.parquet")
    return {f"generation_{name}": value for name, value in metrics.items()}


def _write_record(
    run: RunConfig,
    context: Context,
    staged: Path,
    parts: dict[str, Any],
    *,
    arm: str,
    started: float,
    log: Path,
) -> None:
    """Write every file of the record; field groups follow PEFT's method comparison."""
    env = machine.describe(context.device, context.threads)
    result = {
        "format": FORMAT,
        "run_id": run.run_id,
        "status": parts["status"],
        "failure": parts.get("failure"),
        "run_info": {"created_at": env["time"], "experiment_name": arm, "total_time": time.time() - started},
        "train_info": _train_info(context, parts),
        "meta_info": {
            "model_info": {
                "source": context.base.source,
                "fingerprint": run.model,
                "notices": context.base.notices,
            },
            "dataset_info": {"source": context.study.data.source, "fingerprint": run.data},
            "package_info": env["packages"],
            "system_info": {k: v for k, v in env.items() if k != "packages"},
        },
    }
    write_json(staged / "config.json", run.model_dump(mode="json"))
    write_json(staged / "env.json", env)
    if log.exists():
        shutil.copyfile(log, staged / "metrics.jsonl")
    write_json(staged / "result.json", result)


def _train_info(context: Context, parts: dict[str, Any]) -> dict[str, Any]:
    """Return what the run measured: metrics, parameters, times, memory, sizes."""
    trained: Trained | None = parts.get("trained")
    info = {
        "status": parts["status"],
        "metrics": parts["metrics"],
        "num_trainable_params": parts.get("trainable", 0),
        "num_total_params": context.inventory.base_parameters + parts.get("trainable", 0),
        "evaluation_time": parts.get("evaluation_seconds"),
        "file_size": parts.get("adapter_bytes", 0),
        **machine.peak_memory(context.device),
    }
    if trained is None:
        return info
    return info | {
        "train_time": trained.seconds,
        "train_tokens": trained.tokens,
        "train_label_tokens": trained.label_tokens,
        "tokens_per_second": trained.tokens / trained.seconds,
        "steps": trained.steps,
        "train_loss": trained.final_loss,
        "most_trainable_params": parts["most_trainable"],
        "probes": parts["probes"],
        "unfused_modules": parts["unfused"],
        "rank_use": parts["rank_use"],
    }


def work_of(run: RunConfig, context: Context) -> int:
    """Estimate a run's work in forward passes of one token, for the progress bar."""
    units = sum(len(row.input_ids) for rows in scored_splits(run, context).values() for row in rows)
    if run.role != "untouched":
        mean = mean_tokens(context)
        rows = run.train_rows * run.train.epochs
        if run.train.max_steps is not None:
            a_step = run.train.step_examples or max(1, (run.train.step_tokens or 0) / max(mean, 1))
            rows = min(rows, int(run.train.max_steps * a_step))
        units += int(TRAIN_COST * mean * rows) + len(probed(run)) * probe_work(run, context)
    return units


def mean_tokens(context: Context) -> float:
    """Return the mean tokens of a row of the pool."""
    pool = context.prepared.splits.pool
    return sum(len(row.input_ids) for row in pool) / max(1, len(pool))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]
