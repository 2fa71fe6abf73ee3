"""`rankwise report` and `recommend` as processes; the page that is kept up to date; the axis of rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwise import datasizes
from rankwise.config import StudyConfig
from rankwise.contrasts import contrast_rows
from rankwise.observer import Observer
from rankwise.report.settings import study_yaml
from rankwise.reporting import LivePage, write_all
from rankwise.store import Store
from rankwise.study import run_study
from rankwise.tables import Results, arm_rows
from tests.conftest import rankwise, write_study
from tests.made_up import made_up
from tests.parts import opened

ROOT = Path(__file__).parent.parent


# --- the report ------------------------------------------------------------------------------------


def test_the_report_of_committed_records_is_a_page_tables_and_figures(tmp_path: Path):
    study = ROOT / "studies" / "adalora_rate.yaml"
    done = rankwise("report", study, "--results", ROOT / "results", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "adalora@r1" in page
    assert {path.suffix for path in (tmp_path / "out" / "tables").iterdir()} == {
        ".csv",
        ".parquet",
        ".tex",
        ".md",
    }
    drawn = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"learning_rates.pdf", "learning_rates.svg", "learning_rates.png"} <= drawn


def test_a_study_that_never_ran_has_no_report(tmp_path: Path):
    done = rankwise("report", ROOT / "studies" / "quickstart.yaml", "--results", "none", cwd=tmp_path)
    assert done.returncode == 2
    assert "run the study first" in done.stderr
    assert not (tmp_path / "reports").exists()


def test_text_of_the_rows_is_shown_with_leave_alone(workdir: Path, study_dict: dict):
    path = write_study(workdir, study_dict)
    run_study(opened(workdir, study_dict), Observer())
    for flags, there in (((), False), (("--text",), True)):
        done = rankwise("report", path, "--no-pictures", *flags, cwd=workdir)
        assert done.returncode == 0, done.stderr
        page = (workdir / "reports" / "tiny" / "report.html").read_text()
        assert ("Write number" in page) == there
    assert not (workdir / "reports" / "tiny" / "figures").exists()


def test_the_live_page_follows_the_runs_and_passes_everything_on(workdir: Path, study_dict: dict):
    heard: list[str] = []

    class Ear(Observer):
        def finished(self, planned, status):
            heard.append(status)

        def note(self, text):
            heard.append(text)

    study = opened(workdir, study_dict)
    page = workdir / "page.html"
    live = LivePage(Ear(), study.store, page)
    seen: list[str] = []

    class Peek(LivePage):
        def finished(self, planned, status):
            self.next = 0.0  # a test does not wait
            super().finished(planned, status)
            seen.append(page.read_text())

    peek = Peek(live.inner, study.store, page)
    run_study(study, peek)
    assert heard == ["done"] * 5
    assert len(seen) == 5 and len(set(seen)) == 5
    assert "unfinished" in seen[1].lower() and "unfinished" not in seen[-1].lower()


def test_a_live_page_that_cannot_be_written_stops_no_run(workdir: Path, study_dict: dict):
    notes: list[str] = []

    class Ear(Observer):
        def note(self, text):
            notes.append(text)

    (workdir / "taken").write_text("a file where a folder is needed")
    study = opened(workdir, study_dict)
    run_study(study, LivePage(Ear(), study.store, workdir / "taken" / "page.html"))
    assert all(study.store.has(run["run_id"]) for run in Results(study.store).index["runs"])
    assert "the report could not be written" in notes[0]


def made_study(folder: Path, **changes: Any) -> Path:
    """Write the file of the made-up study, and make a folder for its results."""
    (folder / "results").mkdir()
    config = made_up(folder / "none", seeds=0, wanted=6, arms=("uniform", "spectral")).config
    path = folder / "study.yaml"
    path.write_text(study_yaml(config.model_copy(update=changes)))
    return path


def test_rows_that_cannot_be_read_cost_their_pictures_alone(tmp_path: Path):
    path = made_study(tmp_path)
    made = made_up(tmp_path / "results", arms=("uniform", "spectral"))
    drawn = rankwise("report", path, "--results", tmp_path / "results", "--out", "whole", cwd=tmp_path)
    assert drawn.returncode == 0 and "gains and losses by example" in drawn.stdout, drawn.stderr
    (made.store.path("arm1-2") / "examples.parquet").write_bytes(b"not a table")
    done = rankwise("report", path, "--results", tmp_path / "results", "--out", "poorer", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (
        {p.name for p in (tmp_path / name / "figures").iterdir()} for name in ("whole", "poorer")
    )
    assert before - after == {f"examples-spectral-uniform.{kind}" for kind in ("pdf", "svg", "png")}
    assert after and not after - before
    said = next(line for line in done.stdout.splitlines() if line.startswith("left out: "))
    assert said.startswith("left out: gains and losses of spectral against uniform: ")
    assert "examples.parquet cannot be read" in said
    assert "gains and losses by example" not in done.stdout.replace(said, "")
    curves = (tmp_path / "poorer" / "figures" / "training_curves.svg").read_text()
    assert "mean of 5 steps" in curves


def test_rows_that_are_gone_cost_the_bootstrap_alone(workdir: Path, study_dict: dict):
    study = opened(workdir, study_dict | {"contrasts": ["decay"]})
    run_study(study, Observer())
    (whole,) = contrast_rows(Results(study.store))
    assert whole.bootstrap is not None and whole.paired is not None
    low, high = whole.bootstrap
    assert low <= whole.paired.mean <= high
    for path in study.store.runs.glob("*/examples.parquet"):
        path.unlink()
    (poorer,) = contrast_rows(Results(study.store))
    assert poorer.bootstrap is None and poorer.paired == whole.paired


# --- the recommendation ----------------------------------------------------------------------------


def test_recommend_prints_its_sentence_and_json(workdir: Path, study_dict: dict):
    study_dict["arms"]["small"] = {"strategy": "uniform", "budget": "r=1"}
    study_dict["ladders"] = {"uniform": ["small", "uniform"]}
    path = write_study(workdir, study_dict)
    run_study(opened(workdir, study_dict), Observer())
    told = rankwise("recommend", path, cwd=workdir)
    assert told.returncode == 0, told.stderr
    assert "No verdict: the study screens with 2 seeds" in told.stdout
    answer = json.loads(rankwise("recommend", path, "--json", cwd=workdir).stdout)
    assert answer["decided"] is False
    assert [plan["arm"] for plan in answer["ladders"][0]["plans"]] == ["small", "uniform"]
    assert not (workdir / "plan.json").exists()  # nothing was shown, so no plan is handed out


def test_a_ladder_of_strangers_is_a_fault_with_its_line(workdir: Path, study_dict: dict):
    study_dict["ladders"] = {"mine": ["uniform", "decai"], "short": ["uniform"]}
    done = rankwise("study", "validate", write_study(workdir, study_dict), cwd=workdir)
    assert done.returncode == 2
    assert "no arm is called 'decai'" in done.stderr and "Did you mean 'decay'?" in done.stderr
    assert "a ladder is two or more arms" in done.stderr


# --- the axis of training rows ---------------------------------------------------------------------


def test_a_study_over_numbers_of_rows_is_one_study_for_each(workdir: Path, study_dict: dict):
    study_dict["train_examples"] = [12, 4]
    path = write_study(workdir, study_dict)
    done = rankwise("study", "run", path, "--report", cwd=workdir)
    assert done.returncode == 0, done.stderr
    found = datasizes.records(StudyConfig.model_validate(study_dict), workdir / "results")
    assert list(found) == [4, 12]
    for rows, results in found.items():
        assert results.config.data.train == rows
        assert len(results.losses("uniform")) == 2
    assert "2 seeds screen: where the order settles is not said" in done.stdout
    page = (workdir / "reports" / "tiny" / "report.html").read_text()
    assert "tiny-n12" in page
    again = rankwise("study", "run", path, cwd=workdir)
    assert again.returncode == 0 and ": done," not in again.stderr  # nothing is done twice
    one = rankwise("train", path, "--arm", "uniform", "--seed", 0, cwd=workdir)
    assert one.returncode == 2 and "--set train_examples=[]" in one.stderr


def test_more_rows_than_there_are_is_a_fault_before_anything_runs(workdir: Path, study_dict: dict):
    study_dict["train_examples"] = [4, 400]
    done = rankwise("study", "run", write_study(workdir, study_dict), cwd=workdir)
    assert done.returncode == 2
    assert "Too few rows" in done.stderr
    assert not list((workdir / "results").glob("*/runs/*"))


class Made:
    """Records of made-up losses: arm -> loss per seed, None where the run failed; of every rate if none."""

    def __init__(self, **losses: list[float | None]) -> None:
        self.config = SimpleNamespace(
            arms=dict.fromkeys(losses), seeds=SimpleNamespace(reporting=max(map(len, losses.values())))
        )
        lost = {"rate": None, "grid": [{"rate": 1e-3, "losses": [None]}]}
        self.index = {"rates": {arm: {"rate": 1e-3} if found else lost for arm, found in losses.items()}}
        self._losses = losses

    def losses(self, arm: str) -> dict[int, float]:
        return {seed: loss for seed, loss in enumerate(self._losses[arm]) if loss is not None}

    def of(self, arm: str) -> dict[int, dict[str, str]]:
        states = ("failed" if loss is None else "done" for loss in self._losses[arm])
        return dict(enumerate({"status": state} for state in states))


LOW, HIGH = [1.0, 1.01, 0.99, 1.0, 1.0, 1.02], [1.2, 1.22, 1.19, 1.2, 1.21, 1.2]
NOISE = [1.1, 0.9, 1.3, 1.11, 1.2, 0.95]


def test_the_order_settles_where_it_no_longer_changes():
    by_size: dict = {
        16: Made(a=HIGH, b=LOW, c=NOISE),
        64: Made(a=LOW, b=HIGH, c=NOISE),
        256: Made(a=LOW, b=HIGH, c=NOISE),
    }
    found = datasizes.agreements(by_size)
    assert [(one.rows, one.pairs, one.agree) for one in found] == [(16, 1, 0), (64, 1, 1)]
    assert found[1].correlation == pytest.approx(1.0)
    assert found[0].correlation == pytest.approx(-1.0)
    assert datasizes.told(by_size)[-1] == "From 64 rows on the order of those pairs is the same."
    del by_size[64]
    assert datasizes.told(by_size)[-1] == "Their order had not settled below 256 rows."


def test_numbers_of_rows_that_are_left_out_are_named():
    whole = {"a": LOW, "b": HIGH, "c": NOISE}
    by_size: dict = {
        64: Made(**whole),
        128: Made(**whole),
        256: Made(**{**whole, "b": [None, *HIGH[1:]]}),
        512: Made(**{**whole, "b": HIGH[:3]}),
        1024: Made(**{**whole, "b": [None, None, *HIGH[2:4]], "c": []}),
    }
    *_, answer, left = datasizes.told(by_size, [64, 128, 256, 512, 1024, 2048])
    assert answer == "From 64 rows on the order of those pairs is the same."
    assert left == (
        "Left out: 256 rows (a run failed), 512 rows (unfinished), "
        "1024 rows (2 runs failed, every rate of c diverged, unfinished), 2048 rows (not begun)."
    )
    first, *account = datasizes.sentences({size: by_size[size] for size in (64, 128, 256)})
    assert first == (
        "From 64 rows on the order of the pairs of arms that 128 rows tell apart is the same; "
        "left out: 256 rows (a run failed)."
    )
    assert account[-1] == "Left out: 256 rows (a run failed)."
    assert "Left out: 256 rows" in datasizes.told({size: by_size[size] for size in (128, 256)})[-1]


def test_a_report_over_numbers_of_rows_opens_with_where_the_order_settles(tmp_path: Path):
    path = made_study(tmp_path, train_examples=[8, 16, 32])
    for rows, failed in ((8, {}), (16, {"uniform": 1})):
        place = made_up(tmp_path / "made", arms=("uniform", "spectral"), failed=failed).store.folder
        study = json.loads((place / "study.json").read_text())
        study["config"]["name"] = f"made-up-n{rows}"
        (place / "study.json").write_text(json.dumps(study))
        place.rename(tmp_path / "results" / f"made-up-n{rows}")
    write_all(path, tmp_path / "results", folder=tmp_path / "out", pictures=False)
    header = (tmp_path / "out" / "report.html").read_text().split("</header>")[0]
    assert "Fewer than two numbers of training rows are whole" in header
    assert "left out: 16 rows (a run failed), 32 rows (not begun)." in header


def test_what_the_records_cannot_tell_of_the_order_is_not_told():
    alike: dict = {16: Made(a=NOISE, b=NOISE[::-1]), 64: Made(a=NOISE, b=NOISE[::-1])}
    assert datasizes.told(alike) == [
        "At 64 rows no two arms are told apart (95 % paired intervals): no order is shown."
    ]
    unfinished: dict = {16: Made(a=LOW, b=HIGH), 64: Made(a=LOW, b=HIGH[:3])}
    assert "nothing can be said" in datasizes.told(unfinished)[0]
    few: dict = {16: Made(a=LOW[:3], b=HIGH[:3]), 64: Made(a=LOW[:3], b=HIGH[:3])}
    assert datasizes.told(few)[-1] == "3 seeds screen: where the order settles is not said."


# --- what the tables make of newer records ----------------------------------------------------------


def test_time_to_the_baselines_loss_is_read_off_the_step_logs(workdir: Path, study_dict: dict):
    study = opened(workdir, study_dict)
    run_study(study, Observer())
    store = Store(workdir / "results", "tiny")
    results = Results(store)
    for seed in (0, 1):
        for arm, losses in (("uniform", [4, 3, 2, 1]), ("decay", [3, 1, 1, 1])):
            run_id = next(r["run_id"] for r in results.index["runs"] if r["arm"] == arm and r["seed"] == seed)
            lines = [json.dumps({"step": i, "loss": x, "seconds": 2.0}) for i, x in enumerate(losses)]
            (store.path(run_id) / "metrics.jsonl").write_text("\n".join(lines))
    rows = {row.arm: row for row in arm_rows(Results(store))}
    assert rows["uniform"].seconds_to_baseline == 8.0
    assert rows["decay"].seconds_to_baseline == 4.0
    assert rows["decay"].forgetting is None and rows["decay"].chrf is None
    assert 0 < (rows["decay"].rank_used or math.nan) <= 1
