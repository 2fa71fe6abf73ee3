"""The whole way with TeX: compiled, read back, bundled, and compiled again in an empty folder."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from rankwise.errors import RankwiseError
from rankwise.paper.building import compile_paper, read_log
from rankwise.paper.bundle import archive, prove
from tests.conftest import rankwise
from tests.paper.desk import RESULTS, Desk, desk

needs_tex = pytest.mark.skipif(
    shutil.which("latexmk") is None or shutil.which("pdflatex") is None,
    reason="latexmk or pdflatex is missing",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, list[str]]:
    """A compiled and bundled paper, and what the work said."""
    place = desk(tmp_path_factory.mktemp("tex"))
    lines, faults = place.work().make(arxiv=True)
    assert faults == [], [str(fault) for fault in faults]
    return place, lines


def words(pdf: Path) -> str:
    """The text of a PDF in one line."""
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is missing")
    text = subprocess.run(["pdftotext", pdf, "-"], capture_output=True, text=True, check=True).stdout
    return " ".join(text.split())


@needs_tex
def test_hostile_names_and_studies_that_have_not_run_are_in_the_pdf(made: tuple[Desk, list[str]]):
    place, lines = made
    text = words(place.paper_folder / "build" / "main.pdf")
    assert "<script>alert" in text.replace(" ", "") and "50%" in text.replace(" ", "")
    assert "The study later has not been run yet" in text
    assert place.offer().macros.macros["madeUpSpectralTestLoss"].body in text
    assert "differs from" in text
    assert re.search(r"main\.pdf \(\d+ pages", lines[0]) and "compiled by itself" in lines[1]


@needs_tex
def test_the_bundle_holds_what_is_used_and_nothing_else(made: tuple[Desk, list[str]]):
    place, _ = made
    with tarfile.open(place.paper_folder / "build" / "arxiv.tar.gz") as tar:
        members = tar.getmembers()
    names = {member.name for member in members}
    own = {f"generated/{path.name}" for path in place.generated.iterdir()}
    assert names == {"main.tex", "main.bbl", "sections/results.tex"} | own
    assert {(m.mtime, m.uid, m.uname) for m in members} == {(members[0].mtime, 0, "")}


@needs_tex
def test_a_style_and_a_picture_of_ones_own_are_in_the_bundle(tmp_path: Path):
    place = desk(tmp_path)
    main = place.paper_folder / "main.tex"
    main.write_text(
        main.read_text().replace(r"\begin{document}", "\\usepackage{own}\n\\begin{document}\n\\own")
    )
    picture = next(path for path in place.write() if path.endswith(".pdf"))
    (place.paper_folder / "own.pdf").write_bytes((place.generated / picture).read_bytes())
    (place.paper_folder / "own.sty").write_text("\\newcommand{\\own}{\\includegraphics{own.pdf}}\n")
    _, faults = place.work().make(arxiv=True)
    assert not faults
    with tarfile.open(place.paper_folder / "build" / "arxiv.tar.gz") as tar:
        assert {"own.sty", "own.pdf"} < set(tar.getnames())


@needs_tex
def test_a_bundle_that_lacks_a_piece_is_not_handed_out(made: tuple[Desk, list[str]]):
    place, _ = made
    with tarfile.open(place.paper_folder / "build" / "arxiv.tar.gz") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    assert archive(files) == (place.paper_folder / "build" / "arxiv.tar.gz").read_bytes()
    del files["generated/made-up-fig-differences.pdf"]
    with pytest.raises(RankwiseError, match="made-up-fig-differences"):
        prove(archive(files))


@needs_tex
def test_a_changed_record_changes_the_pdf_and_a_wide_line_is_a_fault(tmp_path: Path):
    place = desk(tmp_path)
    place.say(
        RESULTS.replace(r"\noindent\input{generated/made-up-fig-differences}", "")
        + "\n\n"
        + "x" * 400
        + "\n\n"
    )
    place.change("spectral", 0, 1.5)
    _, faults = place.work().make()
    assert [fault.rule for fault in faults] == ["overfull"] and faults[0].place.path.name == "results.tex"
    number = place.offer().macros.macros["madeUpSpectralTestLoss"].body
    assert number in words(place.paper_folder / "build" / "main.pdf")


@needs_tex
def test_an_error_of_tex_is_told_with_its_place(tmp_path: Path):
    (tmp_path / "main.tex").write_text(
        "\\documentclass{article}\n\\begin{document}\n\\nosuchthing\n\\end{document}\n"
    )
    with pytest.raises(RankwiseError, match=r"main\.tex:3: Undefined control sequence"):
        compile_paper(tmp_path)
    assert read_log(tmp_path)


def test_the_command_lists_checks_and_ends_with_1(tmp_path: Path):
    place = desk(tmp_path)
    listed = rankwise("paper", "--list", "spectralTestLoss", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert r"\madeUpSpectralTestLoss " in listed.stdout and "nats" in listed.stdout
    checked = rankwise("paper", "--check", cwd=tmp_path)
    assert checked.returncode == 1 and not place.generated.exists()
    assert "paper/generated/numbers.tex:1: stale: is missing" in checked.stdout
