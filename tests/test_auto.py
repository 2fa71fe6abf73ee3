"""`rankwise auto`: sizes, rates between the pilot's, and the whole way on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rankwise import sizing
from rankwise.config import SCREENING_BELOW
from rankwise.errors import RankwiseError
from rankwise.sizing import Price
from rankwise.store import Store
from rankwise.tables import Results
from tests.conftest import rankwise

PRICE = Price(tuning=10.0, reporting=14.0)


@pytest.mark.parametrize(("text", "seconds"), [("15m", 900), ("2h", 7200), ("1h30m", 5400), ("90s", 90)])
def test_times_are_read(text, seconds):
    assert sizing.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "m", "2 hours", "-1h", "10s", "99999h"])
def test_other_times_are_refused_with_the_choices(text):
    with pytest.raises(RankwiseError, match="--time must be"):
        sizing.seconds_of(text)


def test_designs_fit_their_time_and_grow_with_it():
    answers, before = [], 0
    for minutes in (5, 8, 12, 20, 40, 90, 240):
        design = sizing.choose(60 * minutes, PRICE, known=12)
        if design.enough:
            assert design.seconds <= sizing.SLACK * 60 * minutes
            assert design.seeds >= SCREENING_BELOW
        answers.append((design.arms, design.tuned))
        assert design.arms >= before
        before = design.arms
    assert answers[-1] == (8, True)
    assert len(set(answers)) >= 4


def test_too_little_time_is_said_and_the_least_study_is_given():
    design = sizing.choose(30, PRICE)
    assert not design.enough
    assert (design.uniform, design.seeds) == ((1, 16), 2)
    assert "no verdict" in sizing.outlook(design.seeds, 1, 0.002, 0.01)[0]


def test_rows_stay_within_what_there_is():
    found = sizing.rows_for(7200, 400, 165, 999)
    assert found["reserved"] == 250
    assert sum(found.values()) <= 999
    assert found["train"] > sizing.rows_for(900, 400, 165, 999)["train"] >= 16
    with pytest.raises(RankwiseError, match="48 rows at least"):
        sizing.rows_for(7200, 400, 165, 40)


def test_rates_between_the_pilots_lie_on_the_grid():
    found = sizing.interpolated((1, 2, 4, 8, 16), {1: 1e-2, 16: 1e-3})
    assert found == {1: 1e-2, 2: 1e-2, 4: 3e-3, 8: 3e-3, 16: 1e-3} or found[4] == 3e-3
    assert sizing.interpolated((1, 4, 16), {1: 3e-3, 16: 3e-3}) == {1: 3e-3, 4: 3e-3, 16: 3e-3}


def test_the_outlook_counts_the_seeds_that_are_missing():
    few = sizing.outlook(6, 1, 0.004, 0.004)[0]
    assert "80 % would take" in few
    assert "80 %" not in sizing.outlook(20, 1, 0.001, 0.004)[0]
    assert "no margin" in sizing.outlook(8, 1, 0.001, -0.1)[0]


@pytest.mark.slow
def test_the_whole_way_then_a_second_call_adds_seeds_of_its_own(workdir: Path, tiny_model: Path):
    ask = ("auto", "--model", f"file:{tiny_model}", "--data", "rows.json", "--max-length", 128)
    dry = rankwise(*ask, "--time", "75s", "--dry-run", cwd=workdir)
    assert dry.returncode == 0, dry.stderr
    assert "plans x" in dry.stdout
    assert not (workdir / "auto").exists()

    done = rankwise(*ask, "--time", "75s", cwd=workdir)
    assert done.returncode == 0, done.stderr
    assert "What this cannot show" in done.stdout
    answer = json.loads((workdir / "auto" / "answer.json").read_text())
    assert answer["sentence"] in done.stdout.replace("\n", " ") or answer["sentence"] in done.stdout
    arm = answer["handed_out"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(base, str(workdir / "auto" / "adapter"))
    plan = json.loads((workdir / "auto" / "plan.json").read_text())
    assert arm in ("uniform@r1", "uniform@r16") or arm.startswith(("uniform", "spectral"))
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == sum(
        (m["in_features"] + m["out_features"]) * plan["ranks"][m["name"]] for m in plan["modules"]
    )
    assert (workdir / "auto" / "report" / "report.html").exists()

    first = yaml.safe_load((workdir / "auto" / "study-1.yaml").read_text())
    pilot = Results(Store(workdir / "auto" / "results", "pilot"))
    assert {run["role"] for run in pilot.index["runs"]} == {"untouched", "tuning"}

    again = rankwise(*ask, "--time", "60s", cwd=workdir)
    assert again.returncode == 0, again.stderr
    second = yaml.safe_load((workdir / "auto" / "study-2.yaml").read_text())
    assert second["seeds"]["first"] == first["seeds"]["reporting"]

    other = rankwise(*ask[:-1], 64, "--time", "60s", cwd=workdir)
    assert other.returncode == 2
    assert "was begun with max_length 128" in other.stderr


@pytest.mark.slow
def test_a_stopped_study_goes_on(workdir: Path, tiny_model: Path):
    ask = (
        "auto",
        "--model",
        f"file:{tiny_model}",
        "--data",
        "rows.json",
        "--max-length",
        128,
        "--time",
        "60s",
    )
    assert rankwise(*ask, cwd=workdir).returncode == 0
    results = Results(Store(workdir / "auto" / "results", "study-1"))
    victim = results.index["runs"][-1]["run_id"]
    import shutil

    shutil.rmtree(results.store.path(victim))
    again = rankwise(*ask, cwd=workdir)
    assert again.returncode == 0, again.stderr
    assert "going on with" in again.stdout
    assert results.store.has(victim)
    assert not (workdir / "auto" / "study-2.yaml").exists()
