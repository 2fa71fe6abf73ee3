"""What the paper may say: names, numbers, foreign text, and verdicts that are the tests' own. No TeX."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from rankwise.contrasts import contrast_rows
from rankwise.errors import RankwiseError
from rankwise.paper.names import camel, looks_like_ours, macro_name
from rankwise.paper.repeats import apart
from rankwise.paper.typeset import chance, escaped, name, number
from rankwise.report.opening import opening
from rankwise.tables import arm_rows
from tests.made_up import EVIL, TEX, made_up
from tests.paper.desk import Desk, desk

WORDS = re.compile(r"\b(better|worse|outperforms|significant|equivalent|differs)\b")


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return desk(tmp_path_factory.mktemp("six"))


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("uniform@r16", "UniformAtROneSix"),
        ("uniform-r16", "UniformROneSix"),
        ("a+b", "APlusB"),
        ("中", "UFourETwoD"),
        ("--", "UTwoDUTwoD"),
        ("", "Nameless"),
        (EVIL, "ScriptAlertOneScript"),
    ],
)
def test_names_are_letters(text: str, wanted: str):
    assert camel(text) == wanted
    assert re.fullmatch("[A-Za-z]+", macro_name("1st", text, "TestLoss"))
    assert looks_like_ours(macro_name("seed", text, "TestLoss"))


def test_two_arms_of_one_name_are_refused(tmp_path: Path):
    place = desk(tmp_path)
    arms = {"a-b": {"strategy": "uniform", "budget": "r=2"}, "a_b": {"strategy": "random", "budget": "r=2"}}
    text = (tmp_path / "studies" / "later.yaml").read_text().partition("arms:")[0]
    text = text.replace("uniform", "a-b").replace("- decay", "- a_b")
    (tmp_path / "studies" / "later.yaml").write_text(text + "arms:\n" + "".join(
        f"  {arm}: {{strategy: {one['strategy']}, budget: r=2}}\n" for arm, one in arms.items()))  # fmt: skip
    with pytest.raises(RankwiseError, match=r"laterABTestLoss.*a-b.*a_b"):
        place.offer()


# --- numbers and text -----------------------------------------------------------------------------


def test_numbers_have_their_precision_and_unit():
    assert number(1.63519, ".4f") == "1.6352"
    assert number(-0.00123, "+.4f") == r"\ensuremath{-0.0012}"
    assert number(4884480, ",d") == "4,884,480"
    assert number(31.24, ".1f", "s") == r"31.2\,s"
    assert chance(0.0001) == r"\ensuremath{p<0.001}" and chance(0.02) == r"\ensuremath{p=0.020}"


def test_text_from_records_stays_text():
    for text in (TEX, EVIL, "\\end{document}", "%comment\n\\write18{ls}", "x_y^z~#1"):
        shown = escaped(text)
        bare = re.sub(r"\\(?:text[a-z]+\{\}|[&%$#_{}])|\{\[\}|\{\]\}", "", shown)
        assert not re.search(r"[\\%$#_^~&]", bare), shown
        assert "\n" not in shown
    assert escaped("中") == r"\texttt{U+4E2D}" and escaped("é") == "é" and escaped("0\u201337") == "0--37"
    assert "allowbreak" in name("a" * 40)  # a long name can be broken somewhere


def test_a_macro_is_one_line_with_its_source(six: Desk):
    for macro in six.offer().macros.macros.values():
        line = macro.definition()
        assert "\n" not in line and line.startswith(rf"\newcommand{{\{macro.name}}}")
        assert line.count("{") - line.count(r"\{") == line.count("}") - line.count(r"\}"), line
    loss = six.offer().macros.macros["madeUpSpectralTestLoss"]
    row = next(row for row in arm_rows(six.results) if row.arm == "spectral")
    assert loss.body == f"{row.loss:.4f}" and "nats" in loss.unit and "spectral" in loss.source


def test_the_spread_of_pairs_is_that_of_differences_to_the_uniform_arm(six: Desk):
    losses = {arm: np.array(list(six.results.losses(arm).values())) for arm in ("uniform", "spectral", EVIL)}
    apart = [losses[arm] - losses["uniform"] for arm in ("spectral", EVIL)]
    wanted = math.sqrt(statistics.fmean(np.var(found, ddof=1) for found in apart))
    macros = six.offer().macros.macros
    assert macros["madeUpBudgetRTwoOverPairs"].body == f"{wanted:.4f}"
    alone = math.sqrt(statistics.fmean(np.var(found, ddof=1) for found in losses.values()))
    assert macros["madeUpBudgetRTwoOverSeeds"].body == f"{alone:.4f}" != f"{wanted:.4f}"


# --- verdicts -------------------------------------------------------------------------------------


def test_verdicts_are_the_reports(six: Desk):
    offer = six.offer().macros
    said = offer.macros["madeUpOpening"].body.replace(r"\ensuremath{-}", "-")
    assert said == escaped(opening(six.results))
    rows = {row.arm: row for row in contrast_rows(six.results)}
    words = {"differs": "differs from", "no difference shown": "is not shown to differ from",
             "equivalent": "is equivalent within the margin to"}  # fmt: skip
    for arm, label in (("spectral", "Spectral"), (EVIL, "ScriptAlertOneScript")):
        wanted = next(text for start, text in words.items() if rows[arm].verdict.startswith(start))
        assert offer.macros[f"madeUp{label}VsUniformVerdict"].body == wanted
        assert f" {wanted} " in offer.macros[f"madeUp{label}VsUniformSentence"].body
    assert rows["spectral"].verdict.startswith("differs: lower")
    assert "with the lower loss" in offer.macros["madeUpSpectralVsUniformSentence"].body
    assert "spectral" not in offer.macros["madeUpNotShown"].body


def test_a_study_with_few_seeds_has_no_verdict_words(tmp_path: Path):
    place = desk(tmp_path, seeds=3)
    offer = place.offer()
    assert "was not tested (3 seeds)" in offer.macros.macros["madeUpSpectralVsUniformVerdict"].body
    ours = [m for m in offer.macros.macros.values() if m.name.startswith("madeUp")]
    for macro in ours:
        assert not WORDS.search(macro.body), macro.body
    tables = [p for p in offer.pieces.values() if p.name.startswith("made-up-") and "fig" not in p.name]
    for piece in tables:
        text = b"".join(piece.make().values()).decode()
        assert not WORDS.search(text), piece.name


def test_exploratory_goes_with_every_sentence_of_what_was_found(tmp_path: Path):
    place = desk(tmp_path)
    place.results.index["exploratory"] = True
    (place.results.store.folder / "study.json").write_text(json.dumps(place.results.index))
    macros = place.offer().macros.macros
    assert macros["madeUpOpening"].body.startswith("Exploratory: ")
    assert macros["madeUpNotShown"].body.startswith("(exploratory) ")
    assert "changed after its first run" in macros["madeUpState"].body


def test_a_failed_run_takes_the_verdict(tmp_path: Path):
    offer = desk(tmp_path, failed={"spectral": 2}).offer().macros
    assert "has no verdict (a run failed)" in offer.macros["madeUpSpectralVsUniformVerdict"].body
    assert offer.macros["madeUpRunsFailed"].body == "1" and "diverged" in offer.macros["madeUpFailures"].body


# --- what has not run -----------------------------------------------------------------------------


def test_what_has_not_run_says_so_everywhere(six: Desk):
    offer = six.offer()
    for quantity in ("Opening", "UntouchedLoss", "DecayTestLoss", "DecayVsUniformVerdict", "Advice"):
        assert offer.macros.macros[f"later{quantity}"].body.rstrip(".") == r"\notrun{}"
    assert offer.macros.macros["laterSeeds"].body == "8"  # the design is known
    assert offer.macros.macros["laterWhenRun"].body.startswith(r"\notrunstudy")
    assert offer.macros.macros["madeUpWhenRun"].body == "#1"
    assert offer.macros.macros["laterWhenReported"].body == ""
    assert offer.macros.macros["madeUpWhenReported"].body == "#1"
    for name_ in ("later-arms", "later-runs", "later-fig-losses", "confirmatory-contrasts"):
        (text,) = offer.pieces[name_].make().values()
        assert b"notrunstudy" in text


def test_the_budget_group_counts_common_seeds_alone(tmp_path: Path):
    place = desk(tmp_path, failed={"spectral": 5})
    macros = place.offer().macros.macros
    assert macros["madeUpBudgetRTwoArms"].body == "3" and macros["madeUpBudgetRTwoSeeds"].body == "5"
    losses = {arm: place.results.losses(arm) for arm in ("uniform", "spectral", EVIL)}
    means = {arm: sum(found[s] for s in range(5)) / 5 for arm, found in losses.items()}
    assert macros["madeUpBudgetRTwoLowestLoss"].body == f"{min(means.values()):.4f}"
    assert macros["madeUpBudgetRTwoLowestArm"].body == name(min(means, key=lambda arm: means[arm]))


def test_runs_made_on_two_kinds_of_device_tell_how_far_they_lie_apart(tmp_path: Path):
    places = [made_up(tmp_path / name, seeds=2, arms=("uniform",)) for name in ("here", "there")]
    for results, device, moved, threads in zip(places, ("cpu", "cuda"), (0.0, 3e-5), (1, 4), strict=True):
        for run_id, record in results.records.items():
            run = {"role": run_id, "seed": 0, "device": device, "threads": threads, "dtype": "fp32",
                   "train": {"learning_rates": [1e-3], "dtype": "auto" if moved else "fp32"}}  # fmt: skip
            if run_id.endswith("1") and moved:
                run["seed"] = 7  # other work: no pair
            (results.store.runs / run_id / "config.json").write_text(json.dumps(run))
            record["train_info"]["metrics"]["test_loss"] += moved
    found = apart(places)
    assert len(found) == 2 and found == pytest.approx([3e-5, 3e-5])
    assert apart(places[:1]) == []
