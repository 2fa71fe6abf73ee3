"""Names of macros: letters only, made of a study, an arm and a quantity."""

from __future__ import annotations

import re

DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
SIGNS = {"@": "At", "+": "Plus"}
"""Characters that tell names apart and have a word of their own; other ASCII signs only part words."""


def camel(text: str) -> str:
    """Return text as ASCII letters: `uniform@r16` is `UniformAtROneSix`; never empty.

    Digits are spelled out one by one. A character beyond ASCII becomes its code, spelled the same way, and so
    does every character of a text that has no letter, digit or named sign at all.
    """
    parts = re.findall(r"[A-Za-z]+|[0-9@+]|[^\x00-\x7f]", text)
    return "".join(map(_part, parts)) or "".join(map(_code, text)) or "Nameless"


def _part(text: str) -> str:
    if not text.isascii():
        return _code(text)
    if text in SIGNS:
        return SIGNS[text]
    return DIGITS[int(text)] if text.isdigit() else text[0].upper() + text[1:]


def _code(character: str) -> str:
    return "U" + "".join(DIGITS[int(c)] if c.isdigit() else c for c in f"{ord(character):X}")


def macro_name(study: str, *parts: str) -> str:
    """Return the macro's name without its backslash: `seedUniformAtREightTestLoss`.

    The last part is a quantity, already in this form; those before it are names from a study. Different parts
    can give one name (`a-b` and `a_b`): the catalogue refuses that.
    """
    first, quantity = camel(study), parts[-1] if parts else ""
    return first[0].lower() + first[1:] + "".join(map(camel, parts[:-1])) + quantity


def looks_like_ours(word: str) -> bool:
    """Whether a control word has the form of a catalogue's macro: lower case, then a capital within."""
    return re.fullmatch(r"[a-z]+[A-Z][A-Za-z]*", word) is not None
