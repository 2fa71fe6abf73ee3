"""The folder `generated`: made from the catalogue, of exactly what the sources use; and its comparison."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rankwise.aside import replacing
from rankwise.errors import RankwiseError
from rankwise.paper.catalogue import HEAD, Offer
from rankwise.paper.references import citation_faults, label_faults
from rankwise.paper.rules import Fault, name_faults, space_faults, text_faults
from rankwise.paper.sources import GENERATED, Paper, Place

NUMBERS = "numbers.tex"
OWN = re.compile(r"\\newcommand\{\\([A-Za-z]+)\}")


def source_faults(paper: Paper, offer: Offer) -> list[Fault]:
    """Return everything that breaks a rule in the hand-written files."""
    studies = {study.name for study in offer.studies}
    found = [
        *text_faults(paper),
        *name_faults(paper, offer.macros, set(offer.pieces), set(offer.arms), studies),
        *space_faults(paper, offer.macros),
        *citation_faults(paper),
        *label_faults(paper),
    ]
    return sorted(found, key=lambda fault: (str(fault.place.path), fault.place.line))


def generated(paper: Paper, offer: Offer) -> dict[str, bytes]:
    """Return every generated file that the sources use, by name; what does not exist is left out.

    Cost: about a second a figure.
    """
    words = {word for word, _ in paper.words()}
    macros = [macro for name, macro in sorted(offer.macros.macros.items()) if name in words]
    text = HEAD + "".join(macro.definition() + "\n" for macro in macros)
    files = {NUMBERS: text.encode()}
    for name in sorted({name for name, _ in paper.pieces()} & set(offer.pieces)):
        files |= offer.pieces[name].make()
    return files


def write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    """Put the files into `folder/generated`, and remove what else lies there; equal files are left alone.

    Raises:
        RankwiseError: the folder cannot be written.
    """
    place = folder / GENERATED
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = place / name
            if not path.is_file() or path.read_bytes() != content:
                with replacing(path) as aside:
                    aside.write_bytes(content)
        for path in sorted(place.iterdir()):
            if path.name not in files and path.is_file():
                path.unlink()
    except OSError as error:
        raise RankwiseError(f"{place} cannot be written: {error.strerror or error}.") from error
    return [place / name for name in sorted(files)]


def stale_faults(paper: Paper, files: dict[str, bytes]) -> Iterator[Fault]:
    """Yield where `generated` on disk is not what the records give now."""
    place = paper.folder / GENERATED
    for name, content in files.items():
        path = place / name
        if not path.is_file():
            yield Fault(Place(path, 1), "stale", "is missing; run `rankwise paper`")
        elif (found := path.read_bytes()) != content:
            yield from _changed(path, found, content)
    for path in sorted(place.glob("*")) if place.is_dir() else ():
        if path.name not in files:
            yield Fault(Place(path, 1), "unused", "nothing uses this generated piece; run `rankwise paper`")


def _changed(path: Path, found: bytes, wanted: bytes) -> Iterator[Fault]:
    """Yield the first line that differs, and in the file of macros every macro that is stale or unused."""
    if path.suffix != ".tex":
        yield Fault(Place(path, 1), "stale", "the picture does not match the records; run `rankwise paper`")
        return
    old, new = found.decode("utf-8", "replace").split("\n"), wanted.decode().split("\n")
    if path.name != NUMBERS:
        line = next(
            (i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), len(new) - 1
        )
        yield Fault(Place(path, line + 1), "stale", "does not match the records; run `rankwise paper`")
        return
    known = set(new)
    names = {match[1] for text in new if (match := OWN.match(text))}
    for line, text in enumerate(old, 1):
        match = OWN.match(text)
        if text in known:
            continue
        if match and match[1] not in names:
            yield Fault(Place(path, line), "unused", f"no source uses \\{match[1]}; run `rankwise paper`")
        else:
            what = f"\\{match[1]}" if match else "this line"
            yield Fault(
                Place(path, line), "stale", f"{what} does not match the records; run `rankwise paper`"
            )
    have = {match[1] for text in old if (match := OWN.match(text))}
    for missing in sorted(names - have):
        yield Fault(Place(path, len(old)), "stale", f"\\{missing} is missing; run `rankwise paper`")
    if sorted(old) == sorted(new):
        yield Fault(Place(path, 1), "stale", "its lines are out of order; run `rankwise paper`")
