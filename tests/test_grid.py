"""What a study runs: tuning, then reporting; who sees which rows; what a run's name stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from rankwise.data import training_rows
from rankwise.errors import RankwiseError
from rankwise.grid import FIRST_TUNING_SEED, Grid, Planned, Study, grid, run_config
from rankwise.observer import Observer
from rankwise.run import scored_splits
from rankwise.store import write_json
from rankwise.study import run_study, train_one
from tests.conftest import alpaca_rows, byte_tokenizer, tiny_llama
from tests.parts import opened, records_of

RATES = [1e-3, 3e-3, 1e-2]


def tuned(study: dict, **seeds: int) -> dict:
    study["train"] = study["train"] | {"learning_rates": RATES}
    study["seeds"] = {"tuning": 2, "reporting": 2} | seeds
    return study


def put(study: Study, planned: Planned, loss: float | None) -> None:
    """A finished record of a tuning run; None stands for a run that diverged."""
    study.store.open()
    folder = study.store.stage(planned.run_id)
    metrics = {} if loss is None else {"validation_loss": loss}
    status = "failed" if loss is None else "done"
    failure = {"step": 1, "reason": "the loss is nan"} if loss is None else None
    result = {"status": status, "failure": failure, "train_info": {"metrics": metrics}}
    write_json(folder / "result.json", result)
    study.store.finish(planned.run_id, folder)


def tune(study: Study, curves: dict[str, dict[float, float | None]]) -> Grid:
    """Record the losses of all pending tuning runs, the second seed's a little higher; return the grid."""
    for planned in grid(study).pending(study.store):
        if planned.role == "tuning":
            assert planned.rate is not None
            loss = curves[planned.arm][planned.rate]
            put(study, planned, None if loss is None else loss + 0.01 * (planned.seed - FIRST_TUNING_SEED))
    return grid(study)


def kinds(found: Grid) -> dict[str, list[tuple[str, float | None, int]]]:
    roles = ("untouched", "tuning", "reporting")
    return {role: [(p.arm, p.rate, p.seed) for p in found.runs if p.role == role] for role in roles}


# --- tuning, then reporting ---------------------------------------------------------------------


def test_tuning_comes_first_and_reporting_follows_at_the_chosen_rates(workdir: Path, study_dict: dict):
    study = opened(workdir, tuned(study_dict, reporting=3))
    first = grid(study)
    seeds = [FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1]
    wanted = {(arm, rate, seed) for arm in ("uniform", "decay") for rate in RATES for seed in seeds}
    assert first.unfinished and kinds(first)["untouched"] == [("untouched", None, 0)]
    assert set(kinds(first)["tuning"]) == wanted and not kinds(first)["reporting"]
    assert {choice["rate"] for choice in first.rates.values()} == {None}

    curve = {"uniform": {1e-3: 1.9, 3e-3: 1.5, 1e-2: 1.8}, "decay": {1e-3: 1.4, 3e-3: 1.2, 1e-2: 1.3}}
    half = first.pending(study.store)[:-1]
    for planned in half:
        if planned.role == "tuning":
            put(study, planned, curve[planned.arm][planned.rate])  # type: ignore[index]
    assert grid(study).unfinished and not kinds(grid(study))["reporting"], "one tuning run is missing"

    last = tune(study, curve)
    assert not last.unfinished and {arm: c["rate"] for arm, c in last.rates.items()} == {
        "uniform": 3e-3,
        "decay": 3e-3,
    }
    assert set(kinds(last)["reporting"]) == {(a, 3e-3, s) for a in ("uniform", "decay") for s in range(3)}
    assert not {s for _, _, s in kinds(last)["tuning"]} & {s for _, _, s in kinds(last)["reporting"]}
    assert last.rates["decay"]["how"] == "tuned" and not last.rates["decay"]["at_edge"]


def test_a_winner_at_the_edge_extends_the_grid_for_every_arm(workdir: Path, study_dict: dict):
    study = opened(workdir, tuned(study_dict))
    curve: dict[str, dict[float, float | None]] = {
        "uniform": {1e-3: 1.9, 3e-3: 1.5, 1e-2: 1.8, 3e-2: 2.5, 1e-1: None, 3e-4: 2.0},
        "decay": {1e-3: 1.9, 3e-3: 1.8, 1e-2: 1.7, 3e-2: 1.6, 1e-1: None, 3e-4: 2.0},
    }
    second = tune(study, curve)
    assert second.unfinished
    pending = {(p.arm, p.rate) for p in second.pending(study.store) if p.role == "tuning"}
    assert pending == {("uniform", 3e-2), ("decay", 3e-2)}, "the arm that was content is tuned there too"
    third = tune(study, curve)
    pending = {(p.arm, p.rate) for p in third.pending(study.store) if p.role == "tuning"}
    assert pending == {("uniform", 1e-1), ("decay", 1e-1)}
    last = tune(study, curve)
    assert not last.unfinished
    assert {arm: choice["rate"] for arm, choice in last.rates.items()} == {"uniform": 3e-3, "decay": 3e-2}
    tried = {arm: [g["rate"] for g in choice["grid"]] for arm, choice in last.rates.items()}
    assert tried["uniform"] == tried["decay"] == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


def test_a_rate_that_diverged_once_is_not_eligible(workdir: Path, study_dict: dict):
    study = opened(workdir, tuned(study_dict))
    for planned in grid(study).runs:
        if planned.role == "tuning":
            bad = planned.arm == "decay" and planned.rate == 1e-2 and planned.seed == FIRST_TUNING_SEED
            loss = {1e-3: 1.9, 3e-3: 1.5, 1e-2: 1.6 if planned.arm == "uniform" else 1.0}[planned.rate]  # type: ignore[index]
            put(study, planned, None if bad else loss)
    found = grid(study)
    assert not found.unfinished and found.rates["decay"]["rate"] == 3e-3 == found.rates["uniform"]["rate"]


def test_an_arm_whose_every_rate_diverged_is_left_out(workdir: Path, study_dict: dict):
    study = opened(workdir, tuned(study_dict))
    good: dict[float, float | None] = {1e-3: 1.9, 3e-3: 1.5, 1e-2: 1.8}
    found = tune(study, {"uniform": good, "decay": dict.fromkeys(RATES)})
    assert not found.unfinished and found.rates["decay"]["rate"] is None
    assert {arm for arm, _, _ in kinds(found)["reporting"]} == {"uniform"}


def test_a_declared_rate_is_not_tuned(workdir: Path, study_dict: dict):
    study_dict["arms"]["decay"]["learning_rate"] = 5e-3
    study = opened(workdir, tuned(study_dict))
    assert {arm for arm, _, _ in kinds(grid(study))["tuning"]} == {"uniform"}
    found = tune(study, {"uniform": {1e-3: 1.9, 3e-3: 1.5, 1e-2: 1.8}})
    assert found.rates["decay"] == {"rate": 5e-3, "how": "declared"}
    assert {rate for arm, rate, _ in kinds(found)["reporting"] if arm == "decay"} == {5e-3}


@pytest.mark.parametrize("seeds", [{"reporting": FIRST_TUNING_SEED + 1}, {"tuning": 0}])
def test_seeds_that_would_meet_or_lack_are_refused(workdir: Path, study_dict: dict, seeds: dict):
    with pytest.raises(RankwiseError, match=f"seeds.{next(iter(seeds))}"):
        opened(workdir, tuned(study_dict, **seeds))


def test_a_tuning_seed_cannot_be_reported_by_hand(workdir: Path, study_dict: dict):
    study = opened(workdir, study_dict)
    with pytest.raises(RankwiseError, match="--seed"):
        train_one(study, "uniform", FIRST_TUNING_SEED, None, Observer())


# --- who sees which rows --------------------------------------------------------------------------


def test_test_rows_meet_neither_tuning_nor_training(workdir: Path, study_dict: dict):
    study = opened(workdir, tuned(study_dict))
    splits = study.context.prepared.splits
    rows = {name: {r.row_hash for r in getattr(splits, name)} for name in ("test", "validation", "reserved")}
    assert {name: len(found) for name, found in rows.items()} == {"test": 6, "validation": 4, "reserved": 4}
    assert not rows["test"] & rows["validation"] and not rows["reserved"] & (
        rows["test"] | rows["validation"]
    )
    scored: dict[str, dict[str, set]] = {
        role: {
            split: {row.row_hash for row in found}
            for split, found in scored_splits(
                run_config(study, "uniform", role, 0, 1e-2), study.context
            ).items()
        }
        for role in ("tuning", "reporting", "untouched")
    }
    assert scored["tuning"] == {"validation": rows["validation"]}
    assert scored["reporting"] == {"test": rows["test"]}
    assert scored["untouched"] == {"test": rows["test"], "validation": rows["validation"]}
    draws = [
        {row.row_hash for row in training_rows(study.context.prepared, seed, 8)}
        for seed in [*range(20), *range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + 20)]
    ]
    assert not set().union(*draws) & set().union(*rows.values())
    assert len({frozenset(draw) for draw in draws}) == 40, "each seed draws rows of its own"


def test_what_real_runs_recorded(workdir: Path, study_dict: dict):
    study = opened(workdir, tuned(study_dict, tuning=1))
    run_study(study, Observer())
    splits = study.context.prepared.splits
    rows = {name: [row.row_hash for row in getattr(splits, name)] for name in ("test", "validation")}
    records = records_of(study.store)
    found = {planned.run_id: planned.role for planned in grid(study).runs}
    assert found.keys() == records.keys() and set(found.values()) == {"untouched", "tuning", "reporting"}
    for run_id, role in found.items():
        record, metrics = records[run_id], records[run_id]["metrics"]
        splits_seen = {name.partition("_")[0] for name in metrics}
        wanted = {
            "tuning": {"validation"},
            "reporting": {"test"},
            "untouched": {"test", "validation"},
        }[role]
        assert splits_seen == wanted
        for split, file in (("test", "examples.parquet"), ("validation", "validation.parquet")):
            assert (file in record) == (split in wanted)
            if split in wanted:
                scores = record[file]
                assert scores["row_hash"] == rows[split]
                mean = sum(scores["nll"]) / sum(scores["tokens"])
                assert metrics[f"{split}_loss"] == pytest.approx(mean)


# --- reserved rows --------------------------------------------------------------------------------


def test_reserved_rows_open_once(workdir: Path, study_dict: dict):
    run_study(opened(workdir, study_dict), Observer())
    confirm = study_dict | {"confirmatory": True, "name": "confirm"}
    study = opened(workdir, confirm, "confirm.yaml")
    index = run_study(study, Observer())
    reserved = [row.row_hash for row in study.context.prepared.splits.reserved]
    for run in index["runs"]:
        scores = pyarrow.parquet.read_table(study.store.path(run["run_id"]) / "examples.parquet").to_pydict()
        assert scores["row_hash"] == reserved
    again = run_study(opened(workdir, confirm, "confirm.yaml"), Observer())
    assert again["runs"] == index["runs"], "the same study may go on"

    fewer = confirm["data"] | {"reserved": 3}  # three of the four rows that were seen
    for change in ({"name": "second"}, {"margin": 0.2}, {"name": "third", "data": fewer}, {"data": fewer}):
        with pytest.raises(RankwiseError, match="opened before, by study 'confirm'"):
            run_study(opened(workdir, confirm | change, "other.yaml"), Observer())
    open_rows = {p.run_id for p in grid(opened(workdir, study_dict)).runs}
    assert not open_rows & {run["run_id"] for run in index["runs"]}


def test_rows_that_any_study_used_cannot_confirm(workdir: Path, study_dict: dict):
    careless = study_dict | {"name": "careless", "data": study_dict["data"] | {"reserved": 0}}
    run_study(opened(workdir, careless, "careless.yaml"), Observer())
    confirm = study_dict | {"confirmatory": True, "name": "confirm"}
    with pytest.raises(RankwiseError, match="4 of the 4 reserved rows were used by study 'careless'"):
        run_study(opened(workdir, confirm, "confirm.yaml"), Observer())
    assert not (workdir / "results" / "confirm" / "rows.json").exists()


def test_another_rate_than_the_arms_own_sees_no_test_row(workdir: Path, study_dict: dict):
    study = opened(workdir, study_dict)
    for rate, seen in ((None, {"test"}), (1e-2, {"test"}), (2e-2, {"validation"})):
        planned = train_one(study, "uniform", 0, rate, Observer())
        metrics = study.store.record(planned.run_id)["train_info"]["metrics"]
        assert {name.split("_")[0] for name in metrics} == seen


def test_other_rows_have_a_reserve_of_their_own(workdir: Path, study_dict: dict):
    confirm = study_dict | {"confirmatory": True, "seeds": {"tuning": 0, "reporting": 1}}
    run_study(opened(workdir, confirm), Observer())
    rows = [{**row, "instruction": f"Other {row['instruction']}"} for row in alpaca_rows(60, seed=1)]
    (workdir / "other.json").write_text(json.dumps(rows))
    other = confirm | {"name": "other", "data": confirm["data"] | {"source": "file:other.json"}}
    run_study(opened(workdir, other, "other.yaml"), Observer())
    with pytest.raises(RankwiseError, match="no reserved rows"):
        opened(workdir, confirm | {"data": confirm["data"] | {"reserved": 0}}, "none.yaml")


# --- a run's name ---------------------------------------------------------------------------------


def changed(study: dict, path: str, value: Any) -> dict:
    study = json.loads(json.dumps(study))
    *groups, last = path.split(".")
    place = study
    for group in groups:
        place = place.setdefault(group, {})
    place[last] = value
    return study


def name_of(workdir: Path, study: dict, arm: str = "decay") -> str:
    found = opened(workdir, study)
    return run_config(found, arm, "reporting", 0, 1e-2).run_id


MATTERS = [
    ("data.train", 9), ("data.test", 5), ("data.validation", 5), ("data.max_length", 70),
    ("data.prompt", "human"), ("targets", "attention"), ("scale", {"rule": "alpha", "value": 4}),
    ("scale", {"rule": "rslora", "value": 4}), ("scale", {"rule": "constant", "value": 4}),
    ("train.epochs", 2), ("train.step_tokens", 100), ("train.micro_tokens", 200), ("train.max_steps", 1),
    ("train.schedule", "linear"), ("train.warmup", 0.5), ("train.weight_decay", 0.1),
    ("train.betas", [0.8, 0.99]), ("train.clip", 0.1), ("train.clip", None), ("train.dropout", 0.1),
    ("train.dtype", "bf16"), ("train.gradient_checkpointing", True), ("train.threads", 2),
    ("arms.decay.budget", "r=3"), ("arms.decay.base", 5), ("arms.decay.min", 2),
    ("arms.decay.targets", "mlp"), ("arms.decay.scale", {"rule": "alpha", "value": 8}),
    ("arms.decay", {"strategy": "linear_growth", "base": 4, "min": 1, "budget": "r=2"}),
    ("arms.decay", {"strategy": "linear_decay", "base": 4, "min": 1, "match": "none"}),
    ("confirmatory", True),
]  # fmt: skip


def test_a_name_covers_what_decides_the_numbers(workdir: Path, study_dict: dict):
    names = [name_of(workdir, study_dict)]
    names += [name_of(workdir, changed(study_dict, path, value)) for path, value in MATTERS]
    study = opened(workdir, study_dict)
    run = run_config(study, "decay", "reporting", 0, 1e-2)
    names += [run_config(study, "decay", "reporting", 1, 1e-2).run_id]
    names += [run_config(study, "decay", "reporting", 0, 1.1e-2).run_id]
    names += [run_config(study, "decay", "tuning", 0, 1e-2).run_id]
    names += [run_config(study, "uniform", "reporting", 0, 1e-2).run_id]
    names += [run.model_copy(update={"numerics": run.numerics + 1}).run_id]
    tiny_llama(seed=1).save_pretrained("other-model")
    byte_tokenizer().save_pretrained("other-model")
    names.append(name_of(workdir, changed(study_dict, "model", f"file:{workdir / 'other-model'}")))
    (workdir / "rows.json").write_text(json.dumps(alpaca_rows(61)))
    names.append(name_of(workdir, study_dict))
    assert len(set(names)) == len(names) == len(MATTERS) + 8


def test_a_name_leaves_out_what_does_not(workdir: Path, study_dict: dict):
    name = name_of(workdir, study_dict)
    for path, value in [
        ("name", "other"), ("margin", 0.2), ("contrasts", ["decay"]), ("seeds.reporting", 5),
        ("seeds.tuning", 1), ("baseline", "decay"), ("train.learning_rates", [3e-3]),
        ("accept_unreachable", True), ("arms.third", {"strategy": "uniform", "budget": "r=1"}),
        ("arms.decay.learning_rate", 1e-2),
    ]:  # fmt: skip
        assert name_of(workdir, changed(study_dict, path, value)) == name, path
    study_dict["arms"]["renamed"] = study_dict["arms"].pop("decay")
    assert name_of(workdir, study_dict, "renamed") == name
    (workdir / "rows.json").write_text(json.dumps(alpaca_rows(60)[::-1], indent=3))
    assert name_of(workdir, study_dict, "renamed") == name, "the same rows in another order"
