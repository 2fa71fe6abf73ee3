"""Commands that read records: the report, the recommendation, the tracker; and auto, the whole way in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.cli.options import RESULTS, Results, Set, StudyPath, app

if TYPE_CHECKING:
    from rankwise import tables


@app.command()
def report(
    study: StudyPath,
    results: Results = RESULTS,
    overrides: Set = None,
    folder: Annotated[Path | None, typer.Option("--out", help="where to; else reports/STUDY")] = None,
    text: Annotated[
        bool, typer.Option("--text", help="show the data's text of the examples: a page for your own eyes")
    ] = False,
    pictures: Annotated[bool, typer.Option(help="also write the figures, as PDF, SVG and PNG")] = True,
) -> None:
    """Write a study's report: one offline page, its tables and its figures; also of an unfinished study."""
    from rankwise.reporting import write_all
    from rankwise.terminal import say

    for line in write_all(study, results, tuple(overrides or ()), folder, text=text, pictures=pictures):
        say(line)


@app.command()
def recommend(
    study: StudyPath,
    results: Results = RESULTS,
    overrides: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="write the recommended plan here, where there is one")
    ] = Path("plan.json"),
) -> None:
    """Name the cheapest plan of the study's ladders that is good enough, and how sure that is."""
    from rankwise.recommend import recommend as ask

    answer = ask(_results(study, results, overrides))
    if as_json:
        print(json.dumps(answer.as_dict(), indent=1))
    from rankwise.terminal import out, say

    if not as_json:
        first, *rest = answer.sentences()
        say(first)
        out.print(answer.table())
        for line in rest:
            say(line)
    if answer.chosen is not None and out_file is not None:
        answer.plan_of().save(out_file)
        if not as_json:
            say(f"plan written to {out_file}")


@app.command()
def auto(
    model: Annotated[str, typer.Option(help="hf:, pypi: or file: source of the model")],
    data: Annotated[str, typer.Option(help="source or path of the rows")],
    limit: Annotated[str, typer.Option("--time", help="for all of it: 15m, 2h, 1h30m")],
    folder: Annotated[Path, typer.Option("--out", help="everything goes here")] = Path("auto"),
    max_length: Annotated[int, typer.Option(help="tokens per row", min=8)] = 256,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done and its price")] = False,
) -> None:
    """Pilot, sized study, verdict, plan, adapter and report: no study file needed. Repeat it to go on."""
    from rankwise import sizing

    seconds = sizing.seconds_of(limit)
    from rankwise import auto as room
    from rankwise.terminal import StudyProgress, out, say

    task = room.Task(
        room.source_of(model), room.source_of(data), seconds, folder, max_length, say=say, watch=StudyProgress
    )
    answer = room.auto(task, dry_run=dry_run)
    if answer is not None:
        out.print(answer.table())
        for line in answer.sentences():
            say(line)
        raise typer.Exit(1 if answer.results.lost() else 0)


@app.command()
def track(
    study: StudyPath,
    results: Results = RESULTS,
    overrides: Set = None,
    folder: Annotated[Path, typer.Option("--out", help="the tracker's folder")] = Path("trackio"),
) -> None:
    """Hand a study's finished runs to Trackio, on this machine; repeat it to add those since."""
    from rankwise.terminal import say
    from rankwise.tracking import export_runs, show_command

    found = _results(study, results, overrides)
    count = export_runs(found, folder)
    say(f"{count} run{'s' if count != 1 else ''} written to {folder}/; to look at them:")
    say(show_command(found, folder))


def _results(study: Path, results: Path, overrides: list[str] | None) -> tables.Results:
    """Return the records of a study; over several numbers of rows, those of the largest begun."""
    from rankwise import datasizes
    from rankwise.store import Store
    from rankwise.studyfile import read_study
    from rankwise.tables import Results as Records

    config = read_study(study, tuple(overrides or ())).config
    by_size = datasizes.records(config, results)
    if by_size:
        return by_size[max(by_size)]
    found = Records(Store(results, config.name))
    if found.config != config:
        from rankwise.terminal import err, say

        say("note: the study has changed since its last run; what follows is as of that run", err)
    return found
