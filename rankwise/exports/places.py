"""Where an export is written: a new folder or file, made aside, that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from rankwise.aside import replacing
from rankwise.errors import RankwiseError


def need_new(folder: Path) -> None:
    """Refuse a folder that would be overwritten.

    Raises:
        RankwiseError: there is a file of that name, or a folder that is not empty.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise RankwiseError(f"{folder} is there already; name a new folder with --out, or remove that one.")


def need_new_file(file: Path, suffix: str, what: str) -> None:
    """Refuse a file of another suffix, or one that would be overwritten.

    Raises:
        RankwiseError: the one or the other.
    """
    if file.suffix != suffix:
        raise RankwiseError(f"{what} is called NAME{suffix}; got {str(file)!r}. Name one with --out.")
    if os.path.lexists(file):
        raise RankwiseError(f"{file} is there already; name a new file with --out, or remove that one.")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` when the block ends well, and vanishes when it does not.

    Raises:
        RankwiseError: `folder` cannot be written, or has come into being meanwhile.
    """
    folder = folder.absolute()
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with _parents(folder):
        try:
            aside.mkdir()
            yield aside
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Yield a path that becomes `file` when the block ends well, and vanishes when it does not.

    Raises:
        RankwiseError: `file` cannot be written, or has come into being meanwhile.
    """
    file = file.absolute()
    with _parents(file), replacing(file) as aside:
        yield aside
        need_new_file(file, file.suffix, "The file")


@contextmanager
def _parents(place: Path) -> Iterator[None]:
    """Make the folders above a place; take those away again that were made, when the block fails."""
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            why = getattr(error, "strerror", None) or error
            raise RankwiseError(f"The export cannot be written to {place}: {why}.") from None
        raise
