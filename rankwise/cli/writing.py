"""Commands that write for people: the paper, the memory bank, a research folder."""

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


@app.command()
def paper(
    results: Results = RESULTS,
    studies: Annotated[Path, typer.Option(help="folder of the study files")] = Path("studies"),
    folder: Annotated[Path, typer.Option("--paper", help="folder of main.tex")] = Path("paper"),
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; name everything that is wrong")
    ] = False,
    arxiv: Annotated[
        bool, typer.Option("--arxiv", help="also bundle it, and compile the bundle by itself")
    ] = False,
    listed: Annotated[
        str | None,
        typer.Option("--list", help="print the macros and pieces whose names hold this", metavar="WORD"),
    ] = None,
) -> None:
    """Make the paper's numbers, tables, figures and verdicts from the records, and compile it."""
    from rankwise import paper as room
    from rankwise.terminal import say

    text = room.read_paper(folder)
    offer = room.offer(studies, results, text.studies() or None)
    if listed is not None:
        for line in offer.lines(listed):
            say(line)
        return
    for study in offer.studies:
        if study.changed:
            say(f"note: {study.name} was changed since its last run; the paper tells of that run")
    work = room.Work(text, offer)
    lines, faults = work.check() if check else work.make(arxiv=arxiv)
    for fault in faults:
        say(str(fault))
    for line in lines:
        say(line)
    raise typer.Exit(1 if faults else 0)
