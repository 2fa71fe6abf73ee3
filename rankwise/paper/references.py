"""Citations against references.bib, and references against labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rankwise.errors import nearest
from rankwise.paper.rules import Fault
from rankwise.paper.sources import BIB, CITE, LABEL, REF, Paper, Place

ENTRY = re.compile(r"^\s*@(\w+)\s*\{\s*([^,\s]+)\s*,", re.MULTILINE)
LONG = ("-rates", "-runs")
"""Pieces whose names end so are longtables, with a label of their own: `tab:` and the piece's name."""
NO_ENTRY = ("comment", "preamble", "string")


def citation_faults(paper: Paper) -> Iterator[Fault]:
    """Yield cited keys without an entry, entries that nothing cites, and keys that stand twice."""
    entries: dict[str, Place] = {}
    for files, place in paper.found(BIB):
        for name in files.split(","):
            path = paper.folder / f"{name.strip()}.bib"
            if not path.is_file():
                yield Fault(place, "citation", f"no file {path.name}")
                continue
            for key, here in _entries(path):
                if key in entries:
                    yield Fault(here, "citation", f"{key} stands here twice")
                entries[key] = here
    cited = [(key.strip(), place) for keys, place in paper.found(CITE) for key in keys.split(",")]
    for key, place in cited:
        if key not in entries:
            near = nearest(key, entries)
            yield Fault(place, "citation", f"no entry {key}" + (f"; did you mean {near}?" if near else ""))
    names = {key for key, _ in cited}
    for key, place in entries.items():
        if key not in names:
            yield Fault(place, "citation", f"nothing cites {key}")


def _entries(path: Path) -> list[tuple[str, Place]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return [
        (match[2], Place(path, text.count("\n", 0, match.start(2)) + 1))
        for match in ENTRY.finditer(text)
        if match[1].lower() not in NO_ENTRY
    ]


def label_faults(paper: Paper) -> Iterator[Fault]:
    """Yield references without a label, labels that stand twice, and figures or tables that nothing names."""
    labels: dict[str, Place] = {f"tab:{name}": place for name, place in paper.pieces() if name.endswith(LONG)}
    given = set(labels)
    for name, place in paper.found(LABEL):
        if name in labels:
            yield Fault(place, "undefined", f"the label {name} stands twice, first at {labels[name]}")
        labels[name] = place
    used = {name for name, _ in paper.found(REF)}
    for name, place in paper.found(REF):
        if name not in labels:
            near = nearest(name, labels)
            yield Fault(place, "undefined", f"no label {name}" + (f"; did you mean {near}?" if near else ""))
    for name, place in labels.items():
        if name.startswith(("fig:", "tab:")) and name not in used | given:
            yield Fault(place, "unused", f"no text refers to {name}")
