"""`rankwise auto`: sizes, prices, what is left after a stop, and the whole way on a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rankwise import auto as room
from rankwise import designing, sizing
from rankwise.errors import RankwiseError
from rankwise.grid import Planned, Study, grid
from rankwise.observer import Observer
from rankwise.recommend import recommend
from rankwise.run import TRAIN_COST
from rankwise.sizing import Price
from rankwise.store import Store
from rankwise.study import open_study
from rankwise.tables import Results
from tests.conftest import rankwise, write_study
from tests.made_up import made_up, plan_of

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


def test_runs_take_what_the_rows_the_speed_and_the_scoring_say():
    rows = {"train": 16, "validation": 8, "test": 24, "reserved": 0}
    price = sizing.price_of(rows, tokens_per_row=100, tokens_per_second=50)
    assert (price.tuning, price.reporting) == pytest.approx((2 * (16 + 8 / 3), 2 * (16 + 24 / 3)))
    assert (price.probe, price.untouched) == pytest.approx((2 * 16, 2 * 32 / 3))
    slow = sizing.price_of(rows, tokens_per_row=100, tokens_per_second=5)
    assert slow.reporting == pytest.approx(10 * price.reporting)
    assert sizing.pilot_takes(price) == (17, pytest.approx(price.untouched + 16 * price.tuning))
    assert sizing.SCORING == 1 / TRAIN_COST


def test_rows_are_as_many_as_their_price_affords():
    rows = sizing.rows_for(7200, 400, 165, 999)
    affordable = 0.75 * 7200 / sizing.runs_for(7200)
    assert sizing.price_of(rows, 165, 400).reporting == pytest.approx(affordable, rel=0.02)


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


# --- what is left, and what it takes --------------------------------------------------------------


class Stopped(BaseException):
    """As Ctrl-C, which no handler of the package takes for an error."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stopped


def asked(workdir: Path, model: Path, time: str) -> tuple[room.Task, list[str]]:
    """A task in `workdir/auto`, and the sentences that it will have said."""
    said: list[str] = []
    task = room.Task(
        f"file:{model}", f"file:{workdir / 'rows.json'}", sizing.seconds_of(time), workdir / "auto", 128,
        say=said.append, watch=lambda: nullcontext(Observer()),
    )  # fmt: skip
    return task, said


def piloted(task: room.Task) -> Study:
    """The smallest pilot of a task, written and opened."""
    task.folder.mkdir()
    path = task.folder / "pilot.yaml"
    path.write_text(designing.pilot(task.model, task.data, sizing.LEAST, task.max_length))
    return open_study(path, task.results)


def pretend(study: Study, runs: Iterable[Planned], seconds: float) -> None:
    """Write records of runs that took this long; the middle rate is the best."""
    study.store.open()
    for planned in runs:
        loss = 2.0 if planned.rate == sizing.PILOT_RATES[1] else 3.0
        result = {
            "status": "done",
            "run_info": {"total_time": seconds},
            "train_info": {"metrics": {"validation_loss": loss}},
        }
        place = study.store.path(planned.run_id)
        place.mkdir()
        (place / "result.json").write_text(json.dumps(result))


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture
def at_speed(monkeypatch: pytest.MonkeyPatch):
    """Sets the speed that a measurement gives; without it a measurement is an error."""

    def set_to(tokens_per_second: float) -> None:
        measured = SimpleNamespace(tokens_per_second=tokens_per_second)
        monkeypatch.setattr(room, "measure", lambda *args: measured)

    monkeypatch.setattr(room, "measure", stop)
    return set_to


def test_the_price_follows_the_measured_speed(workdir: Path, tiny_model: Path, at_speed):
    """64 tokens a row; a run trains on 16 and scores 8 at a third: 149 s at 8 tokens/s, and there are 16."""
    told = {}
    for speed in (8.0, 80.0):
        task, said = asked(workdir, tiny_model, "15m")
        at_speed(speed)
        assert room.auto(task, dry_run=True) is None
        told[speed] = " ".join(said)
    assert "64 tokens a row: 16 training rows, 8 to choose rates" in told[8.0]
    assert "some 17 runs to do, about 41 min" in told[8.0]
    assert "The pilot alone does not fit the 15 min given" in told[8.0]
    assert "goes on past the time" in told[8.0], "nor does the study"
    assert "some 17 runs to do, about 4 min" in told[80.0] and "not fit" not in told[80.0]
    assert not (workdir / "auto").exists()


def test_the_pilots_price_is_said_before_it_starts(workdir: Path, tiny_model: Path, at_speed, monkeypatch):
    monkeypatch.setattr(room, "run_together", stop)
    at_speed(8.0)
    task, said = asked(workdir, tiny_model, "15m")
    with pytest.raises(Stopped):
        room.auto(task)
    assert "about 41 min" in said[1] and said[2].startswith("The pilot alone does not fit the 15 min given.")


def test_a_dry_run_prices_what_is_left_of_a_pilot(workdir: Path, tiny_model: Path, at_speed):
    task, said = asked(workdir, tiny_model, "2h")
    pilot = piloted(task)
    runs = grid(pilot).runs
    pretend(pilot, runs[:7], 100.0)
    before = files(task.folder)
    room.auto(task, dry_run=True)
    assert f"those of {task.folder / 'pilot.yaml'}" in said[0] and "16 training rows" in said[0]
    # 1 and 12 runs are declared, 4 more expected at a rate that is added; what took 100 s is tuning alone
    assert "some 10 runs to do, about 17 min" in said[1]
    assert files(task.folder) == before
    pretend(pilot, runs[7:], 100.0)
    said.clear()
    room.auto(task, dry_run=True)
    assert said[1] == "pilot: all its runs are there"


def test_a_study_takes_the_pilots_runs_over_at_no_cost(workdir: Path, tiny_model: Path):
    task, _ = asked(workdir, tiny_model, "2h")
    pilot = piloted(task)
    pretend(pilot, grid(pilot).runs, 100.0)
    assert designing.left(pilot) == []
    design = sizing.Design((1, 4, 16), (), 6, 0, 0.0, True)
    path = task.folder / "study-1.yaml"
    path.write_text(designing.study(task.folder / "pilot.yaml", 1, design, 0))
    study = open_study(path, task.results)
    # rank 4 has 3 declared rates, and every rank one more that may be added, at 2 seeds; 3 plans x 6 seeds
    assert len(designing.left(study)) == 3 * 2 + 3 * 2 + 3 * 6
    assert designing.speed(study) == designing.speed(pilot), "by the pilot's records"


@pytest.fixture
def declared(workdir: Path, tiny_model: Path, study_dict: dict) -> Path:
    """A study of two plans and two seeds in `workdir/auto`, of which nothing has run."""
    (workdir / "auto").mkdir()
    study = study_dict | {"name": "study-1", "ladders": {"all": ["decay", "uniform"]}}
    study["data"]["source"] = f"file:{workdir / 'rows.json'}"
    return write_study(workdir / "auto", study, "study-1.yaml")


def test_a_resumed_study_says_what_is_left_and_keeps_its_size(
    workdir: Path, tiny_model: Path, declared: Path, at_speed, monkeypatch
):
    monkeypatch.setattr(room, "run_together", stop)
    task, said = asked(workdir, tiny_model, "2m")
    study = open_study(declared, task.results)
    pretend(study, grid(study).runs[:3], 600.0)
    with pytest.raises(Stopped):
        room.auto(task)
    assert said[0].startswith(f"going on with {declared}: 2 runs left to do, about 20 min.")
    assert "exceeds the 2 min now given: the study keeps the size it was declared with" in said[0]
    long, said = asked(workdir, tiny_model, "1h")
    room.auto(long, dry_run=True)
    assert said[0].endswith("goes on with it: 2 runs left to do, about 20 min")


# --- the end of it --------------------------------------------------------------------------------


def test_a_study_that_was_stopped_after_its_last_run_is_closed(
    workdir: Path, tiny_model: Path, declared: Path, monkeypatch
):
    task, said = asked(workdir, tiny_model, "2m")
    answer = task.folder / "answer.json"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(room.reporting, "write_all", stop)
        room.auto(task)
    assert not answer.exists()
    monkeypatch.setattr(room.reporting, "write_all", lambda *args, **kwargs: [])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(room.shutil, "copytree", stop)
        room.auto(task)
    assert (task.folder / "plan.json").exists() and not answer.exists()
    said.clear()
    closed = room.auto(task)
    assert said[0].startswith(f"going on with {declared}: its runs are all there")
    assert closed is not None and closed.study == "study-1" == json.loads(answer.read_text())["study"]
    assert (task.folder / "adapter" / "adapter_config.json").exists()
    assert not (task.folder / "study-2.yaml").exists() and room._finished(task, declared)
    answer.write_text(json.dumps({"study": "study-0"}))
    assert not room._finished(task, declared), "the answer is that of the study before"


@pytest.mark.parametrize(
    ("failed", "chosen", "run"),
    [({}, "spectral", "arm1-0"), ({"uniform": 0}, None, "arm0-1")],
    ids=["the one that is better", "without a verdict the baseline, from the first seed that went well"],
)
def test_what_is_handed_out_is_the_plan_that_was_recommended(tmp_path: Path, failed, chosen, run):
    """uniform, the baseline, has a loss of 2.0 and spectral one of 1.9, where the margin is 0.05."""
    ladder = {"one": ["uniform", "spectral"]}
    results = made_up(tmp_path / "results", ladders=ladder, failed=failed)
    for folder in results.store.runs.iterdir():
        (folder / "adapter").mkdir()
        (folder / "adapter" / "of").write_text(folder.name)
    task, said = asked(tmp_path, tmp_path, "2m")
    task.folder.mkdir()
    room._hand_out(task, results, recommend(results))
    answer = json.loads((task.folder / "answer.json").read_text())
    handed = "uniform" if chosen is None else chosen
    assert (answer["study"], answer["chosen"], answer["handed_out"]) == ("made-up", chosen, handed)
    ranks = plan_of({"uniform": 0, "spectral": 1}[handed])["ranks"]
    assert json.loads((task.folder / "plan.json").read_text())["ranks"] == ranks
    assert (task.folder / "adapter" / "of").read_text() == run
    assert ("by default" in said[0]) == (chosen is None)


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
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(base, str(workdir / "auto" / "adapter"))
    plan = json.loads((workdir / "auto" / "plan.json").read_text())
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == sum(
        (m["in_features"] + m["out_features"]) * plan["ranks"][m["name"]] for m in plan["modules"]
    )
    assert (workdir / "auto" / "report" / "report.html").exists()
    assert_recommended(answer, plan, Results(Store(workdir / "auto" / "results", "study-1")))

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


def assert_recommended(answer: dict[str, Any], plan: dict[str, Any], results: Results) -> None:
    """The plan is that of the arm which the records recommend anew, or of the largest rank."""
    anew = recommend(results)
    assert (answer["study"], answer["chosen"]) == ("study-1", anew.chosen)
    handed = answer["handed_out"]
    assert handed == ("uniform@r16" if anew.chosen is None else anew.chosen)
    assert plan["ranks"] in [its["ranks"] for its in results.plans(handed)]
    if handed.startswith("uniform@r"):
        assert set(plan["ranks"].values()) == {int(handed.removeprefix("uniform@r"))}
