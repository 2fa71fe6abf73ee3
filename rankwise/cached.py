"""The cache folder, and the hashes of files: computed, noted in the cache, compared with a pin.

A file whose size and times are as they were noted is not read again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from rankwise.aside import replacing
from rankwise.errors import RankwiseError


def cache_dir() -> Path:
    """Return the folder that fetched files are kept in: $RANKWISE_CACHE or the user's cache folder.

    It holds files/<dist>-<version>/<path> (members of archives), downloads/<archive> (small ones, since
    several members may come from one sdist), downloads/<archive>.part (a broken download, continued by the
    next call), locks/ and notes/ (size, times and sha256 of files already hashed).
    """
    chosen = os.environ.get("RANKWISE_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("rankwise")


def verify(expected: str | None, actual: str, what: str) -> None:
    """Refuse content that is not the expected one; without an expected hash, any content will do.

    Raises:
        RankwiseError: the hashes differ.
    """
    if expected not in (None, actual):
        raise RankwiseError(
            f"The sha256 of {what} is not the expected one: expected {expected}, actual {actual}. Nothing "
            "was kept or used. If the content is meant to have changed, write its hash after #sha256=; "
            "if not, fetch it from another mirror or report it to whoever publishes it."
        )


def digest(path: Path) -> str:
    """Return the sha256 of a file, read anew."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _note_of(path: Path) -> Path:
    return cache_dir() / "notes" / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]}.json"


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def note(path: Path, sha: str) -> str:
    """Remember a hash and return it. If the cache cannot be written, the file is hashed again next time."""
    kept = _note_of(path)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as aside:
            aside.write_text(json.dumps({"path": str(path), "stamp": _stamp(path), "sha256": sha}))
    except OSError:
        pass
    return sha


def _noted(path: Path) -> tuple[bool, str | None]:
    """Return whether the file is as it was when it was last hashed, and the hash that it had then."""
    try:
        kept = json.loads(_note_of(path).read_text())
        return kept["stamp"] == _stamp(path), kept["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False, None


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, which is read only if it changed since it was last hashed."""
    same, sha = _noted(path)
    return sha if same and sha else note(path, digest(path))


def cached_sha256(path: Path, pin: str | None) -> str | None:
    """Return the hash of a cached file, or None if it is absent, damaged, or not the pinned content."""
    if not path.is_file():
        return None
    same, before = _noted(path)
    wanted = pin or before
    actual = before if same else digest(path)
    if wanted is None or actual != wanted:
        return None
    return wanted if same else note(path, wanted)


def folder_sha256(root: Path, files: Iterable[Path]) -> str:
    """Return a digest over the sorted (name, sha256) of the files: not over their times or their order.

    Raises:
        RankwiseError: there are no files.
    """
    entries = sorted((p.relative_to(root).as_posix(), file_sha256(p)) for p in files)
    if not entries:
        raise RankwiseError(f"The folder {root} holds no files.")
    return hashlib.sha256("".join(f"{name}\0{sha}\n" for name, sha in entries).encode()).hexdigest()


@contextmanager
def disk_faults() -> Iterator[None]:
    """Say what a full disk or a cache that cannot be written means, and what mends it."""
    try:
        yield
    except OSError as exc:
        if exc.errno is None:
            raise
        where = exc.filename or cache_dir()
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            fault = f"The disk is full: could not write {where}. Free some space"
        else:
            fault = f"Could not read or write {where}: {exc.strerror}. Mend that"
        remedy = "or set RANKWISE_CACHE to a folder that can be written and has room."
        raise RankwiseError(f"{fault}, {remedy} The cache is now {cache_dir()}.") from exc
