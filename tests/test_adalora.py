"""AdaLoRA through our loop is PEFT's AdaLoRA, and what it hands on is the same function as plain LoRA."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model

from rankwise import adapters, checkpoint
from rankwise.engine.lora import same_input_groups
from rankwise.engine.paths import Packed, Plain
from rankwise.engine.plain import pad
from rankwise.errors import RankwiseError
from rankwise.inventory import inventory
from rankwise.methods.session import Outcome, Session
from rankwise.train import CHECKPOINT, rate_factor
from tests.parts import hand_rows, plan_of, train_config
from tests.zoo import gpt2, llama

method: Any = importlib.import_module("rankwise.methods.adalora")  # the package has the function by this name
STEPS = 30
RATE = 1e-2


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def session_of(
    model: Any, folder: Path, *, steps: int = STEPS, budget: str | int = "r=2", **changes: Any
) -> Session:
    """A session of `steps` steps of four rows each, one micro-batch a step."""
    folder.mkdir(exist_ok=True)
    rows = hand_rows(4 * steps)
    plan = plan_of(model, "adalora", budget=budget, **changes.pop("plan", {}))
    session = Session(
        model=model, inventory=inventory(model), plan=plan, engine=Plain(),
        steps=[rows[i : i + 4] for i in range(0, len(rows), 4)], config=train_config(),
        rate=RATE, seed=3, folder=folder,
    )  # fmt: skip
    return replace(session, **changes)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def state_of(model: Any) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


# --- the same as PEFT's -------------------------------------------------------------------------


def by_hand(
    session: Session, config: AdaLoraConfig, start: dict[str, torch.Tensor]
) -> tuple[Any, list, list]:
    """PEFT's AdaLoRA in a loop as its documentation has it: the model's own loss, AdamW, allocate.

    Returns the model, and of every step the model's loss (orthogonality included) and that term alone.
    """
    model: Any = get_peft_model(llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = session.config
    optimizer = torch.optim.AdamW(trained, betas=settings.betas, weight_decay=settings.weight_decay)
    whole, terms = [], []
    model.train()
    for i, rows in enumerate(session.steps):
        ids, mask, labels = (torch.from_numpy(array) for array in pad(rows))
        for group in optimizer.param_groups:
            group["lr"] = session.rate * rate_factor(settings, i, len(session.steps))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        with torch.no_grad():
            terms.append(float(loss - model.get_base_model()(ids, attention_mask=mask, labels=labels).loss))
        whole.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        model.base_model.update_and_allocate(i + 1)
        optimizer.zero_grad()
    return model, whole, terms


def test_thirty_steps_are_those_of_pefts_own_adalora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    session = session_of(llama(), tmp_path)
    timing = method.schedule(session.plan, STEPS)
    tuned = method.attach(session, timing)
    start = {name: p.detach().clone() for name, p in adapters.adapter_tensors(tuned).items()}
    adapters.detach(tuned)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=list(session.plan.ranks), init_r=3, target_r=2,
        tinit=3, tfinal=9, deltaT=1, total_step=STEPS, lora_alpha=2.0 * 3.00001,
    )  # fmt: skip
    hand, whole, terms = by_hand(session, config, start)

    added: list[float] = []
    term = method.orthogonality

    def heard(model: Any) -> torch.Tensor:
        value = term(model)
        added.append(float(value.detach()))
        return value

    monkeypatch.setattr(method, "orthogonality", heard)
    with method.adalora(session) as (model, outcome):
        ours = losses(tmp_path)
        assert ours == pytest.approx([w - t for w, t in zip(whole, terms, strict=True)], abs=1e-5)
        assert [a + b for a, b in zip(ours, added, strict=True)] == pytest.approx(whole, abs=1e-5)
        assert ours[-1] < ours[0] - 0.05, "nothing was learned"
        pattern = checkpoint.read(tmp_path / CHECKPOINT).about["rank_pattern"]
        assert pattern == hand.peft_config["default"].rank_pattern
        assert len(set(outcome.plan.ranks.values())) > 1, "the ranks are those of the start"
        assert logits(model) == pytest.approx(logits(hand), abs=1e-5)
        assert outcome.plan.ranks == {n: sum(pattern[f"{n}.lora_E.default"]) for n in outcome.plan.ranks}


# --- what is handed on --------------------------------------------------------------------------


@pytest.mark.parametrize("family", [llama, gpt2])
@pytest.mark.parametrize("rule", [{"rule": "constant", "value": 2.0}, {"rule": "alpha", "value": 7.0}])
def test_the_result_is_a_plain_adapter_and_the_base_is_as_before(
    family: Callable[[], Any], rule: dict, tmp_path: Path
):
    base = family()
    before = state_of(base)
    session = session_of(base, tmp_path / "run", steps=10, plan={"scale": rule})
    with method.adalora(session) as (model, outcome):
        adapters.verify(model, outcome.plan)
        adapters.save(model, tmp_path / "adapter")
        wanted = logits(model)
        assert (wanted - logits(family())).abs().max() > 1e-2, "the adapter does nothing"
        conversion = outcome.details["conversion"]
        assert conversion["loss_after"] == pytest.approx(conversion["loss_before"], abs=1e-5)
    assert state_of(base) == before and not hasattr(base, "peft_config")
    assert not any(p.requires_grad for p in base.parameters())
    loaded = PeftModel.from_pretrained(family(), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), wanted)


def test_counts_parameters_and_ranks(tmp_path: Path):
    base = llama()
    session = session_of(base, tmp_path, steps=10)
    modules = {m.name: m for m in inventory(base)}
    with method.adalora(session) as (model, outcome):
        ranks = outcome.plan.ranks
        counted = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert outcome.trained_parameters == sum(3 * (m.cost + 1) for m in modules.values())
    assert outcome.plan.parameters == sum(modules[n].cost * r for n, r in ranks.items()) == counted
    assert outcome.plan.parameters < outcome.trained_parameters
    assert sum(ranks.values()) == 2 * len(ranks)  # PEFT's budget is of ranks
    over = outcome.plan.parameters > session.plan.budget
    assert (outcome.plan.match, outcome.plan.budget) == (
        ("none", None) if over else ("budget", session.plan.budget)
    )
    assert outcome.details["ranks"]["highest"] == max(ranks.values()) > min(ranks.values())


def test_a_plan_of_mixed_ranks_keeps_its_number_of_ranks(tmp_path: Path):
    base = llama()
    half = sum(m.cost for m in inventory(base)) // 2
    session = session_of(base, tmp_path, steps=8, budget=half)
    count = sum(session.plan.ranks.values())
    assert 0 < count < len(session.plan.ranks)
    with method.adalora(session) as (_, outcome):
        assert sum(outcome.plan.ranks.values()) == count


def test_a_module_never_ends_above_full_rank(tmp_path: Path):
    base = llama()  # k and v have 16 outputs
    session = session_of(base, tmp_path, steps=6, budget="r=14")
    full = {m.name: m.max_rank for m in inventory(base)}
    with method.adalora(session) as (_, outcome):  # proves its own conversion
        assert outcome.details["schedule"]["init_r"] == 21
        assert any(outcome.plan.ranks[n] == full[n] == 16 for n in full)


def test_without_a_triplet_left_the_cheapest_module_keeps_a_rank():
    plan = plan_of(llama(), "adalora", budget="r=2")
    nothing = {f"{name}.lora_E.default": [False] * 3 for name in plan.ranks}
    ranks = method.final_ranks(plan, nothing)
    cheapest = min(module.cost for module in plan.modules)
    assert [m.cost for m in plan.modules if ranks[m.name]] == [cheapest] and sum(ranks.values()) == 1


# --- scale, start, paths ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "scale"),
    [({"rule": "constant", "value": 2.0}, 2.0), ({"rule": "alpha", "value": 16}, 16 / 12),
     ({"rule": "rslora", "value": 16}, 16 / 12**0.5)],
)  # fmt: skip
@pytest.mark.parametrize("family", [llama, gpt2])
def test_the_update_at_the_initial_rank_is_scaled_by_the_plans_rule(
    family: Callable[[], Any], rule: dict, scale: float, tmp_path: Path
):
    session = session_of(family(), tmp_path, budget="r=8", plan={"scale": rule})
    tuned = method.attach(session, method.schedule(session.plan, STEPS))
    layer = list(adapters.lora_layers(tuned).values())[1]
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        layer.lora_E["default"].normal_()
        moved = layer(x) - layer.get_base_layer()(x)
        a, b, e = (f["default"] for f in (layer.lora_A, layer.lora_B, layer.lora_E))
        assert a.shape[0] == 12
        assert moved == pytest.approx(scale * x @ a.T @ torch.diag(e[:, 0]) @ b.T, abs=1e-5)
    assert moved.abs().max() > 1e-2


def test_the_start_depends_on_seed_and_module_alone(tmp_path: Path):
    def start(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        session = session_of(llama(), tmp_path, seed=seed)
        tuned = method.attach(session, method.schedule(session.plan, STEPS))
        return {name: p.detach() for name, p in adapters.adapter_tensors(tuned).items()}

    first, again, other = start(3, 0), start(3, 1), start(4, 0)
    drawn = [name for name in first if "lora_E" not in name]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert all(not first[name].any() for name in first.keys() - set(drawn))
    for kind in ("lora_A", "lora_B"):
        values = torch.cat([first[name].flatten() for name in drawn if kind in name])
        assert float(values.std()) == pytest.approx(0.02, rel=0.05) and abs(float(values.mean())) < 1e-3


def test_the_packed_path_trains_the_same(tmp_path: Path):
    found = {}
    for name in ("plain", "packed"):
        base = llama()
        engine = Plain() if name == "plain" else Packed(same_input_groups(base))
        session = session_of(base, tmp_path / name, steps=10, engine=engine)
        with method.adalora(session) as (_, outcome):
            found[name] = losses(tmp_path / name), outcome.plan.ranks
            unfused = outcome.details["unfused_in_training"]
            assert unfused == (0 if name == "plain" else len(session.plan.ranks))
    assert found["packed"][0] == pytest.approx(found["plain"][0], abs=1e-4)
    assert found["packed"][1] == found["plain"][1]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path):
    found = []
    for on in (False, True):
        config = train_config(gradient_checkpointing=on)
        session = session_of(llama(), tmp_path / str(on), steps=5, config=config)
        with method.adalora(session) as (_, outcome):
            found.append((losses(tmp_path / str(on)), outcome.plan.ranks))
    assert found[0] == found[1]


def test_half_precision_trains_no_divisor(tmp_path: Path):
    session = session_of(llama().to(torch.bfloat16), tmp_path, steps=4)
    with method.adalora(session) as (model, outcome):
        assert outcome.trained_parameters == sum(3 * (m.cost + 1) for m in session.plan.modules)
        assert all(p.dtype == torch.float32 for p in adapters.adapter_tensors(model).values())
        conversion = outcome.details["conversion"]
        assert conversion["loss_after"] == pytest.approx(conversion["loss_before"], abs=2e-2)


# --- killed and resumed -------------------------------------------------------------------------


class Killed(Exception):
    pass


def run(
    folder: Path, kill: int | None = None, **changes: Any
) -> tuple[dict[str, bytes], Outcome, list[float]]:
    """Train, or stop after step `kill` with the checkpoint of the step before it."""

    def on_step(entry: dict[str, Any]) -> None:
        if entry["step"] == kill:
            raise Killed

    session = session_of(llama(), folder, steps=12, on_step=on_step, checkpoint_seconds=0.0, **changes)
    session = replace(session, config=train_config(dropout=0.1))
    with method.adalora(session) as (model, outcome):
        tensors = {n: p.detach().numpy().tobytes() for n, p in adapters.adapter_tensors(model).items()}
        return tensors, outcome, losses(folder)


def same(a: tuple[Any, Outcome, Any], b: tuple[Any, Outcome, Any]) -> None:
    assert a[0] == b[0]
    assert a[1].plan == b[1].plan and a[1].details == b[1].details
    assert a[2] == b[2]


@pytest.mark.parametrize("every", [1, 3])
def test_a_killed_run_goes_on_bit_for_bit(every: int, tmp_path: Path):
    changes: dict[str, Any] = {"plan": {"options": {"every": every}}}
    whole = run(tmp_path / "whole", **changes)
    timing = whole[1].details["schedule"]
    assert (timing["tinit"], timing["total_step"] - timing["tfinal"]) == (1, 8)
    # before the first masking, amid the maskings, at and behind the last one, and in the last step
    for done in (1, 2, 5, 7, 8, 9, 11):
        folder = tmp_path / f"killed-{done}"
        with pytest.raises(Killed):
            run(folder, kill=done, **changes)
        assert checkpoint.read(folder / CHECKPOINT).step == done
        same(run(folder, **changes), whole)


def test_a_run_killed_after_training_is_converted_alike(tmp_path: Path):
    whole = run(tmp_path / "run")
    same(run(tmp_path / "run"), whole)


def test_a_run_killed_twice_goes_on(tmp_path: Path):
    whole = run(tmp_path / "whole")
    for kill in (4, 7, 10):
        with pytest.raises(Killed):
            run(tmp_path / "run", kill=kill)
    same(run(tmp_path / "run"), whole)


# --- schedules and refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 4, 5, 7])
def test_few_steps_still_reach_the_target(steps: int, tmp_path: Path):
    session = session_of(llama(), tmp_path, steps=steps)
    with method.adalora(session) as (_, outcome):
        assert sum(outcome.plan.ranks.values()) == 2 * len(outcome.plan.ranks)
        assert outcome.details["masked"][-1][0] <= steps - 1  # what is left is trained on


def test_too_few_steps_are_refused_before_anything_is_attached(tmp_path: Path):
    base = llama()
    with pytest.raises(RankwiseError, match=r"needs 3 optimizer steps or more.*this run has 2"):
        method.adalora(session_of(base, tmp_path, steps=2)).__enter__()
    assert not adapters.lora_layers(base)


def test_a_start_along_directions_is_refused(tmp_path: Path):
    base = llama()
    name = inventory(base).names[0]
    session = session_of(base, tmp_path, directions={name: torch.zeros(1, 32).numpy()})
    with pytest.raises(RankwiseError, match="init does not apply to adalora"):
        method.adalora(session).__enter__()


def test_a_failure_in_training_leaves_the_base_bare(tmp_path: Path):
    base = llama()
    before = state_of(base)

    def on_step(entry: dict[str, Any]) -> None:
        raise Killed

    with pytest.raises(Killed):
        method.adalora(session_of(base, tmp_path, on_step=on_step)).__enter__()
    assert state_of(base) == before


@pytest.mark.parametrize(
    ("factor", "rank", "init"), [(1.5, 1, 2), (1.5, 8, 12), (1.5, 3, 5), (1.01, 4, 5), (2.0, 16, 32)]
)
def test_the_initial_rank_is_the_factor_times_the_target(factor: float, rank: int, init: int):
    plan = plan_of(llama(), "adalora", budget=f"r={rank}", options={"factor": factor})
    assert method.schedule(plan, 100).init_r == init


def test_every_schedule_is_one_that_peft_takes():
    plan = plan_of(llama(), "adalora", budget="r=1")
    timings = [method.schedule(plan, steps) for steps in range(3, 400)]
    for t in timings:
        assert t.tinit < t.total_step - t.tfinal and t.total_step - t.tfinal >= 2 and t.tfinal >= 1
    assert (timings[-3].tinit, timings[-3].tfinal) == (40, 119)
