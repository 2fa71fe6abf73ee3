"""Text from studies, records, data and configurations, put so that Markdown and HTML show it as it is.

One rule for data cards, model cards, the memory bank and tables: what a reader sees is the text, no word of
it is a link, markup or HTML, and nothing turns the direction of what follows.
"""

from __future__ import annotations

import re
import unicodedata

SPECIAL = re.compile(r"([\\`*{}\[\]<>#|~!$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_ADDRESS = re.compile(r"://|www\.|mailto:|xmpp:|@", re.IGNORECASE)


def line(text: object) -> str:
    """Return a text on one line, without characters that are not seen or that turn its direction."""
    seen = "".join("\ufffd" if unicodedata.category(c) in ("Cf", "Cs") else c for c in str(text))
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", seen)


def prose(text: object) -> str:
    """Return text for use within a line or a table's cell; readable in the source too.

    Full stops, hyphens and round brackets stay bare, as they are markup at a line's start, or behind `]`,
    alone; so do underscores within a word. Words that hold an address become code: GitHub makes links of
    addresses, of some even where they are escaped.
    """
    return "".join(_word(word) for word in re.split(r"(\s+)", line(text)))


def _word(word: str) -> str:
    core = word.rstrip(".,;:)") if _ADDRESS.search(word) else ""
    rest = SPECIAL.sub(r"\\\1", word[len(core) :]).replace(r"\<", "&lt;").replace(r"\&", "&amp;")
    return (code(core) if core else "") + rest


def code(text: object, longest: int = 300) -> str:
    """Return a text as a code span on one line, in which nothing is a link or markup.

    No pipe is left, so that it can stand in a table.
    """
    shown = line(text).replace("|", "\u00a6").strip()
    shown = shown[:longest] + "…" * (len(shown) > longest) or "(empty)"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " * (shown[0] == "`" or shown[-1] == "`")
    return f"{fence}{space}{shown}{space}{fence}"
