"""Generated parts inside a document that people write: found between two lines, replaced, all else untouched.

    <!-- rankwise:begin NAME -->
    ...
    <!-- rankwise:end NAME -->

Documents are handled as bytes, so that line endings, white space and odd characters around the parts stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import RankwiseError, one_of, visible

MARKER = re.compile(rb"<!-- rankwise:(begin|end) (\S+) -->")
LOOKS_LIKE = re.compile(rb"<!--\s*rankwise\b")


@dataclass(frozen=True)
class Part:
    """Where a part's text lies in a document: bytes from `start` to `end`, and its line ending."""

    start: int
    end: int
    newline: bytes


def begin(name: str) -> str:
    """Return the line before a part."""
    return f"<!-- rankwise:begin {name} -->"


def end(name: str) -> str:
    """Return the line after a part."""
    return f"<!-- rankwise:end {name} -->"


def parts_of(data: bytes, path: Path, names: list[str] | None = None) -> dict[str, Part]:
    """Return name -> part of a document, in its order.

    Args:
        data: the document.
        path: its name, for errors.
        names: the parts that it must have, each once; None takes those that are there.

    Raises:
        RankwiseError: a marker is missing, unknown, doubled, crossed or misspelt; with the file and the line.
    """
    found: dict[str, Part] = {}
    lines: dict[str, int] = {}
    inside, start, newline, at = "", 0, b"\n", 0
    rows = data.split(b"\n")
    for number, row in enumerate(rows, 1):
        after = at + len(row) + 1
        marker = _marker(row, path, number, names)
        if marker and marker[0] == "begin":
            _check_begin(marker[1], inside, lines, path, number)
            inside, start, newline = marker[1], after, b"\r\n" if row.endswith(b"\r") else b"\n"
            lines[inside] = number
        elif marker:
            _check_end(marker[1], inside, lines, path, number)
            found[inside] = Part(start, at, newline)
            inside = ""
        at = after
    if inside:
        raise _fault(
            path, lines[inside], f"the part {inside!r} begins here and never ends; `{end(inside)}` is missing"
        )
    if missing := [name for name in names or () if name not in found]:
        wanted = f"`{begin(missing[0])}` and `{end(missing[0])}`"
        raise _fault(
            path, len(rows), f"the file ends without the part {missing[0]!r}: put back the lines {wanted}"
        )
    return found


def renewed(data: bytes, path: Path, texts: Mapping[str, str]) -> bytes:
    """Return the document with these texts in its parts; every byte outside of them is kept.

    Raises:
        RankwiseError: as `parts_of` does; the document must have these parts and no other.
    """
    found = parts_of(data, path, list(texts))
    pieces, at = [], 0
    for name, part in found.items():
        pieces += [data[at : part.start], texts[name].encode().replace(b"\n", part.newline)]
        at = part.end
    return b"".join([*pieces, data[at:]])


def _marker(row: bytes, path: Path, number: int, names: list[str] | None) -> tuple[str, str] | None:
    line = row.strip()
    match = MARKER.fullmatch(line)
    if match is None:
        if LOOKS_LIKE.match(line):
            said = visible(line.decode("utf-8", "replace"))[:80]
            raise _fault(
                path,
                number,
                f"{said!r} is no marker; one is `{begin('NAME')}` or `{end('NAME')}`, alone on its line",
            )
        return None
    name = match[2].decode("utf-8", "replace")
    if names is not None and name not in names:
        raise _fault(path, number, one_of("a part of this document", visible(name), names))
    return match[1].decode(), name


def _check_begin(name: str, inside: str, lines: Mapping[str, int], path: Path, number: int) -> None:
    if inside:
        raise _fault(
            path,
            number,
            f"{name!r} begins inside {inside!r}, which began on line {lines[inside]} and has not ended",
        )
    if name in lines:
        raise _fault(path, number, f"the part {name!r} stands twice: it began on line {lines[name]} too")


def _check_end(name: str, inside: str, lines: Mapping[str, int], path: Path, number: int) -> None:
    if not inside:
        raise _fault(
            path, number, f"the part {name!r} ends here but does not begin before; `{begin(name)}` is missing"
        )
    if name != inside:
        raise _fault(
            path,
            number,
            f"{name!r} ends inside {inside!r}, which began on line {lines[inside]} and has not ended",
        )


def _fault(path: Path, line: int, rule: str) -> RankwiseError:
    return RankwiseError(f"{path}:{line}: {rule}{'' if rule[-1] in '.?' else '.'} Nothing was changed.")
