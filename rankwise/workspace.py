"""`rankwise init`: a research folder in which every command works, made whole or not at all."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jinja2

from rankwise.errors import RankwiseError

TEMPLATES = Path(__file__).parent / "templates"
STUDY = "studies/study.yaml"
FILES = {
    "README.md": "workspace_README.md.j2",
    "Makefile": "workspace_Makefile.j2",
    ".gitignore": "workspace_gitignore.j2",
    STUDY: "workspace_study.yaml.j2",
    "paper/main.tex": "workspace_main.tex",
    "paper/references.bib": "workspace_references.bib",
}
"""Path within the folder -> its template; what is no template (LaTeX is full of Jinja2's marks) is copied."""
PLACES = {
    "data": "Rows of your own (JSON, JSONL, Parquet or text), and the cards that `rankwise data` writes.",
    "models": "Models of your own, rank plans and exported adapters; git leaves the weights out.",
    "results": "A folder for each study with one for each run, by rankwise: commit them, do not edit them.",
    "studies": "What is asked: one YAML file for each study; `study.yaml` is the one to begin with.",
    "paper": "The paper: prose by hand, every number in `generated/` from the records.",
    "memory": "The project's living documents; `make memory` begins them and renews their marked parts.",
}
"""Folder -> the one line of its README."""


@dataclass(frozen=True)
class Workspace:
    """A research folder that was made.

    Attributes:
        folder: where it lies.
        files: its files, as paths within it.
    """

    folder: Path
    files: tuple[str, ...]

    def summary(self) -> list[str]:
        """Return in sentences what is there and what comes next."""
        return [
            f"{self.folder}: {len(self.files)} files in {', '.join(f'{name}/' for name in PLACES)}",
            f"Next: cd {self.folder}, look at {STUDY} (two lines name the model and the rows), `make study`.",
        ]


def create(folder: Path) -> Workspace:
    """Make a research folder.

    Args:
        folder: new or empty; folders above it are made.

    Raises:
        RankwiseError: it is a file or holds something, or cannot be written; nothing is left behind then.
    """
    _need_empty(folder)
    made = contents(folder.absolute().name)
    with _aside(folder) as aside:
        for name, text in made.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    return Workspace(folder, tuple(made))


def contents(name: str) -> dict[str, str]:
    """Return path -> text of every file; `name` is shown in the README."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    given = {"study": STUDY, "places": PLACES, "program": program()}
    files = {
        path: environment.get_template(source).render(given)
        if source.endswith(".j2")
        else (TEMPLATES / source).read_text(encoding="utf-8")
        for path, source in FILES.items()
    }
    return files | {f"{place}/README.md": f"{line}\n" for place, line in PLACES.items()}


def program() -> str:
    """Return what a Makefile calls: `rankwise` where that is found by name, else the one that is running."""
    own, found = Path(sys.executable).with_name("rankwise"), shutil.which("rankwise")
    if found and (not own.exists() or Path(found).samefile(own)):
        return "rankwise"
    words = [str(own)] if own.exists() else [sys.executable, "-m", "rankwise"]
    return shlex.join(words).replace("$", "$$").replace("#", r"\#")


def _need_empty(folder: Path) -> None:
    if folder.is_dir():
        inside = sorted(path.name for path in folder.iterdir())
        if inside:
            few = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
            raise RankwiseError(f"a research folder is made in a new or empty folder; {folder} holds {few}.")
    elif os.path.lexists(folder):
        raise RankwiseError(f"a research folder is made in a new or empty folder; {folder} is a file.")


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Yield a folder whose contents come to `folder` when the block ends well; else nothing is left of it.

    One that is there already is filled and not replaced: it may be somebody's working folder, or a mount.
    """
    there = folder.is_dir()
    place = folder if there else folder.absolute().parent
    aside = place / f".{folder.absolute().name}.{os.getpid()}.partial"
    moved: list[Path] = []
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in sorted(aside.iterdir()) if there else ():
            moved.append(path.rename(folder / path.name))
        if not there:
            aside.rename(folder)
    except OSError as error:
        for path in moved:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        why = error.strerror or error
        raise RankwiseError(f"the research folder cannot be written to {folder}: {why}.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
