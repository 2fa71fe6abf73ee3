"""The bundle for arXiv: the sources, main.bbl and the pieces in use, and the proof that they compile."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import tempfile
from pathlib import Path

from rankwise.aside import replacing
from rankwise.errors import RankwiseError
from rankwise.paper.building import BUILD, UNDEFINED, compile_paper, read_log
from rankwise.paper.sources import GENERATED, Paper

MOST = 10_000_000
"""Bytes of a bundle."""
STAMP = 1577836800
"""The time of every file within: 2020-01-01."""
PAGES = re.compile(r"Output written on .*\((\d+) pages?")


def bundled(paper: Paper, files: dict[str, bytes]) -> dict[str, bytes]:
    """Return what goes into the bundle, by name: no hidden file, and all that TeX read in the paper's folder.

    Raises:
        RankwiseError: the paper was not compiled, so that there is no main.bbl.
    """
    bbl = paper.folder / BUILD / "main.bbl"
    if not bbl.is_file():
        raise RankwiseError(f"{bbl} is missing: compile the paper first (`rankwise paper`).")
    found = {"main.bbl": bbl.read_bytes()}
    for source in paper.sources:
        found[source.path.relative_to(paper.folder).as_posix()] = source.path.read_bytes()
    for name in _read_by_tex(paper.folder):  # pictures and styles of one's own
        found[name] = (paper.folder / name).read_bytes()
    found |= {f"{GENERATED}/{name}": content for name, content in files.items()}
    if hidden := [name for name in found if any(part.startswith(".") for part in name.split("/"))]:
        raise RankwiseError(f"arXiv takes no hidden files; rename {', '.join(sorted(hidden))}.")
    return found


def _read_by_tex(folder: Path) -> list[str]:
    """Return the files of the paper's folder that its last compilation read, those that are made left out.

    Source: the recorder file that latexmk keeps, main.fls.
    """
    record = folder / BUILD / "main.fls"
    if not record.is_file():
        return []
    lines = record.read_text(encoding="utf-8", errors="replace").splitlines()
    base = next((Path(line[4:]) for line in lines if line.startswith("PWD ")), folder.absolute())
    own, found = folder.resolve(), set()
    for line in lines:
        path = (base / line.removeprefix("INPUT ")).resolve() if line.startswith("INPUT ") else own
        if path.is_file() and path.is_relative_to(own):
            name = path.relative_to(own)
            found |= {name.as_posix()} if name.parts[0] not in (BUILD, GENERATED) else set()
    return sorted(found)


def archive(files: dict[str, bytes]) -> bytes:
    """Return a .tar.gz of the files; equal files give equal bytes.

    Raises:
        RankwiseError: it is larger than allowed.
    """
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(files[name]), STAMP, 0o644
            tar.addfile(member, io.BytesIO(files[name]))
    packed = gzip.compress(raw.getvalue(), compresslevel=9, mtime=0)
    if len(packed) > MOST:
        largest = max(files, key=lambda name: len(files[name]))
        raise RankwiseError(
            f"the bundle has {len(packed) / 1e6:.1f} MB, and at most {MOST / 1e6:.0f} MB are allowed; its "
            f"largest file is {largest} ({len(files[largest]) / 1e6:.1f} MB)."
        )
    return packed


def write_bundle(paper: Paper, files: dict[str, bytes]) -> tuple[Path, int]:
    """Write `build/arxiv.tar.gz`, once its content has compiled by itself in an empty folder.

    Returns:
        Its path, and the pages that it gave.

    Raises:
        RankwiseError: it does not compile by itself, or gives another paper than the folder does.
    """
    packed = archive(bundled(paper, files))
    pages = prove(packed)
    own = PAGES.search(read_log(paper.folder))
    if own and int(own[1]) != pages:
        raise RankwiseError(f"the bundle gives {pages} pages and the paper {own[1]}: something is left out.")
    path = paper.folder / BUILD / "arxiv.tar.gz"
    with replacing(path) as aside:
        aside.write_bytes(packed)
    return path, pages


def prove(packed: bytes) -> int:
    """Compile a bundle in an empty folder, without BibTeX, and return its pages.

    Raises:
        RankwiseError: TeX finds an error, or a reference or citation is missing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(folder, filter="data")
        compile_paper(folder, ".", bibtex=False)
        log = read_log(folder, ".")
    if lost := UNDEFINED.findall(log):
        raise RankwiseError(f"the bundle compiles, but TeX misses something in it: {lost[0]}")
    found = PAGES.search(log)
    return int(found[1]) if found else 0
