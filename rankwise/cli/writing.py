"""Commands that write documents and folders for people: memory, init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import RESULTS, Results, app

STUDIES = Path("studies")


@app.command()
def memory(
    studies: Annotated[
        list[Path] | None,
        typer.Argument(help="study files; else all of studies/*.yaml", metavar="[STUDY.yaml]..."),
    ] = None,
    results: Results = RESULTS,
    folder: Annotated[Path, typer.Option("--out", help="folder of the documents")] = Path("memory"),
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; exit code 1 if a document is stale")
    ] = False,
) -> None:
    """Write the memory bank: living documents, of which studies and records write the marked parts."""
    from rankwise.memorybank import write_memory
    from rankwise.terminal import say

    done = write_memory(studies or STUDIES, results, folder, check=check)
    for line in done.summary():
        say(line)
    if check:
        raise typer.Exit(0 if done.fresh else 1)
    from rankwise import doctor  # its reading is of now and of here, so that it is no part of the documents

    found = doctor.perform("accelerator", doctor.accelerator)
    say(f"this machine: {found.found}" + (f"; {found.remedy}" if found.remedy else ""))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="new or empty folder", metavar="DIR")],
) -> None:
    """Make a research folder: a study to change, places for data, models, results and papers, a Makefile."""
    from rankwise.terminal import say
    from rankwise.workspace import create

    for line in create(folder).summary():
        say(line)
