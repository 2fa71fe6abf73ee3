"""The memory bank: what the records say stands between the markers, and what people write stays as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from rankwise.cli import app
from rankwise.contrasts import contrast_rows
from rankwise.errors import RankwiseError
from rankwise.memorybank import DOCUMENTS, Memory, write_memory
from rankwise.memorybank.markers import begin, end
from rankwise.memorybank.text import named, prose
from rankwise.recommend import recommend
from rankwise.report.opening import opening
from rankwise.report.settings import study_yaml
from rankwise.tables import Results, arm_rows
from tests.made_up import EVIL, TEX, made_up

GENERATED = ("active-focus", "progress", "knowledge")
VERDICT_WORDS = re.compile(r"\b(better|worse|outperform\w*|significant\w*|equivalent|superior|best)\b", re.I)
MODEL = "file:<img src=x onerror=alert(2)>"


def project(folder: Path, **made: Any) -> Results:
    """A project with one study: its file, and its made-up records."""
    results = made_up(folder / "results", **{"contrasts": [], **made})
    study(folder, results)
    return results


def study(folder: Path, results: Results, name: str = "made-up", **changes: Any) -> Path:
    """Write the file of a study like that of these records."""
    config = results.config.model_copy(update={"name": name, **changes})
    (folder / "studies").mkdir(exist_ok=True)
    path = folder / "studies" / f"{name}.yaml"
    path.write_text(f"# Does it matter? It may.\n{study_yaml(config)}", encoding="utf-8")
    return path


def written(folder: Path, **how: Any) -> Memory:
    return write_memory(folder / "studies", folder / "results", folder / "memory", **how)


def texts(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "memory" / f"{name}.md").read_bytes() for name in DOCUMENTS}


def part(folder: Path, document: str, name: str) -> str:
    text = texts(folder)[document].decode()
    return text.split(begin(name))[1].split(end(name))[0]


def flat(markdown: str) -> str:
    """The words of a document as a reader sees them."""
    return " ".join(token.content for token in inline(markdown) if token.type in ("text", "code_inline"))


def inline(markdown: str) -> list[Any]:
    found = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    return [*found, *(child for token in found for child in token.children or ())]


def change_a_record(folder: Path) -> None:
    """Raise the loss of one of uniform's runs."""
    path = folder / "results" / "made-up" / "runs" / "arm0-0" / "result.json"
    record = json.loads(path.read_text())
    record["train_info"]["metrics"]["test_loss"] += 0.06
    path.write_text(json.dumps(record))


# --- begun, fresh, stale --------------------------------------------------------------------------


def test_eight_documents_are_begun_and_then_fresh(tmp_path: Path):
    project(tmp_path)
    assert written(tmp_path, check=True).missing == DOCUMENTS and not (tmp_path / "memory").exists()
    assert written(tmp_path).missing == DOCUMENTS and written(tmp_path, check=True).fresh
    before = texts(tmp_path)
    assert written(tmp_path).fresh and texts(tmp_path) == before


def test_the_same_records_give_the_same_bytes_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("one", "two"):
        project(tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        paths = [Path("studies"), Path("results"), Path("memory")]
        write_memory(*[path if name == "one" else path.absolute() for path in paths])
    assert texts(tmp_path / "one") == texts(tmp_path / "two")


def test_a_changed_record_makes_the_check_fail_and_changes_the_text(tmp_path: Path):
    results = project(tmp_path)
    written(tmp_path)
    change_a_record(tmp_path)
    row = next(row for row in arm_rows(results) if row.arm == "uniform")
    assert f"| {row.loss:.4f} |" in part(tmp_path, "knowledge", "numbers")
    before = texts(tmp_path)
    assert (
        set(written(tmp_path, check=True).stale) == {"active-focus", "knowledge"}
        and texts(tmp_path) == before
    )
    assert not written(tmp_path).fresh
    numbers = part(tmp_path, "knowledge", "numbers")
    assert f"| {row.loss + 0.01:.4f} |" in numbers and f"| {row.loss:.4f} |" not in numbers
    assert written(tmp_path, check=True).fresh


def test_the_command_exits_1_when_stale_and_names_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project(tmp_path, seeds=1, arms=("uniform",))
    monkeypatch.chdir(tmp_path)
    stale = CliRunner().invoke(app, ["memory", "--check"])
    assert stale.exit_code == 1 and all(f"missing: memory/{name}.md" in stale.output for name in DOCUMENTS)
    written(tmp_path)
    fresh = CliRunner().invoke(app, ["memory", "studies/made-up.yaml", "--check"])
    assert fresh.exit_code == 0 and "as studies and records say" in fresh.output


def test_a_folder_without_studies_and_two_of_one_name_are_refused(tmp_path: Path):
    (tmp_path / "studies").mkdir()
    with pytest.raises(RankwiseError, match=r"no \*\.yaml in"):
        written(tmp_path)
    results = project(tmp_path, seeds=1)
    (tmp_path / "studies" / "copy.yaml").write_bytes(study(tmp_path, results).read_bytes())
    with pytest.raises(RankwiseError, match="are both named 'made-up'"):
        written(tmp_path)


# --- what people write ----------------------------------------------------------------------------


def test_what_people_write_is_kept_byte_for_byte(tmp_path: Path):
    results = project(tmp_path, seeds=5, wanted=6)
    written(tmp_path)
    mine = {"progress": b"# Mine \xff\xfe\x00\r\n\r\n  two spaces  \r\n", "brief": b"all mine\r"}
    tail = b"no newline at the end \xe2\x80\xa8"
    for name in mine:
        path = tmp_path / "memory" / f"{name}.md"
        windows = path.read_bytes().replace(b"\n", b"\r\n") if name == "progress" else b""
        path.write_bytes(mine[name] + windows + tail)
    assert written(tmp_path, check=True).fresh  # line endings of Windows are no change
    made_up(tmp_path / "again", seeds=6)
    (tmp_path / "results").rename(tmp_path / "old")
    (tmp_path / "again").rename(tmp_path / "results")
    before = texts(tmp_path)
    assert set(written(tmp_path).stale) == set(GENERATED) and results.config
    for name, data in texts(tmp_path).items():
        assert outside(data) == outside(before[name])
    data = texts(tmp_path)["progress"]
    assert data.startswith(mine["progress"]) and data.endswith(tail) and b"6/6" in data
    assert data.count(b"\n") == data.count(b"\r\n") and texts(tmp_path)["brief"] == mine["brief"] + tail


def outside(data: bytes) -> bytes:
    """A document without what lies between its markers."""
    return re.sub(rb"(?s)(rankwise:begin \S+ -->).*?(<!-- rankwise:end)", rb"\1\2", data)


def test_emptied_parts_are_rebuilt_to_the_same_bytes(tmp_path: Path):
    project(tmp_path)
    written(tmp_path)
    before = texts(tmp_path)
    for name in GENERATED:
        path = tmp_path / "memory" / f"{name}.md"
        path.write_bytes(re.sub(rb"(?s)(begin \S+ -->\n).*?(<!-- rankwise:end)", rb"\1\2", before[name]))
        assert len(path.read_bytes()) < len(before[name])
    (tmp_path / "memory" / "knowledge.md").unlink()
    assert set(written(tmp_path).stale) == {"active-focus", "progress"} and texts(tmp_path) == before


B, E, LAST = begin("runs"), end("runs"), end("failures")
BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "no end": (lambda t: t.replace(E, ""), "'failures' begins inside 'runs', which began on line 7"),
    "no begin": (lambda t: t.replace(B, ""), "the part 'runs' ends here but does not begin"),
    "neither": (lambda t: t.replace(E, "").replace(B, ""), "the file ends without the part 'runs'"),
    "twice": (lambda t: f"{t}\n{B}\n{E}\n", "the part 'runs' stands twice: it began on line 7 too"),
    "crossed": (
        lambda t: t.replace(E, "").replace(LAST, f"{E}\n{LAST}"), "'failures' begins inside 'runs', which",
    ),
    "end of another": (lambda t: t.replace(E, LAST, 1), "'failures' ends inside 'runs'"),
    "last never ends": (lambda t: t.replace(LAST, ""), "the part 'failures' begins here and never ends"),
    "unknown": (lambda t: t.replace(" runs -->", " rans -->"), r".*Did you mean 'runs'\?"),
    "misspelt": (lambda t: t.replace(B, "<!-- rankwise:start runs -->"), ".* is no marker"),
    "not alone": (lambda t: t.replace(B, f"{B} and more"), ".* alone on its line"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_broken_markers_are_refused_with_their_line_and_nothing_changes(tmp_path: Path, how: str):
    breaks, message = BROKEN[how]
    project(tmp_path, seeds=1, arms=("uniform",))
    written(tmp_path)
    focus = tmp_path / "memory" / "active-focus.md"
    focus.write_text(focus.read_text().replace("made-up", "stale"))
    path = tmp_path / "memory" / "progress.md"
    path.write_text(breaks(path.read_text()))
    before = texts(tmp_path)
    for check in (True, False):
        with pytest.raises(RankwiseError, match=rf"progress\.md:\d+: {message}") as error:
            written(tmp_path, check=check)
        assert "Nothing was changed." in str(error.value)
    assert texts(tmp_path) == before


# --- what it says ---------------------------------------------------------------------------------


def test_verdicts_are_those_of_the_contrasts(tmp_path: Path):
    results = project(tmp_path, contrasts=["spectral", EVIL])
    written(tmp_path)
    numbers, learnt = part(tmp_path, "knowledge", "numbers"), part(tmp_path, "active-focus", "learnt")
    for row in contrast_rows(results):
        assert row.paired and f"{row.paired.mean:+.4f}" in numbers and prose(row.verdict) in numbers
    assert "differs: lower loss" in numbers and "Differs: lower loss" in learnt
    assert "- note: 2 of 20 rows are cut" in numbers


@pytest.mark.parametrize("seeds", [0, 1, 3, 5])
def test_no_verdict_words_under_6_seeds(tmp_path: Path, seeds: int):
    project(tmp_path, seeds=seeds, contrasts=["spectral", EVIL])
    written(tmp_path)
    for name in GENERATED:
        assert not VERDICT_WORDS.search(texts(tmp_path)[name].decode()), name


def test_a_whole_screening_speaks_before_a_verdict_that_is_not_in(tmp_path: Path):
    project(tmp_path, seeds=3, wanted=8, contrasts=["spectral"])
    study(tmp_path, made_up(tmp_path / "other", seeds=3, contrasts=[]), "a-whole-one")
    (tmp_path / "other" / "made-up").rename(tmp_path / "results" / "a-whole-one")
    written(tmp_path)
    learnt = part(tmp_path, "active-focus", "learnt")
    assert learnt.index("**a-whole-one**") < learnt.index("**made-up**")


def test_of_whole_studies_the_confirmatory_one_speaks_first(tmp_path: Path):
    project(tmp_path, seeds=8, contrasts=["spectral"])
    study(
        tmp_path,
        made_up(tmp_path / "other", seeds=6, contrasts=["spectral"], confirmatory=True),
        "z-confirms",
    )
    (tmp_path / "other" / "made-up").rename(tmp_path / "results" / "z-confirms")
    written(tmp_path)
    learnt = part(tmp_path, "active-focus", "learnt")
    assert learnt.index("**z-confirms**") < learnt.index("**made-up**")


def test_failures_are_told_with_reason_and_record_and_come_first(tmp_path: Path):
    project(tmp_path, failed={"spectral": 2}, contrasts=["spectral"])
    written(tmp_path)
    told = part(tmp_path, "progress", "failures")
    assert "reporting seed 2, rate 0.001: failed at step 3: diverged" in told and "runs/arm1-2)" in told
    steps = part(tmp_path, "active-focus", "next")
    assert re.search(r"^1\. Look at 1 failed run .*--retry-failed`", steps, re.M)
    assert "no verdict: a run failed" in part(tmp_path, "knowledge", "numbers")


def test_what_is_next_is_ranked(tmp_path: Path):
    results = project(tmp_path, seeds=5, wanted=6, arms=("uniform", "spectral"))
    fresh = results.config.seeds.model_copy(update={"reporting": 2})
    study(tmp_path, results, "b-small", seeds=fresh)
    study(tmp_path, results, "a-large")
    study(tmp_path, results, "a-hub", seeds=fresh, model="hf:some/model")
    study(tmp_path, results, "z-last", seeds=fresh, confirmatory=True)
    written(tmp_path)
    steps = part(tmp_path, "active-focus", "next")
    named = re.findall(r"^\d+\. .*?\[([a-z-]+)\]", steps, re.M)
    assert named == ["made-up", "b-small", "a-large", "a-hub", "z-last"]
    assert "2 runs are missing" in steps and "`rankwise study run studies/b-small.yaml`" in steps
    assert "`hf:some/model` from a hub" in part(tmp_path, "active-focus", "blockers")


def test_a_whole_study_says_what_a_further_one_takes(tmp_path: Path):
    project(tmp_path, contrasts=[EVIL], margin=0.0005)
    written(tmp_path)
    line = next(
        line for line in part(tmp_path, "active-focus", "next").splitlines() if "no difference" in line
    )
    needed = re.search(r"takes about (\d+) seeds", line)
    assert needed and int(needed[1]) > 6


def test_devices_are_those_of_the_records(tmp_path: Path):
    project(tmp_path, seeds=1)
    written(tmp_path)
    assert "No record says so yet." in part(tmp_path, "knowledge", "questions")
    for name, device in (("arm0-0", "cpu"), ("arm1-0", "NVIDIA H100")):
        path = tmp_path / "results" / "made-up" / "runs" / name / "result.json"
        record = json.loads(path.read_text())
        record["meta_info"] = {"system_info": {"device": device, "processor": "Some CPU", "cores": 2}}
        path.write_text(json.dumps(record))
        written(tmp_path)
        alone = device == "cpu"
        assert ("No accelerator: the one run" in part(tmp_path, "active-focus", "blockers")) is alone
    assert "1 of 2 runs had one (`NVIDIA H100`)" in part(tmp_path, "knowledge", "questions")
    assert "| NVIDIA H100 | Some CPU | 2 | 1 |" in part(tmp_path, "progress", "runs")


def test_questions_name_the_studies_that_will_answer(tmp_path: Path):
    results = project(tmp_path, seeds=3, arms=("uniform", "spectral"))
    study(tmp_path, results, "sizes", train_examples=(8, 4))
    written(tmp_path)
    said = part(tmp_path, "knowledge", "questions")
    assert "asks it at 4, 8 rows. It has not begun." in said
    assert (
        "token accuracy 50.0% to 50.0%" in said
        and "forgetting -" in said
        and "Not measured there: ROUGE-L" in said
    )
    assert "1.43 with 6, 1.16 with 8" in said
    mean = sum(results.losses("spectral").values()) / 3 - sum(results.losses("uniform").values()) / 3
    assert f"`spectral` {mean:+.4f} (3 seeds). An order over 3 seeds at most, and no verdict." in said


def test_arms_are_code_in_sentences_and_words_are_words():
    arms = ["uniform", "uniform-r1", "uniform-r16", "<b>-1", "a_b"]
    said = named("uniform-r16 against uniform-r1x, uniform-r1 and <b>-1; a uniform *plan*, a_b.", arms)
    assert said == r"`uniform-r16` against uniform-r1x, `uniform-r1` and `<b>-1`; a uniform \*plan\*, `a_b`."


def test_a_recommendation_is_told_as_recommend_words_it(tmp_path: Path):
    results = project(tmp_path, arms=("uniform", "spectral"), ladders={"one": ["uniform", "spectral"]})
    written(tmp_path)
    answer = recommend(results)
    assert answer.decided and answer.chosen == "spectral"
    for name, place in (("active-focus", "learnt"), ("knowledge", "questions"), ("knowledge", "numbers")):
        assert prose(answer.sentence()) in part(tmp_path, name, place)


def test_several_numbers_of_rows_are_one_study_with_their_order(tmp_path: Path):
    for rows in (4, 8):
        results = made_up(
            tmp_path / str(rows), arms=("uniform", "spectral"), name=f"made-up-n{rows}", contrasts=[],
            data={"source": "file:rows.json", "train": rows, "validation": 4, "test": 4, "reserved": 4},
        )  # fmt: skip
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / str(rows) / "made-up").rename(tmp_path / "results" / f"made-up-n{rows}")
    study(tmp_path, results, train_examples=(8, 4))
    written(tmp_path)
    told = "4 rows: 1 of the 1 pairs of arms that 8 rows tell apart stand in the same order"
    assert told in part(tmp_path, "knowledge", "questions") and told in part(
        tmp_path, "active-focus", "learnt"
    )
    status = part(tmp_path, "active-focus", "status")
    assert "| [made-up-n4](../studies/made-up.yaml) | whole" in status and "results/made-up-n8)" in status
    assert part(tmp_path, "knowledge", "numbers").count(told) == 1


# --- names are names, links lead somewhere -----------------------------------------------------------


def test_hostile_names_are_shown_as_they_are(tmp_path: Path):
    results = project(tmp_path, seeds=2, failed={EVIL: 1})
    name = "reason | ![x](http://evil.example/x.png) <b>\x1b[31m www.evil.example _a_"
    path = tmp_path / "results" / "made-up" / "runs" / "arm2-1" / "result.json"
    record = json.loads(path.read_text())
    record["failure"]["reason"] = name
    path.write_text(json.dumps(record))
    source = "hf:some/rows/<b>`x`|y.json"
    study(tmp_path, results, "other", data=results.config.data.model_copy(update={"source": source}))
    written(tmp_path)
    for document in GENERATED:
        text = texts(tmp_path)[document].decode()
        tokens = inline(text)
        comments = [t.content.strip() for t in tokens if t.type in ("html_block", "html_inline")]
        assert all(re.fullmatch(r"(<!-- rankwise:(begin|end) [a-z]+ -->\s*)+", found) for found in comments)
        assert not [t for t in tokens if t.type in ("image", "em")]
        assert not [t for t in tokens if t.type == "link_open" and ":" in str(t.attrGet("href"))]
        assert "\x1b" not in text
    assert EVIL in flat(texts(tmp_path)["knowledge"].decode())
    assert TEX.replace("|", "\u00a6") in flat(texts(tmp_path)["progress"].decode())  # no pipe in a table
    told = flat(texts(tmp_path)["progress"].decode()).replace(" ", "")  # addresses are code: other tokens
    assert name.replace("\x1b", "").replace(" ", "") in told
    assert source.replace("|", "\u00a6") in flat(texts(tmp_path)["active-focus"].decode())


def test_every_link_leads_somewhere(tmp_path: Path):
    project(tmp_path, failed={"spectral": 2})
    written(tmp_path)
    for name in DOCUMENTS:
        links = re.findall(r"\]\(([^)]+)\)", texts(tmp_path)[name].decode())
        assert not [link for link in links if not (tmp_path / "memory" / link).exists()], name
        assert links or name not in GENERATED


# --- a README's results ---------------------------------------------------------------------------


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_a_readme_gets_its_results_only_where_it_asks_for_them(tmp_path: Path):
    project(tmp_path, seeds=6)
    (tmp_path / "README.md").write_text("# Mine\n")
    written(tmp_path)
    assert readme(tmp_path) == "# Mine\n" and not (tmp_path / "memory" / "results.svg").exists()
    (tmp_path / "README.md").write_text(f"# Mine\n{begin('results')}\n{end('results')}\nand more\n")
    assert set(written(tmp_path, check=True).stale) == {"README"} and "and more" in readme(tmp_path)
    written(tmp_path)
    assert written(tmp_path, check=True).fresh
    text = readme(tmp_path)
    assert text.startswith("# Mine\n") and text.endswith("\nand more\n")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert "memory/results.svg" in links and all((tmp_path / link).exists() for link in links)


def test_a_readme_tells_what_the_contrasts_show(tmp_path: Path):
    results = project(tmp_path, seeds=8, contrasts=["spectral"])
    (tmp_path / "README.md").write_text(f"{begin('results')}\n{end('results')}\n")
    written(tmp_path)
    assert opening(results) in flat(readme(tmp_path))


def test_a_readme_without_results_says_so_and_with_a_changed_record_is_stale(tmp_path: Path):
    (tmp_path / "README.md").write_text(f"{begin('results')}\n{end('results')}\n")
    project(tmp_path)
    (tmp_path / "results").rename(tmp_path / "later")
    written(tmp_path)
    assert "No study has a result yet." in readme(tmp_path)
    (tmp_path / "later").rename(tmp_path / "results")
    assert "README" in written(tmp_path).stale
    written(tmp_path)
    change_a_record(tmp_path)
    assert {"README", "results.svg"} <= set(written(tmp_path, check=True).stale)
