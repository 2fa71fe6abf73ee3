"""Text for Markdown in which nothing from a study or a record can be markup.

`Marked` is text that is Markdown already. Everything else is escaped where it is put in: by `md`, and by the
templates' environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rankwise import markdown
from rankwise.markdown import prose


class Marked(str):
    """Text that is Markdown already; what is joined or cut from it is not, and would be escaped again."""

    __slots__ = ()


def shown(value: Any) -> str:
    """Return a value for a template: escaped, unless it is Markdown already."""
    return value if isinstance(value, Marked) else prose(str(value))


def md(form: str, **values: Any) -> Marked:
    """Return a sentence of ours with values put in, which are escaped unless they are `Marked`."""
    return Marked(form.format(**{name: shown(value) for name, value in values.items()}))


def code(name: str) -> Marked:
    """Return a name as code."""
    return Marked(markdown.code(name))


def listed(names: Sequence[str], most: int = 0) -> Marked:
    """Return names as code with commas; beyond `most`, how many more."""
    few = names[:most] if most and len(names) > most + 1 else names
    rest = [f"and {len(names) - len(few)} more"] if len(few) < len(names) else []
    return Marked(", ".join([*map(code, few), *rest]))


def named(sentence: str, names: Iterable[str]) -> Marked:
    """Return a sentence in which these names are code and the rest is escaped.

    Names that are words of the language stay words: an arm `uniform` is no other than what "uniform" says.
    """
    wanted = sorted((name for name in names if not name.isalpha()), key=len, reverse=True)
    if not wanted:
        return Marked(prose(sentence))
    parts = re.split(rf"(?<![\w@-])({'|'.join(map(re.escape, wanted))})(?![\w@-])", sentence)
    return Marked("".join(code(part) if i % 2 else prose(part) for i, part in enumerate(parts)))


def joined(parts: Sequence[Any]) -> Marked:
    """Return sentences one after the other, escaped unless they are `Marked`."""
    return Marked(" ".join(map(shown, parts)))


def link(text: str, target: Path, folder: Path) -> Marked:
    """Return a link from a document in `folder` to a file, relative, so that it works in every copy."""
    place = Path(os.path.relpath(target, folder)).as_posix()
    return Marked(f"[{prose(text)}]({quote(place)})")


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]], numeric: Sequence[bool]) -> Marked:
    """Return a table; cells are escaped unless they are `Marked`."""
    lines = [headings, ["--:" if right else "---" for right in numeric]]
    cells = [[Marked(cell) for cell in line] for line in lines] + [list(row) for row in rows]
    return Marked("\n".join(f"| {' | '.join(shown(cell) or ' ' for cell in row)} |" for row in cells))
