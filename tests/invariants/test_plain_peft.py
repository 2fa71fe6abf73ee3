"""What the package trains and saves is what plain PEFT trains and loads."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rankwise import adapters
from rankwise.engine.batches import micro_batches, optimizer_steps
from rankwise.errors import RankwiseError
from rankwise.inventory import inventory
from rankwise.train import train_adapters
from tests.conftest import tiny_llama
from tests.parts import MODELS, hand_rows, mixed_ranks, plan_of, train_config

STEPS, RATE, WARM = 20, 1e-2, 4
SUFFIXES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


# --- (a) the same losses as a loop written with PEFT and PyTorch alone ------------------------


def factor_by_hand(schedule: str, step: int) -> float:
    """Warm-up over 4 of 20 steps: 1/5 .. 4/5, then from 1 down."""
    if step < WARM:
        return (step + 1) / 5
    left = (STEPS - step) / (STEPS - WARM)
    return {"cosine": (1 + math.cos(math.pi * (1 - left))) / 2, "linear": left, "constant": 1.0}[schedule]


def padded(rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(r.input_ids) for r in rows)
    ids, mask, labels = [], [], []
    for r in rows:
        gap = longest - len(r.input_ids)
        ids.append([*r.input_ids.tolist(), *[258] * gap])
        mask.append([1] * len(r.input_ids) + [0] * gap)
        labels.append([*r.labels.tolist(), *[-100] * gap])
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def loop_by_hand(model, steps, start, schedule: str, *, alpha: float, kind: str) -> tuple[list, list]:
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=SUFFIXES[kind], task_type="CAUSAL_LM")
    config.fan_in_fan_out = kind == "gpt2"
    model = get_peft_model(model, config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            own[name].copy_(value)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(start)
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), weight_decay=0.1)
    losses, norms = [], []
    for step, rows in enumerate(steps):
        ids, mask, labels = padded(rows)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 0.3)))
        optimizer.param_groups[0]["lr"] = RATE * factor_by_hand(schedule, step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("micro_tokens", [10_000, 50], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    ("kind", "schedule", "rule", "alpha"),
    [
        ("llama", "cosine", {"rule": "constant", "value": 2}, 8),
        ("gpt2", "linear", {"rule": "alpha", "value": 6}, 6),
        ("llama", "constant", {"rule": "rslora", "value": 3}, 6),
    ],
)
def test_training_equals_plain_peft(kind, schedule, rule, alpha, micro_tokens, tmp_path: Path):
    config = train_config(schedule=schedule, micro_tokens=micro_tokens, epochs=5)
    steps = optimizer_steps(hand_rows(16), config, seed=3)
    assert len(steps) == STEPS and all(len({len(r.input_ids) for r in rows}) > 1 for rows in steps)
    cuts = [len(micro_batches(rows, micro_tokens)) for rows in steps]
    assert (max(cuts) == 1) if micro_tokens == 10_000 else (min(cuts) > 1)

    ours = MODELS[kind]()
    adapted = adapters.attach(ours, plan_of(ours, budget="r=4", scale=rule), seed=3)
    start = {name: p.detach().clone() for name, p in adapters.adapter_tensors(adapted).items()}
    entries = []
    train_adapters(adapted, steps, config, rate=RATE, seed=3, folder=tmp_path, on_step=entries.append)

    losses, norms = loop_by_hand(MODELS[kind](), steps, start, schedule, alpha=alpha, kind=kind)
    assert max(norms) > 0.3, "clipping must have happened, or this test does not see it"
    assert losses[0] - min(losses) > 0.02, "the losses must move, or this test sees nothing"
    assert [e["loss"] for e in entries] == pytest.approx(losses, rel=1e-5)
    assert [e["grad_norm"] for e in entries] == pytest.approx(norms, rel=1e-3)
    assert [e["learning_rate"] / RATE for e in entries] == pytest.approx(
        [factor_by_hand(schedule, step) for step in range(STEPS)]
    )


# --- (b) what we save, plain PEFT loads -------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "rule",
    [{"rule": "constant", "value": 2}, {"rule": "alpha", "value": 16}, {"rule": "rslora", "value": 5}],
    ids=lambda r: r["rule"],
)
def test_saved_mixed_ranks_load_in_plain_peft(kind, rule, tmp_path: Path):
    model = MODELS[kind]()
    ranks = mixed_ranks(model)
    plan = plan_of(model, "custom", match="none", options={"ranks": ranks}, scale=rule)
    assert plan.ranks == ranks and {0, 1, 8} <= set(ranks.values())
    adapted = adapters.attach(model, plan, seed=1)
    config = train_config(epochs=2)
    steps = optimizer_steps(hand_rows(8), config, seed=1)
    train_adapters(adapted, steps, config, rate=RATE, seed=1, folder=tmp_path)
    adapters.save(adapted, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "adapter")
    ids, mask, _ = padded(hand_rows(3, seed=9))
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=ids, attention_mask=mask).logits
        found = loaded.eval()(input_ids=ids, attention_mask=mask).logits
        base = MODELS[kind]().eval()(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    assert (wanted - base)[seen].abs().max() > 1e-2, "the adapter must do something"
    assert torch.allclose(found[seen], wanted[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("hf:org/name@v1.0", ("org/name", "v1.0")),
        ("hf:org/name", ("org/name", None)),
        ("hf:org/name/model.gguf", ("here", None)),
        ("pypi:dist==1.0/model.gguf", ("here", None)),
    ],
)
def test_the_base_of_an_adapter_is_named_as_others_find_it(source: str, named: tuple, tmp_path: Path):
    model = MODELS["llama"]()
    model.name_or_path = "here"
    plan = plan_of(model, budget="r=1").model_copy(update={"model": source})
    adapters.save(adapters.attach(model, plan, seed=0), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == named


# --- (c) the arms of the earlier study on real shapes: built ranks are the planned ones ---------


@pytest.fixture(scope="module")
def smollm2() -> LlamaForCausalLM:
    """SmolLM2-135M's shape."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def dialogpt() -> GPT2LMHeadModel:
    """DialoGPT-medium's shape."""
    return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16, vocab_size=50257))


def ranks_in(model) -> dict[str, int]:
    """Ranks from the tensors of A and B themselves, by base module name; 0 for a bare Linear or Conv1D."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            assert a.shape[0] == b.shape[1] and a.dtype == b.dtype == torch.float32
            assert a.requires_grad and b.requires_grad and not b.any() and a.any()
            found[name] = a.shape[0]
    return found


def by_layer(ranks: dict[str, int]) -> list[set[int]]:
    layers = sorted({int(name.split(".")[2]) for name in ranks})
    return [{r for name, r in ranks.items() if int(name.split(".")[2]) == i} for i in layers]


def expected(arm: str, layers: int, name: str) -> int:
    """The earlier study's formulas (base 16, min 4), written out for one module."""
    layer = int(name.split(".")[2])
    at = Fraction(layer, layers - 1)
    return {
        "r8": 8,
        "r16": 16,
        "linear_decay": math.floor(16 - 12 * at),
        "attention_heavy": 16 if "attn" in name else 8,
        "empirical": 9 if at < Fraction(3, 10) else 19 if at < Fraction(7, 10) else 16,
    }[arm]


ARMS = {
    "r8": {"strategy": "uniform", "budget": "r=8"},
    "r16": {"strategy": "uniform", "budget": "r=16"},
    "linear_decay": {"strategy": "linear_decay", "match": "none", "options": {"base": 16, "min": 4}},
    "attention_heavy": {"strategy": "attention_heavy", "match": "none", "options": {"base": 16}},
    "empirical": {"strategy": "empirical", "match": "none", "options": {"base": 16}},
}
VECTORS = {
    "r8": [8] * 24,
    "r16": [16] * 24,
    "linear_decay": [16, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4],
    "empirical": [9] * 7 + [19] * 10 + [16] * 7,
}
COUNTS = {"r8": 3_145_728, "r16": 6_291_456}


@pytest.mark.parametrize("shape", ["smollm2", "dialogpt"])
@pytest.mark.parametrize("arm", ARMS)
def test_built_ranks_are_the_plan_on_real_shapes(shape, arm, request: pytest.FixtureRequest):
    model = request.getfixturevalue(shape)
    names = inventory(model).names
    layers, per_layer = (30, 7) if shape == "smollm2" else (24, 4)
    assert len(names) == layers * per_layer
    base = sum(p.numel() for p in model.parameters())
    assert base == (134_515_008 if shape == "smollm2" else 354_823_168)
    plan = plan_of(model, **ARMS[arm])
    model.requires_grad_(False)
    adapted = adapters.attach(model, plan, seed=0)
    try:
        built = ranks_in(model)
        assert built == plan.ranks == {name: expected(arm, layers, name) for name in names}
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert trainable == plan.parameters == adapters.trainable_parameters(adapted)
        assert sum(p.numel() for p in adapted.parameters()) == base + trainable
        if shape == "dialogpt":
            assert trainable == COUNTS.get(arm, trainable)
            if arm == "attention_heavy":
                kinds = [("attn.c_attn", 16), ("attn.c_proj", 16), ("mlp.c_fc", 8), ("mlp.c_proj", 8)]
                assert {(n.split(".", 3)[3], r) for n, r in built.items()} == set(kinds)
            else:
                assert by_layer(built) == [{rank} for rank in VECTORS[arm]]
    finally:
        adapters.detach(adapted)
    assert not ranks_in(model)


def smaller(layer: LoraLayer, factors: str, rank: int) -> None:
    if "A" in factors:
        layer.lora_A["default"] = torch.nn.Linear(layer.in_features, rank, bias=False)
    if "B" in factors:
        layer.lora_B["default"] = torch.nn.Linear(rank, layer.out_features, bias=False)


TAMPER = {
    "rank of A": lambda layer: smaller(layer, "A", 3),
    "rank of B": lambda layer: smaller(layer, "B", 3),
    "rank of both": lambda layer: smaller(layer, "AB", 3),
    "scaling": lambda layer: layer.scaling.update(default=1.9),
    "frozen A": lambda layer: layer.lora_A["default"].weight.requires_grad_(False),
    "switched off": lambda layer: layer.enable_adapters(False),
    "another active": lambda layer: setattr(layer, "_active_adapter", ["other"]),
}


@pytest.mark.parametrize("what", TAMPER)
def test_a_tampered_build_is_caught_and_named(what):
    model = tiny_llama()
    plan = plan_of(model, budget="r=4")
    adapted = adapters.attach(model, plan, seed=0)
    adapters.verify(adapted, plan)
    name = "model.layers.1.mlp.up_proj"
    TAMPER[what](adapters.lora_layers(adapted)[name])
    with pytest.raises(RankwiseError, match=name.replace(".", r"\.")) as error:
        adapters.verify(adapted, plan)
    assert "layers.0" not in str(error.value)


def test_an_adapter_too_many_or_too_few_is_named():
    model = tiny_llama()
    ranks = {name: 2 for name in inventory(model).names}
    lacking = "model.layers.0.self_attn.v_proj"
    full = plan_of(model, "custom", match="none", options={"ranks": ranks})
    less = plan_of(model, "custom", match="none", options={"ranks": ranks | {lacking: 0}})
    adapted = adapters.attach(model, full, seed=0)
    with pytest.raises(RankwiseError, match=r"layers\.0\.self_attn\.v_proj: built \(2, 2\.0\), planned None"):
        adapters.verify(adapted, less)
    adapted = adapters.attach(adapters.detach(adapted), less, seed=0)
    with pytest.raises(RankwiseError, match=r"layers\.0\.self_attn\.v_proj: built None, planned \(2, 2\.0\)"):
        adapters.verify(adapted, full)


def test_trainable_base_weights_are_caught():
    model = tiny_llama()
    plan = plan_of(model, budget="r=4")
    adapted = adapters.attach(model, plan, seed=0)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(RankwiseError, match="trains"):
        adapters.verify(adapted, plan)


# --- (d) A is nested in the rank ----------------------------------------------------------------


def starting_a(budget: str, seed: int) -> dict[str, torch.Tensor]:
    model = tiny_llama()
    torch.manual_seed(seed * 7 + len(budget))  # the global generator must not matter
    adapted = adapters.attach(model, plan_of(model, budget=budget), seed=seed)
    layers = adapters.lora_layers(adapted)
    return {name: layer.lora_A["default"].weight.detach() for name, layer in layers.items()}


def test_a_is_nested_in_rank_and_differs_between_modules_and_seeds():
    low, high, again, other = (starting_a(*x) for x in [("r=3", 5), ("r=12", 5), ("r=12", 5), ("r=12", 6)])
    for name in low:
        assert torch.equal(low[name], high[name][:3]) and torch.equal(high[name], again[name])
        assert not torch.isclose(high[name], other[name]).any()
        bound = 1 / math.sqrt(high[name].shape[1])
        assert high[name].abs().max() <= bound and high[name].std() == pytest.approx(bound / 3**0.5, rel=0.2)
    same_shape = [a for a in high.values() if a.shape == (12, 32)]
    assert len(same_shape) > 2
    firsts = {tuple(a[0].tolist()) for a in same_shape}
    assert len(firsts) == len(same_shape), "modules must not share their draws"
