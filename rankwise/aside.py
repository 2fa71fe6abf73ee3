"""Files written aside and renamed: a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place at the end, or vanishes on an error.

    Raises:
        OSError: from the rename, such as a folder that stands there; what the block raises passes through.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        aside.replace(path)
    finally:
        with suppress(OSError):  # on a read-only disk even the removal of what is not there fails
            aside.unlink(missing_ok=True)
