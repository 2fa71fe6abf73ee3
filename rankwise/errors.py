"""The one error for what a person can mend, and what its sentences share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankwiseError(Exception):
    """A fault that the person at the keyboard can mend.

    The text states the rule, the value received and the choices. The command line prints it
    without a traceback and exits with code 2.
    """


def nearest(value: str, choices: Iterable[str]) -> str | None:
    """Return the choice that was probably meant, or None if none is near."""
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.6)
    return near[0] if near else None


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest choice, or an empty string."""
    near = nearest(value, choices)
    return "" if near is None else f" Did you mean {near!r}?"


def one_of(what: str, value: object, choices: Iterable[str]) -> str:
    """Return the sentence for a value that is not among its choices, with the nearest one."""
    names = list(choices)
    return f"{what} must be one of {', '.join(names)}; got {value!r}.{did_you_mean(str(value), names)}"


def visible(text: str) -> str:
    r"""Return text in which control and other unprintable characters are written out, such as \x1b.

    A terminal obeys such characters, so names from files would otherwise colour, move or hide output.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
