"""`rankwise paper --check`: each rule fires where it should, and stays silent where it should. No TeX."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rankwise.errors import RankwiseError
from rankwise.paper import Offer
from rankwise.paper.building import log_faults, need_tex
from rankwise.paper.generating import source_faults
from tests.paper.desk import BIB, RESULTS, Desk, desk, told


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, Offer]:
    found = desk(tmp_path_factory.mktemp("check"))
    return found, found.offer()


@pytest.fixture
def clean(place: tuple[Desk, Offer]) -> Iterator[Clean]:
    yield Clean(*place)
    place[0].say(RESULTS)
    (place[0].paper_folder / "references.bib").write_text(BIB)


@dataclass
class Clean:
    """A paper to be spoilt, and what its studies offer."""

    desk: Desk
    offer: Offer

    def faults(self, text: str = RESULTS) -> list[str]:
        """What the hand-written files break, with this results section."""
        self.desk.say(text)
        return told(source_faults(self.desk.paper(), self.offer))


def test_a_sound_paper_has_no_faults(clean: Clean):
    assert clean.faults() == []
    clean.desk.write()
    assert clean.desk.faults() == []


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("We saw 1.63 nats.", "number results.tex:1 '1.63'"),
        ("We saw three arms.", "number results.tex:1 'three'"),
        (r"In $x<2$.", "number results.tex:1 '2'"),
        ("It is better.", "verdict results.tex:1 'better'"),
        ("Significantly so.", "verdict results.tex:1 'Significantly'"),
        ("It outperforms.", "verdict results.tex:1 'outperforms'"),
        ("They are equivalent.", "verdict results.tex:1 'equivalent'"),
        ("It does not differ.", "verdict results.tex:1 'differ'"),
        (r"\madeUpSpectralGian{}", "undefined results.tex:1 no macro \\madeUpSpectralGian; did you mean "
         "madeUpSpectralGain?"),
        (r"\arm{spectrall}", "undefined results.tex:1 no arm spectrall; did you mean spectral?"),
        (r"\input{generated/made-up-arm}", "undefined results.tex:1 no piece generated/made-up-arm; did"),
        (r"\input{sections/nowhere}", "undefined results.tex:1 no file sections/nowhere"),
        (r"\ref{fig:none}", "undefined results.tex:1 no label fig:none"),
        (r"\label{fig:lonely}", "unused results.tex:1 no text refers to fig:lonely"),
        (r"\newcommand{\idle}{x}", "unused results.tex:1 \\idle is defined and never used"),
        (r"\citep{keys}", "citation results.tex:1 no entry keys; did you mean key?"),
        (r"\includegraphics[width=0.8\linewidth]{figure2}", "picture results.tex:1 '\\\\includegraphics'"),
        (r"\madeUpSpectralGain nats", "space results.tex:1 write \\madeUpSpectralGain{}"),
    ],
)  # fmt: skip
def test_each_rule_fires(clean: Clean, line: str, wanted: str):
    found = clean.faults(f"{line}\n{RESULTS}")
    assert len(found) == 1 and found[0].startswith(wanted), found


@pytest.mark.parametrize(
    "line",
    [
        r"\label{sec:2} See \ref{sec:2}.",
        r"\url{https://example.org/2026}",
        r"$\lVert x \rVert$",
        r"% 3 better arms",
        "The margin of equivalence, and non-inferiority; another one.",
    ],
)
def test_names_and_comments_are_no_text(clean: Clean, line: str):
    assert clean.faults(f"{line}\n{RESULTS}") == []


def test_digits_may_stand_in_the_method_and_verdicts_nowhere(clean: Clean):
    method = clean.desk.paper_folder / "sections" / "method.tex"
    method.write_text("At 5 per cent over two tests.\nIt is better.\n")
    found = clean.faults(RESULTS + r"\input{sections/method}" + "\n")
    method.unlink()
    assert len(found) == 1 and found[0].startswith("verdict method.tex:2")


@pytest.mark.parametrize(
    ("definition", "wanted"),
    [
        (r"\newcommand{\mine}{1.63}", "number main.tex:1 '1.63'"),
        (r"\newcommand*\mine[1]{{#1} it is better}", "verdict main.tex:1 'better'"),
        (r"\def\mine#1{loses 2 nats}", "number main.tex:1 '2'"),
        (r"\newcommand{\mine}[2]{\footnotesize\hspace{4pt}#2 \vspace{0.5 em}}", None),
    ],
)
def test_a_definition_is_no_way_round_the_rules(clean: Clean, definition: str, wanted: str | None):
    main = clean.desk.paper_folder / "main.tex"
    before = main.read_text()
    main.write_text(f"{definition}\n{before}")
    found = clean.faults(RESULTS + r"\mine{}" + "\n")
    main.write_text(before)
    assert [text.startswith(str(wanted)) for text in found] == [True] * (wanted is not None), found


def test_numbers_of_the_method_are_not_to_be_carried_out_of_it(clean: Clean):
    method = clean.desk.paper_folder / "sections" / "method.tex"
    method.write_text("At 5 per cent.\n" + r"\newcommand{\mine}{1.63}" + "\n")
    found = clean.faults(r"\input{sections/method}" + RESULTS + r"\mine{}" + "\n")
    method.unlink()
    assert len(found) == 1 and found[0].startswith("number method.tex:2 '1.63'")


def test_a_file_that_nothing_reads_is_a_fault(clean: Clean):
    stray = clean.desk.paper_folder / "sections" / "stray.tex"
    stray.write_text("words\n")
    found = clean.faults()
    stray.unlink()
    assert found == ["unused stray.tex:1 no file of the paper reads this one"]


def test_an_entry_that_nothing_cites_is_a_fault(clean: Clean):
    bib = clean.desk.paper_folder / "references.bib"
    bib.write_text(BIB + "@book{idle,\n title = {T},\n}\n@book{key,\n title = {T},\n}\n")
    found = clean.faults()
    assert [text.split(" ", 2)[1] for text in found] == ["references.bib:6", "references.bib:9"]
    assert "nothing cites idle" in found[0] and "twice" in found[1]


# --- stale ----------------------------------------------------------------------------------------


def test_deleting_and_rebuilding_gives_the_same_bytes(tmp_path: Path):
    place = desk(tmp_path)
    first = place.write()
    on_disk = {path.name: path.read_bytes() for path in place.generated.iterdir()}
    assert on_disk == first and any(name.endswith(".pdf") for name in first)
    shutil.rmtree(place.generated)
    assert any(text.startswith("stale numbers.tex:1 is missing") for text in place.faults())
    place.write()
    assert {path.name: path.read_bytes() for path in place.generated.iterdir()} == on_disk


def test_a_changed_record_is_stale_until_it_is_rebuilt(tmp_path: Path):
    place = desk(tmp_path)
    before = place.write()["numbers.tex"].decode()
    place.change("spectral", 0, 1.5)
    found = place.faults()
    line = next(i for i, text in enumerate(before.split("\n"), 1) if "madeUpSpectralTestLoss}" in text)
    assert f"stale numbers.tex:{line} \\madeUpSpectralTestLoss does not match the records" in "\n".join(found)
    assert any(text.startswith("stale made-up-arms.tex:") for text in found)
    assert any(text.startswith("stale made-up-fig-differences.pdf:1") for text in found)
    after = place.write()["numbers.tex"].decode()
    assert after != before and place.faults() == []


def test_what_nobody_uses_any_more_is_named_and_then_removed(tmp_path: Path):
    place = desk(tmp_path)
    place.write()
    place.say(
        RESULTS.replace(r"\madeUpSpectralTestLoss{}", "low").replace(r"\input{generated/later-arms}", "")
    )
    found = place.faults()
    assert any("no source uses \\madeUpSpectralTestLoss" in text for text in found)
    assert any(text.startswith("unused later-arms.tex:1") for text in found)
    place.write()
    assert place.faults() == [] and not (place.generated / "later-arms.tex").exists()


def test_nothing_is_written_where_names_are_missing(tmp_path: Path):
    place = desk(tmp_path)
    place.say(r"\madeUpNothing{}" + "\n" + RESULTS)
    lines, faults = place.work().make()
    assert not place.generated.exists()
    assert "nothing was written" in lines[0] and [fault.rule for fault in faults] == ["undefined"]


# --- TeX ------------------------------------------------------------------------------------------


def test_without_tex_the_pieces_are_written_and_the_remedy_told(tmp_path: Path, monkeypatch):
    place = desk(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RankwiseError, match=r"needs latexmk, pdflatex, bibtex.*apt-get install"):
        place.work().make()
    assert (place.generated / "numbers.tex").is_file()
    with pytest.raises(RankwiseError):
        need_tex(tmp_path)


def test_overfull_boxes_are_found_in_the_file_that_has_them():
    log = r"""(./main.tex (/usr/share/a.cls
Document Class: article) (./generated/numbers.tex) (./sections/one.tex
Overfull \hbox (0.5pt too wide) in paragraph at lines 3--4
[]\T1/ptm/m/n/10 hardly (seen
 []

Overfull \hbox (12.3pt too wide) in paragraph at lines 7--9
[]\T1/ptm/m/n/10 an unbalanced (parenthesis
 []

) (./sections/two.tex
Overfull \vbox (8.0pt too high) has occurred while \output is active []

) (./main.bbl
Overfull \hbox (5.0pt too wide) in paragraph at lines 12--13
[]x

))
Package natbib Warning: Citation `x' on page 1 undefined on input line 3.
"""
    found = [str(fault) for fault in log_faults(Path("paper"), log)]
    assert [text.split(": ")[0] for text in found] == [
        "paper/sections/one.tex:7", "paper/sections/two.tex:1", "paper/main.bbl:12", "paper/main.tex:1"
    ]  # fmt: skip
    assert "12.3 pt too wide" in found[0] and "Citation `x'" in found[-1]
