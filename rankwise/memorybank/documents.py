"""The eight documents and a README's results: begun where missing, their generated parts renewed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from rankwise.aside import replacing
from rankwise.errors import RankwiseError
from rankwise.memorybank.cases import read_asked
from rankwise.memorybank.focus import focus
from rankwise.memorybank.ground import Ground
from rankwise.memorybank.knowledge import knowledge
from rankwise.memorybank.markers import begin, end, parts_of, renewed
from rankwise.memorybank.progress import progress
from rankwise.memorybank.readme import PART, PICTURE, asks, picture, results_section
from rankwise.memorybank.text import Marked, shown

TEMPLATES = Path(__file__).parent.parent / "templates"
DOCUMENTS = ("brief", "product", "system", "tech", "active-focus", "progress", "decisions", "knowledge")
"""In the order in which they are read; those that have no generated part are only ever begun."""
README = "README"
"""The project's own, beside the folder: nothing is written to it unless it has the part for results."""


@dataclass(frozen=True)
class Memory:
    """What became of the documents.

    Attributes:
        folder: of the documents.
        missing: those that were not there.
        stale: those whose generated parts were not what studies and records say.
        written: whether both have been written; a check writes nothing.
    """

    folder: Path
    missing: tuple[str, ...]
    stale: tuple[str, ...]
    written: bool

    @property
    def fresh(self) -> bool:
        """Whether nothing had to be done."""
        return not self.missing and not self.stale

    def summary(self) -> list[str]:
        """Return in sentences what was done or what is stale."""
        if self.fresh:
            return [f"{self.folder}/: all {len(DOCUMENTS)} documents are as studies and records say."]
        words = ("begun", "renewed") if self.written else ("missing", "stale")
        found = zip(words, (self.missing, self.stale), strict=True)
        lines = [f"{word}: {_place(self.folder, name)}" for word, names in found for name in names]
        return lines if self.written else [*lines, "`rankwise memory` writes them."]


def write_memory(
    studies: Path | Sequence[Path], results: Path, folder: Path, *, check: bool = False
) -> Memory:
    """Write the memory bank, or say which of its documents are stale.

    A document that is missing is begun from its template. In one that is there, the generated parts alone
    are renewed; what people wrote around them is kept byte for byte. So it is with the README beside the
    folder, if it has the part `results`, which shows a picture. All parts are made before anything is
    written. The same studies and records give the same bytes: no times of now, no readings of this machine.

    Args:
        studies: study files, or a folder whose `*.yaml` are meant.
        results: folder of the records.
        folder: of the documents; made if it is missing.
        check: write nothing.

    Returns:
        What was missing or stale, and whether it has been written.

    Raises:
        RankwiseError: a study file or a record has a fault, a marker is missing, doubled or crossed (with
            file and line), or a document cannot be read or written.

    Cost: a second to import what the report uses, then some 3 ms a record, and twice 0.1 s for each declared
        contrast.
    """
    ground = Ground(read_asked(_files(studies), results), results, folder)
    made = pages(ground)
    before = {name: _read(_place(folder, name)) for name in (*DOCUMENTS, README, PICTURE)}
    after = {name: _after(before[name], made[name], _place(folder, name)) for name in DOCUMENTS}
    after |= _results(ground, before[README])
    missing = tuple(name for name in after if before[name] is None)
    stale = tuple(name for name in after if name not in missing and before[name] != after[name])
    if not check:
        for name in (*missing, *stale):
            _write(_place(folder, name), after[name])
    return Memory(folder, missing, stale, not check)


def _place(folder: Path, name: str) -> Path:
    return {README: folder.parent / "README.md", PICTURE: folder / PICTURE}.get(name, folder / f"{name}.md")


def _results(ground: Ground, readme: bytes | None) -> dict[str, bytes]:
    """Return a README with its results, and their picture, if it asks for them."""
    if readme is None or not asks(readme):
        return {}
    path, drawn = _place(ground.folder, README), picture(ground)
    after = {README: renewed(readme, path, {PART: results_section(ground, path)})}
    return after if drawn is None else after | {PICTURE: drawn}


def pages(ground: Ground) -> dict[str, str]:
    """Return every document as it is when it is begun: name -> text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    context = {"begin": lambda name: Marked(begin(name)), "end": lambda name: Marked(end(name)),
               "studies": ground.asked, "focus": focus(ground), "progress": progress(ground),
               "knowledge": knowledge(ground)}  # fmt: skip
    return {name: environment.get_template(f"memory_{name}.md.j2").render(context) for name in DOCUMENTS}


def _files(studies: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(studies, Path):
        found = list(studies)
    elif studies.is_dir():
        found = sorted([*studies.glob("*.yaml"), *studies.glob("*.yml")])
    else:
        found = [studies]
    if not found:
        raise RankwiseError(
            f"the memory bank is made from study files, and there is no *.yaml in {studies}: name them, as "
            "in `rankwise memory STUDY.yaml`."
        )
    return found


def _after(before: bytes | None, made: str, path: Path) -> bytes:
    """Return the document as it should be."""
    whole = made.encode()
    if before is None:
        return whole
    texts = {name: whole[part.start : part.end].decode() for name, part in parts_of(whole, path).items()}
    return renewed(before, path, texts) if texts else before


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RankwiseError(
            f"{path} cannot be read: {error.strerror or error}. Nothing was changed."
        ) from None


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_bytes(data)
    except OSError as error:
        raise RankwiseError(f"{path} cannot be written: {error.strerror or error}.") from None
