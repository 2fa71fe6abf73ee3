"""The paper's own files: what they use, where, and their text without comments."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from rankwise.errors import RankwiseError

GENERATED = "generated"
COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%.*")
WORD = re.compile(r"\\([A-Za-z]+)")
DEFINED = re.compile(r"\\(?:re|provide)?newcommand\*?\{?\\([A-Za-z]+)\}?|\\def\\([A-Za-z]+)")
INPUT = re.compile(r"\\input\{([^{}]*)\}")
CITE = re.compile(r"\\cite[a-z]*\*?(?:\[[^\]]*\])*\{([^{}]*)\}")
LABEL = re.compile(r"\\label\{([^{}]*)\}")
REF = re.compile(r"\\(?:eq|auto|page|name)?ref\*?\{([^{}]*)\}")
STUDY = re.compile(r"\\study\{([^{}]*)\}")
BIB = re.compile(r"\\bibliography\{([^{}]*)\}")


@dataclass(frozen=True)
class Place:
    """A place in a file, as messages name it; lines count from 1."""

    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class Source:
    r"""One file that a person wrote.

    Attributes:
        path: as messages name it.
        text: its content without comments; lines keep their numbers.
        body: from where on it is typeset: after \begin{document} in the main file.
    """

    path: Path
    text: str
    body: int = 0

    @property
    def stem(self) -> str:
        """The file's name without its ending; messages and rules go by it."""
        return self.path.stem

    def at(self, offset: int) -> Place:
        """Return the place of a character."""
        return Place(self.path, self.text.count("\n", 0, offset) + 1)

    def found(self, pattern: re.Pattern[str]) -> list[tuple[str, Place]]:
        """Return what the pattern's first filled group holds, each with its place."""
        return [
            (next(text for text in match.groups() if text is not None), self.at(match.start()))
            for match in pattern.finditer(self.text)
        ]

    def words(self) -> list[tuple[str, Place]]:
        """Return the control words that are used, those that are being defined left out."""
        defined = {m.start(1) if m[1] else m.start(2) for m in DEFINED.finditer(self.text)}
        return [(m[1], self.at(m.start())) for m in WORD.finditer(self.text) if m.start(1) not in defined]


@dataclass(frozen=True)
class Paper:
    """The files of a paper, from the main one on.

    Attributes:
        folder: that holds main.tex.
        sources: in the order in which they are read.
        missing: inputs that are no file, with their places.
        strangers: .tex files of the folder that nothing reads.
    """

    folder: Path
    sources: list[Source]
    missing: list[tuple[str, Place]] = field(default_factory=list)
    strangers: list[Path] = field(default_factory=list)

    def found(self, pattern: re.Pattern[str]) -> list[tuple[str, Place]]:
        """Return what the pattern finds in all files."""
        return [hit for source in self.sources for hit in source.found(pattern)]

    def words(self) -> list[tuple[str, Place]]:
        """Return the control words that all files use."""
        return [hit for source in self.sources for hit in source.words()]

    def studies(self) -> list[str]:
        r"""Return the studies that the text names by \study, in the order in which it does."""
        return list(dict.fromkeys(name for name, _ in self.found(STUDY)))

    def pieces(self) -> list[tuple[str, Place]]:
        """Return the generated pieces that are read, `numbers` left out."""
        inputs = ((text.removesuffix(".tex"), place) for text, place in self.found(INPUT))
        prefix = f"{GENERATED}/"
        return [
            (t.removeprefix(prefix), p) for t, p in inputs if t.startswith(prefix) and t != prefix + "numbers"
        ]


def read_paper(folder: Path) -> Paper:
    """Read main.tex and every hand-written file that it reads.

    Raises:
        RankwiseError: no main.tex, or a file that is not text.
    """
    if not (folder / "main.tex").is_file():
        raise RankwiseError(f"no main.tex lies in {folder}; choose the paper's folder with --paper.")
    paper = Paper(folder, [])
    _read(folder / "main.tex", paper)
    read = {source.path for source in paper.sources}
    files = sorted([*folder.glob("*.tex"), *folder.glob("sections/**/*.tex")])
    paper.strangers.extend(path for path in files if path not in read)
    return paper


def _read(path: Path, paper: Paper) -> None:
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RankwiseError(f"{path} cannot be read as text ({error}).") from None
    text = COMMENT.sub(r"\1", raw)
    begin = text.find(r"\begin{document}")
    source = Source(path, text, max(begin, 0))
    paper.sources.append(source)
    for target, place in source.found(INPUT):
        if target.startswith(f"{GENERATED}/"):
            continue
        inner = paper.folder / (target if target.endswith(".tex") else f"{target}.tex")
        if not inner.is_file():
            paper.missing.append((target, place))
        elif inner not in {one.path for one in paper.sources}:
            _read(inner, paper)
