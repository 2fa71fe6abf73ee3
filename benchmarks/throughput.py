"""Training speed and memory of rankwise beside Transformers' Trainer + PEFT and TRL's SFTTrainer.

One model (SmolLM2-135M), the same Alpaca rows, tokens and labels, the same adapters (r=16 on all linears,
scale 2), whole epochs, every contender in a process of its own, interleaved (A B C A B C), medians with
min-max. Timed is the training loop alone: from its beginning to the end of its last optimizer step, after an
untimed step on 4 rows with adapters that are then thrown away, so that everybody is warm and everybody is
timed on every token of the epochs. Tokens are real tokens; padding never counts. Peak memory is the process's
(VmHWM), reset after loading. The test loss is everybody's adapters on the same fp32 base through the same
plain reference, so that nobody is fast by learning less.

    python -m benchmarks.throughput                      shortened
    python -m benchmarks.throughput --full               the reported size
    python -m benchmarks.throughput --contenders a,c,e
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import common, flops

CONTENDERS = {
    "a": "Trainer + PEFT, fp32, batch 8",
    "b": "Trainer + PEFT, bf16 autocast, by length",
    "b32": "Trainer + PEFT, fp32, by length",
    "c": "TRL SFTTrainer at its best here",
    "p": "rankwise, plain path, fp32",
    "d": "rankwise, fp32",
    "e": "rankwise, default",
}
OURS = ("p", "d", "e")
SEED, RATE, RANK, SCALE, STEP_ROWS, WARM_ROWS = 0, 1e-3, 16, 2.0, 8, 4
SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)]
"""(out, in) of SmolLM2-135M's linear maps: q and o, k and v, gate and up, down."""


class Ready(NamedTuple):
    """What a contender starts from."""

    base: Any
    config: Any  # TrainConfig
    rows: list[Any]  # in the order of the optimizer steps
    steps: list[list[Any]]
    test: Sequence[Any]
    plan: Any
    device: str
    dtype: str
    engine: Any  # rankwise's way through the model; None for peers


def main() -> int:
    """Read the flags and measure; in a measuring process, do the job."""
    parser = common.parser(__doc__, "throughput")
    parser.add_argument("--rows", type=int, help="training rows [8; full: 64]")
    parser.add_argument("--repetitions", type=int, help="processes per contender [3; full: 5]")
    parser.add_argument("--epochs", type=int, default=1, help="whole passes over the rows [%(default)s]")
    parser.add_argument("--test", type=int, default=32, help="held-out rows [%(default)s]")
    parser.add_argument("--max-length", type=int, default=512, help="tokens per row [%(default)s]")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="letters [%(default)s]")
    parser.add_argument(
        "--peers-keep-memory", action="store_true", help="give the peers rankwise's allocator settings too"
    )
    parser.add_argument(
        "--probe-trl", action="store_true", help="first try (c)'s settings on 16 rows and take the fastest"
    )
    flags = parser.parse_args()
    if flags.job:
        common.answer_job(flags.job, lambda job: flops.ceiling(job) if "shapes" in job else measure(job))
        return 0
    flags.rows = flags.rows or (64 if flags.full else 8)
    flags.repetitions = flags.repetitions or (5 if flags.full else 3)
    chosen = flags.contenders.split(",")
    if unknown := set(chosen) - set(CONTENDERS):
        parser.error(f"no contender {', '.join(sorted(unknown))}; they are {', '.join(CONTENDERS)}")
    settings = {
        name: getattr(flags, name)
        for name in ("rows", "repetitions", "epochs", "test", "max_length", "peers_keep_memory")
    }
    jobs: dict[str, dict[str, Any]] = {name: {"contender": name, **settings} for name in chosen}
    jobs["ceiling"] = {"shapes": SHAPES, "seconds": 0.5}
    failures: list[str] = []
    if "c" in jobs:
        jobs["c"]["trl"], failures = probe_trl(jobs["c"]) if flags.probe_trl else (trl_best(), [])
    answers, failed = common.collect("benchmarks.throughput", jobs, flags.repetitions)
    failures += failed
    ceilings = answers.pop("ceiling")
    best = flops.best(ceilings) if ceilings else {}
    summary = {name: summarise(found, best) for name, found in answers.items() if found}
    report(summary, best)
    content = {
        "machine": common.machine_description(), "jobs": jobs, "ceiling_gflops": best,
        "ceilings": ceilings, "summary": summary, "ratios": ratios(summary), "repetitions": answers,
        "failures": failures,
    }  # fmt: skip
    common.write(flags.out, content)
    return common.finish(failures)


def trl_best() -> dict[str, Any]:
    """Return (c)'s declared setting for this machine."""
    import torch

    from benchmarks.contenders import TRL_BEST

    return TRL_BEST["cuda" if torch.cuda.is_available() else "cpu"]


def probe_trl(job: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fastest of TRL's settings here, and what failed; fp32, and bf16 where it is native."""
    import torch

    from benchmarks.contenders import TRL_SETTINGS
    from rankwise import machine

    bf16 = machine.bf16_native("cuda" if torch.cuda.is_available() else "cpu")
    tried = {
        f"{name}, {'bf16' if half else 'fp32'}": job | {"rows": 16, "trl": setting | {"bf16": half}}
        for name, setting in TRL_SETTINGS.items()
        for half in ([False, True] if bf16 else [False])
    }
    answers, failures = common.collect("benchmarks.throughput", tried, 1)
    speeds = {name: found[0]["tokens"] / found[0]["seconds"] for name, found in answers.items() if found}
    for name, speed in sorted(speeds.items(), key=lambda one: -one[1]):
        common.console.print(f"TRL {name}: {speed:.0f} tokens/s", highlight=False)
    chosen = max(speeds, key=lambda name: speeds[name]) if speeds else None
    return (tried[chosen]["trl"] if chosen else trl_best()), failures


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train one contender and return its figures: the work of a measuring process."""
    from benchmarks.contenders import Progress
    from rankwise import adapters, machine

    if job["contender"] in OURS or job["peers_keep_memory"]:
        machine.keep_freed_memory()
    ready = prepare(job)
    train = trainer_of(job, ready)
    machine.reset_peak_memory(ready.device)
    model = adapters.attach(ready.base.model, ready.plan, seed=SEED)
    train(model, ready.rows[:WARM_ROWS], [ready.rows[:WARM_ROWS]], Progress())
    adapters.detach(model)
    model = adapters.attach(ready.base.model, ready.plan, seed=SEED)
    progress = Progress()
    train(model, ready.rows, ready.steps, progress)
    peak = machine.peak_memory(ready.device)
    learned = {name: p.detach().float().cpu() for name, p in adapters.adapter_tensors(model).items()}
    lengths = [len(row.input_ids) for row in ready.rows]
    labels = sum(progress.labels)
    shape = flops.shape_of(ready.base.model, ready.plan.modules, ready.plan.parameters)
    bf16 = job["contender"] == "b" or (job.get("trl") or {}).get("bf16", False)
    return {
        "dtype": "bf16" if bf16 else ready.dtype,
        "path": ready.engine.name if ready.engine else "",
        "seconds": progress.seconds,
        "steps": len(progress.ended),
        "tokens": sum(progress.tokens),
        "label_tokens": labels,
        "train_loss": progress.losses[-1],
        "losses": progress.losses,
        "needed_flops": flops.needed(shape, lengths, labels),
        "test_loss": reference_loss(ready, learned),
        **peak,
    }


def prepare(job: dict[str, Any]) -> Ready:
    """Load the model and the rows as a study would."""
    from benchmarks.contenders import rankwise_engine
    from rankwise import machine, models
    from rankwise.config import ScaleRule, TrainConfig
    from rankwise.data import training_rows
    from rankwise.engine.batches import optimizer_steps
    from rankwise.inventory import inventory
    from rankwise.strategies import allocate
    from rankwise.studydata import prepare_data, read_data
    from rankwise.studyfile import read_study

    sizes = {"train": job["rows"], "test": job["test"], "max_length": job["max_length"]}
    study = read_study(common.STUDY, tuple(f"data.{key}={value}" for key, value in sizes.items()))
    config = TrainConfig(
        epochs=job["epochs"], step_examples=STEP_ROWS, learning_rates=(RATE,),
        dtype="auto" if job["contender"] == "e" else "fp32",
        engine="plain" if job["contender"] == "p" else "auto",
    )  # fmt: skip
    device = machine.device_for(config)
    machine.threads_for(config)
    dtype = machine.dtype_for(config, device)
    base = models.load(study.config.model, dtype, device, common.STUDY.parent)
    prepared = prepare_data(study, read_data(study), base.tokenizer)
    steps = optimizer_steps(training_rows(prepared, SEED, job["rows"]), config, SEED)
    plan = allocate(
        inventory(base.model).select("all"), strategy="uniform", budget=f"r={RANK}", match="budget",
        scale=ScaleRule(rule="constant", value=SCALE), options={}, seed=SEED, model=study.config.model,
    )  # fmt: skip
    rows = [row for step in steps for row in step]
    engine = rankwise_engine(base.model, config.engine) if job["contender"] in OURS else None
    return Ready(base, config, rows, steps, prepared.splits.test, plan, device, dtype, engine)


def trainer_of(job: dict[str, Any], ready: Ready) -> Callable[[Any, list[Any], list[list[Any]], Any], None]:
    """Return the contender as a function of (model, rows, steps, progress)."""
    from benchmarks import contenders

    name, once = job["contender"], ready.config.model_copy(update={"epochs": 1})

    def train(model: Any, rows: list[Any], steps: list[list[Any]], progress: Any) -> None:
        if name in OURS:
            contenders.train_rankwise(model, steps, ready.config, progress, engine=ready.engine, seed=SEED)
        elif name == "c":
            setting = job.get("trl") or contenders.TRL_BEST[ready.device]
            contenders.train_trl(model, rows, once, progress, tokenizer=ready.base.tokenizer, **setting)
        else:
            setting = {"bf16": name == "b", "grouped": name != "a", "batch": STEP_ROWS}
            contenders.train_trainer(model, rows, once, progress, **setting)

    return train  # `rows` already holds every epoch, so a trainer goes through it once


def reference_loss(ready: Ready, learned: dict[str, Any]) -> float:
    """Return the test loss of some adapters on a newly loaded fp32 base, through the plain path."""
    import torch

    from rankwise import adapters, models
    from rankwise.engine.batches import label_count, micro_batches
    from rankwise.engine.plain import score

    models.load.cache_clear()
    base = models.load(ready.base.source, "fp32", ready.device, common.STUDY.parent)
    model = adapters.attach(base.model, ready.plan, seed=SEED).eval()
    with torch.no_grad():
        for name, parameter in adapters.adapter_tensors(model).items():
            parameter.copy_(learned[name])
        total = [score(model, batch).nll.double().sum().item() for batch in micro_batches(ready.test, 2048)]
    return math.fsum(total) / label_count(ready.test)


def summarise(found: list[dict[str, Any]], best: dict[str, float]) -> dict[str, Any]:
    """Return medians with min-max over a contender's repetitions."""
    dtype = found[0]["dtype"]
    peak = "device_peak_bytes" if "device_peak_bytes" in found[0] else "process_peak_bytes"
    rates = [one["needed_flops"] / one["seconds"] / 1e9 for one in found]
    summary: dict[str, Any] = {
        "dtype": dtype,
        "path": found[0]["path"],
        "tokens_per_second": common.spread(one["tokens"] / one["seconds"] for one in found),
        "label_tokens_per_second": common.spread(one["label_tokens"] / one["seconds"] for one in found),
        "needed_gflops": common.spread(rates),
        "peak_gb": common.spread(one[peak] / 1e9 for one in found),
        "train_loss": common.spread(one["train_loss"] for one in found),
        "test_loss": common.spread(one["test_loss"] for one in found),
        "label_tokens": found[0]["label_tokens"],
        "steps": found[0]["steps"],
    }
    if dtype in best:
        summary["share_of_ceiling"] = summary["needed_gflops"]["median"] / best[dtype]
    return summary


def report(summary: dict[str, dict[str, Any]], best: dict[str, float]) -> None:
    """Print the table, the ceiling and the ratios."""
    rows = [
        (
            f"{name:4}{CONTENDERS[name]}", f"{one['dtype']} {one['path']}",
            common.shown(one["tokens_per_second"]), common.shown(one["label_tokens_per_second"]),
            common.shown(one["peak_gb"], ".1f"),
            f"{one['share_of_ceiling']:.0%}" if "share_of_ceiling" in one else "",
            f"{one['train_loss']['median']:.4f}", f"{one['test_loss']['median']:.4f}",
        )
        for name, one in summary.items()
    ]  # fmt: skip
    columns = "contender", "computes", "tokens/s", "label tokens/s", "GB", "of ceiling", "train", "test loss"
    common.table("Training, medians (min-max)", columns, rows)
    said = ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in best.items())
    common.console.print(f"matrix-product ceiling: {said}", highlight=False)
    for line in ratios(summary):
        common.console.print(f"{line['what']}: {line['ratio']:.2f}x   goal {line['goal']}", highlight=False)


def ratios(summary: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ratios that were asked for, as far as both sides were measured."""

    def value(name: str, key: str) -> float | None:
        return summary[name][key]["median"] if name in summary else None

    speed, memory = "label_tokens_per_second", "peak_gb"
    peers = [(value(name, speed), name) for name in ("b", "b32", "c") if name in summary]
    fastest, peer = max(peers, default=(None, ""))
    wanted = [
        ("speed e/a", value("e", speed), value("a", speed), "5"),
        (f"speed e/{peer}, the best of b, b32, c", value("e", speed), fastest, "4"),
        ("speed d/a", value("d", speed), value("a", speed), "2.2"),
        ("memory e/a", value("e", memory), value("a", memory), "at most 0.33"),
        ("memory e/c", value("e", memory), value("c", memory), "below 1"),
    ]
    return [
        {"what": what, "ratio": over / under, "goal": goal}
        for what, over, under, goal in wanted
        if over and under
    ]


if __name__ == "__main__":
    sys.exit(main())
