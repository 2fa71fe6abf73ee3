"""A training state under other ranks: what a move does to values and moments, and what units are worth."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from rankwise import adapters
from rankwise.budget import solve_gains
from rankwise.checkpoint import Saved
from rankwise.inventory import inventory
from rankwise.methods.grow_prune import moved
from rankwise.methods.resize import factors, key, resize
from rankwise.methods.segments import importance
from rankwise.methods.sensitivity import gains
from rankwise.methods.session import replanned
from rankwise.methods.shrink import energies
from rankwise.plans import RankPlan
from tests.parts import MODELS, mixed_ranks, plan_of

SCALES = {
    "constant": {"rule": "constant", "value": 2},
    "alpha": {"rule": "alpha", "value": 16},
    "rslora": {"rule": "rslora", "value": 16},
}

# --- a state under other ranks --------------------------------------------------------------------


def custom(model: Any, ranks: dict[str, int], scale: str = "constant") -> RankPlan:
    return plan_of(model, "custom", match="none", options={"ranks": ranks}, scale=SCALES[scale])


def other_ranks(model: Any, change: int) -> dict[str, int]:
    full = inventory(model).max_ranks
    return {n: min(max(0, r + change), full[n]) for n, r in mixed_ranks(model).items()}


def gradients(module: Any) -> torch.Tensor:
    """The loss of these tests is linear in the update, with this gradient G by the frozen weight."""
    draw = torch.Generator().manual_seed(len(module.name) + 31 * module.layer)
    return torch.randn(module.out_features, module.in_features, generator=draw)


def by_autograd(plan: RankPlan, saved: Saved, name: str) -> dict[str, torch.Tensor]:
    module = next(m for m in plan.modules if m.name == name)
    found = factors(saved, name)
    a, b = (f["value"].clone().requires_grad_() for f in (found.a, found.b))
    (gradients(module) * (plan.scale.scaling(found.rank) * b @ a)).sum().backward()
    return {"A": a.grad, "B": b.grad}


def trained_state(plan: RankPlan, seed: int = 5) -> Saved:
    """A state as training leaves it: B no longer zero, first moments the true gradients, steps done."""
    draw = torch.Generator().manual_seed(seed)
    parameters: dict[str, dict[str, torch.Tensor]] = {}
    for m in plan.modules:
        r = plan.ranks[m.name]
        if r:
            for factor, shape in (("A", (r, m.in_features)), ("B", (m.out_features, r))):
                value = 0.3 * torch.randn(shape, generator=draw)
                square = torch.rand(shape, generator=draw)
                parameters[key(m.name, factor)] = {
                    "value": value, "exp_avg_sq": square, "step": torch.tensor([7.0]),
                }  # fmt: skip
    saved = Saved(7, 1.5, parameters)
    for m in plan.modules:
        if plan.ranks[m.name]:
            for factor, gradient in by_autograd(plan, saved, m.name).items():
                parameters[key(m.name, factor)]["exp_avg"] = gradient
    return saved


def update(plan: RankPlan, saved: Saved, name: str) -> np.ndarray:
    """s B A in float64; zero without an adapter."""
    module = next(m for m in plan.modules if m.name == name)
    found = factors(saved, name)
    if found is None:
        return np.zeros((module.out_features, module.in_features))
    a, b = (f["value"].double().numpy() for f in (found.a, found.b))
    return plan.scale.scaling(found.rank) * b @ a


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@torch.no_grad()
def logits(model: Any, plan: RankPlan, saved: Saved) -> torch.Tensor:
    on = adapters.attach(model, plan, seed=4)
    for name, parameter in adapters.adapter_tensors(on).items():
        parameter.copy_(saved.parameters[name]["value"])
    try:
        return on(input_ids=torch.arange(40).reshape(2, 20)).logits
    finally:
        adapters.detach(on)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", MODELS)
def test_growing_leaves_the_function_as_it_was(family: str, scale: str):
    model = MODELS[family]().eval()
    before, after = custom(model, mixed_ranks(model), scale), custom(model, other_ranks(model, 3), scale)
    saved = trained_state(before)
    held = copy.deepcopy(saved.parameters)
    grown = resize(saved, before, after, seed=4)
    was = logits(model, before, saved)
    assert (was - model(input_ids=torch.arange(40).reshape(2, 20)).logits).abs().max() > 0.1, (
        "it must say something"
    )
    assert (logits(model, after, grown) - was).abs().max() < 1e-5
    assert all(torch.equal(held[n][k], t) for n, state in saved.parameters.items() for k, t in state.items())
    for name, rank in mixed_ranks(model).items():
        if rank:  # the old units learn on as before: their first moments are the gradients where they are now
            wanted = by_autograd(after, grown, name)
            found = factors(grown, name)
            torch.testing.assert_close(
                found.b["exp_avg"][:, :rank], wanted["B"][:, :rank], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(found.a["exp_avg"], wanted["A"], rtol=1e-4, atol=1e-5)


def test_new_units_start_as_an_adapter_of_that_rank_would():
    model = MODELS["llama"]()
    before, after = custom(model, mixed_ranks(model)), custom(model, other_ranks(model, 3))
    directions = {
        n: np.random.default_rng(1).normal(size=(4, inventory(model)[n].in_features)) for n in before.ranks
    }
    grown = resize(trained_state(before), before, after, seed=9, directions=directions)
    on = adapters.attach(model, after, seed=9, directions=directions)
    for name, layer in adapters.lora_layers(on).items():
        rank, found = before.ranks[name], factors(grown, name)
        assert torch.equal(found.a["value"][rank:], layer.lora_A["default"].weight[rank:])
        assert not found.b["value"][:, rank:].any() and not found.b["exp_avg"][:, rank:].any()
        if rank:
            assert found.b["step"].item() == 7
            mean = found.b["exp_avg_sq"][:, :rank].mean(1)
            assert torch.allclose(found.b["exp_avg_sq"][:, -1], mean)
        else:
            assert found.b["step"].item() == 0 and not found.a["exp_avg_sq"].any()
    adapters.detach(on)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", MODELS)
def test_pruning_is_the_best_approximation_and_carries_gradients(family: str, scale: str):
    model = MODELS[family]()
    before, after = custom(model, mixed_ranks(model), scale), custom(model, other_ranks(model, -2), scale)
    saved = trained_state(before)
    pruned = resize(saved, before, after, seed=4)
    assert set(pruned.parameters) == {key(n, f) for n, r in after.ranks.items() if r for f in "AB"}
    for name, rank in after.ranks.items():
        np.testing.assert_allclose(
            update(after, pruned, name), best(update(before, saved, name), rank), rtol=0, atol=2e-6
        )
        if rank:
            found, was = factors(pruned, name), factors(saved, name)
            lengths = found.a["value"].norm(dim=1)
            wanted = was.a["value"].square().sum(1).mean().sqrt()
            torch.testing.assert_close(lengths, wanted.expand(rank), rtol=1e-5, atol=0)
            assert found.a["step"].item() == 7
            for factor, gradient in by_autograd(after, pruned, name).items():
                state = found.a if factor == "A" else found.b
                torch.testing.assert_close(state["exp_avg"], gradient, rtol=1e-3, atol=1e-4)
                assert (state["exp_avg_sq"] >= 0).all()


def test_pruning_where_nothing_has_to_turn_only_stretches():
    """A has orthogonal rows, B orthogonal columns: the units are the directions, and A's get one length p.

    A row that was a long becomes p long, so its gradient is a/p times what it was, and its square (a/p)^2.
    """
    model = MODELS["llama"]()
    name = inventory(model).names[0]
    before, after = custom(model, {name: 5}), custom(model, {name: 3})
    saved = trained_state(before)
    a, b = (saved.parameters[key(name, factor)] for factor in "AB")
    lengths = torch.tensor([0.3, 0.6, 0.5, 0.4, 0.9])
    a["value"] = lengths[:, None] * torch.linalg.qr(a["value"].t())[0].t()
    b["value"] = torch.linalg.qr(b["value"])[0] * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]) / lengths
    found = factors(resize(saved, before, after, seed=0), name)
    signs = torch.sign((found.a["value"] * a["value"][:3]).sum(1))
    longer = lengths.square().mean().sqrt() / lengths[:3]  # p/a
    wanted_a = {"value": longer * signs, "exp_avg": signs / longer, "exp_avg_sq": longer**-2}
    wanted_b = {"value": signs / longer, "exp_avg": longer * signs, "exp_avg_sq": longer**2}
    for what, factor in wanted_a.items():
        torch.testing.assert_close(found.a[what], factor[:, None] * a[what][:3], rtol=1e-4, atol=1e-5)
    for what, factor in wanted_b.items():
        torch.testing.assert_close(found.b[what], factor * b[what][:, :3], rtol=1e-4, atol=1e-5)


def test_pruning_before_anything_was_learned_keeps_the_first_rows():
    model = MODELS["llama"]()
    name = inventory(model).names[0]
    before, after = custom(model, {name: 5}), custom(model, {name: 2})
    saved = trained_state(before)
    saved.parameters[key(name, "B")]["value"].zero_()
    found = factors(resize(saved, before, after, seed=0), name)
    assert torch.equal(found.a["value"], saved.parameters[key(name, "A")]["value"][:2])
    assert not found.b["value"].any()
    assert torch.equal(found.b["exp_avg"], saved.parameters[key(name, "B")]["exp_avg"][:, :2])


# --- what a module is worth -----------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_importance_is_the_loss_change_of_removing_the_update(scale: str):
    """For a loss that is linear in the updates, first order is exact."""
    model = MODELS["llama"]()
    plan = custom(model, mixed_ranks(model), scale)
    saved = trained_state(plan)
    for state in saved.parameters.values():
        state["exp_avg"] = state["exp_avg"] * (1 - 0.9**7)  # as AdamW holds a gradient that was always this
    found = importance(saved, plan.modules, beta=0.9)
    assert set(found) == {name for name, rank in plan.ranks.items() if rank}
    for module in plan.modules:
        if module.name in found:
            removed = (gradients(module).double().numpy() * update(plan, saved, module.name)).sum()
            assert found[module.name] == pytest.approx(abs(removed), rel=1e-4)


def test_sensitivity_spreads_a_module_over_its_units_by_energy():
    model = MODELS["llama"]()
    names = inventory(model).names
    plan = plan_of(model, "sensitivity", budget="r=2")
    saved = trained_state(plan)
    values = {name: 1.0 for name in names} | {names[3]: 50.0, names[8]: 0.01}
    for name in (names[3], names[8], names[0]):  # two equal units, so that the energies say nothing
        saved.parameters[key(name, "A")]["value"] = torch.eye(2, 32)
        saved.parameters[key(name, "B")]["value"] = torch.eye(inventory(model)[name].out_features, 2)
    units = gains(plan, saved, values)
    assert all(len(units[m.name]) == m.max_rank and (np.diff(units[m.name]) <= 0).all() for m in plan.modules)
    assert units[names[3]][:4] == pytest.approx([25, 25, 50 / 3, 12.5])
    a, b = (saved.parameters[key(names[1], f)]["value"].double().numpy() for f in "AB")
    energy = np.linalg.svd(b @ a, compute_uv=False)[:2] ** 2
    assert units[names[1]][:2] == pytest.approx(energy / energy.sum(), rel=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_shrink_weighs_the_singular_values_of_the_scaled_update(scale: str):
    model = MODELS["llama"]()
    plan = custom(model, mixed_ranks(model), scale)
    saved = trained_state(plan)
    for name, values in energies(plan, saved).items():
        wanted = np.linalg.svd(update(plan, saved, name), compute_uv=False)[: plan.ranks[name]] ** 2
        np.testing.assert_allclose(values, wanted, rtol=1e-8)


def test_a_move_keeps_to_budget_and_share():
    model = MODELS["llama"]()
    draw = np.random.default_rng(0)
    costs, moves = inventory(model).costs, 0
    for trial in range(60):
        plan = plan_of(model, "random", budget=f"r={draw.integers(1, 6)}", seed=trial)
        plan = replanned(plan, {n: draw.integers(0, r + 1) if r else 0 for n, r in plan.ranks.items()})
        values = {name: float(draw.exponential()) ** 3 for name in plan.ranks}
        share = float(draw.uniform(0.02, 1))
        ranks = moved(plan, values, share)
        pruned = sum(costs[n] * max(0, r - ranks[n]) for n, r in plan.ranks.items())
        spent = sum(costs[n] * r for n, r in ranks.items())
        assert spent <= plan.budget and pruned <= share * plan.budget
        lost = [values[n] / k / costs[n] for n, r in plan.ranks.items() for k in range(ranks[n] + 1, r + 1)]
        won = [values[n] / k / costs[n] for n, r in plan.ranks.items() for k in range(r + 1, ranks[n] + 1)]
        assert not lost or np.mean(lost) < np.mean(won)
        moves += bool(lost)
        units = {m.name: values[m.name] / np.arange(1, m.max_rank + 1) for m in plan.modules}
        best_ranks = solve_gains(units, costs, plan.budget, inventory(model).max_ranks)
        full = moved(plan, values, 1.0)
        assert full == best_ranks, "with the whole budget to move, it gets where the solver would"
        assert moved(replanned(plan, full), values, 1.0) == full, "what it moved to, it leaves alone"
    assert moves > 30


def test_a_module_without_adapter_comes_back_when_it_is_worth_it():
    model = MODELS["llama"]()
    names = inventory(model).names
    plan = plan_of(model, "uniform", budget="r=2")
    plan = replanned(plan, plan.ranks | {names[4]: 0})
    assert moved(plan, dict.fromkeys(names, 1e-9) | {names[4]: 1.0}, 0.5)[names[4]] > 0
