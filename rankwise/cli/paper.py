"""The command that writes the paper's generated parts, checks its text, compiles it and bundles it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import RESULTS, Results, app


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
    offer = room.offer(studies, results, text.studies())
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
