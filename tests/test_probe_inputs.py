"""Probes of inputs, weights and outputs against independent computations; the model stays as it was."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer

from rankwise import adapters, probes
from rankwise.budget import solve_gains
from rankwise.engine import plain, proof
from rankwise.engine.paths import Plain
from rankwise.errors import RankwiseError
from rankwise.inventory import inventory
from rankwise.probes import inputs as inputs_probe
from rankwise.strategies import allocate, eva
from tests import zoo
from tests.parts import MODELS, hand_rows

MICRO = 160
"""Padded tokens: several micro-batches of the rows below."""

WIDE = 320
"""The same for EVA against PEFT, where no micro-batch may have fewer label tokens than components."""

ROWS = hand_rows(24, seed=3)


def measured(kind, model, rows=ROWS, engine=None, seed=0, micro=MICRO, **options):
    return probes.evidence(
        kind, model, inventory(model), rows, engine=engine or Plain(), micro_tokens=micro, seed=seed,
        options=options,
    )  # fmt: skip


# ---- EVA against PEFT ----


def padded(rows):
    ids, mask, labels = (torch.from_numpy(array) for array in plain.pad(rows))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_peft(model, rank, rho, tau):
    """Ranks and A of PEFT's own EVA, on the same micro-batches."""
    config = LoraConfig(
        r=rank, lora_alpha=1, target_modules=list(inventory(model).suffixes), init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=tau), fan_in_fan_out=isinstance(model, MODELS["gpt2"]().__class__),
    )  # fmt: skip
    adapted = get_peft_model(copy.deepcopy(model), config)
    batches = [padded(rows) for rows in Plain().batches(ROWS, WIDE)]
    assert len(batches) > 2
    assert all(int((batch["labels"] != -100).sum()) >= rank * rho for batch in batches)  # PEFT skips none
    initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    found = {
        name: layer.lora_A["default"].weight.detach().numpy()
        for name, layer in adapted.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
    pattern = adapted.peft_config["default"].rank_pattern
    assert all(len(a) == pattern.get(name, rank) for name, a in found.items())
    return {name: len(found[name]) if name in found else 0 for name in inventory(model).names}, found


@pytest.mark.parametrize(("family", "rank", "rho", "tau"), [
    ("llama", 4, 2.0, 0.99), ("llama", 3, 4.0, 0.9), ("gpt2", 4, 2.0, 0.99), ("neox", 4, 2.0, 0.99),
])  # fmt: skip
def test_eva_counts_ranks_as_peft_does_and_parameters_otherwise(family, rank, rho, tau):
    model = zoo.FAMILIES[family]()
    modules = inventory(model)
    theirs, a = by_peft(model, rank, rho, tau)
    assert len(set(theirs.values())) > 2  # else uniform ranks would pass

    most = round(rho * rank)
    found = measured("inputs", model, micro=WIDE, components=most, rank=rank, tau=tau)
    gains = eva.gains(modules, found, {})
    ours = solve_gains(gains, dict.fromkeys(gains, 1), rank * len(modules), dict.fromkeys(gains, most))
    assert ours == theirs

    components = found.of("components")
    for name, rows in a.items():
        signs = np.sign((rows * components[name][: len(rows)]).sum(1, keepdims=True))
        np.testing.assert_allclose(signs * components[name][: len(rows)], rows, atol=1e-6)

    plan = allocate(modules, strategy="eva", budget=f"r={rank}", probe=found)
    counted = sum(modules.costs[name] * r for name, r in theirs.items())
    print(f"{family}: {counted} parameters by counted ranks, budget {plan.budget}, spent {plan.parameters}")
    assert plan.parameters <= plan.budget
    assert plan.ranks != theirs and counted != plan.budget


def test_components_are_the_principal_axes_of_the_label_tokens():
    """Against a whole decomposition in float64; PEFT's incremental one is cut between micro-batches."""
    model = zoo.llama()
    found = measured("inputs", model, micro=10_000)
    heard: dict[str, list[np.ndarray]] = {}
    name = "model.layers.1.mlp.down_proj"
    handle = model.get_submodule(name).register_forward_hook(
        lambda m, i, o: heard.setdefault(name, []).append(i[0][0].double().numpy())
    )
    with torch.no_grad():
        for row in ROWS:  # one by one: no padding, no batches
            model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None])
    handle.remove()
    x = np.concatenate([x[row.labels != -100] for x, row in zip(heard[name], ROWS, strict=True)])
    values, axes = np.linalg.svd(x - x.mean(0))[1:]
    ratio, components = (found.of(q)[name] for q in ("explained_variance_ratio", "components"))
    expected = (values**2 / (values**2).sum())[:32]
    np.testing.assert_allclose(ratio, expected, rtol=1e-4)
    np.testing.assert_allclose(abs((components[:8] * axes[:8]).sum(1)), 1, atol=1e-4)
    several = measured("inputs", model).of("explained_variance_ratio")[name]
    np.testing.assert_allclose(several[:8], expected[:8], rtol=0.05)
    assert len(ratio) == 32 and components.shape == (32, 48)  # full rank, of a (32, 48) weight


def test_small_micro_batches_are_merged():
    """Fewer label tokens than components in every micro-batch: PEFT would skip all of them, forever."""
    small = measured("inputs", zoo.llama(), micro=1, components=16)
    large = measured("inputs", zoo.llama(), micro=10_000, components=16)
    assert small.about["batches"] == len(ROWS) and large.about["batches"] == 1
    for name, ratio in large.of("explained_variance_ratio").items():
        np.testing.assert_allclose(small.of("explained_variance_ratio")[name][:4], ratio[:4], rtol=0.1)


def test_fewer_label_tokens_than_components_and_the_passes_are_counted():
    rows = hand_rows(1, seed=5, shortest=12, longest=12)
    labels = int((rows[0].labels != -100).sum())
    found = measured("inputs", zoo.llama(), rows, tau=1.0, batches=3)
    assert found.cost.forward_tokens == 3 * 12 and found.cost.passes == 3 and found.cost.backward_tokens == 0
    assert {len(r) for r in found.of("explained_variance_ratio").values()} == {min(labels, 16), labels}


def test_settled_modules_rest_and_the_probe_stops():
    told = []
    model = zoo.llama()
    probes.evidence(
        "inputs", model, inventory(model), ROWS, engine=Plain(), micro_tokens=MICRO,
        options={"tau": -1.0, "batches": 50}, on_progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    first = sum(len(r.input_ids) for batch in Plain().batches(ROWS, MICRO)[:2] for r in batch)
    assert told[-1] == (first, first)  # any two micro-batches agree at a cosine of -1


# ---- weights ----


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_spectra(family):
    model = zoo.FAMILIES[family]()
    found = measured("weights", model, rows=[])
    for name in inventory(model).names:
        weight = model.get_submodule(name).weight.detach()
        expected = torch.linalg.svdvals(weight.double()).numpy()
        np.testing.assert_allclose(found.of("singular_values")[name], expected, rtol=1e-5, atol=1e-6)
        assert found.of("norm")[name] == pytest.approx(np.linalg.norm(weight.numpy()), rel=1e-6)
    assert (found.cost.forward_tokens, found.cost.passes) == (0, 0)


def test_large_weights_are_sketched(monkeypatch):
    """A flat spectrum is the hard case; the draw depends on the seed alone."""
    model = zoo.llama()
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    layer.weight = torch.nn.Parameter(torch.randn(700, 600, generator=torch.Generator().manual_seed(1)))
    layer.in_features, layer.out_features = 600, 700
    expected = torch.linalg.svdvals(layer.weight.detach().double()).numpy()[:64]
    monkeypatch.setattr("rankwise.probes.weights.EXACT_UP_TO", 512)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (measured("weights", model, [], seed=s).of("singular_values")[name] for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(one, expected, rtol=1e-3)
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert not np.allclose(one, expected, rtol=1e-7)  # it was sketched


def test_weights_that_cannot_be_read_are_named():
    class Packed4Bit(torch.nn.Linear):
        pass

    model = zoo.llama()
    old = model.model.layers[0].mlp.up_proj
    packed = Packed4Bit(old.in_features, old.out_features, bias=False)
    packed.weight = torch.nn.Parameter(torch.zeros(768, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj = packed
    with pytest.raises(RankwiseError, match=r"layers\.0\.mlp\.up_proj is a Packed4Bit"):
        measured("weights", model, [])


# ---- outputs ----


def by_hand(model, rank, steps, rate, seed):
    """LoRA-drop's evidence from PEFT and a loop of its own; rows one by one, without padding."""
    model = copy.deepcopy(model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(inventory(model).suffixes))
    adapted = get_peft_model(model, config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        a = layer.lora_A["default"].weight
        a.data.copy_(torch.from_numpy(adapters.drawn_rows(name, seed, *a.shape)))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        mine = [row for i, row in enumerate(ROWS) if i % steps == step]
        labels = sum(int((row.labels[1:] != -100).sum()) for row in mine)
        for row in mine:
            ids, wanted = (torch.from_numpy(x.astype(np.int64)) for x in (row.input_ids, row.labels))
            logits = adapted(input_ids=ids[None]).logits[0, :-1]
            (torch.nn.functional.cross_entropy(logits, wanted[1:], reduction="sum") / labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    total = dict.fromkeys(layers, 0.0)

    added = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, x, y, name=name: added.update({name: y - m.base_layer(x[0])}))
    for row in ROWS:
        keep = torch.from_numpy(row.labels != -100)
        with torch.no_grad():
            adapted(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None])
        for name, update in added.items():
            total[name] += float(update[0, keep].double().square().sum())
    count = sum(int((row.labels != -100).sum()) for row in ROWS)
    return {name: value / count for name, value in total.items()}


@pytest.mark.parametrize("packed", [False, True])
def test_outputs_against_a_loop_of_peft(packed):
    model = zoo.llama()
    engine = proof.choose(model) if packed else Plain()
    assert engine.name == ("packed" if packed else "plain")
    found = measured("outputs", model, engine=engine, rank=2, steps=3, rate=3e-3, seed=7)
    expected = by_hand(model, rank=2, steps=3, rate=3e-3, seed=7)
    values = {name: float(v) for name, v in found.of("mean_square").items()}
    assert values == pytest.approx(expected, rel=2e-3)
    assert max(values.values()) > 1.5 * min(values.values())
    tokens = sum(len(row.input_ids) for row in ROWS)
    assert (found.cost.forward_tokens, found.cost.backward_tokens) == (2 * tokens, tokens)
    other = measured("outputs", model, engine=engine, rank=2, steps=3, rate=3e-3, seed=8)
    assert other.of("mean_square")["model.layers.0.mlp.up_proj"] != values["model.layers.0.mlp.up_proj"]


def test_a_training_that_diverges_is_told():
    with pytest.raises(RankwiseError, match="brief training diverged"):
        measured("outputs", zoo.llama(), rate=1e30)


# ---- the model, options ----


def state_of(model):
    """Everything that a user could see changed."""
    parts = {
        n: (p.data_ptr(), p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()
    }
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), type(m), m.training)
             for n, m in model.named_modules()]  # fmt: skip
    return parts, hooks, hasattr(model, "peft_config"), model.config.to_dict(), torch.get_rng_state()


def assert_same(before, after):
    for (name, old), new in zip(before[0].items(), after[0].values(), strict=True):
        assert old[:3] == new[:3] and torch.equal(old[3], new[3]), name
    assert before[1:4] == after[1:4] and torch.equal(before[4], after[4])


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["inputs", "weights", "outputs"])
def test_the_model_is_left_as_it_was(kind, packed, broken):
    model = zoo.llama()
    model.train().requires_grad_(True)
    model.model.layers[1].eval()  # a mode and flags that are not the same everywhere
    model.model.layers[0].mlp.requires_grad_(False)
    engine = proof.choose(copy.deepcopy(model)) if packed else Plain()
    before = state_of(model)
    calls = []

    def stop(done, total):
        calls.append(done)
        if broken and len(calls) == 2:
            raise Interrupt

    try:
        probes.evidence(
            kind, model, inventory(model), ROWS, engine=engine, micro_tokens=MICRO, on_progress=stop
        )
        assert not broken
    except Interrupt:
        assert broken
    assert len(calls) >= 2
    assert_same(before, state_of(model))


def test_a_failure_while_adapters_are_put_on_takes_them_off(monkeypatch):
    def fail(adapted, plan):
        raise Interrupt

    model = zoo.llama()
    before = state_of(model)
    monkeypatch.setattr(adapters, "verify", fail)
    with pytest.raises(Interrupt):
        measured("outputs", model)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("family", ["gpt2", "gemma", "opt", "neox", "bloom", "falcon"])
def test_families(family):
    """Every module of every family gets finite numbers; the inputs of the plain path are the model's own."""
    model = ({**zoo.PACKABLE, **zoo.UNPACKABLE})[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("inputs", "weights", "outputs"):
            found = measured(kind, model, ROWS[:6])
            for values in found.values.values():
                assert set(values) == set(inventory(model).names)
                assert all(np.isfinite(v).all() and v.dtype == np.float32 for v in values.values())


def test_same_numbers_again():
    one, two = (measured("inputs", zoo.llama()) for _ in range(2))
    for quantity, values in one.values.items():
        assert all(np.array_equal(v, two.of(quantity)[name]) for name, v in values.items())


@pytest.mark.parametrize(("kind", "options", "says"), [
    ("inputs", {"components": 0}, "components must be a whole number"),
    ("inputs", {"tau": 2}, "tau must be a cosine"),
    ("inputs", {"rho": 2}, "takes the options components, tau, rank, batches; got rho"),
    ("inputs", {"batches": True}, "batches must be a whole number"),
    ("weights", {"k": 3}, "takes no options"),
    ("outputs", {"steps": 0}, "steps must be a whole number"),
    ("outputs", {"rate": float("nan")}, "rate must be a finite number"),
    ("outputs", {"epochs": 1}, "takes the options rank, steps, rate; got epochs"),
])  # fmt: skip
def test_bad_options(kind, options, says):
    with pytest.raises(RankwiseError, match=says):
        measured(kind, zoo.llama(), **options)


def test_experts_that_see_a_part_of_the_tokens_are_refused():
    model = zoo.llama()
    layer = model.model.layers[0].mlp
    whole = layer.forward
    layer.forward = lambda x: torch.cat([whole(x[:, :3]), whole(x[:, 3:])], dim=1)
    with pytest.raises(RankwiseError, match=r"one input per token; model\.layers\.0\.mlp"):
        measured("inputs", model)
    assert inputs_probe.COMPONENTS == 64
