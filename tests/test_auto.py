"""`rankwise auto`: sizes, rates between the pilot's, and the whole way on a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rankwise import designing, sizing
from rankwise.errors import RankwiseError
from rankwise.sizing import Price
from rankwise.store import Store
from rankwise.tables import Results
from tests.conftest import rankwise

PRICE = Price(tuning=10.0, reporting=14.0, probe=5.0)


@pytest.mark.parametrize(("text", "seconds"), [("15m", 900), ("2h", 7200), ("1h30m", 5400), ("90s", 90)])
def test_times_are_read(text, seconds):
    assert sizing.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "m", "2 hours", "-1h", "10s", "99999h"])
def test_other_times_are_refused_with_the_choices(text):
    with pytest.raises(RankwiseError, match="--time must be"):
        sizing.seconds_of(text)


def test_designs_fit_their_time_and_grow_with_it():
    arms = []
    for minutes in (2, 5, 8, 20, 40, 90, 240):
        design = sizing.choose(60 * minutes, PRICE)
        if design.enough:
            assert design.seconds <= sizing.SLACK * 60 * minutes
            assert design.seeds >= 2
        arms.append(design.arms)
    assert arms == sorted(arms)
    assert {2, 3, 5, 8} == set(arms)


def test_the_pilots_runs_are_not_paid_twice_and_probes_are_paid_per_seed():
    two = sizing.choose(3 * 60, PRICE)
    assert two.runs == 2 * two.seeds  # both ends are tuned by the pilot
    all_of_them = sizing.choose(4 * 3600, PRICE)
    tuning = 6 * PRICE.rates * sizing.PILOT_SEEDS
    assert all_of_them.runs == 8 * all_of_them.seeds + tuning
    seconds = tuning * 10 + (all_of_them.seeds + sizing.PILOT_SEEDS) * 5 + 8 * all_of_them.seeds * 14
    assert all_of_them.seconds == pytest.approx(seconds)


def test_too_little_time_is_said_and_the_least_study_is_given():
    design = sizing.choose(30, PRICE)
    assert not design.enough
    assert (design.uniform, design.seeds) == ((1, 16), 2)
    assert "no verdict" in sizing.outlook(design, 0.002, 0.01)[0]
    assert "56 s, and 30 s are left" in " ".join(designing.limits(design, 20, 30))


def test_rows_stay_within_what_there_is():
    found = sizing.rows_for(7200, 400, 165, 999)
    assert found["reserved"] == 250
    assert sum(found.values()) <= 999
    assert found["train"] > sizing.rows_for(900, 400, 165, 999)["train"] >= 16
    assert sum(sizing.rows_for(7200, 400, 165, 48).values()) == 48
    with pytest.raises(RankwiseError, match="48 rows at least"):
        sizing.rows_for(7200, 400, 165, 47)


def design_of(seeds: int, plans: int = 5) -> sizing.Design:
    return sizing.Design((1, 2, 4, 8, 16)[:plans], (), seeds, 1, 1.0, True)


def test_the_outlook_is_that_of_the_whole_ladder():
    """8 seeds and a margin of 1.4 SDs name the smallest of five equal plans in 64 % of studies (`ladder`)."""
    told = sizing.outlook(design_of(8), 1.0, 1.41)[0]
    share = int(told.split("in about ")[1].split("%")[0])
    assert 57 <= share <= 71
    assert "Some" in sizing.outlook(design_of(6), 0.004, 0.004)[1]
    assert len(sizing.outlook(design_of(20), 0.001, 0.004)) == 1
    assert "no margin" in sizing.outlook(design_of(8), 0.001, -0.1)[0]
    assert "not known" in sizing.outlook(design_of(8), math.nan, 0.1)[0]


class Piloted:
    """A pilot's records, made up: rank -> rate -> losses."""

    def __init__(self, losses: dict[int, dict[float, list[float | None]]], untouched: float | None = 2.0):
        self.index = {
            "rates": {
                f"uniform@r{rank}": {
                    "grid": [{"rate": rate, "losses": found} for rate, found in tried.items()]
                }
                for rank, tried in losses.items()
            }
        }
        self._untouched = untouched

    def untouched_metrics(self) -> dict[str, float]:
        return {} if self._untouched is None else {"validation_loss": self._untouched}

    def failures(self) -> list[str]:
        return ["untouched failed at step 0: not finite"]


SMALL = {1e-3: [1.7, 1.8], 3e-3: [1.6, 1.7], 1e-2: [5.0, 9.0]}
LARGE: dict[float, list[float | None]] = {1e-3: [1.5, 1.62], 3e-3: [1.55, 1.7], 1e-2: [None, 3.0]}


def test_the_pilot_tells_rates_spread_and_gain():
    told = designing.told(Piloted({1: SMALL, 16: LARGE}))  # type: ignore[arg-type]
    assert told.rates == {1: 3e-3, 16: 1e-3}
    # either at its best: 0.1 and 0.08 apart; nothing lies below rank 16's best, so no other pair counts
    assert told.sd == pytest.approx(0.02 / math.sqrt(2))
    assert told.gain == pytest.approx(2.0 - 1.56)
    assert told.tried == 3


def test_a_pilot_that_cannot_be_built_on_says_why():
    lost: dict[float, list[float | None]] = {1e-3: [None, 1.0], 3e-3: [None, None]}
    with pytest.raises(RankwiseError, match="every rate of uniform@r16 diverged"):
        designing.told(Piloted({1: SMALL, 16: lost}))  # type: ignore[arg-type]
    with pytest.raises(RankwiseError, match="could not be scored"):
        designing.told(Piloted({1: SMALL, 16: LARGE}, untouched=None))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_whole_way_then_a_stop_then_a_call_that_adds_seeds_of_its_own(workdir: Path, tiny_model: Path):
    ask = ("auto", "--model", f"file:{tiny_model}", "--data", "rows.json", "--max-length", 128)
    dry = rankwise(*ask, "--time", "75s", "--dry-run", cwd=workdir)
    assert dry.returncode == 0, dry.stderr
    assert "plans x" in dry.stdout
    assert not (workdir / "auto").exists()
    typo = rankwise(*ask[:4], "rows.jsn", "--time", "75s", cwd=workdir)
    assert typo.returncode == 2 and "--data: " in typo.stderr
    assert not (workdir / "auto").exists()

    done = rankwise(*ask, "--time", "75s", cwd=workdir)
    assert done.returncode == 0, done.stderr
    assert "What this cannot show" in done.stdout
    answer = json.loads((workdir / "auto" / "answer.json").read_text())
    assert answer["sentence"] in done.stdout
    assert answer["handed_out"] == (answer["chosen"] or "uniform@r16")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(base, str(workdir / "auto" / "adapter"))
    plan = json.loads((workdir / "auto" / "plan.json").read_text())
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == sum(
        (m["in_features"] + m["out_features"]) * plan["ranks"][m["name"]] for m in plan["modules"]
    )
    assert (workdir / "auto" / "report" / "report.html").exists()

    first = yaml.safe_load((workdir / "auto" / "study-1.yaml").read_text())
    pilot = Results(Store(workdir / "auto" / "results", "pilot"))
    assert {run["role"] for run in pilot.index["runs"]} == {"untouched", "tuning"}

    tuned = {run["run_id"] for run in pilot.index["runs"] if run["role"] == "tuning"}
    study = Results(Store(workdir / "auto" / "results", "study-1"))
    assert tuned <= {run["run_id"] for run in study.index["runs"]}  # taken over, not done twice

    victim = study.index["runs"][-1]["run_id"]  # as if it had been stopped there
    shutil.rmtree(study.store.path(victim))
    dry = rankwise(*ask, "--time", "60s", "--dry-run", cwd=workdir)
    assert "is not finished" in dry.stdout and not study.store.has(victim)
    goes_on = rankwise(*ask, "--time", "60s", cwd=workdir)
    assert goes_on.returncode == 0, goes_on.stderr
    assert "going on with" in goes_on.stdout and study.store.has(victim)
    assert not (workdir / "auto" / "study-2.yaml").exists()

    again = rankwise(*ask, "--time", "60s", cwd=workdir)
    assert again.returncode == 0, again.stderr
    assert "study 2 of these rows" in again.stdout
    second = yaml.safe_load((workdir / "auto" / "study-2.yaml").read_text())
    assert second["seeds"]["first"] == first["seeds"]["reporting"]

    other = rankwise(*ask[:-1], 64, "--time", "60s", cwd=workdir)
    assert other.returncode == 2
    assert "was begun with max_length 128" in other.stderr
