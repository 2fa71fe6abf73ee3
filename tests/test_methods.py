"""Methods that choose ranks while training: what a run must keep to, killed and resumed ones included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise import adapters, checkpoint
from rankwise.engine import proof
from rankwise.engine.batches import optimizer_steps
from rankwise.evaluate import evaluate
from rankwise.inventory import inventory
from rankwise.methods import METHODS, method_of, segments
from rankwise.methods.segments import Decision, in_segments
from rankwise.methods.session import Outcome, Session, adapted, replanned
from rankwise.strategies import allocate
from rankwise.train import train_adapters
from tests.parts import MODELS, hand_rows, train_config
from tests.test_resize import SCALES, best, update

OPTIONS: dict[str, dict[str, Any]] = {
    "grow_prune": {"every": 2, "move_share": 0.4},
    "sensitivity": {"warm_share": 0.3},
    "shrink": {"factor": 3.0, "refit_share": 0.4},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- whole runs -----------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def session(
    strategy: str,
    folder: Path,
    *,
    family: str = "llama",
    path: str = "plain",
    targets: str | tuple[str, ...] = "all",
    budget: str = "r=2",
    scale: str = "constant",
    rows: int = 40,
    rate: float = 1e-2,
    on_step: Any = lambda entry: None,
    checkpoint_seconds: float = 1e9,
    **changes: Any,
) -> Session:
    folder.mkdir(exist_ok=True)
    model = MODELS[family]().eval().requires_grad_(False)
    modules = inventory(model).select(targets)
    config = train_config(**changes)
    plan = allocate(
        modules,
        strategy=strategy,
        budget=budget,
        scale=SCALES[scale],
        options=OPTIONS.get(strategy, {}),
        seed=4,
    )
    return Session(
        model=model, inventory=modules, plan=plan, engine=proof.choose(model, path),
        steps=optimizer_steps(hand_rows(rows), config, seed=4), config=config, rate=rate, seed=4,
        folder=folder, on_step=on_step, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip


def run(one: Session) -> tuple[Outcome, dict[str, bytes], list[dict]]:
    """Train; return the outcome, the adapters' bytes and the step log."""
    with method_of(one.plan.strategy)(one) as (model, outcome):
        adapters.verify(model, outcome.plan)
        tensors = {n: p.detach().numpy().tobytes() for n, p in adapters.adapter_tensors(model).items()}
    log = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    return outcome, tensors, [{k: v for k, v in entry.items() if k != "seconds"} for entry in log]


def untimed(outcome: Outcome) -> list[dict]:
    return [{k: v for k, v in move.items() if k != "seconds"} for move in outcome.details["moves"]]


@pytest.mark.parametrize("path", ["plain", "auto"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("strategy", OPTIONS)
def test_a_run_keeps_to_its_word(strategy: str, family: str, path: str, tmp_path: Path):
    built: list[int] = []
    one = session(
        strategy, tmp_path / "run", family=family, path=path, scale="alpha",
        on_step=lambda entry: built.append(adapters.trainable_parameters(one.model)),
    )  # fmt: skip
    assert one.engine.name == ("plain" if path == "plain" else "packed")
    before = {name: t.clone() for name, t in one.model.state_dict().items()}
    outcome, _, log = run(one)
    after = one.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not hasattr(one.model, "peft_config") and not adapters.lora_layers(one.model)

    assert outcome.plan.parameters <= one.plan.budget == outcome.plan.budget
    assert outcome.trained_parameters == max(built) and built[-1] == outcome.plan.parameters
    moves = [move for move in outcome.details["moves"] if move["changes"]]
    assert moves, "the test must see a move"
    at = dict(outcome.details["start"])
    for move in moves:
        assert built[move["step"] - 1] == move["parameters"]["before"]
        assert built[move["step"]] == move["parameters"]["grown"] <= one.plan.budget
        assert move["parameters"]["pruned"] <= move["parameters"]["grown"]
        assert abs(move["loss"]["grown"] - move["loss"]["pruned"]) < 1e-5, "growing alone changes nothing"
        assert move["loss_jump"] == move["loss"]["pruned"] - move["loss"]["before"]
        assert all(at[name] == pair[0] for name, pair in move["changes"].items())
        at |= {name: pair[1] for name, pair in move["changes"].items()}
    assert at == outcome.plan.ranks
    assert outcome.trained.seconds > sum(move["seconds"] for move in moves)

    reference, _, fixed_log = run(session("uniform", tmp_path / "fixed", family=family, path=path))
    assert [e["tokens"] for e in log] == [e["tokens"] for e in fixed_log]
    assert [e["learning_rate"] for e in log] == [e["learning_rate"] for e in fixed_log]
    for name in ("steps", "tokens", "label_tokens"):
        assert getattr(outcome.trained, name) == getattr(reference.trained, name)
    if strategy == "shrink":
        assert outcome.trained_parameters > 2 * outcome.plan.parameters
    else:
        assert max(built) <= one.plan.budget


@pytest.mark.parametrize("stops", [[2], [3], [5, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]], ids=str)
@pytest.mark.parametrize("checkpoint_seconds", [0, 1e9], ids=["each-step", "at-boundaries"])
@pytest.mark.parametrize("strategy", OPTIONS)
def test_resumed_equals_uninterrupted(
    strategy: str, checkpoint_seconds: float, stops: list[int], tmp_path: Path
):
    settings: dict[str, Any] = {"checkpoint_seconds": checkpoint_seconds, "dropout": 0.1, "family": "gpt2"}
    outcome, tensors, log = run(session(strategy, tmp_path / "whole", **settings))
    assert len(log) == 10 and any(move["changes"] for move in outcome.details["moves"])
    for stop in stops:

        def on_step(entry: dict, stop: int = stop) -> None:
            if entry["step"] == stop:
                raise Stopped

        with pytest.raises(Stopped):
            run(session(strategy, tmp_path / "cut", on_step=on_step, **settings))
    again, tensors_again, log_again = run(session(strategy, tmp_path / "cut", **settings))
    assert tensors_again == tensors and log_again == log
    assert untimed(again) == untimed(outcome) and again.plan == outcome.plan
    assert again.trained_parameters == outcome.trained_parameters


@pytest.mark.parametrize("where", ["resize", "_loss_of", "_cross"])
@pytest.mark.parametrize("strategy", OPTIONS)
def test_a_kill_within_a_move_loses_nothing(
    strategy: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    outcome, tensors, _ = run(session(strategy, tmp_path / "whole"))
    real, calls = getattr(segments, where), [0]

    def dies(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1 and where != "_cross":
            raise Stopped
        result = real(*arguments)
        if calls[0] == 1:
            raise Stopped  # the new state is written, training has not gone on
        return result

    monkeypatch.setattr(segments, where, dies)
    one = session(strategy, tmp_path / "cut")
    with pytest.raises(Stopped):
        run(one)
    assert not adapters.lora_layers(one.model)
    again, tensors_again, _ = run(session(strategy, tmp_path / "cut"))
    assert tensors_again == tensors and untimed(again) == untimed(outcome)


def test_sensitivity_gives_more_to_modules_whose_update_matters(tmp_path: Path):
    """At rank 1 a module's unit is all of it: of two that cost the same, the more important gets no less."""
    one = session("sensitivity", tmp_path / "run", budget="r=1", rows=8)
    outcome, _, _ = run(one)
    (move,) = outcome.details["moves"]
    costs, ranks = one.inventory.costs, outcome.plan.ranks
    for cost in set(costs.values()):
        alike = sorted((n for n in ranks if costs[n] == cost), key=lambda n: move["importance"][n])
        assert [ranks[n] for n in alike] == sorted(ranks[n] for n in alike)
    assert ranks[max(ranks, key=lambda n: move["importance"][n] / costs[n])] > 1


@pytest.mark.parametrize("rows", [1, 8, 12])
@pytest.mark.parametrize("strategy", OPTIONS)
def test_runs_of_one_two_and_three_steps(strategy: str, rows: int, tmp_path: Path):
    outcome, _, log = run(session(strategy, tmp_path / "run", rows=rows))
    assert len(log) == outcome.trained.steps == -(-rows // 4)
    assert outcome.plan.parameters <= outcome.plan.budget


@pytest.mark.parametrize("strategy", OPTIONS)
def test_a_single_module_has_nowhere_to_move(strategy: str, tmp_path: Path):
    name = inventory(MODELS["llama"]()).names[0]
    one = session(strategy, tmp_path / "run", targets=(name,))
    outcome, _, _ = run(one)
    assert outcome.plan.ranks == one.plan.ranks == {name: 2}
    assert outcome.trained_parameters == (3 if strategy == "shrink" else 1) * one.plan.parameters


def test_nothing_moves_before_b_has_left_zero(tmp_path: Path):
    outcome, _, _ = run(session("grow_prune", tmp_path / "run", rate=0.0))
    assert [move["step"] for move in outcome.details["moves"]] == [2, 4, 6, 8]
    assert not any(move["changes"] for move in outcome.details["moves"])


def test_every_boundary_but_those_too_late_is_used_once(tmp_path: Path):
    outcome, _, _ = run(session("grow_prune", tmp_path / "run", rows=36))
    assert [move["step"] for move in outcome.details["moves"]] == [2, 4, 6], (
        "the last leaves two steps at least"
    )


def test_shrink_cuts_what_an_independent_computation_cuts(tmp_path: Path):
    """The larger adapter is trained apart; numpy chooses and truncates; the loss is that of dense weights."""
    one = session("shrink", tmp_path / "run", scale="rslora")
    outcome, _, _ = run(one)
    (move,) = outcome.details["moves"]
    apart = session("uniform", tmp_path / "apart", budget="r=6", scale="rslora")
    rows = apart.steps[5]
    with adapted(apart, apart.plan) as model:
        train_adapters(model, apart.steps, apart.config, rate=1e-2, seed=4, folder=apart.folder, until=6)
        loss = evaluate(model, rows, micro_tokens=10_000).metrics["loss"]
    assert move["step"] == 6 and outcome.details["start"] == apart.plan.ranks
    assert move["loss"]["before"] == pytest.approx(loss, abs=1e-6)
    saved = checkpoint.read(apart.folder / "checkpoint.safetensors")
    updates = {name: update(apart.plan, saved, name) for name in apart.plan.ranks}
    energy = {name: np.linalg.svd(w, compute_uv=False)[:6] ** 2 for name, w in updates.items()}
    costs, left = one.inventory.costs, one.plan.budget
    ranks, closed = dict.fromkeys(updates, 0), set()
    for name, _, _ in sorted(
        ((n, k, e) for n, values in energy.items() for k, e in enumerate(values)),
        key=lambda t: -t[2] / costs[t[0]],
    ):
        if name not in closed and costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
        else:
            closed.add(name)
    assert ranks == outcome.plan.ranks and len(set(ranks.values())) > 1
    for name, rank in ranks.items():
        assert move["energy_kept"][name] == pytest.approx(
            energy[name][:rank].sum() / energy[name].sum(), rel=1e-5
        )
    for name, w in updates.items():
        cut = torch.from_numpy(best(w, ranks[name])).float()
        apart.model.get_submodule(name).weight.add_(cut)
    dense = evaluate(apart.model, rows, micro_tokens=10_000).metrics["loss"]
    assert move["loss"]["pruned"] == pytest.approx(dense, abs=1e-5)


def test_all_rank_may_move_at_once(tmp_path: Path):
    """Between pruning and growing there is then no adapter at all: the loss is the base model's."""
    pair = inventory(MODELS["llama"]()).names[:4:3]
    one = session("uniform", tmp_path / "run", targets=pair)
    a, b = one.plan.ranks
    start = replanned(one.plan, {a: 2, b: 0})
    with in_segments(one, start, [4], lambda plan, saved, memory: Decision({a: 0, b: 2})) as (model, outcome):
        assert adapters.read_back(model) == {b: (2, 2.0)}
    (move,) = outcome.details["moves"]
    bare = evaluate(one.model, one.steps[3], micro_tokens=10_000).metrics["loss"]
    assert move["loss"]["pruned"] == move["loss"]["grown"] == pytest.approx(bare, abs=1e-6)


def test_a_decision_over_the_budget_is_refused(tmp_path: Path):
    one = session("uniform", tmp_path / "run")
    greedy = Decision({name: rank + 1 for name, rank in one.plan.ranks.items()})
    with pytest.raises(AssertionError, match="budget"), in_segments(one, one.plan, [4], lambda *_: greedy):
        pass


def test_what_went_comes_back_with_the_share_it_had(tmp_path: Path):
    """Modules lose their last unit, and the checkpoint remembers what they were worth."""
    one = replace(session("grow_prune", tmp_path / "run", budget="r=1", rows=80), rate=3e-2)
    outcome, _, _ = run(one)
    moves = outcome.details["moves"]
    gone = {name for move in moves for name, (_, rank) in move["changes"].items() if rank == 0}
    assert gone
    memory = checkpoint.read(one.folder / "checkpoint.safetensors").about["memory"]
    assert set(memory) == {name for name, rank in outcome.plan.ranks.items() if rank == 0}
    assert all(0 <= share < 1 for share in memory.values())


def test_every_trained_strategy_has_a_method():
    assert set(OPTIONS) <= set(METHODS)
