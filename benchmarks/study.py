"""Wall time of the quickstart study beside the same grid run as a loop over Transformers' Trainer + PEFT.

rankwise: `rankwise study run studies/quickstart.yaml` as one process, results in a temporary folder. It also
scores the untouched model, which the loop does not.

The peer is what one would write instead: for every arm and seed a process that loads the model, attaches the
arm's plan through `plan.lora_config()`, trains with `Trainer` (batches of like length, as many optimizer
steps as rankwise takes on those rows) and scores the test rows in padded batches of like length. It runs in
bf16 autocast where the processor multiplies bf16 itself, else in fp32, which is then its faster setting.
Both sides get the same plans, rows, initial adapters, rate and schedule.

    python -m benchmarks.study                       shortened: 8 rows, 8 test rows, 1 seed
    python -m benchmarks.study --full                the study as it stands
    python -m benchmarks.study --set data.train=16
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

SHORT = ("data.train=8", "data.test=8", "data.validation=2", "seeds.reporting=1")


def main() -> int:
    """Read the flags and measure; in a measuring process, do the job."""
    parser = common.parser(__doc__, "study")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a key")
    parser.add_argument("--repetitions", type=int, default=1, help="of both sides [%(default)s]")
    flags = parser.parse_args()
    if flags.job:
        common.answer_job(flags.job, peer_run)
        return 0
    overrides = [*([] if flags.full else SHORT), *flags.set]
    sides: dict[str, list[dict[str, Any]]] = {"rankwise": [], "peer": []}
    failures: list[str] = []
    for _, side in common.interleaved(list(sides), flags.repetitions):
        try:
            sides[side].append(rankwise_study(overrides) if side == "rankwise" else peer_study(overrides))
        except common.Failed as error:
            failures.append(f"{side}: {error}")
            common.console.print(failures[-1], style="red", markup=False, highlight=False)
    summary = {
        side: {
            "wall_seconds": common.spread(one["seconds"] for one in found),
            "runs": len(found[0]["runs"]),
            "train_tokens": sum(run["train_tokens"] for run in found[0]["runs"]),
        }
        for side, found in sides.items()
        if found
    }
    factor = None
    if len(summary) == 2:
        factor = summary["peer"]["wall_seconds"]["median"] / summary["rankwise"]["wall_seconds"]["median"]
    report(summary, sides, factor)
    content = {
        "machine": common.machine_description(), "settings": {"overrides": overrides}, "summary": summary,
        "ratio": factor, "repetitions": sides, "failures": failures,
    }  # fmt: skip
    common.write(flags.out, content)
    return common.finish(failures)


def rankwise_study(overrides: list[str]) -> dict[str, Any]:
    """Run the study as a person would, and read its records."""
    with tempfile.TemporaryDirectory(prefix="rankwise-bench-") as folder:
        results, printed = Path(folder) / "results", Path(folder) / "output"
        command = [
            sys.executable, "-m", "rankwise", "study", "run", str(common.STUDY), "--results", str(results)
        ]  # fmt: skip
        for text in overrides:
            command += ["--set", text]
        seconds = -time.perf_counter()
        with printed.open("w") as output:
            status = common.run_process(command, output, 7200, {})
        seconds += time.perf_counter()
        if status != 0:
            tail = "\n".join(printed.read_text().splitlines()[-25:])
            raise common.Failed(f"rankwise study run ended with {status}:\n{tail}")
        records = [json.loads(path.read_text()) for path in results.rglob("result.json")]
    runs = [_run_of(record) for record in records if "train_tokens" in record["train_info"]]
    common.console.print(f"rankwise study  {seconds:.0f} s", style="dim", highlight=False)
    return {"seconds": seconds, "runs": runs}


def _run_of(record: dict[str, Any]) -> dict[str, Any]:
    info = record["train_info"]
    keys = ("train_tokens", "train_time", "evaluation_time", "steps", "process_peak_bytes")
    found = {key: info[key] for key in keys}
    return found | {"arm": record["run_info"]["experiment_name"], "test_loss": info["metrics"]["test_loss"]}


def peer_study(overrides: list[str]) -> dict[str, Any]:
    """Run the same grid as a loop of processes, one per arm and seed."""
    from rankwise.studyfile import read_study

    config = read_study(common.STUDY, tuple(overrides)).config
    seconds = -time.perf_counter()
    runs = []
    for seed in range(config.seeds.reporting):
        for arm in config.arms:
            runs.append(common.fresh("benchmarks.study", {"arm": arm, "seed": seed, "overrides": overrides}))
            took = f"{runs[-1]['process_seconds']:.0f} s"
            common.console.print(f"peer  {arm}, seed {seed}  {took}", style="dim", highlight=False)
    return {"seconds": seconds + time.perf_counter(), "runs": runs}


def peer_run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one arm and seed with Trainer + PEFT: the work of one of the loop's processes."""
    from benchmarks.contenders import Progress, train_trainer
    from rankwise import adapters, machine, models
    from rankwise.data import training_rows
    from rankwise.engine.batches import optimizer_steps
    from rankwise.inventory import inventory
    from rankwise.strategies import allocate
    from rankwise.studydata import prepare_data, read_data
    from rankwise.studyfile import read_study

    file = read_study(common.STUDY, tuple(job["overrides"]))
    study, arm, seed = file.config, file.config.arms[job["arm"]], job["seed"]
    device = machine.device_for(study.train)
    machine.threads_for(study.train)
    base = models.load(study.model, "fp32", device, common.STUDY.parent)
    prepared = prepare_data(file, read_data(file), base.tokenizer)
    modules = inventory(base.model)
    plan = allocate(
        modules.select(arm.targets or study.targets), study_targets_inventory=modules.select(study.targets),
        strategy=arm.strategy, budget=arm.budget, match=arm.match, scale=arm.scale or study.scale,
        options=arm.options, seed=seed, model=study.model,
    )  # fmt: skip
    model = adapters.attach(base.model, plan, seed=seed, dropout=study.train.dropout)
    rows = training_rows(prepared, seed, study.data.train)
    steps = len(optimizer_steps(rows, study.train.model_copy(update={"epochs": 1}), seed))
    machine.reset_peak_memory(device)
    progress = Progress()
    bf16 = machine.bf16_native(device)
    rate = arm.learning_rate or study.train.learning_rates[0]
    train = study.train.model_copy(update={"learning_rates": (rate,)})
    trainer = train_trainer(
        model, rows, train, progress, batch=max(1, round(len(rows) / steps)), bf16=bf16, grouped=True,
        seed=seed,
    )  # fmt: skip
    peak = machine.peak_memory(device)["process_peak_bytes"]
    began = time.perf_counter()
    loss = evaluate_padded(trainer, prepared.splits.test)
    return {
        "arm": job["arm"], "seed": seed, "dtype": "bf16" if bf16 else "fp32", "test_loss": loss,
        "train_tokens": sum(progress.tokens), "train_time": progress.seconds, "steps": len(progress.ended),
        "evaluation_time": time.perf_counter() - began, "process_peak_bytes": peak,
    }  # fmt: skip


def evaluate_padded(trainer: Any, rows: Any, batch: int = 8) -> float:
    """Return the loss per label token of padded batches: `Trainer.evaluate`, with its mean put right.

    (`Trainer.evaluate` weighs batches by rows, not by label tokens; its work is the same.)
    """
    import torch

    from benchmarks.contenders import IGNORE, as_dicts, padded

    model = trainer.model.eval()
    ordered = as_dicts(sorted(rows, key=lambda row: -len(row.input_ids)))
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ordered), batch):
            inputs = {k: v.to(model.device) for k, v in padded(ordered[start : start + batch]).items()}
            labels = int((inputs["labels"][:, 1:] != IGNORE).sum())
            total += model(**inputs).loss.item() * labels
            count += labels
    return total / count


def report(
    summary: dict[str, dict[str, Any]], sides: dict[str, list[dict[str, Any]]], factor: float | None
) -> None:
    """Print the two sides, the arms' losses beside each other, and the ratio."""
    rows = []
    for side, one in summary.items():
        runs = sides[side][0]["runs"]
        train, scored = (sum(run[key] for run in runs) for key in ("train_time", "evaluation_time"))
        peak = max(run["process_peak_bytes"] for run in runs) / 1e9
        rows.append(
            (side, str(one["runs"]), f"{one['train_tokens']:,}", common.shown(one["wall_seconds"]),
             f"{train:.0f}", f"{scored:.0f}", f"{peak:.1f}")
        )  # fmt: skip
    columns = "side", "trained runs", "tokens", "wall s", "training s", "scoring s", "peak GB"
    common.table("The quickstart study", columns, rows)
    if factor is None:
        return
    arms = list(dict.fromkeys(run["arm"] for run in sides["peer"][0]["runs"]))
    losses = [
        (arm, *(f"{_mean(run['test_loss'] for run in sides[side][0]['runs'] if run['arm'] == arm):.4f}"
                for side in ("rankwise", "peer")))
        for arm in arms
    ]  # fmt: skip
    common.table("Test loss (the peer's steps hold other rows)", ("arm", "rankwise", "peer"), losses)
    common.console.print(f"wall time peer/rankwise: {factor:.2f}x   goal 6", highlight=False)


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


if __name__ == "__main__":
    sys.exit(main())
