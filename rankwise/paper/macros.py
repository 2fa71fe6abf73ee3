"""A macro and the catalogue of them all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rankwise.errors import RankwiseError, visible


@dataclass(frozen=True)
class Macro:
    """One generated value.

    Attributes:
        name: without the backslash.
        body: LaTeX.
        source: which study, arm and quantity, in words.
        unit: of the number; empty for text.
        form: the precision, as Python's format; empty for text.
        arguments: that the macro takes.
    """

    name: str
    body: str
    source: str
    unit: str = ""
    form: str = ""
    arguments: int = 0

    def definition(self) -> str:
        """Return the line that defines it, with its unit, precision and source in a comment."""
        taken = f"[{self.arguments}]" if self.arguments else ""
        told = ", ".join(filter(None, (self.source, self.unit, self.form)))
        return rf"\newcommand{{\{self.name}}}{taken}{{{self.body}}}% {visible(told)}"


class Catalogue:
    """Every macro that the studies offer, by name."""

    def __init__(self, macros: Iterable[Macro] = ()) -> None:
        self.macros: dict[str, Macro] = {}
        for macro in macros:
            self.add(macro)

    def add(self, macro: Macro) -> None:
        """Take a macro in.

        Raises:
            RankwiseError: another one has its name.
        """
        other = self.macros.get(macro.name)
        if other is not None:
            raise RankwiseError(
                f"two values would both be called \\{macro.name}: {visible(other.source)}, and "
                f"{visible(macro.source)}. Names keep letters and digits alone; rename an arm or a study."
            )
        self.macros[macro.name] = macro
