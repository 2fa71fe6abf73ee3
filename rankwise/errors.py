"""The one error for what a person can mend, and the "did you mean" that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankwiseError(Exception):
    """A fault that the person at the keyboard can mend.

    The text states the rule, the value received and the choices. The command line prints it
    without a traceback and exits with code 2.
    """


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest choice, or an empty string."""
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def one_of(what: str, value: object, choices: Iterable[str]) -> str:
    """Return the sentence for a value that is not among its choices, with the nearest one."""
    names = list(choices)
    return f"{what} must be one of {', '.join(names)}; got {value!r}.{did_you_mean(str(value), names)}"
