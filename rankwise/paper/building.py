"""Compiling with latexmk: no shell escape, no settings of the user's, the same bytes for the same sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from rankwise.errors import RankwiseError
from rankwise.paper.rules import Fault
from rankwise.paper.sources import Place

BUILD = "build"
REMEDY = (
    "On Debian or Ubuntu: apt-get install --no-install-recommends latexmk texlive-latex-recommended "
    "texlive-fonts-recommended. What is generated lies in {folder} all the same."
)
FIXED = {"SOURCE_DATE_EPOCH": "1577836800", "FORCE_SOURCE_DATE": "1", "max_print_line": "10000",
         "openout_any": "p", "openin_any": "a", "TZ": "UTC"}  # fmt: skip
"""A fixed date, so that equal sources give equal PDFs; log lines unbroken; no writing outside the folder."""
LIMIT = 600
"""Seconds that a compilation may take."""
ERROR = re.compile(r"^(?:\./)?([^:\n]+\.(?:tex|bbl|sty|cls)):(\d+): (.+)$", re.MULTILINE)
BOX = re.compile(r"^Overfull \\([hv])box \(([0-9.]+)pt too (wide|high)\)(.*)$")
LINES = re.compile(r"at lines? (\d+)")
TAKEN = re.compile(r"\((?:\./)?([^\s()]+\.(?:tex|bbl|sty|cls|def|cfg|clo|fd|ldf|aux|toc|out))|[()]")
UNDEFINED = re.compile(
    r"^LaTeX Warning: (?:Reference|Citation) .*|^Package natbib Warning: Citation .*", re.MULTILINE
)
NEGLIGIBLE = 1.0
"""Points, of 72.27 to an inch: a box that sticks out less is not seen."""


def need_tex(folder: Path) -> str:
    """Return latexmk's path.

    Raises:
        RankwiseError: a program is missing; says how to get it.
    """
    missing = [program for program in ("latexmk", "pdflatex", "bibtex") if shutil.which(program) is None]
    if missing:
        raise RankwiseError(
            f"compiling needs {', '.join(missing)}. {REMEDY.format(folder=folder / 'generated')}"
        )
    return str(shutil.which("latexmk"))


def compile_paper(folder: Path, out: str = BUILD, *, bibtex: bool = True) -> Path:
    """Compile `folder/main.tex` and return the PDF.

    Args:
        folder: that holds main.tex.
        out: folder of the PDF and of what TeX leaves, below it.
        bibtex: False uses main.bbl as it lies there.

    Raises:
        RankwiseError: TeX is missing, finds an error (told with its place), or takes too long.

    Cost: some seconds.
    """
    command = [need_tex(folder), "-norc", "-pdf", "-bibtex" if bibtex else "-bibtex-", f"-outdir={out}",
               "-interaction=nonstopmode", "-halt-on-error", "-file-line-error",
               "-latexoption=-no-shell-escape", "-silent", "main.tex"]  # fmt: skip
    try:
        (folder / out).mkdir(exist_ok=True)
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **FIXED}, capture_output=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        raise RankwiseError(
            f"latexmk took longer than {LIMIT} s on {folder}/main.tex and was ended."
        ) from None
    except OSError as error:
        raise RankwiseError(f"{folder}/{out} cannot be written: {error.strerror or error}.") from None
    pdf = folder / out / "main.pdf"
    if done.returncode or not pdf.is_file():
        raise RankwiseError(_why(folder, out, done.stdout + done.stderr))
    return pdf


def _why(folder: Path, out: str, said: bytes) -> str:
    errors = [f"{folder / file}:{line}: {text}" for file, line, text in ERROR.findall(read_log(folder, out))]
    told = errors[:5] or said.decode("utf-8", "replace").strip().splitlines()[-5:]
    return f"TeX found errors in {folder}:\n  " + "\n  ".join(told)


def read_log(folder: Path, out: str = BUILD) -> str:
    """Return TeX's log of the last compilation; empty without one."""
    path = folder / out / "main.log"
    return path.read_text(encoding="latin-1") if path.is_file() else ""


def log_faults(folder: Path, log: str) -> Iterator[Fault]:
    """Yield overfull boxes with their file and line, and references or citations that TeX did not find."""
    for file, line in _with_files(log.split("\n")):
        found = BOX.match(line)
        if found and float(found[2]) > NEGLIGIBLE:
            where = LINES.search(found[4])
            text = f"{found[2]} pt too {found[3]}{found[4]}"
            yield Fault(Place(folder / file, int(where[1]) if where else 1), "overfull", text)
    for text in dict.fromkeys(UNDEFINED.findall(log)):
        yield Fault(Place(folder / "main.tex", 1), "undefined", text.strip())


def _with_files(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each line of a log with the file that TeX was reading; the text of bad boxes is not parsed."""
    stack: list[str] = []
    boxed = False
    for line in lines:
        yield next((name for name in reversed(stack) if name), "main.tex"), line
        if line.startswith(("Overfull", "Underfull")):
            boxed = "paragraph" in line or "alignment" in line
            continue
        if boxed:
            boxed = bool(line.strip())
            continue
        for match in TAKEN.finditer(line):
            if match[0] == ")":
                del stack[-1:]
            else:
                stack.append(match[1] if match[1] and match[1].endswith((".tex", ".bbl")) else "")
