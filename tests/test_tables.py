"""What the tables say, and what they must not: no number for a run that failed, no verdict without seeds."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from typer.testing import CliRunner, Result

from rankwise import cli, stats
from rankwise.config import StudyConfig
from rankwise.contrasts import ContrastRow, contrast_rows, margin_words
from rankwise.errors import RankwiseError
from rankwise.observer import Observer
from rankwise.power import noninferior_power, provable_margin
from rankwise.report.opening import missing_runs, opening
from rankwise.store import Store
from rankwise.study import run_study
from rankwise.tables import Results, arm_rows, captions, design_warnings
from tests.conftest import alpaca_rows, byte_tokenizer, tiny_llama, write_study
from tests.made_up import EVIL, made_up
from tests.parts import opened

SEEDS = 6


def study_of(model: Path, **changes: object) -> dict:
    return {
        "name": "tiny",
        "model": f"file:{model}",
        "data": {
            "source": "file:rows.json", "train": 8, "validation": 4, "test": 6, "reserved": 4,
            "max_length": 128,
        },
        "train": {
            "step_examples": 4, "micro_tokens": 300, "learning_rates": [1e-2], "dtype": "fp32",
            "device": "cpu", "threads": 1,
        },
        "seeds": {"tuning": 0, "reporting": SEEDS},
        "baseline": "uniform",
        "contrasts": ["decay", "mlp", "mlp vs decay"],
        "arms": {
            "uniform": {"strategy": "uniform", "budget": "r=2"},
            "decay": {"strategy": "linear_decay", "base": 4, "min": 1, "budget": "r=2"},
            "mlp": {"strategy": "mlp_only", "base": 3, "match": "none"},
        },
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a finished study of 3 arms and 6 seeds; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "rows.json").write_text(json.dumps(alpaca_rows(60)))
    run_study(opened(folder, study_of(tiny_model)), Observer())
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def results_in(folder: Path) -> Results:
    return Results(Store(folder / "results", "tiny"))


def edit(folder: Path, arm: str, seed: int, change: Callable[[dict], None]) -> Path:
    """Change one run's result by hand and return its folder."""
    runs = json.loads((folder / "results" / "tiny" / "study.json").read_text())["runs"]
    run_id = next(run["run_id"] for run in runs if run["arm"] == arm and run["seed"] == seed)
    path = folder / "results" / "tiny" / "runs" / run_id / "result.json"
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))
    return path.parent


def set_losses(folder: Path, **losses: list[float]) -> None:
    for arm, values in losses.items():
        for seed, loss in enumerate(values):
            edit(folder, arm, seed, lambda r, v=loss: r["train_info"]["metrics"].update(test_loss=v))  # type: ignore[misc]


def contrast(folder: Path, arm: str = "decay", against: str = "uniform") -> ContrastRow:
    return next(row for row in contrast_rows(results_in(folder)) if (row.arm, row.against) == (arm, against))


def base_losses() -> list[float]:
    return [1.50, 1.47, 1.53, 1.49, 1.52, 1.48]


NOISE = [0.004, -0.003, 0.001, 0.002, -0.005, 0.001]


# --- numbers --------------------------------------------------------------------------------------


def test_rows_are_the_means_of_the_records(finished: Path):
    results = results_in(finished)
    rows = {row.arm: row for row in arm_rows(results)}
    untouched = results.untouched()
    assert list(rows) == ["uniform", "decay", "mlp"] and untouched is not None
    for arm, row in rows.items():
        runs = [run for run in results.index["runs"] if run["arm"] == arm]
        found = [results.store.record(run["run_id"])["train_info"] for run in runs]
        losses = [info["metrics"]["test_loss"] for info in found]
        assert len(set(losses)) == SEEDS == row.done and row.failed == 0
        assert row.loss == pytest.approx(statistics.fmean(losses))
        assert row.loss_sd == pytest.approx(statistics.stdev(losses))
        assert row.perplexity == pytest.approx(math.exp(statistics.fmean(losses)))
        assert row.gain == pytest.approx(untouched - statistics.fmean(losses)) and row.gain > 0
        assert {info["num_trainable_params"] for info in found} == set(row.parameters)
    assert [rows[arm].equal_budget for arm in rows] == [True, True, False]
    assert (rows["decay"].ranks, rows["mlp"].ranks, rows["uniform"].ranks) == ((1, 3), (0, 3), (2, 2))
    assert any("outside the equal-budget" in line for line in captions(results))
    assert captions(results)[0] == "rate not tuned, 6 seeds"


def test_contrasts_pair_the_seeds(finished: Path):
    results = results_in(finished)
    losses = {arm: results.losses(arm) for arm in ("uniform", "decay", "mlp")}
    p_values = []
    for row in contrast_rows(results):
        a, b = ([losses[name][seed] for seed in range(SEEDS)] for name in (row.arm, row.against))
        theirs = scipy.stats.ttest_rel(a, b)
        assert row.paired is not None and row.paired.p == pytest.approx(theirs.pvalue)
        assert row.paired.mean == pytest.approx(np.mean(a) - np.mean(b))
        p_values.append(row.paired.p)
    assert [row.p_holm for row in contrast_rows(results)] == pytest.approx(stats.holm(p_values))


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "noise", "verdict"),
    [
        (-0.02, 1, "differs: lower loss"),
        (+0.02, 1, "differs: higher loss"),
        (0.0, 1, "equivalent within the margin"),
        (+0.01, 0.1, "differs: higher loss, within the margin"),
        (0.0, 50, "no difference shown; could have seen "),
    ],
)
def test_verdicts(copy: Path, shift: float, noise: float, verdict: str):
    uniform = base_losses()
    edit(copy, "untouched", 0, lambda r: r["train_info"]["metrics"].update(test_loss=2.5))
    decay = [u + shift + noise * e for u, e in zip(uniform, NOISE, strict=True)]
    set_losses(copy, uniform=uniform, decay=decay)
    row = contrast(copy)
    assert row.verdict.startswith(verdict)
    assert row.margin == pytest.approx(0.05 * (2.5 - statistics.fmean(uniform)))
    if noise == 50:
        assert row.paired is not None and row.verdict == verdict + f"{row.paired.detectable:.4f}"
        assert row.paired.detectable > row.margin  # type: ignore[operator]


def test_no_gain_no_margin(copy: Path):
    edit(copy, "untouched", 0, lambda r: r["train_info"]["metrics"].update(test_loss=1.0))
    set_losses(copy, uniform=base_losses(), decay=[loss + 0.5 for loss in base_losses()])
    row = contrast(copy)
    assert row.verdict == "differs: higher loss" and row.margin is None, "that needs no margin"
    assert margin_words(results_in(copy)).startswith("no margin: the baseline gains nothing")
    same = [loss + 1e-6 * sign for loss, sign in zip(base_losses(), (1, -1) * 3, strict=True)]
    set_losses(copy, uniform=base_losses(), decay=same)
    assert contrast(copy).verdict.startswith("no difference shown"), (
        "there is nothing to be equivalent within"
    )


def test_a_huge_loss_is_shown_and_no_traceback(copy: Path):
    set_losses(copy, uniform=base_losses(), decay=[800.0 + i for i in range(SEEDS)])
    row = {row.arm: row for row in arm_rows(results_in(copy))}["decay"]
    assert row.loss == pytest.approx(802.5) and row.perplexity == pytest.approx(math.exp(700))


def test_holms_adjustment_can_take_a_verdict_away(copy: Path):
    uniform = base_losses()
    edit(copy, "untouched", 0, lambda r: r["train_info"]["metrics"].update(test_loss=2.5))
    shifts = np.arange(0, 0.02, 1e-5)
    near = next(s for s in shifts if scipy.stats.ttest_1samp(np.add(NOISE, s), 0).pvalue < 0.04)
    decay = [u + near + e for u, e in zip(uniform, NOISE, strict=True)]
    set_losses(copy, uniform=uniform, decay=decay, mlp=uniform[::-1])  # of three contrasts this is the best
    row = contrast(copy)
    assert row.paired is not None and row.paired.p == pytest.approx(0.04, abs=0.001)
    assert row.p_holm == pytest.approx(3 * row.paired.p)
    assert row.verdict == "equivalent within the margin"


def test_holm_is_over_all_declared_contrasts_whatever_became_of_them(copy: Path):
    def fail(result: dict) -> None:
        result.update(status="failed", failure={"step": 3, "reason": "the loss is nan", "last_metrics": None})
        result["train_info"]["metrics"] = {}

    uniform = base_losses()
    decay = [u + 0.003 + e for u, e in zip(uniform, NOISE, strict=True)]
    set_losses(copy, uniform=uniform, decay=decay, mlp=[u - 0.4 for u in uniform])
    alone = contrast(copy).paired
    assert alone is not None
    edit(copy, "mlp", 5, fail)  # two of the three contrasts are lost, one of them with a p near 0
    assert contrast(copy).p_holm == pytest.approx(3 * alone.p)
    assert contrast(copy, "mlp").p_holm is None and contrast(copy, "mlp").paired is not None
    for seed in range(6):
        shutil.rmtree(edit(copy, "mlp", seed, lambda result: None))
    assert contrast(copy).p_holm == pytest.approx(3 * alone.p), "also where an arm has no run at all"


def test_a_failed_run_takes_the_verdict_and_stays_out_of_the_mean(copy: Path):
    def fail(result: dict) -> None:
        result.update(status="failed", failure={"step": 3, "reason": "the loss is nan", "last_metrics": None})
        result["train_info"]["metrics"] = {}

    set_losses(copy, uniform=base_losses(), decay=[loss - 0.4 for loss in base_losses()])
    edit(copy, "decay", 5, fail)
    rows = {row.arm: row for row in arm_rows(results_in(copy))}
    assert (rows["decay"].done, rows["decay"].failed, rows["decay"].wanted) == (5, 1, 6)
    assert rows["decay"].loss == pytest.approx(statistics.fmean(base_losses()[:5]) - 0.4)
    verdicts = {(row.arm, row.against): row.verdict for row in contrast_rows(results_in(copy))}
    assert verdicts["decay", "uniform"] == verdicts["mlp", "decay"] == "no verdict: a run failed"
    assert not verdicts["mlp", "uniform"].startswith("no verdict")
    sentence = "decay (reporting, seed 5, rate 0.01) failed at step 3: the loss is nan"
    assert sentence in captions(results_in(copy))


def test_a_missing_run_takes_the_verdict(copy: Path):
    shutil.rmtree(edit(copy, "decay", 2, lambda result: None))
    assert contrast(copy).verdict == "no verdict yet: runs are missing"
    assert any("unfinished: 1 reporting runs missing" in line for line in captions(results_in(copy)))


def test_a_missing_metric_is_an_error_and_never_a_number(copy: Path):
    edit(copy, "decay", 2, lambda r: r["train_info"]["metrics"].pop("test_loss"))
    with pytest.raises((KeyError, RankwiseError)):
        arm_rows(results_in(copy))


def test_fewer_than_six_seeds_screen(copy: Path, tiny_model: Path):
    study = study_of(tiny_model, seeds={"tuning": 0, "reporting": 5})
    run_study(opened(copy, study), Observer())
    set_losses(copy, uniform=base_losses()[:5], decay=[loss - 0.4 for loss in base_losses()[:5]])
    row = contrast(copy)
    assert row.verdict == "screening: 5 seeds, no verdict" and row.paired is not None
    assert captions(results_in(copy))[0] == "rate not tuned, 5 seeds: no verdict"
    assert "verdicts need 6" in design_warnings(results_in(copy).config)[0]


def test_a_ladders_design_is_told_at_its_own_level(tmp_path: Path):
    made = made_up(tmp_path, seeds=8, ladders={"a": ["uniform", "spectral"], "b": ["uniform", EVIL]})
    told = [line for line in design_warnings(made.config) if line.startswith("ladder")]
    sds = provable_margin(8, alpha=0.02, two_sided=False)  # half of 5 %, of which a fifth is kept
    assert len(told) == 2 and all("at 2.5 %" in line and f"{sds:.2f} SDs" in line for line in told)
    assert noninferior_power(8, sds, 1.0, alpha=0.02) == pytest.approx(0.8, abs=1e-3)


def test_a_confirmatory_study_wants_seeds_of_its_own(tmp_path: Path):
    own = {"tuning": 1, "reporting": 8, "first": 100}
    for place, changes, warned in (("a", {}, True), ("b", {"seeds": own}, False)):
        config = made_up(tmp_path / place, seeds=8).config.model_dump(mode="json") | {"confirmatory": True}
        lines = design_warnings(StudyConfig.model_validate(config | changes))
        assert any("give seeds.first" in line for line in lines) == warned


def test_an_arm_without_a_run_is_not_marked_as_of_another_budget(tmp_path: Path):
    made = made_up(tmp_path, seeds=0, wanted=6)
    assert [row.other_budget for row in arm_rows(made)] == [False] * 4
    assert not any("equal-budget" in line for line in captions(made))


def test_exploratory_stands_before_what_a_study_says(tmp_path: Path):
    made = made_up(tmp_path)
    plain = opening(made)
    made.index["exploratory"] = True
    assert opening(made) == f"Exploratory: {plain[0].lower()}{plain[1:]}"


def test_arms_that_share_a_run_wait_for_none(tmp_path: Path):
    made = made_up(tmp_path, arms=("uniform", "spectral"), seeds=2)
    shared = {run["seed"]: run["run_id"] for run in made.index["runs"] if run["arm"] == "uniform"}
    for run in made.index["runs"]:
        if run["arm"] == "spectral":
            run["run_id"] = shared[run["seed"]]
    (made.store.folder / "study.json").write_text(json.dumps(made.index))
    assert missing_runs(Results(made.store)) == (0, 3)


@pytest.mark.parametrize(
    "change",
    [{"margin": 0.1}, {"contrasts": ["decay"]}, {"contrasts": ["decay", "mlp", "uniform vs decay"]},
     {"seeds": {"tuning": 0, "reporting": 7}}, {"scale": {"rule": "constant", "value": 1.0}},
     {"baseline": "decay", "contrasts": ["uniform", "mlp", "mlp vs uniform"]}],
    ids=str,
)  # fmt: skip
def test_what_is_declared_later_is_exploratory(copy: Path, tiny_model: Path, change: dict):
    assert not any("exploratory" in line for line in captions(results_in(copy)))
    run_study(opened(copy, study_of(tiny_model, **change)), Observer())
    assert any(line.startswith("exploratory") for line in captions(results_in(copy)))
    run_study(opened(copy, study_of(tiny_model)), Observer())
    assert not any("exploratory" in line for line in captions(results_in(copy))), "as it was declared"


# --- runs that diverge ------------------------------------------------------------------------------


def run_cli(folder: Path, study: dict, *more: str) -> Result:
    path = write_study(folder, study)
    return CliRunner().invoke(
        cli.app, ["study", "run", str(path), "--results", str(folder / "results"), *more]
    )


def strict(path: Path) -> dict:
    """Read JSON that holds neither NaN nor infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("epochs", [3, 1], ids=["in training", "in evaluation"])
def test_a_diverged_run_is_a_failure_and_never_a_number(workdir: Path, tiny_model: Path, epochs: int):
    study = study_of(tiny_model, seeds={"tuning": 0, "reporting": 2}, contrasts=["decay"])
    study["train"] |= {"epochs": epochs, "step_examples": 8}  # with one epoch only the evaluation can tell
    study["arms"]["decay"]["learning_rate"] = 1e30
    assert run_cli(workdir, study).exit_code == 1
    results = results_in(workdir)
    store = results.store
    bad = [run for run in results.index["runs"] if run["arm"] == "decay"]
    for run in bad:
        folder = store.path(run["run_id"])
        record = strict(folder / "result.json")
        assert record["status"] == "failed" and record["train_info"]["metrics"] == {}
        assert "train_loss" not in record["train_info"]
        failure = record["failure"]
        assert failure["step"] == 1 and "layers.0" in failure["reason"]
        assert ("in evaluation" in failure["reason"]) == (epochs == 1)
        assert failure["last_metrics"]["step"] == 0 and math.isfinite(failure["last_metrics"]["loss"])
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == [0]
        assert strict(folder / "plan.json")["ranks"] and strict(folder / "config.json")["seed"] == run["seed"]
        assert not (folder / "adapter").exists() and not (folder / "examples.parquet").exists()
    row = {row.arm: row for row in arm_rows(results)}["decay"]
    assert (row.done, row.failed) == (0, 2)
    assert (row.loss, row.perplexity, row.gain, row.token_accuracy, row.parameters) == (None,) * 5
    assert contrast(workdir).verdict == "no verdict: a run failed" and contrast(workdir).paired is None
    good = {row.arm: row for row in arm_rows(results)}["uniform"]
    assert good.done == 2 and good.loss is not None

    def times() -> dict[str, int]:
        return {run.name: (run / "result.json").stat().st_mtime_ns for run in store.runs.iterdir()}

    first = times()
    assert run_cli(workdir, study).exit_code == 1 and times() == first, "a failed run is not done again"
    assert run_cli(workdir, study, "--retry-failed").exit_code == 1
    assert {name for name, time in times().items() if time != first[name]} == {run["run_id"] for run in bad}
    del study["arms"]["decay"]["learning_rate"]
    assert run_cli(workdir, study).exit_code == 0


def test_a_base_with_a_bad_weight_fails_everywhere_and_is_named(workdir: Path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = math.nan
    model.save_pretrained("broken")
    byte_tokenizer().save_pretrained("broken")
    study = study_of(workdir / "broken", seeds={"tuning": 0, "reporting": 1}, contrasts=["decay"])
    ended = run_cli(workdir, study)
    assert ended.exit_code == 1 and isinstance(ended.exception, SystemExit), ended.exception
    results = results_in(workdir)
    assert {record["status"] for record in results.records.values()} == {"failed"}
    assert all("layers.1.mlp.gate_proj" in r["failure"]["reason"] for r in results.records.values())
    assert results.untouched() is None and len(results.failures()) == 4
    assert [row.loss for row in arm_rows(results)] == [None] * 3
    assert "nan" not in "".join(str(cell) for row in arm_rows(results) for cell in vars(row).values())


def test_an_arm_that_diverges_at_every_rate_says_so(workdir: Path, tiny_model: Path):
    study = study_of(tiny_model, seeds={"tuning": 1, "reporting": SEEDS}, contrasts=["decay"])
    study["train"]["learning_rates"] = [1e28, 1e30]
    for arm in ("uniform", "mlp"):
        study["arms"][arm]["learning_rate"] = 1e-2
    assert run_cli(workdir, study).exit_code == 1
    assert "decay: every rate diverged" in captions(results_in(workdir))
    assert contrast(workdir).verdict == "no verdict: every rate of decay diverged"
    row = {row.arm: row for row in arm_rows(results_in(workdir))}["decay"]
    assert (row.rate, row.loss, row.done) == (None, None, 0)


def test_a_rate_that_diverges_in_tuning_is_a_finding_and_no_failure(workdir: Path, tiny_model: Path):
    study = study_of(tiny_model, seeds={"tuning": 1, "reporting": 1}, contrasts=[])
    study["train"]["learning_rates"] = [3e-3, 1e-2, 1e30]
    assert run_cli(workdir, study).exit_code == 0
    results = results_in(workdir)
    assert results.failures() and all("(tuning" in line for line in results.failures())
    assert all(row.rate is not None and row.rate < 1 and row.done == 1 for row in arm_rows(results))
