"""Steps, micro-batches and scores: what the fast paths compute is what the model itself computes."""

from __future__ import annotations

import inspect
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from rankwise import adapters
from rankwise.engine import proof
from rankwise.engine.batches import label_count, micro_batches, optimizer_steps
from rankwise.engine.plain import first_not_finite, score
from rankwise.evaluate import evaluate
from rankwise.train import Diverged, train_adapters
from tests.conftest import tiny_llama
from tests.parts import MODELS, hand_rows, plan_of, train_config


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def by_tokens(**changes):
    return train_config(step_examples=None, step_tokens=100, **changes)


def names(rows) -> list[str]:
    return [row.row_hash for row in rows]


class OldLlama(LlamaForCausalLM):
    """A model whose forward has no logits_to_keep."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        assert "logits_to_keep" not in kwargs
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def old_llama() -> OldLlama:
    llama = tiny_llama()
    model = OldLlama(llama.config)
    model.load_state_dict(llama.state_dict())
    return model


EVERY = {**MODELS, "no logits_to_keep": old_llama}


# --- steps and micro-batches ----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 40, 79, 80, 200, 10_000])
def test_micro_batches_keep_the_bound_and_every_row_once(limit: int):
    rows = hand_rows(50, seed=2)
    batches = micro_batches(rows, limit)
    assert sorted(names(r for b in batches for r in b)) == sorted(names(rows))
    for batch in batches:
        padded = len(batch) * max(len(row.input_ids) for row in batch)
        assert padded <= limit or len(batch) == 1
    assert len(batches) == (1 if limit == 10_000 else len(batches)) <= (50 if limit == 1 else 49)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert [names(b) for b in micro_batches(shuffled, limit)] == [names(b) for b in batches]


def test_rows_of_like_length_share_a_micro_batch():
    batches = micro_batches(hand_rows(50, seed=2), 200)
    longest = [max(len(r.input_ids) for r in batch) for batch in batches]
    shortest = [min(len(r.input_ids) for r in batch) for batch in batches]
    assert all(low >= high for low, high in zip(shortest, longest[1:], strict=False))


def test_steps_by_tokens_are_filled_while_rows_fit():
    long = hand_rows(2, shortest=120, longest=130)
    rows = [*hand_rows(40), *(replace(row, row_hash=f"long{i}") for i, row in enumerate(long))]
    steps = optimizer_steps(rows, by_tokens(), seed=0)
    sizes = [[len(row.input_ids) for row in step] for step in steps]
    for now, after in zip(sizes, [*sizes[1:], [10**9]], strict=True):
        assert sum(now) <= 100 or len(now) == 1
        assert sum(now) + after[0] > 100, "the next row would have fitted"
    assert sorted(names(r for s in steps for r in s)) == sorted(names(rows))
    assert sum(len(size) == 1 and size[0] > 100 for size in sizes) == 2


def test_steps_by_examples():
    sizes = [len(step) for step in optimizer_steps(hand_rows(10), train_config(epochs=2), seed=0)]
    assert sizes == [4, 4, 2, 4, 4, 2], "an epoch's end does not fill up with the next"


@pytest.mark.parametrize("config", [train_config, by_tokens], ids=["examples", "tokens"])
def test_order_depends_on_seed_and_epoch_alone(config):
    rows = hand_rows(30)
    flat = {
        (seed, epochs): names(r for s in optimizer_steps(rows, config(epochs=epochs), seed) for r in s)
        for seed in (0, 1)
        for epochs in (1, 3)
    }
    assert flat[0, 3][:30] == flat[0, 1] != flat[1, 1]
    epochs = [flat[0, 3][i : i + 30] for i in (0, 30, 60)]
    assert all(Counter(e) == Counter(names(rows)) for e in epochs) and len({tuple(e) for e in epochs}) == 3
    assert flat[0, 1] != names(rows)
    whole = optimizer_steps(rows, config(epochs=3), 0)
    assert optimizer_steps(rows, config(epochs=3, max_steps=5), 0) == whole[:5] and len(whole) > 5


def test_label_count_leaves_out_the_first_token():
    row = replace(hand_rows(1)[0], labels=hand_rows(1)[0].input_ids)  # nothing comes before the first token
    assert label_count([row, row]) == 2 * (len(row.input_ids) - 1)
    assert int(score(tiny_llama(), [row]).tokens) == len(row.input_ids) - 1


# --- scores ---------------------------------------------------------------------------------------


@torch.no_grad()
def plainly(model, row) -> tuple[float, int, int]:
    """A row by itself, with full logits and the model's own loss: summed nll, tokens, correct."""
    ids, labels = torch.tensor(row.input_ids).long()[None], torch.tensor(row.labels).long()[None]
    out = model(input_ids=ids, labels=labels)
    wanted = labels[0, 1:]
    seen = wanted != -100
    correct = (out.logits[0, :-1].argmax(-1) == wanted)[seen].sum()
    return out.loss.item() * int(seen.sum()), int(seen.sum()), int(correct)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapters"])
def test_evaluate_is_the_models_own_loss_row_by_row(kind: str, adapted: bool):
    model = EVERY[kind]()
    assert ("logits_to_keep" in inspect.signature(type(model).forward).parameters) == (kind in MODELS)
    if adapted:
        model = adapters.attach(model, plan_of(model, budget="r=2"), seed=0, dropout=0.5)
        for layer in adapters.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    model.train()  # dropout must be off while scoring, and on again after
    rows, heard = hand_rows(17, seed=4), []
    found = evaluate(model, rows, micro_tokens=150, on_tokens=heard.append)
    assert model.training
    model.eval()
    wanted = [plainly(model, row) for row in rows]
    assert found.examples["row_hash"] == names(rows)
    assert found.examples["nll"] == pytest.approx([nll for nll, _, _ in wanted], rel=1e-5)
    assert found.examples["tokens"] == [tokens for _, tokens, _ in wanted]
    assert found.examples["correct"] == [correct for _, _, correct in wanted]
    total, tokens = sum(nll for nll, _, _ in wanted), sum(t for _, t, _ in wanted)
    assert found.metrics == pytest.approx(
        {
            "loss": total / tokens,
            "perplexity": math.exp(total / tokens),
            "token_accuracy": sum(c for _, _, c in wanted) / tokens,
            "bits_per_byte": total / math.log(2) / sum(row.response_bytes for row in rows),
            "tokens": tokens,
            "examples": 17,
        },
        rel=1e-5,
    )
    assert sum(heard) == sum(len(row.input_ids) for row in rows) and len(heard) > 2
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", EVERY)
def test_logits_at_labels_alone_give_the_full_gradient(kind: str):
    rows = hand_rows(6, seed=1)
    gradients = []
    for way in ("ours", "full"):
        model = EVERY[kind]()
        if way == "ours":
            loss = score(model, rows).nll.sum()
        else:
            longest = max(len(r.input_ids) for r in rows)
            fill = [np.pad(r.input_ids, (0, longest - len(r.input_ids)), constant_values=7) for r in rows]
            mask = [np.arange(longest) < len(r.input_ids) for r in rows]
            ids, seen = torch.tensor(np.stack(fill)).long(), torch.tensor(np.stack(mask)).long()
            out = model(input_ids=ids, attention_mask=seen).logits
            loss = -sum(
                out[i, t - 1].log_softmax(-1)[r.labels[t]]
                for i, r in enumerate(rows)
                for t in range(1, len(r.input_ids))
                if r.labels[t] != -100
            )
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()})
    for name, value in gradients[1].items():
        assert torch.allclose(gradients[0][name], value, rtol=1e-3, atol=1e-4), name


def test_a_row_does_not_see_its_neighbours():
    model, rows = tiny_llama().eval(), hand_rows(8, seed=6)
    alone = evaluate(model, rows, micro_tokens=1).examples["nll"]
    together = evaluate(model, rows, micro_tokens=10_000).examples["nll"]
    assert together == pytest.approx(alone, rel=1e-5)


# --- training settings that must not change what is learned ---------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_learns_the_same(kind: str, tmp_path: Path):
    seen = []
    for checkpointing in (False, True):
        model = MODELS[kind]()
        model.requires_grad_(False)
        adapted = adapters.attach(model, plan_of(model, budget="r=4"), seed=0, dropout=0.3)
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        config, losses = train_config(epochs=3), []
        steps = optimizer_steps(hand_rows(8), config, 0)
        folder = tmp_path / str(checkpointing)
        folder.mkdir()
        train_adapters(adapted, steps, config, rate=3e-2, seed=0, folder=folder, on_step=losses.append)
        seen.append([entry["loss"] for entry in losses])
    assert seen[0] == pytest.approx(seen[1], rel=1e-6) and seen[0][0] - seen[0][-1] > 0.02


# --- numbers that are not finite ------------------------------------------------------------------


def poisoned():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    return model


@pytest.mark.parametrize("path", ["plain", "packed"])
def test_a_bad_weight_is_named_in_training_and_evaluation(path: str, tmp_path: Path):
    engine = proof.choose(tiny_llama().requires_grad_(False), "plain" if path == "plain" else "auto")
    assert engine.name == path
    rows, config = hand_rows(4), train_config()
    model = poisoned().requires_grad_(False)
    with (
        pytest.raises(FloatingPointError, match=r"row 0{12} is not finite.*layers\.1\.mlp\.up_proj"),
        engine.installed(model),
    ):
        evaluate(model, rows, micro_tokens=100, engine=engine)
    adapted = adapters.attach(model, plan_of(model, budget="r=2"), seed=0)
    with (
        pytest.raises(Diverged, match=r"step 0: the loss is nan.*layers\.1\.mlp\.up_proj") as error,
        engine.installed(adapted),
    ):
        train_adapters(adapted, [rows], config, rate=1e-3, seed=0, folder=tmp_path, engine=engine)
    assert error.value.step == 0 and error.value.last is None
    assert not (tmp_path / "checkpoint.safetensors").exists()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path):
    model = tiny_llama()
    adapted = adapters.attach(model, plan_of(model, budget="r=2"), seed=0)
    target = adapters.lora_layers(adapted)["model.layers.0.self_attn.v_proj"].lora_B["default"].weight
    target.register_hook(lambda grad: grad * math.inf)
    steps = [hand_rows(4), hand_rows(4)]
    with pytest.raises(Diverged, match=r"the gradient of .*layers\.0\.self_attn\.v_proj.lora_B") as error:
        train_adapters(adapted, steps, train_config(), rate=1e-3, seed=0, folder=tmp_path)
    assert error.value.step == 0


def test_a_sound_model_has_no_bad_module():
    assert first_not_finite(tiny_llama(), hand_rows(2)) == "no module (the loss itself)"
