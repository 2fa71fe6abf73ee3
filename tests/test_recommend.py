"""What is recommended, what is refused, and how often it is wrong, through made-up records.

The decision itself is tested in test_ladder.py; here the records decide whether it may be made, and the
savings and sentences are compared with figures worked out by hand.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rankwise.contrasts import margin
from rankwise.errors import RankwiseError
from rankwise.ladder import decide_together
from rankwise.recommend import Recommendation, recommend
from rankwise.store import Store
from rankwise.tables import Results

UNIFORM = {"u1": 100, "u2": 200, "u4": 400}
DRIVEN = {"s1": 98, "s2": 199}
PARAMETERS = {**UNIFORM, **DRIVEN}
SEEDS = 8
UNTOUCHED = 1.7
BASELINE = 1.5
MARGIN = 0.01
"""5 % of 1.7 - 1.5: what the baseline u4 gains."""


def noise(
    arms: Mapping[str, float], sd: float = 0.1, seeds: int = SEEDS, draw: int = 1
) -> dict[str, list[float]]:
    """Losses around each arm's distance from the baseline, in margins; seeds share their luck.

    The own noise of each arm has a mean of zero, so that mean differences are exactly as given.
    """
    rng = np.random.default_rng(draw)
    luck = rng.normal(0, 3, seeds)
    luck -= luck.mean()
    found = {}
    for arm, distance in arms.items():
        own = rng.normal(0, sd, seeds)
        found[arm] = (BASELINE + MARGIN * (distance + luck + own - own.mean())).tolist()
    return found


def write(
    folder: Path,
    losses: Mapping[str, list[float | None]],
    ladders: Mapping[str, list[str]] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda index: None,
    parameters: Mapping[str, int] = PARAMETERS,
) -> Results:
    """Write a study's records (a loss of None is a failed run) and read them back."""
    place = folder / "made"
    seeds = max(len(values) for values in losses.values())
    runs = [record(place, "untouched", "untouched", 0, UNTOUCHED, 0)]
    for arm, values in losses.items():
        for seed, loss in enumerate(values):
            runs.append(record(place, arm, "reporting", seed, loss, parameters[arm]))
    strategies = {"u": "uniform", "s": "spectral"}
    index = {
        "config": {
            "name": "made", "model": "file:m",
            "data": {"source": "file:rows.json", "train": 8, "validation": 4, "test": 4, "reserved": 4,
                     "max_length": 64},
            "train": {"step_examples": 4, "learning_rates": [1e-3, 3e-3]},
            "seeds": {"tuning": 1, "reporting": seeds}, "baseline": next(reversed(UNIFORM)),
            "arms": {arm: {"strategy": strategies[arm[0]], "budget": "r=1"} for arm in losses},
            "ladders": {"uniform": list(UNIFORM)} if ladders is None else ladders,
        },
        "resolved": {"notices": ["the base is dequantised"]},
        "exploratory": False, "tuning_unfinished": False, "runs": runs,
        "rates": {arm: {"rate": 1e-3, "how": "tuned", "grid": [{"rate": 1e-3, "losses": [2.1]}]}
                  for arm in losses},
    }  # fmt: skip
    change(index)
    (place / "store.json").write_text('{"format": 1}')
    (place / "study.json").write_text(json.dumps(index))
    return Results(Store(folder, "made"))


def record(
    folder: Path, arm: str, role: str, seed: int, loss: float | None, parameters: int
) -> dict[str, Any]:
    """Write a run's record; time grows with parameters and seed, the plan of an "s" arm differs by seed."""
    name = f"{arm}-{seed}".replace("/", "_")
    place = folder / "runs" / name
    place.mkdir(parents=True)
    info = {
        "metrics": {} if loss is None else {"test_loss": loss},
        "num_trainable_params": parameters,
        "train_time": (10 + seed) * (1 + parameters / 400),
        "process_peak_bytes": 1000 + parameters,
        "file_size": 4 * parameters or 1,
        "probes": [{"kind": "gradients", "cost": {"seconds": 4.0}}] if arm.startswith("s") else [],
    }
    failure = None if loss is not None else {"step": 3, "reason": "diverged"}
    system = {"host": "vm", "processor": "P", "device": "cpu", "threads": 1}
    whole = {
        "run_id": name, "status": "failed" if failure else "done", "failure": failure, "train_info": info,
        "meta_info": {"system_info": system},
    }  # fmt: skip
    (place / "result.json").write_text(json.dumps(whole))
    if role == "reporting" and loss is not None:
        (place / "plan.json").write_text(json.dumps(plan(arm, seed)))
    return {"arm": arm, "role": role, "seed": seed, "rate": 1e-3, "run_id": name}


def plan(arm: str, seed: int) -> dict[str, Any]:
    """Four modules; an arm that looks at data gives the last module another rank in odd seeds."""
    ranks = [1, 1, 1, 2 if arm.startswith("s") and seed % 2 else 1]
    names = [f"layers.{i}.q" for i in range(4)]
    modules = [
        {"name": n, "layer": i, "part": "q", "kind": "q", "in_features": 8, "out_features": 8}
        for i, n in enumerate(names)
    ]
    return {
        "rankwise_plan": 1, "model": "file:m", "strategy": "uniform", "match": "none",
        "ranks": dict(zip(names, ranks, strict=True)), "modules": modules,
    }  # fmt: skip


def shown(answer: Recommendation, width: int = 200) -> str:
    page = Console(file=io.StringIO(), width=width, highlight=False)
    page.print(answer.table())
    return page.file.getvalue()  # type: ignore[attr-defined]


# --- what is chosen -------------------------------------------------------------------------------


def test_equal_plans_end_at_the_cheapest(tmp_path: Path):
    results = write(tmp_path, noise({"u4": 0, "u1": 0, "u2": 0}), {"uniform": ["u4", "u1", "u2"]})
    answer = recommend(results)
    assert answer.ladders[0].arms == ["u1", "u2", "u4"], "by parameters, whatever the order declared"
    assert (answer.chosen, answer.decided, answer.margin) == ("u1", True, pytest.approx(MARGIN))
    sentence = answer.sentence()
    assert sentence.startswith("Use u1: with 8 seeds") and "\n" not in sentence
    assert "less than 0.0100 (5 % of what u4 gains) against every plan of ladder 'uniform'" in sentence
    assert "no plan of ladder 'uniform' is smaller" in sentence
    assert "the base is dequantised" in answer.sentences()
    assert "The plan of u1 is the same for every seed." in answer.sentences()


def test_savings_are_those_worked_out_by_hand(tmp_path: Path):
    (saved,) = recommend(write(tmp_path, noise(dict.fromkeys(UNIFORM, 0.0)))).ladders[0].savings
    assert (saved.arm, saved.against, saved.parameters, saved.fewer) == ("u1", "u4", 0.25, 300)
    assert saved.seconds == pytest.approx(1.25 / 2) and saved.seconds_range == pytest.approx((0.625, 0.625))
    assert saved.peak == pytest.approx(1100 / 1400) and saved.file == 0.25
    words = (
        "25 % of the parameters (300 fewer), 38 % less training time, 21 % less peak memory, 75 % less disk"
    )
    assert words in saved.text()


def test_one_run_that_other_work_slowed_decides_no_saving_of_time(tmp_path: Path):
    results = write(tmp_path, noise(dict.fromkeys(UNIFORM, 0.0)))
    path = results.store.path("u1-3") / "result.json"
    slow = json.loads(path.read_text())
    slow["train_info"]["train_time"] *= 100
    path.write_text(json.dumps(slow))
    (saved,) = recommend(Results(results.store)).ladders[0].savings
    assert saved.seconds == pytest.approx(0.625) and saved.seconds_range == pytest.approx((0.625, 62.5))


def test_a_plan_that_loses_too_much_ends_the_walk_and_the_sentence_says_what_would_settle_it(tmp_path: Path):
    answer = recommend(write(tmp_path, noise({"u1": 0.6, "u2": 0, "u4": 0}, sd=0.6)))
    assert answer.chosen == "u2"
    settling = answer.ladders[0].settling
    assert settling is not None and settling.more is not None and settling.more > 0
    rung = answer.ladders[0].rungs[0]
    assert rung.passed is False and rung.rival_bound is not None and rung.rival_bound > MARGIN
    told = f"u1 is not shown: against {rung.rival} it may lose up to {rung.rival_bound:.4f}"
    assert told in answer.sentence()
    assert f"a new study of about {8 + settling.more} seeds would settle it" in answer.sentence()
    worse = recommend(write(tmp_path / "worse", noise({"u1": 3, "u2": 0, "u4": 0})))
    assert worse.chosen == "u2" and "looks worse by the margin or more" in worse.sentence()


def test_the_largest_may_overfit(tmp_path: Path):
    answer = recommend(write(tmp_path, noise({"u1": 0, "u2": 0, "u4": 4}, sd=0.02)))
    assert answer.chosen == "u1"
    assert [rung.passed for rung in answer.ladders[0].rungs] == [True, True, False]


def test_no_plan_is_shown_where_seeds_are_too_noisy(tmp_path: Path):
    answer = recommend(write(tmp_path, noise(dict.fromkeys(UNIFORM, 0.0), sd=5)))
    assert answer.decided and answer.chosen is None
    assert answer.sentence().startswith("No plan is shown, with 8 seeds, to lose less than 0.0100")
    assert "seeds would settle it" in answer.sentence()
    with pytest.raises(RankwiseError, match=r"no plan to hand out\. No plan is shown"):
        answer.plan_of()


# --- several ladders ------------------------------------------------------------------------------

BOTH = {"uniform": list(UNIFORM), "spectral": ["s1", "s2", "u4"]}


def test_ladders_share_alpha_also_where_one_has_no_verdict(tmp_path: Path):
    for draw in range(200):  # a draw that passes at the whole level and not at half of it
        losses = noise(dict.fromkeys(PARAMETERS, 0.0), sd=0.75, draw=draw)
        small = {arm: losses[arm] for arm in UNIFORM}
        alone = recommend(write(tmp_path / f"alone{draw}", small))
        if alone.chosen == "u1" and (alone.ladders[0].rungs[0].p or 0) > 0.025:
            break
    else:
        raise AssertionError("no draw lies between the levels")
    shared = recommend(write(tmp_path / "shared", losses, BOTH))
    assert shared.ladders[0].chosen != "u1"
    assert [found.decision.alpha for found in shared.ladders if found.decision] == [0.025, 0.025]
    assert "The 2 ladders share the 5 %: each is tested at 2.5 %." in shared.sentences()
    broken = {**losses, "s1": [None, *losses["s1"][1:]]}
    answer = recommend(write(tmp_path / "broken", broken, BOTH))
    assert answer.ladders[0].decision == shared.ladders[0].decision, "a lost ladder gives no level back"
    assert answer.ladders[1].faults == ("1 run of s1 failed",) and answer.ladders[1].decision is None
    assert "ladder 'spectral' has no verdict: 1 run of s1 failed" in answer.sentence()


def test_it_decides_as_the_ladders_do_together(tmp_path: Path):
    results = write(tmp_path, noise({"u1": 0.9, "u2": 0, "u4": 0, "s1": 0, "s2": 0.1}, sd=0.3), BOTH)
    arrays = {
        name: np.array([list(results.losses(arm).values()) for arm in arms]) for name, arms in BOTH.items()
    }
    theirs = decide_together(arrays, margin(results) or 0)
    assert {found.name: found.decision for found in recommend(results).ladders} == theirs


def test_of_two_chosen_plans_the_one_with_fewer_parameters_counts(tmp_path: Path):
    answer = recommend(write(tmp_path, noise({"u1": 3, "u2": 0.5, "u4": 0, "s1": 0, "s2": 0}), BOTH))
    assert [found.chosen for found in answer.ladders] == ["u2", "s1"] and answer.chosen == "s1"
    text = "\n".join(answer.sentences())
    assert "s1 is recommended before u2" in text and "not tested against each other" in text
    assert "u2 is shown, at 200 parameters and an observed +0.0050 of loss, not tested against s1" in text
    assert "takes a probe of 4.0 s" in text
    assert "seed 0, which is handed out, 14 % of the modules have another rank" in text  # 4/7 of 1 in 4
    assert "(at most 25 %)" in text
    assert [answer.plan_of(seed).ranks["layers.3.q"] for seed in (None, 1)] == [1, 2]
    with pytest.raises(RankwiseError, match="seed must be one of 0, 1, 2"):
        answer.plan_of(8)


def test_an_equal_count_goes_to_the_ladder_declared_first(tmp_path: Path):
    losses = noise(dict.fromkeys(PARAMETERS, 0.0))
    assert recommend(write(tmp_path / "a", losses, BOTH)).chosen == "u1", "98 and 100 parameters are equal"
    turned = {name: BOTH[name] for name in ("spectral", "uniform")}
    assert recommend(write(tmp_path / "b", losses, turned)).chosen == "s1"


# --- what is refused ------------------------------------------------------------------------------


def equal() -> dict[str, list[float | None]]:
    return {arm: list(values) for arm, values in noise(dict.fromkeys(UNIFORM, 0.0)).items()}


def test_a_study_without_ladders_is_told_how_to_declare_one(tmp_path: Path):
    with pytest.raises(RankwiseError) as caught:
        recommend(write(tmp_path, equal(), {}))
    assert "declares no ladder" in str(caught.value) and "ladders:\n  uniform: [" in str(caught.value)
    with pytest.raises(RankwiseError, match="run the study first"):
        Results(Store(tmp_path, "never"))


def rates(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["rates"]["u2"].update(changes)


def drop(index: dict[str, Any]) -> None:
    """Take three planned runs of u1 and one of u2 out of the records that are found."""
    for run in index["runs"]:
        if (run["arm"], run["seed"]) in {("u1", 5), ("u1", 6), ("u1", 7), ("u2", 7)}:
            run["run_id"] = "not-yet"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, "4 of 24 reporting runs are missing (u1 3, u2 1)"),
        (rates(rate=None, grid=[{"rate": 1e-3, "losses": [None]}]), "every learning rate of u2 diverged"),
    ],
)
def test_incomplete_records_give_no_verdict(tmp_path: Path, change: Callable, words: str):
    answer = recommend(write(tmp_path, equal(), change=change))
    assert not answer.decided and answer.chosen is None
    assert answer.sentence() == f"No verdict: {words}."
    assert "u1: mean loss" in "\n".join(answer.sentences()), "numbers, all the same"
    json.dumps(answer.as_dict(), allow_nan=False)
    assert "not tested" in shown(answer) and " yes " not in shown(answer)


def test_what_is_unfinished_counts_common_seeds_and_keeps_the_largest(tmp_path: Path):
    def fewer(index: dict[str, Any]) -> None:
        for run in index["runs"]:
            if run["arm"] == "u4" and run["seed"] > 4:
                run["run_id"] = "not-yet"

    def none(index: dict[str, Any]) -> None:
        for run in index["runs"]:
            if run["arm"] == "u4":
                run["run_id"] = "not-yet"

    answer = recommend(write(tmp_path / "fewer", equal(), change=fewer))
    assert any("u1: mean loss" in line and "over 5 seeds" in line for line in answer.sentences())
    answer = recommend(write(tmp_path / "none", equal(), change=none))
    assert answer.ladders[0].arms == ["u1", "u2", "u4"], "an arm without a run is not the smallest"


def test_unfinished_tuning_is_told(tmp_path: Path):
    def change(index: dict[str, Any]) -> None:
        index["tuning_unfinished"] = True
        index["runs"] = [run for run in index["runs"] if run["arm"] != "u1"]

    answer = recommend(write(tmp_path, equal(), change=change))
    assert (
        "8 of 24 reporting runs are missing (u1 8), learning rates are still being tuned" in answer.sentence()
    )


def test_an_arm_with_failures_is_named(tmp_path: Path):
    losses = equal()
    losses["u2"][3] = losses["u2"][5] = None
    answer = recommend(write(tmp_path, losses))
    assert answer.sentence() == "No verdict: 2 runs of u2 failed."


def test_few_seeds_screen(tmp_path: Path):
    losses = {arm: values[:5] for arm, values in equal().items()}
    answer = recommend(write(tmp_path, losses))
    assert answer.sentence() == "No verdict: the study screens with 5 seeds, and a verdict takes 6."
    assert recommend(write(tmp_path / "six", {arm: v[:6] for arm, v in equal().items()})).decided


def test_a_baseline_that_gains_nothing_gives_no_margin(tmp_path: Path):
    losses = {arm: [x + 0.3 for x in values if x] for arm, values in equal().items()}
    answer = recommend(write(tmp_path, losses))
    assert (
        not answer.decided
        and "u4 gains nothing over the model without an adapter (-0.1000)" in answer.sentence()
    )
    assert "no margin" in shown(answer) and "margin -" not in shown(answer)


def test_the_baseline_counts_also_where_it_is_no_plan_of_the_ladder(tmp_path: Path):
    losses = equal()
    losses["u4"][0] = None
    answer = recommend(write(tmp_path, losses, {"small": ["u1", "u2"]}))
    assert answer.sentence() == "No verdict: 1 run of u4 failed.", "the margin rests on it"


def test_cautions(tmp_path: Path):
    def change(index: dict[str, Any]) -> None:
        index["exploratory"] = True
        index["rates"]["u2"]["at_edge"] = True

    results = write(tmp_path, equal(), change=change)
    (tmp_path / "made" / "execution.json").write_text('{"processes": 2}')
    results.records["u2-0"]["meta_info"]["system_info"]["host"] = "other"
    answer = recommend(results)
    text = "\n".join(answer.sentences())
    assert answer.sentence().startswith("Exploratory, as the study was changed after its first run: Use u1")
    assert "The learning rate of u2 lies at the edge of its grid" in text
    assert "2 runs at a time" in text and "2 machines or numbers of threads" in text


# --- how it is shown ------------------------------------------------------------------------------


def test_json_holds_everything_and_no_nan(tmp_path: Path):
    answer = recommend(write(tmp_path, noise({"u1": 0.6, "u2": 0, "u4": 0, "s1": 0, "s2": 0}, sd=0.6), BOTH))
    back = json.loads(json.dumps(answer.as_dict(), allow_nan=False))
    assert back["sentence"] == answer.sentence() and back["chosen"] == answer.chosen
    plans = back["ladders"][0]["plans"]
    assert [plan["arm"] for plan in plans] == list(UNIFORM) and len(plans[0]["losses"]) == SEEDS
    assert plans[2]["level"] == pytest.approx(0.025 * 0.8) and plans[2]["passed"] is True
    assert back["ladders"][0]["alpha"] == 0.025
    assert back == answer.as_dict()


def test_names_with_markup_are_shown_as_they_are(tmp_path: Path):
    names = {"u[red]1": 100, "u2": 200, "u4": 400}
    losses = noise(dict.fromkeys(names, 0.0))
    answer = recommend(write(tmp_path, losses, {"[bold]x": list(names)}, parameters=names))
    assert "u[red]1 <" in shown(answer) and "Use u[red]1" in answer.sentence()
    lacking = {**losses, "u[red]1": losses["u[red]1"][1:]}
    answer = recommend(write(tmp_path / "b", lacking, {"[bold]x": list(names)}, parameters=names))
    assert "ladder '[bold]x': no verdict" in shown(answer) and "u[red]1 1" in shown(answer)


# --- how often it is wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "bad"),
    [
        ({"u1": 1.0, "u2": 0, "u4": 0, "s1": 1.0, "s2": 0}, {"u1", "s1"}),
        ({"u1": 0, "u2": 0, "u4": 1.0, "s1": 0, "s2": 0}, {"u4"}),
        ({"u1": 1.0, "u2": 0, "u4": 1.0, "s1": 0, "s2": 1.0}, {"u1", "u4", "s2"}),
    ],
    ids=["the smallest are worse by the margin", "the largest overfits", "both ends are worse"],
)
def test_errors_in_simulated_studies(tmp_path: Path, truth: dict[str, float], bad: set[str]):
    """Losses redrawn in one set of records; the margin is estimated from them as in a real study."""
    studies, rng = 1_000, np.random.default_rng(5)
    gain = 0.05 * (UNTOUCHED - BASELINE)
    ladders = {"uniform": list(UNIFORM), "spectral": ["s1", "s2"]}
    results = write(tmp_path, {arm: [BASELINE] * SEEDS for arm in truth}, ladders)
    # The margin is a share of what u4 truly gains, so that "worse by the margin" is exact where u4 is worse.
    unit = gain / (1 + 0.05 * truth["u4"])
    wrong = chosen = 0
    for _ in range(studies):
        luck = rng.normal(0, 3, SEEDS)
        for arm, distance in truth.items():
            for seed, own in enumerate(rng.normal(0, 0.4, SEEDS)):
                metrics = results.records[f"{arm}-{seed}"]["train_info"]["metrics"]
                metrics["test_loss"] = BASELINE + unit * (distance + luck[seed] + own)
        picks = {found.chosen for found in recommend(results).ladders}
        wrong += bool(picks & bad)
        chosen += picks != {None}
    print(f"wrong {wrong / studies:.1%}, a plan in {chosen / studies:.0%}")
    assert wrong / studies <= 0.055 and chosen / studies > 0.5
