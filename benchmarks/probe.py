"""What the gradient probe costs: its time beside the training that it plans, its memory beside the model.

Every figure is a process of its own. Time: SmolLM2-135M in this machine's default precision, `--rows` Alpaca
rows (32, as studies have by default), beside one epoch over 200 rows of the same draw, uniform r=8 on all
linears. Training is measured on its first rows alone and scaled up by tokens. Both come after an untimed
start on 4 rows, so that neither pays for the process's first touch of memory. Memory: random weights in
DialoGPT-medium's exact shape (fp32 gradients of 1.2 GB), rows of 256 random tokens, micro-batches of 1,024;
peaks are the process's. "bare" is the same micro-batches forward and backward with the probe's hooks and
nothing accumulated: its peak is the model and one micro-batch's activations, and what a probe's peak is above
that, it has added.

    python -m benchmarks.probe            shortened: one repetition, training on 16 rows
    python -m benchmarks.probe --full     three repetitions, training on 64 rows
"""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks import common

EPOCH_ROWS, RANK, SEED = 200, 8, 0
SHAPE, MEMORY_ROWS, LENGTH, MICRO_TOKENS = "DialoGPT-medium", 8, 256, 1024
GOALS = {"exact": 0.30, "sketch": 0.17}
"""Most time of a probe, as a share of the epoch."""

ROOM = 300e6
"""Most bytes that a probe may add to the model and one micro-batch's activations."""


def main() -> int:
    """Read the flags and measure; in a measuring process, do the job."""
    parser = common.parser(__doc__, "probe")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows of the timing [%(default)s]")
    parser.add_argument("--train-rows", type=int, help="rows that training is timed on [16; full: 64]")
    parser.add_argument("--repetitions", type=int, help="processes per figure [1; full: 3]")
    parser.add_argument("--parts", default="time,memory", help="what to measure [%(default)s]")
    flags = parser.parse_args()
    if flags.job:
        common.answer_job(flags.job, measure)
        return 0
    jobs = jobs_of(flags.parts.split(","), flags.rows, flags.train_rows or (64 if flags.full else 16))
    answers, failures = common.collect(
        "benchmarks.probe", jobs, flags.repetitions or (3 if flags.full else 1)
    )
    summary = {name: summarise(found) for name, found in answers.items() if found}
    ratios = shares(summary)
    report(summary, ratios)
    settings = {"jobs": jobs, "epoch_rows": EPOCH_ROWS, "rank": RANK}
    content = {"machine": common.machine_description(), "settings": settings, "summary": summary}
    common.write(flags.out, content | {"ratios": ratios, "failures": failures})
    return common.finish(failures)


def jobs_of(parts: list[str], rows: int, train_rows: int) -> dict[str, dict[str, Any]]:
    """Return the jobs by name."""
    jobs: dict[str, dict[str, Any]] = {}
    if "time" in parts:
        jobs["time train"] = {"part": "time", "what": "train", "rows": train_rows}
        jobs |= {f"time {what}": {"part": "time", "what": what, "rows": rows} for what in GOALS}
    if "memory" in parts:
        jobs |= {f"memory {what}": {"part": "memory", "what": what} for what in ("bare", "exact", "auto")}
    return jobs


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job: the work of a measuring process."""
    from rankwise import machine

    machine.keep_freed_memory()
    return measure_time(job) if job["part"] == "time" else measure_memory(job)


def measure_time(job: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of training on some rows, or of a probe of them; and the tokens of the epoch."""
    from benchmarks.contenders import rankwise_engine
    from rankwise import machine, models
    from rankwise.config import TrainConfig
    from rankwise.data import training_rows
    from rankwise.studydata import prepare_data, read_data
    from rankwise.studyfile import read_study

    study = read_study(common.STUDY, (f"data.train={EPOCH_ROWS}",))
    config = TrainConfig(step_examples=8, learning_rates=(1e-3,))
    device = machine.device_for(config)
    machine.threads_for(config)
    dtype = machine.dtype_for(config, device)
    base = models.load(study.config.model, dtype, device, common.STUDY.parent)
    epoch = training_rows(prepare_data(study, read_data(study), base.tokenizer), SEED, EPOCH_ROWS)
    rows = epoch[: job["rows"]]
    engine = rankwise_engine(base.model, config.engine)
    about = {
        "dtype": dtype, "path": engine.name, "tokens": sum(len(row.input_ids) for row in rows),
        "epoch_tokens": sum(len(row.input_ids) for row in epoch),
    }  # fmt: skip
    if job["what"] == "train":
        return about | {"seconds": train(base.model, rows, config, engine)}
    probe(base.model, rows[:4], engine, config.micro_tokens, job["what"])
    machine.reset_peak_memory(device)
    return about | probe(base.model, rows, engine, config.micro_tokens, job["what"]) | peak_of(device)


def train(model: Any, rows: Any, config: Any, engine: Any) -> float:
    """Return the seconds of one epoch over the rows, after an untimed step on adapters thrown away."""
    from benchmarks.contenders import Progress, train_rankwise
    from rankwise import adapters
    from rankwise.engine.batches import optimizer_steps
    from rankwise.inventory import inventory
    from rankwise.strategies import allocate

    plan = allocate(inventory(model), strategy="uniform", budget=f"r={RANK}")
    for chosen in (rows[:4], rows):
        adapted, progress = adapters.attach(model, plan, seed=SEED), Progress()
        train_rankwise(adapted, optimizer_steps(chosen, config, SEED), config, progress, engine=engine)
        adapters.detach(adapted)
    return progress.seconds


def probe(model: Any, rows: Any, engine: Any, micro_tokens: int, method: str) -> dict[str, Any]:
    """Return the seconds of one gradient probe and what it says of itself."""
    from rankwise import probes
    from rankwise.inventory import inventory

    began = time.perf_counter()
    found = probes.evidence(
        "gradients", model, inventory(model), rows, engine=engine, micro_tokens=micro_tokens, seed=SEED,
        options={"method": method},
    )  # fmt: skip
    return {"seconds": time.perf_counter() - began, "method": found.about["method"], "cost": str(found.cost)}


def peak_of(device: str) -> dict[str, int]:
    """Return the peak bytes of the device that computes."""
    from rankwise import machine

    peaks = machine.peak_memory(device)
    return {"peak_bytes": peaks.get("device_peak_bytes", peaks["process_peak_bytes"])}


def measure_memory(job: dict[str, Any]) -> dict[str, Any]:
    """Return the peak of a probe of a medium model, or of bare micro-batches."""
    from benchmarks.contenders import rankwise_engine
    from benchmarks.growth import build, random_rows
    from rankwise import machine
    from rankwise.config import TrainConfig

    config = TrainConfig(step_examples=8, learning_rates=(1e-3,))
    device = machine.device_for(config)
    machine.threads_for(config)
    model = build(SHAPE).to(device).requires_grad_(False)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    engine = rankwise_engine(model, config.engine)
    rows = random_rows(MEMORY_ROWS, LENGTH, model.config.vocab_size)
    machine.reset_peak_memory(device)
    about = {"weights_bytes": weights, "before_bytes": machine.resident_memory(), "path": engine.name}
    if job["what"] == "bare":
        found = bare(model, engine, rows)
    else:
        found = probe(model, rows, engine, MICRO_TOKENS, job["what"])
    return about | found | peak_of(device)


def bare(model: Any, engine: Any, rows: Any) -> dict[str, Any]:
    """Pass the micro-batches forward and backward with the probe's hooks, which forget what they catch."""
    from rankwise.inventory import inventory
    from rankwise.probes.watch import still, sweep, watching

    began = time.perf_counter()
    with still(model), engine.installed(model):
        with watching(model, inventory(model).names, lambda name, x, g: None):
            batches = engine.batches(rows, MICRO_TOKENS)
            sweep(model, engine, batches, [1] * len(batches), lambda batch: None)
    return {"seconds": time.perf_counter() - began}


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians of what varies, and the rest as it is."""
    varying = [key for key in ("seconds", "peak_bytes", "before_bytes") if key in found[0]]
    return found[0] | {key: common.spread(one[key] for one in found) for key in varying}


def shares(summary: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each probe's share of the epoch's time, and the bytes that it adds, with the goals."""
    made: list[dict[str, Any]] = []
    trained, floor = summary.get("time train"), summary.get("memory bare")
    for what, goal in GOALS.items():
        one = summary.get(f"time {what}")
        if one and trained:
            epoch = trained["seconds"]["median"] * trained["epoch_tokens"] / trained["tokens"]
            share = one["seconds"]["median"] / epoch
            made.append({"what": f"time {what}, share of an epoch", "value": share, "goal": goal})
    for what in ("exact", "auto"):
        one = summary.get(f"memory {what}")
        if one and floor:
            added = one["peak_bytes"]["median"] - floor["peak_bytes"]["median"]
            made.append({"what": f"memory {what}, bytes added", "value": added, "goal": ROOM})
    return made


def report(summary: dict[str, dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    """Print the table and the ratios."""
    rows = [
        (
            name, one.get("method", ""), one["path"], f"{one['tokens']:,}" if "tokens" in one else "",
            common.shown(one["seconds"], ".1f"),
            f"{one['peak_bytes']['median'] / 1e9:.2f}" if "peak_bytes" in one else "", one.get("cost", ""),
        )
        for name, one in summary.items()
    ]  # fmt: skip
    columns = "job", "method", "path", "tokens", "seconds", "peak GB", "cost"
    common.table("The gradient probe", columns, rows)
    for line in ratios:
        value, goal = (
            (f"{line['value']:.1%}", f"{line['goal']:.0%}")
            if line["goal"] < 1
            else (f"{line['value'] / 1e6:.0f} MB", f"{line['goal'] / 1e6:.0f} MB")
        )
        common.console.print(f"{line['what']}: {value}   goal at most {goal}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
