"""Packed training is plain training: losses, gradients, accumulation, interruption, on five families."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise import adapters
from rankwise.engine import lora, loss, packing, proof
from rankwise.engine.batches import label_count, optimizer_steps
from rankwise.engine.paths import Packed, Plain, hidden_states
from rankwise.evaluate import evaluate
from rankwise.train import train_adapters
from tests.parts import hand_rows, mixed_ranks, plan_of, train_config
from tests.zoo import FAMILIES, PACKABLE, UNPACKABLE, gemma, gemma3, llama, mistral


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def adapted_of(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model of the family with mixed ranks, 0 among them, and B away from zero."""
    model = PACKABLE[family]().to(dtype)
    plan = plan_of(model, "custom", match="none", options={"ranks": mixed_ranks(model)})
    assert 0 in plan.ranks.values() and len(set(plan.ranks.values())) > 3
    adapted = adapters.attach(model, plan, seed=0, **options)
    draw = torch.Generator().manual_seed(1)
    for layer in adapters.lora_layers(adapted).values():
        weight = layer.lora_B["default"].weight
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.1)
    return adapted.train()


def rows_of(count: int = 8, beginning: int = 10, seed: int = 0) -> list:
    """Rows of 21 to 70 tokens that begin alike, some with labels in the beginning, one much like another."""
    rows = hand_rows(count, seed=seed, shortest=21, longest=70)
    head = rows[0].input_ids[:beginning]
    made = []
    for i, row in enumerate(rows):
        ids, labels = np.r_[head, row.input_ids[beginning:]].astype(np.int32), row.labels.copy()
        labels[beginning:][labels[beginning:] != -100] = ids[beginning:][labels[beginning:] != -100]
        labels[:beginning] = -100
        if i % 3 == 0:
            labels[5 : beginning + 1] = ids[5 : beginning + 1]
        made.append(dataclasses.replace(row, input_ids=ids, labels=labels))
    return [*made, dataclasses.replace(made[1], row_hash="f" * 64)]


def gradients(path: Any, model: Any, batches: list[list]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Every row's loss, and the gradient of the step's mean over label tokens."""
    model.zero_grad(set_to_none=True)
    labels, losses = sum(label_count(batch) for batch in batches), {}
    with path.installed(model):
        for batch in batches:
            scores = path.score(model, batch)
            (scores.nll.sum() / labels).backward()
            losses |= dict(zip((row.row_hash for row in batch), scores.nll.tolist(), strict=True))
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return [losses[key] for key in sorted(losses)], found


def agree(found: Any, wanted: Any, near: float = 1e-5) -> None:
    """Losses and every gradient within `near` of their size, and no drift in the mean."""
    losses, slopes = found
    assert losses == pytest.approx(wanted[0], rel=near)
    relative = (np.array(losses) - wanted[0]) / np.array(wanted[0])
    assert abs(relative.mean()) < near / 10, "the losses drift to one side"
    assert slopes.keys() == wanted[1].keys()
    for name, slope in wanted[1].items():
        assert slope.abs().max() > 0, f"{name} has no gradient, so the comparison shows nothing"
        assert (slopes[name] - slope).norm() < near * slope.norm(), name
    drift = torch.stack([((slopes[n] - s).mean() / s.abs().mean()) for n, s in wanted[1].items()]).mean()
    assert abs(drift) < near


def proven(model: Any) -> Packed:
    path = proof.choose(model)
    assert isinstance(path, Packed) and path.name == "packed" and path.notice is None
    return path


# --- which path -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PACKABLE)
def test_a_model_that_can_be_packed_is(family):
    path = proven(PACKABLE[family]())
    adapted = adapted_of(family)
    before = {name: set(vars(module)) for name, module in adapted.named_modules()}
    with path.installed(adapted):
        assert path.unfused == [], "every adapter of a plain plan runs fused"
        assert adapted.config._attn_implementation == "rankwise_packed"
        fused = [n for n, layer in adapters.lora_layers(adapted).items() if "forward" in vars(layer)]
        assert sorted(fused) == sorted(adapters.lora_layers(adapted))
    assert adapted.config._attn_implementation != "rankwise_packed"
    assert {name: set(vars(module)) for name, module in adapted.named_modules()} == before


@pytest.mark.parametrize("family", UNPACKABLE)
def test_a_model_that_fails_the_proof_is_trained_plainly_with_one_notice(family, tmp_path: Path):
    model = UNPACKABLE[family]()
    path = proof.choose(model)
    assert isinstance(path, Plain) and path.notice is not None
    assert path.notice.startswith(family) and "padded rows" in path.notice
    adapted = adapters.attach(model, plan_of(model, budget="r=2"), seed=0)
    config, entries = train_config(epochs=3, micro_tokens=120), []
    steps = optimizer_steps(rows_of(), config, 0)
    with path.installed(adapted):
        train_adapters(
            adapted, steps, config, rate=3e-2, seed=0, folder=tmp_path, engine=path, on_step=entries.append
        )
        found = evaluate(adapted, rows_of(), micro_tokens=200, engine=path)
    with torch.no_grad():
        alone = [float(Plain().score(adapted.eval(), [row]).nll) for row in rows_of()]
    assert found.examples["nll"] == pytest.approx(alone, rel=1e-5), "a row sees its neighbours"
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.1


@pytest.mark.parametrize("make", [gemma, gemma3, mistral])
@pytest.mark.parametrize("window", [16, 700])
def test_windows_are_proven_also_where_they_are_long(make, window):
    model = make(window)
    assert proof.failure(model) is None
    assert model.config.sliding_window == window


SABOTAGE = {
    "no window": ("mask", lambda own: lambda self, span, window: own(self, span, None)),
    "beginning lost": ("seen_by_all", lambda own: lambda self, t, dim: own(self, t, dim).roll(1, dim)),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_proof_can_fail(what, monkeypatch: pytest.MonkeyPatch):
    name, change = SABOTAGE[what]
    model = gemma()
    assert proof.failure(model) is None
    monkeypatch.setattr(packing.Pack, name, change(getattr(packing.Pack, name)))
    assert "differ" in str(proof.failure(model))


def test_the_proof_sees_rows_that_see_each_other(monkeypatch: pytest.MonkeyPatch):
    own = packing.pack

    def leaking(rows: Any, device: Any = "cpu") -> packing.Pack:
        """One causal block over all rows; their tokens and positions are right."""
        whole = own(rows, device, share=False)
        return dataclasses.replace(whole, spans=(packing.Span(0, whole.tokens, 0),))

    model = llama()
    rows = proof._rows(model, 16)
    with torch.no_grad():
        alone = proof._separate(model, rows)
        with Packed().installed(model):
            leaked = loss.head_of(model).logits(hidden_states(model, leaking(rows)))
    far = proof._far(leaked, alone)
    assert 0.1 < far < 10


def test_the_proof_sees_adapters_that_learn_otherwise(monkeypatch: pytest.MonkeyPatch):
    assert isinstance(proof.choose(llama()), Packed)
    own = lora._map
    monkeypatch.setattr(lora, "_map", lambda layer: dataclasses.replace(own(layer), scale=1.5))
    path = proof.choose(llama())
    assert isinstance(path, Plain) and "differ" in str(path.notice)


def test_the_proof_sees_a_head_that_is_not_understood(monkeypatch: pytest.MonkeyPatch):
    model = gemma()
    monkeypatch.setattr(loss, "head_of", lambda m: loss.Head(m.get_output_embeddings().weight))  # uncapped
    assert "differ" in str(proof.failure(model))


def test_unknown_arguments_to_attention_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = llama()
    own = type(model.model.layers[0].self_attn).forward
    monkeypatch.setattr(
        type(model.model.layers[0].self_attn),
        "forward",
        lambda self, *args, **kwargs: own(self, *args, **kwargs, s_aux=torch.ones(4)),
    )
    assert "Unsupported" in str(proof.failure(model))


# --- what is learned ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_is_padded(family):
    adapted, rows = adapted_of(family), rows_of()
    path = proven(PACKABLE[family]())
    wanted = gradients(Plain(), adapted, [rows])
    agree(gradients(path, adapted, [rows]), wanted)
    assert packing.pack(rows).tokens == sum(len(row.input_ids) - 10 for row in rows) + 10, "padding"


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_does_not_change_a_step(family):
    adapted, rows = adapted_of(family), rows_of(7)
    path = proven(FAMILIES[family]())
    whole = gradients(path, adapted, [rows])
    assert len(rows) == 8
    agree(gradients(path, adapted, [[row] for row in rows]), whole)
    agree(gradients(path, adapted, [rows[:2], rows[2:4], rows[4:6], rows[6:]]), whole)
    budgeted = path.batches(rows, 150)
    assert 1 < len(budgeted) < 8 and all(sum(len(r.input_ids) for r in b) <= 150 for b in budgeted)
    agree(gradients(path, adapted, budgeted), whole)


@pytest.mark.parametrize("family", PACKABLE)
def test_fused_lora_is_pefts(family):
    adapted, rows = adapted_of(family), rows_of(5)
    fused, left = proven(PACKABLE[family]()), Packed(groups=[])
    wanted = gradients(left, adapted, [rows])
    assert sorted(left.unfused) == sorted(adapters.lora_layers(adapted))
    agree(gradients(fused, adapted, [rows]), wanted)
    assert not fused.unfused


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_changes_nothing(family, monkeypatch: pytest.MonkeyPatch):
    adapted, rows = adapted_of(family), rows_of(6)
    path = proven(FAMILIES[family]())
    shared = gradients(path, adapted, [rows])
    assert packing.pack(rows).shared == 10
    monkeypatch.setattr(packing, "SHORTEST_SHARED", 10**6)
    assert packing.pack(rows).shared == 0
    agree(shared, gradients(path, adapted, [rows]))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(family, tmp_path: Path):
    config, rows = train_config(epochs=2, micro_tokens=130), rows_of(11)
    steps = optimizer_steps(rows, config, 0)
    path = proven(FAMILIES[family]())

    def train(folder: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        adapted = adapted_of(family)

        def hear(entry: dict[str, Any]) -> None:
            if entry["step"] == stop_at:
                raise KeyboardInterrupt

        with path.installed(adapted):
            train_adapters(
                adapted, steps, config, rate=1e-2, seed=0, folder=folder, engine=path,
                checkpoint_seconds=0, on_step=hear,
            )  # fmt: skip
        return {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=3)
    resumed = train(tmp_path / "cut")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    logs = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("whole", "cut")]
    assert logs == [len(steps)] * 2 and len(steps) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_an_epoch_teaches_the_same_on_both_paths(family, tmp_path: Path):
    config, losses = train_config(epochs=2, micro_tokens=200), {}
    rows, test = rows_of(24), rows_of(12, seed=9)
    for path in (Plain(), proven(FAMILIES[family]())):
        adapted = adapted_of(family)
        folder = tmp_path / path.name
        folder.mkdir()
        with path.installed(adapted):
            before = evaluate(adapted, test, micro_tokens=400, engine=path).metrics["loss"]
            steps = optimizer_steps(rows, config, 0)
            train_adapters(adapted, steps, config, rate=2e-2, seed=0, folder=folder, engine=path)
            losses[path.name] = evaluate(adapted, test, micro_tokens=400, engine=path).metrics["loss"]
        assert abs(losses[path.name] - before) > 1e-3
    assert losses["packed"] == pytest.approx(losses["plain"], abs=1e-4)


def test_dropout_is_left_to_peft_and_never_shared():
    adapted, rows = adapted_of("llama", dropout=0.3), rows_of(4)
    path = proven(llama())
    with path.installed(adapted):
        assert sorted(path.unfused) == sorted(adapters.lora_layers(adapted))
        torch.manual_seed(0)
        first = path.score(adapted, [rows[1], rows[-1]]).nll
        assert not torch.isclose(*first), "two equal rows drew the same dropout"
        adapted.eval()
        assert torch.isclose(*path.score(adapted, [rows[1], rows[-1]]).nll)


def test_bf16_learns_what_pefts_own_forward_learns():
    adapted, rows = adapted_of("llama", dtype=torch.bfloat16), rows_of()
    path = proof.choose(llama().to(torch.bfloat16))
    assert isinstance(path, Packed)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    losses, slopes = gradients(path, adapted, [rows])
    wanted, plain = gradients(Plain(), adapted, [rows])
    assert losses == pytest.approx(wanted, rel=2e-2)
    assert all(slope.dtype == torch.float32 for slope in slopes.values())
    for factor in ("lora_A", "lora_B"):
        ours, theirs = (
            torch.cat([g.flatten() for n, g in s.items() if factor in n]) for s in (slopes, plain)
        )
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999
        assert ours.norm() / theirs.norm() == pytest.approx(1, abs=0.02)


def test_half_precision_is_proven_beside_fp32_and_comes_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    model = gemma().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert isinstance(proof.choose(model), Packed)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())
    monkeypatch.setattr(proof, "ROUNDING", 0.0)
    path = proof.choose(model)
    assert isinstance(path, Plain) and "half precision" in str(path.notice)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family):
    adapted, rows = adapted_of(family), rows_of(5)
    path = proven(FAMILIES[family]())
    wanted = gradients(path, adapted, [rows[:3], rows[3:]])
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.disable_input_require_grads()
    agree(gradients(path, adapted, [rows[:3], rows[3:]]), wanted)


# --- no more than is needed -----------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_kept_below_the_lowest_adapter(family, checkpointing):
    model = FAMILIES[family]()
    names = [n for n in mixed_ranks(model) if ".2." in n]
    ranks = {name: 3 if name in names else 0 for name in mixed_ranks(model)}
    plan = plan_of(model, "custom", match="none", options={"ranks": ranks})
    path = proven(model)
    adapted = adapters.attach(model, plan, seed=0).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.disable_input_require_grads()
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    reached: list[bool] = []

    def hear(module: Any, inputs: Any, output: Any) -> None:
        reached.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    handles = [layer.register_forward_hook(hear) for layer in layers]
    with path.installed(adapted):
        path.score(adapted, rows_of(3)).nll.sum().backward()
    for handle in handles:
        handle.remove()
    assert reached[:3] == [False, False, True]
