"""Commands that train: one run, or a study; its state, its faults, its schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.cli.options import (
    RESULTS,
    Checkpoint,
    Results,
    Set,
    StudyPath,
    app,
    count_of,
    opened,
    sizes_of,
    study_app,
)
from rankwise.errors import RankwiseError, one_of

if TYPE_CHECKING:
    from rankwise.config import StudyConfig
    from rankwise.observer import Observer
    from rankwise.store import Store


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
    found = opened(study, results, overrides, arm)
    from rankwise.study import train_one
    from rankwise.terminal import StudyProgress, out, say

    with StudyProgress() as progress:
        planned = train_one(found, arm, seed, rate, progress)
    record = found.store.record(planned.run_id)
    out.print_json(json.dumps({"status": record["status"], **record["train_info"]["metrics"]}))
    say(f"record: {found.store.path(planned.run_id)}")
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
    arms: Annotated[str | None, typer.Option(help="only the runs of these arms", metavar="A,B")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="keep reports/STUDY/report.html up to date as runs finish")
    ] = False,
) -> None:
    """Do every pending run of a study, then print its tables. Interrupt and repeat as you like."""
    count = count_of(processes)
    config, sizes = sizes_of(study, overrides)
    only = _arms_of(arms, config)
    if len(sizes) > 1:
        opened(study, results, sizes[max(sizes)])  # the largest needs the most rows: its faults come first
    lost = 0
    for given in sizes.values():
        found = opened(study, results, given)
        from rankwise.terminal import StudyProgress, print_results
        from rankwise.workers import run_together

        with StudyProgress() as progress:
            observer = _live(progress, found.store) if report else progress
            run_together(
                replace(found, only=only), observer, overrides=tuple(given), processes=count,
                checkpoint_seconds=checkpoint_seconds, retry_failed=retry_failed,
            )  # fmt: skip
        lost += print_results(found.store)
    _tell_sizes(config, results)
    if report:
        from rankwise.reporting import write_all
        from rankwise.terminal import say

        say(write_all(study, results, tuple(overrides or ()), pictures=False)[0])
    raise typer.Exit(1 if lost else 0)


def _arms_of(text: str | None, config: StudyConfig) -> tuple[str, ...]:
    """Read --arms: names with commas between them, each an arm of the study; none without it."""
    names = tuple(name.strip() for name in text.split(",")) if text is not None else ()
    for name in names:
        if name not in config.arms:
            raise RankwiseError(one_of("--arms", name, config.arms))
    return names


def _live(progress: Observer, store: Store) -> Observer:
    from rankwise.reporting import LivePage

    return LivePage(progress, store, Path("reports") / store.folder.name / "report.html")


def _tell_sizes(config: StudyConfig, results: Path) -> None:
    """Say where the order of the arms stops changing, if the study asks over numbers of training rows."""
    if config.train_examples:
        from rankwise import datasizes
        from rankwise.terminal import say

        for line in datasizes.told(datasizes.records(config, results), config.train_examples):
            say(line)


@study_app.command("status")
def study_status(study: StudyPath, results: Results = RESULTS, overrides: Set = None) -> None:
    """List the study's runs by state, and its results so far."""
    from rankwise.store import Store
    from rankwise.studyfile import read_study

    config, sizes = sizes_of(study, overrides)
    for given in sizes.values():
        config = read_study(study, tuple(given)).config
        store = Store(results, config.name)
        from rankwise.terminal import print_status

        print_status(store, config)


@study_app.command("validate")
def study_validate(study: StudyPath, results: Results = RESULTS, overrides: Set = None) -> None:
    """Report every fault of a study file at once, then what the study will take."""
    _, sizes = sizes_of(study, overrides)
    for given in reversed(sizes.values()):  # the largest needs the most rows
        found = opened(study, results, given)
        from rankwise.terminal import print_design

        print_design(found)


@study_app.command("schema")
def study_schema() -> None:
    """Print the JSON schema of study files, for editors."""
    from rankwise.config import StudyConfig

    print(json.dumps(StudyConfig.model_json_schema(), indent=2))
