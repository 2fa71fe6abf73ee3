"""The results of a project's README: what was found, in one sentence, with a picture; then study by study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rankwise.memorybank.cases import Case
from rankwise.memorybank.findings import findings
from rankwise.memorybank.ground import Ground
from rankwise.memorybank.markers import begin
from rankwise.memorybank.text import Marked, link, md
from rankwise.paper.pictures import losses, picture_bytes

PART = "results"
PICTURE = "results.svg"
"""Beside the documents of the memory bank."""


def asks(readme: bytes | None) -> bool:
    """Whether a README has the marked part, and so wants its results written."""
    return readme is not None and begin(PART).encode() in readme


def results_section(ground: Ground, readme: Path) -> str:
    """Return the part's text: the finding, its picture, a line for every other study, where to read on."""
    here = replace(ground, folder=readme.parent)
    if not here.reported:
        return "\nNo study has a result yet.\n\n"
    first, *others = here.reported
    lines = [
        md("**{found}** ({study}, {records})", found=findings(here, first)[0],
           study=here.study(first), records=here.records(first)),
        Marked(f"!{link(_alternative(first), ground.folder / PICTURE, readme.parent)}"),
    ]  # fmt: skip
    if others:
        told = (
            md("- {study}: {found}", study=here.study(case), found=findings(here, case)[0]) for case in others
        )
        lines.append(Marked("\n".join(told)))
    pages = {"active-focus": "what is next", "knowledge": "every number"}
    links = [link(words, ground.folder / f"{page}.md", readme.parent) for page, words in pages.items()]
    lines.append(Marked(f"Read on: {', '.join(links)}."))
    return "\n" + "\n\n".join(lines) + "\n\n"


def _alternative(case: Case) -> str:
    return f"{case.config.name}: each arm's test loss at its trainable parameters"


def picture(ground: Ground) -> bytes | None:
    """Return the SVG of the first study's losses; None before there is any."""
    if not ground.reported:
        return None
    results = ground.reported[0].results
    assert results is not None
    return picture_bytes(losses(results), *PICTURE.split("."))
