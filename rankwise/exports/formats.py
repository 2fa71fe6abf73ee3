"""Every format that an adapter, or its plan, is exported to, by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rankwise.errors import RankwiseError, one_of
from rankwise.exports.gguf_file import export_gguf
from rankwise.exports.merged import export_merged
from rankwise.exports.patterned import export_peft
from rankwise.exports.trainers import TRAINERS, export_trainer
from rankwise.exports.uniform import export_uniform


class Written(Protocol):
    """What every export returns: where it is, what was done as sentences, and everything as JSON values."""

    @property
    def out(self) -> Path:
        """The folder or file."""

    def summary(self) -> str:
        """Return what was done, a sentence a line."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""


@dataclass(frozen=True)
class Format:
    """One format: what writes it, the options that this takes, and its file's suffix ("" for a folder)."""

    write: Callable[..., Written]
    options: tuple[str, ...]
    suffix: str = ""


FORMATS: dict[str, Format] = {
    "uniform": Format(export_uniform, ("max_rank", "dtype", "model", "tgi")),
    "peft": Format(export_peft, ("max_rank", "dtype", "model")),
    "merged": Format(export_merged, ("dtype", "model")),
    "gguf": Format(export_gguf, ("max_rank", "dtype", "model"), ".gguf"),
    **{
        name: Format(partial(export_trainer, name), ("dropout",), f"_{name}{trainer.suffix}")
        for name, trainer in TRAINERS.items()
    },
}


def export(
    source: str | Path, out: str | Path | None = None, *, format: str = "uniform", **options: Any
) -> Written:
    """Write an adapter, or a plan, in a format.

    Args:
        source: folder of a PEFT LoRA adapter; for a trainer's format also a plan file.
        out: a new folder, or a new file with the format's suffix; None puts it beside the source.
        format: one of `FORMATS`.
        options: of the format; those that are None count as not given.

    Raises:
        RankwiseError: no such format, an option that it does not take, or whatever it refuses itself.
    """
    if format not in FORMATS:
        raise RankwiseError(one_of("format", format, FORMATS))
    chosen, given = FORMATS[format], {key: value for key, value in options.items() if value is not None}
    for option in given:
        if option not in chosen.options:
            takers = [name for name, other in FORMATS.items() if option in other.options]
            raise RankwiseError(
                f"{option} is no option of format {format}, which takes {', '.join(chosen.options)}."
                + (f" It belongs to {', '.join(takers)}." if takers else "")
            )
    return chosen.write(source, beside(source, format) if out is None else out, **given)


def beside(source: str | Path, format: str) -> Path:
    """Return where a format goes next to its source: `mine-uniform`, `mine.gguf`, `plan_trl.py`."""
    place, suffix = Path(os.path.abspath(source)), FORMATS[format].suffix  # noqa: PTH100 - links stay links
    if not suffix:
        return place.with_name(f"{place.name}-{format}")
    return place.with_name(f"{place.stem if place.is_file() else place.name}{suffix}")
