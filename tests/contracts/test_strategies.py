"""One contract for every strategy in the dict, and the earlier study's own numbers."""

import json
import math
import warnings
from fractions import Fraction
from numbers import Number
from pathlib import Path

import numpy as np
import pytest
import torch

import rankwise.strategies
from rankwise import adapters
from rankwise.budget import raw_ranks
from rankwise.engine.batches import optimizer_steps
from rankwise.engine.paths import Plain
from rankwise.errors import RankwiseError
from rankwise.evidence import QUANTITIES, Evidence
from rankwise.inventory import Inventory, Module, inventory
from rankwise.methods import METHODS, method_of
from rankwise.methods.session import Session
from rankwise.seeds import generator
from rankwise.strategies import STRATEGIES, allocate, evidence_of, resolve
from rankwise.strategies.options import Strategy
from tests.conftest import tiny_llama
from tests.parts import hand_rows, plan_of, train_config

# What a strategy cannot do without; everything else runs on its defaults.
NEEDED = {"custom": {"ranks": {"attention": 6, "mlp": 3}}, "reversed": {"of": "linear_decay"}}
TRAINED = [name for name, one in STRATEGIES.items() if one.kind == "trained"]


def evidence(strategy, modules, options=None):
    """Measurements as a probe might give them: uneven over modules, falling with the unit of rank."""
    kind = evidence_of(strategy, options or {})
    if kind is None:
        return None
    values = {quantity: {} for quantity in QUANTITIES[kind]}
    for quantity, axes in QUANTITIES[kind].items():
        for m in modules:
            draw = generator(1, kind, quantity, m.name)
            shape = [m.max_rank] if len(axes) == 1 else [m.max_rank, m.in_features] if axes else []
            found = draw.lognormal(size=shape).astype(np.float32)
            values[quantity][m.name] = -np.sort(-found) if len(axes) == 1 else found
    return Evidence(kind, values)


def by_hand(layers, parts):
    modules = [
        Module(f"h.{i}.{path}", i, path.rpartition(".")[2], kind, a, b, path=path)
        for i in range(layers)
        for path, (kind, a, b) in parts.items()
    ]
    return Inventory(tuple(modules), layers, 10**7, (), 0.0, (), "ByHand")


GPT2 = {
    "attn.c_attn": ("attention", 1024, 3072), "attn.c_proj": ("attention", 1024, 1024),
    "mlp.c_fc": ("mlp", 1024, 4096), "mlp.c_proj": ("mlp", 4096, 1024),
}  # fmt: skip
SMOL = {
    "q": ("attention", 576, 576), "k": ("attention", 576, 192), "v": ("attention", 576, 192),
    "o": ("attention", 576, 576),
    "gate": ("mlp", 576, 1536), "up": ("mlp", 576, 1536), "down": ("mlp", 1536, 576),
}  # fmt: skip
SMALL = {"attn.q_proj": ("attention", 8, 8), "mlp.up_proj": ("mlp", 8, 20)}
INVENTORIES = {
    "gpt2": by_hand(24, GPT2), "smollm2": by_hand(30, SMOL),
    "single": by_hand(1, SMALL), "small": by_hand(5, SMALL),
}  # fmt: skip
DIALOGPT = INVENTORIES["gpt2"]


def raw(strategy, modules=DIALOGPT, seed=0, **options):
    one, settings = resolve(strategy, options, seed)
    return raw_ranks(one.function(modules, None, settings), modules.max_ranks)


def per_layer(ranks, modules=DIALOGPT):
    rows = [{ranks[m.name] for m in modules if m.layer == i} for i in range(modules.layers)]
    assert all(len(row) == 1 for row in rows)
    return [row.pop() for row in rows]


@pytest.mark.parametrize("size", INVENTORIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_contract_of_values(name, size):
    modules = INVENTORIES[size]
    one, settings = resolve(name, NEEDED.get(name, {}), seed=3)
    probe = evidence(name, modules, settings)
    values = one.function(modules, probe, settings)
    again = one.function(modules, probe, settings)
    assert set(values) == set(modules.names)
    for module in modules.names:
        array = np.atleast_1d(np.asarray(values[module], dtype=float))
        assert np.isfinite(array).all() and (array >= 0).all() and (np.diff(array) <= 0).all()
        assert np.array_equal(array, np.atleast_1d(np.asarray(again[module], dtype=float)))
    assert one.doc and STRATEGIES[name].kind in ("targets", "gains", "inner", "trained")


@pytest.mark.parametrize(
    ("size", "budget"),
    [(size, budget) for size in INVENTORIES for budget in ("r=1", "r=4", "r=8")]
    + [("gpt2", 17_003), ("smollm2", "0.31%"), ("smollm2", 123_457), ("small", 90), ("single", 44)],
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_contract_of_plans(name, size, budget):
    modules = INVENTORIES[size]
    options = NEEDED.get(name, {})
    probe = evidence(name, modules, options)
    plan, same = (
        allocate(modules, strategy=name, budget=budget, options=options, seed=3, model="m", probe=probe)
        for _ in range(2)
    )
    assert plan == same and plan.to_json() == same.to_json()
    assert list(plan.ranks) == list(modules.names)
    assert 0 < plan.parameters <= plan.budget
    one, settings = resolve(name, options, 3)
    values = one.function(modules, probe, settings)
    wanting = [m for m in modules if not isinstance(values[m.name], Number) or values[m.name] > 0]
    unfinished = [m.cost for m in wanting if plan.ranks[m.name] < m.max_rank]
    assert not unfinished or plan.leftover < min(unfinished)
    config = plan.lora_config()
    assert set(config.target_modules) == {n for n, rank in plan.ranks.items() if rank}


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=40,
        )
    )  # fmt: skip


@pytest.mark.parametrize("match", ["budget", "none"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_contract_of_built_models(name, match, model):
    from peft import get_peft_model

    modules, options = inventory(model), NEEDED.get(name, {})
    settings = {
        "strategy": name,
        "budget": "r=2",
        "options": options,
        "probe": evidence(name, modules, options),
    }
    if match == "none" and STRATEGIES[name].kind in ("gains", "trained"):
        with pytest.raises(RankwiseError, match="instead of `match: none`"):
            allocate(modules, match=match, **settings)
        return
    plan = allocate(modules, match=match, scale={"value": 1}, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = get_peft_model(model, plan.lora_config())
    try:
        built = {
            n: m.lora_A["default"].weight.shape[0]
            for n, m in adapted.get_base_model().named_modules()
            if hasattr(m, "lora_A")
        }
        assert built == {n: rank for n, rank in plan.ranks.items() if rank}
        assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.parameters
    finally:
        adapted.unload()


@pytest.mark.parametrize("name", TRAINED)
def test_contract_of_training(name, tmp_path):
    """It states what it trained, ends within the budget or says so, and counts every token."""
    model = tiny_llama().requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows, config = hand_rows(16), train_config(step_examples=2)
    plan = plan_of(model, name, budget="r=2")
    steps = optimizer_steps(rows, config, seed=5)
    session = Session(
        model, inventory(model), plan, Plain(), steps, config, rate=1e-2, seed=5, folder=tmp_path
    )
    with method_of(name)(session) as (adapted, outcome):
        assert outcome.trained.tokens == sum(len(row.input_ids) for row in rows)
        assert (
            outcome.trained.steps == len(steps) == len((tmp_path / "metrics.jsonl").read_text().splitlines())
        )
        adapters.verify(adapted, outcome.plan)
        assert list(outcome.plan.ranks) == list(plan.ranks)
        assert 0 < outcome.plan.parameters <= outcome.trained_parameters
        assert outcome.plan.parameters <= plan.budget or outcome.plan.match == "none"
        json.dumps(outcome.details, allow_nan=False)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_every_strategy_has_a_file_of_its_name():
    folder = Path(rankwise.strategies.__file__).parent
    assert {p.stem for p in folder.glob("*.py")} - {"__init__", "options"} == set(STRATEGIES)
    assert set(METHODS) == set(TRAINED)


# ---- the earlier study's formulas, facts section 1 ----


def test_vector_linear_decay():
    expected = [16, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
    assert per_layer(raw("linear_decay")) == expected
    assert per_layer(raw("linear_growth")) == expected[::-1]
    assert raw("reversed", of="linear_decay") == raw("linear_growth")


def test_vector_empirical():
    assert per_layer(raw("empirical")) == [9] * 7 + [19] * 10 + [16] * 7
    assert per_layer(raw("empirical", max=18)) == [9] * 7 + [18] * 10 + [16] * 7
    assert per_layer(raw("empirical", min=12)) == [12] * 7 + [19] * 10 + [16] * 7


def test_vector_attention_heavy():
    ranks = raw("attention_heavy")
    assert {m.path: ranks[m.name] for m in DIALOGPT} == {
        "attn.c_attn": 16, "attn.c_proj": 16, "mlp.c_fc": 8, "mlp.c_proj": 8
    }  # fmt: skip


def test_vector_uniform_parameters():
    assert allocate(DIALOGPT, strategy="uniform", match="none").parameters == 6_291_456
    assert allocate(DIALOGPT, strategy="uniform", match="none", options={"base": 8}).parameters == 3_145_728


def test_uniform_r8_is_rank_8_everywhere_on_uneven_costs():
    plan = allocate(INVENTORIES["smollm2"], strategy="uniform", budget="r=8")
    assert set(plan.ranks.values()) == {8} and plan.leftover == 0


def test_single_layer_formulas():
    modules = INVENTORIES["single"]
    assert set(raw("linear_decay", modules, base=8).values()) == {8}
    assert set(raw("linear_growth", modules, base=8).values()) == {8}
    assert set(raw("empirical", modules, base=5, min=1).values()) == {3}


def test_selective_arms_spend_the_studys_budget():
    for name, kind in (("attention_only", "attention"), ("mlp_only", "mlp")):
        plan = allocate(DIALOGPT, strategy=name, budget="r=8")
        assert plan.budget == 3_145_728
        assert {m.kind for m in plan.modules if plan.ranks[m.name]} == {kind}
    subset = DIALOGPT.select("attention")
    plan = allocate(subset, study_targets_inventory=DIALOGPT, strategy="uniform", budget="r=8")
    assert plan.budget == 3_145_728 and plan.targets == "attention" and len(plan.ranks) == 48
    with pytest.raises(RankwiseError, match="no module of kind mlp, only attention"):
        allocate(subset, strategy="mlp_only", budget="r=8")


def test_random_depends_on_seed_and_name_alone():
    one, settings = resolve("random", {}, seed=5)
    values = one.function(DIALOGPT, None, settings)
    assert all(isinstance(v, Fraction) and 4 <= v < 32 for v in values.values())
    subset = DIALOGPT.select("c_proj")
    assert one.function(subset, None, settings) == {n: values[n] for n in subset.names}
    assert len(set(values.values())) == len(values)
    assert raw("random", seed=6) != raw("random", seed=5)
    assert allocate(DIALOGPT, strategy="random", match="none", seed=6).options["seed"] == 6
    pinned = {"seed": 5}
    a, b = (allocate(DIALOGPT, strategy="random", match="none", options=pinned, seed=s).ranks for s in (1, 2))
    assert a == b == raw("random", seed=5)


def test_reversed_of_others():
    ranks, plain = raw("reversed", of="random", seed=5), raw("random", seed=5)
    assert all(ranks[f"h.{i}.mlp.c_fc"] == plain[f"h.{23 - i}.mlp.c_fc"] for i in range(24))
    lower = DIALOGPT.select(r"h\.[0-9]\..*")  # no counterpart there: each keeps its own
    assert raw("reversed", lower, of="linear_decay") == raw("linear_decay", lower)
    assert resolve("reversed", {"of": "empirical", "max": 20})[1] == {
        "of": "empirical",
        "base": 16,
        "min": 4,
        "max": 20,
    }


def test_reversed_mirrors_gains_too(monkeypatch):
    def gains(modules, probe, options):
        return {m.name: np.arange(3, 0, -1.0) * (m.layer + 1) for m in modules}

    monkeypatch.setitem(STRATEGIES, "made_up", Strategy("gains", gains, {}, "for this test"))
    modules = INVENTORIES["small"]
    plain = allocate(modules, strategy="made_up", budget="r=1")
    mirror = allocate(modules, strategy="reversed", options={"of": "made_up"}, budget="r=1")
    assert all(mirror.ranks[f"h.{i}.attn.q_proj"] == plain.ranks[f"h.{4 - i}.attn.q_proj"] for i in range(5))
    with pytest.raises(RankwiseError, match="wants no number of its own"):
        allocate(modules, strategy="reversed", options={"of": "made_up"}, match="none")


def test_gains_reach_budgets_beyond_what_was_measured():
    modules = INVENTORIES["gpt2"]
    few = {m.name: 2.0 ** -np.arange(5, dtype=np.float32) * (m.layer + 1) for m in modules}
    right = {m.name: np.ones((5, m.in_features), np.float32) for m in modules}
    probe = Evidence("gradients", {"singular_values": few, "right_vectors": right})
    large = allocate(modules, strategy="spectral", budget="r=64", probe=probe)
    assert large.leftover < min(m.cost for m in modules) and max(large.ranks.values()) > 64
    assert any("more rank than was measured" in notice for notice in large.provenance["notices"])
    small = allocate(modules, strategy="spectral", budget="r=1", probe=probe)
    assert max(small.ranks.values()) <= 5 and not small.provenance["notices"]


def test_custom_forms():
    small = INVENTORIES["small"]
    assert per_layer(raw("custom", small, ranks=[5, 4, 3, 2, 1]), small) == [5, 4, 3, 2, 1]
    as_keys = {str(i): 5 - i for i in range(5)}
    assert raw("custom", small, ranks=as_keys) == raw("custom", small, ranks=[5, 4, 3, 2, 1])
    assert raw("custom", small, ranks={i: 5 - i for i in range(5)}) == raw("custom", small, ranks=as_keys)
    kinds = raw("custom", small, ranks={"attention": 6, "mlp": 0})
    assert {kinds[m.name] for m in small if m.kind == "mlp"} == {0}
    partial = raw("custom", DIALOGPT, ranks={"c_proj": 2, "mlp.c_proj": 3, "h.0.mlp.c_proj": 9})
    assert (partial["h.0.mlp.c_proj"], partial["h.1.mlp.c_proj"], partial["h.1.attn.c_proj"]) == (9, 3, 2)
    assert partial["h.5.attn.c_attn"] == 0


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1, 2], "must name every layer (0 switches one off); missing: 2, 3, 4"),
        ([1] * 6, "names layers 5; the model's are 0 to 4"),
        ({"attention": 4}, "must name every kind (0 switches one off); missing: mlp"),
        ({"attention": 4, "mlp": 2, "other": 1}, "names kinds other"),
        ({"atention": 4}, "Did you mean 'attention'"),
        ({"q_prj": 4}, "Did you mean 'q_proj'"),
        ({"attention": 4, "q_proj": 4}, "mixes kinds"),
        ({"0": 4, "q_proj": 4}, "mixes layers"),
        ({"q_proj": -1}, "0 or more; got -1"),
        ({"q_proj": float("nan")}, "got nan"),
        ({"q_proj": "8"}, "got '8'"),
        ({"q_proj": True}, "got True"),
        ({}, "is empty"),
        (8, "list or a mapping"),
        ({"q_proj": 0}, "wants less than rank 1"),
    ],
)
def test_custom_faults(ranks, message):
    with pytest.raises(RankwiseError) as error:
        allocate(INVENTORIES["small"], strategy="custom", match="none", options={"ranks": ranks})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "unifrom"}, "Did you mean 'uniform'"),
        ({"strategy": "linear_decay", "options": {"mim": 3}}, "no option 'mim'; it takes base, min. Did you"),
        ({"strategy": "custom"}, "needs the option ranks"),
        ({"strategy": "reversed"}, "needs the option of"),
        ({"strategy": "reversed", "options": {"of": "unifrom"}}, "Did you mean 'uniform'"),
        ({"strategy": "reversed", "options": {"of": "reversed"}}, "not itself"),
        ({"strategy": "reversed", "options": {"of": "uniform", "min": 3}}, "no option 'min'"),
        ({"strategy": "uniform", "options": {"base": 0}}, "base must be a whole number of 1 or more; got 0"),
        ({"strategy": "uniform", "options": {"base": 2.5}}, "got 2.5"),
        ({"strategy": "uniform", "options": {"base": True}}, "got True"),
        ({"strategy": "linear_decay", "options": {"base": 2}}, "min <= base; got min 4, base 2"),
        ({"strategy": "empirical", "options": {"max": 8}}, "min <= base <= max; got min 4, base 16, max 8"),
        ({"strategy": "random", "options": {"seed": -1}}, "seed must be"),
        ({"budget": None}, "needs a budget such as 'r=8'"),
        ({"match": "nothing"}, "match must be one of budget, none"),
        ({"budget": "r=99"}, "rank 8 at most"),
        ({"strategy": "mlp_only", "budget": 20}, "uses: the cheapest unit there costs 28"),
    ],
)  # fmt: skip
def test_faults_state_rule_value_and_choices(arguments, message):
    with pytest.raises(RankwiseError) as error:
        allocate(INVENTORIES["small"], **{"strategy": "uniform", "budget": "r=2", **arguments})
    assert message in str(error.value)


def test_own_ranks_keep_no_budget_and_say_where_they_were_capped():
    plan = allocate(INVENTORIES["small"], strategy="uniform", match="none", budget="r=2", model="m", seed=4)
    assert plan.budget is None and plan.leftover is None and set(plan.ranks.values()) == {8}
    assert plan.provenance["notices"] == ["10 modules wanted more than their full rank and got that."]
    assert plan.provenance["seed"] == 4 and plan.options == {"base": 16}
    assert math.isclose(plan.scale.scaling(3), 2)
