"""How rankwise's training time and memory grow with rows, sequence length, model size and rank.

Every point is a process of its own: a model with random weights in the exact shape of a real one, rows of
random tokens of one length (labels on the second half), uniform ranks on all linears, steps of 2,048 tokens.
Timed is the loop alone, after an untimed step; memory is the process's peak over it. Written are a JSON and
a picture.

    python -m benchmarks.growth            shortened
    python -m benchmarks.growth --full     more points, three repetitions
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import common

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "SmolLM2-135M": ("llama", 134_515_008, {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rope_theta": 100000.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }),
    "DialoGPT-medium": ("gpt2", 354_823_168, {
        "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 50257,
    }),
    "SmolLM2-360M": ("llama", 361_821_120, {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
        "num_key_value_heads": 5, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rope_theta": 100000.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }),
}  # fmt: skip
"""Family, parameters (asserted on the built model) and shape; DialoGPT's own dropout of 0.1 stays on."""

USUAL: dict[str, Any] = {"model": "SmolLM2-135M", "rows": 8, "length": 256, "rank": 16}
AXES: dict[str, tuple[str, list[Any], list[Any]]] = {
    "rows": ("rows of 256 tokens", [4, 8, 16], [4, 8, 16, 32, 64]),
    "length": ("tokens per row (2,048 in all)", [64, 256, 1024], [64, 128, 256, 512, 1024]),
    "model": ("parameters (millions)", list(MODELS), list(MODELS)),
    "rank": ("rank on all linears", [1, 16, 64], [1, 4, 16, 64]),
}
"""What varies: its label, the shortened points, all points."""

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe-Ito: told apart by everybody
STEP_TOKENS = 2048


def main() -> int:
    """Read the flags and measure; in a measuring process, do the job."""
    parser = common.parser(__doc__, "growth")
    parser.add_argument("--repetitions", type=int, help="processes per point [1; full: 3]")
    parser.add_argument("--axes", default=",".join(AXES), help="what varies [%(default)s]")
    flags = parser.parse_args()
    if flags.job:
        common.answer_job(flags.job, measure)
        return 0
    axes = flags.axes.split(",")
    if unknown := set(axes) - set(AXES):
        parser.error(f"no axis {', '.join(sorted(unknown))}; they are {', '.join(AXES)}")
    repetitions = flags.repetitions or (3 if flags.full else 1)
    jobs = points(axes, flags.full)
    answers, failures = common.collect("benchmarks.growth", jobs, repetitions)
    summary = {name: summarise(jobs[name], found) for name, found in answers.items() if found}
    report(summary)
    machine = common.machine_description()
    content = {
        "machine": machine, "settings": {"usual": USUAL, "repetitions": repetitions},
        "points": summary, "failures": failures,
    }  # fmt: skip
    common.write(flags.out, content)
    if summary:
        picture = flags.out.with_suffix(".png")
        draw(summary, axes, picture, machine)
        common.console.print(f"written: {picture}", markup=False, highlight=False)
    return common.finish(failures)


def points(axes: list[str], full: bool) -> dict[str, dict[str, Any]]:
    """Return the jobs by name; the point that all axes share is measured once."""
    jobs: dict[str, dict[str, Any]] = {}
    for axis in axes:
        for value in AXES[axis][2 if full else 1]:
            job: dict[str, Any] = USUAL | {axis: value}
            if axis == "length":
                job["rows"] = STEP_TOKENS // int(value)
            jobs["{model}, {rows} x {length}, r={rank}".format(**job)] = job
    return jobs


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train once and return time and memory: the work of a measuring process."""
    from benchmarks.contenders import Progress, rankwise_engine, train_rankwise
    from rankwise import adapters, machine
    from rankwise.config import ScaleRule, TrainConfig
    from rankwise.engine.batches import optimizer_steps
    from rankwise.inventory import inventory
    from rankwise.strategies import allocate

    machine.keep_freed_memory()
    config = TrainConfig(step_tokens=STEP_TOKENS, learning_rates=(1e-3,))
    device = machine.device_for(config)
    machine.threads_for(config)
    dtype = machine.dtype_for(config, device)
    model = build(job["model"]).to(machine.torch_dtype(dtype)).to(device).requires_grad_(False)
    plan = allocate(
        inventory(model).select("all"), strategy="uniform", budget=f"r={job['rank']}", match="budget",
        scale=ScaleRule(), options={}, seed=0, model=job["model"],
    )  # fmt: skip
    engine = rankwise_engine(model, config.engine)
    rows = random_rows(job["rows"], job["length"], model.config.vocab_size)
    steps = optimizer_steps(rows, config, 0)
    machine.reset_peak_memory(device)
    adapted = adapters.attach(model, plan, seed=0)
    train_rankwise(adapted, [steps[0][: max(1, len(steps[0]) // 4)]], config, Progress(), engine=engine)
    progress = Progress()
    train_rankwise(adapted, steps, config, progress, engine=engine)
    return {
        "dtype": dtype, "path": engine.name, "seconds": progress.seconds, "tokens": sum(progress.tokens),
        "trainable": plan.parameters, **machine.peak_memory(device),
    }  # fmt: skip


def build(name: str) -> Any:
    """Return a model of that exact shape with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, parameters, shape = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    counted = sum(p.numel() for p in model.parameters())
    assert counted == parameters, f"{name}: built {counted:,} parameters, it has {parameters:,}"
    model.config.use_cache = False
    return model


def random_rows(count: int, length: int, vocabulary: int) -> list[Any]:
    """Return rows of random tokens, their second half labelled."""
    import numpy as np

    from rankwise.data import Example

    draws = np.random.default_rng(0).integers(0, vocabulary, size=(count, length), dtype=np.int32)
    half = length // 2
    rows = []
    for i, ids in enumerate(draws):
        labels = np.where(np.arange(length) < half, -100, ids).astype(np.int32)
        rows.append(Example(f"{i:064x}", ids, labels, half, length - half, 0, length - half))
    return rows


def summarise(job: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a point's medians."""
    peak = "device_peak_bytes" if "device_peak_bytes" in found[0] else "process_peak_bytes"
    return job | {
        "dtype": found[0]["dtype"],
        "path": found[0]["path"],
        "trainable": found[0]["trainable"],
        "ms_per_token": common.spread(1000 * one["seconds"] / one["tokens"] for one in found),
        "peak_gb": common.spread(one[peak] / 1e9 for one in found),
    }


def report(summary: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    rows = [
        (
            name, f"{one['dtype']} {one['path']}", f"{one['trainable']:,}",
            common.shown(one["ms_per_token"], ".2f"), common.shown(one["peak_gb"], ".2f"),
        )
        for name, one in summary.items()
    ]  # fmt: skip
    columns = "model, rows x tokens, rank", "computes", "trainable", "ms/token", "peak GB"
    common.table("Growth of training, medians (min-max)", columns, rows)


def series(summary: dict[str, dict[str, Any]], axis: str) -> list[tuple[float, dict[str, Any], str]]:
    """Return the points of an axis as (x, point, label), in the order of x."""
    chosen = []
    for point in summary.values():
        others = {key for key in USUAL if key != axis and point[key] != USUAL[key]}
        if others - ({"rows"} if axis == "length" else set()):
            continue
        if axis == "length" and point["rows"] * point["length"] != STEP_TOKENS:
            continue
        x = MODELS[point["model"]][1] / 1e6 if axis == "model" else point[axis]
        chosen.append((x, point, point["model"] if axis == "model" else f"{x:g}"))
    return sorted(chosen, key=lambda one: one[0])


def draw(summary: dict[str, dict[str, Any]], axes: list[str], path: Path, machine: dict[str, Any]) -> None:
    """Draw one column per axis: time per token above, peak memory below, each from zero."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        2, len(axes), figsize=(3.1 * len(axes) + 0.6, 4.8), sharex="col", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    measures = [("ms_per_token", "time per token (ms)", BLUE), ("peak_gb", "peak memory (GB)", ORANGE)]
    for column, axis in enumerate(axes):
        chosen = series(summary, axis)
        for row, (key, label, colour) in enumerate(measures):
            panel = grid[row][column]
            _line(panel, chosen, key, colour)
            panel.set_ylim(0, 1.15 * max(point[key]["max"] for point in summary.values()))
            if column == 0:
                panel.set_ylabel(label)
            if axis == "model":
                _name(panel, chosen, key)
        _ticks(grid[1][column], axis, chosen)
    where = f"{machine['processor']}, {machine['threads']} threads, {next(iter(summary.values()))['dtype']}"
    usual = "{model}, {rows} rows of {length} tokens, rank {rank}".format(**USUAL)
    figure.suptitle(f"Training with rankwise: {usual} (unless the axis says otherwise)\n{where}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _line(panel: Any, chosen: list[tuple[float, dict[str, Any], str]], key: str, colour: str) -> None:
    xs = [x for x, _, _ in chosen]
    middle = [point[key]["median"] for _, point, _ in chosen]
    below = [point[key]["median"] - point[key]["min"] for _, point, _ in chosen]
    above = [point[key]["max"] - point[key]["median"] for _, point, _ in chosen]
    joined = "" if chosen[0][2] in MODELS else "-"  # two families make no line
    panel.errorbar(xs, middle, [below, above], color=colour, marker="o", markersize=4, capsize=2, ls=joined)
    panel.grid(axis="y", color="0.9")
    panel.spines[["top", "right"]].set_visible(False)


def _name(panel: Any, chosen: list[tuple[float, dict[str, Any], str]], key: str) -> None:
    """Write each model's name beside its point, to the left so that it stays in the panel."""
    for x, point, label in chosen:
        left = x > 200
        panel.annotate(
            label, (x, point[key]["median"]), xytext=(-7 if left else 7, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=8, color="0.25",
        )  # fmt: skip


def _ticks(panel: Any, axis: str, chosen: list[tuple[float, dict[str, Any], str]]) -> None:
    panel.set_xlabel(AXES[axis][0])
    if axis == "model":
        panel.set_xlim(0, 420)
        panel.set_xticks([0, 100, 200, 300, 400])
        return
    panel.set_xscale("log", base=2)
    panel.set_xticks([x for x, _, _ in chosen], [label for _, _, label in chosen])
    panel.minorticks_off()


if __name__ == "__main__":
    sys.exit(main())
