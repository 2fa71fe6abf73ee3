import hashlib
import warnings

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from rankwise.errors import RankwiseError
from rankwise.inventory import KNOWN, inventory
from rankwise.strategies import allocate

LLAMA = ["q", "k", "v", "o", "gate", "up", "down"]
FUSED = ["qkv", "o", "fc_in", "fc_out"]
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": (SIZES, LLAMA),
    "qwen2": (SIZES, LLAMA),
    "qwen3": ({**SIZES, "head_dim": 8}, LLAMA),
    "mistral": (SIZES, LLAMA),
    "gemma2": ({**SIZES, "head_dim": 16}, LLAMA),
    "gemma3_text": ({**SIZES, "head_dim": 16}, LLAMA),
    "phi3": (SIZES, ["o", "qkv", "gate_up", "down"]),
    "gpt2": (GPT, FUSED),
    "gpt_neox": (SIZES, FUSED),
    "opt": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, ["k", "v", "q", "o", "fc_in", "fc_out"]),
    "falcon": ({k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, FUSED),
    "bloom": ({**SIZES, "n_head": 4}, FUSED),
}
ATTENTION_PARTS = {"q", "k", "v", "o", "qkv"}


def tiny(family, **changes):
    sizes = FAMILIES[family][0] if family in FAMILIES else SIZES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**sizes, **changes}))


def custom_plan(modules, scale=None):
    """Ranks from 0 to 3 that follow from the names, so that neighbours differ."""
    ranks = {m.name: hashlib.sha256(m.name.encode()).digest()[0] % 4 for m in modules}
    ranks[modules.names[0]] = 2
    return allocate(
        modules, strategy="custom", match="none", options={"ranks": ranks}, scale=scale, model="tiny"
    )


def read_back(adapted):
    """{module name: (rank, scale)} from the tensors themselves."""
    found = {}
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            found[name] = (module.lora_A["default"].weight.shape[0], module.scaling["default"])
    return found


def assert_built_as_planned(model, plan, **settings):
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = get_peft_model(model, plan.lora_config(**settings))
    found = read_back(adapted)
    assert {n: r for n, (r, _) in found.items()} == {n: r for n, r in plan.ranks.items() if r}
    for name, (rank, scale) in found.items():
        assert scale == pytest.approx(plan.scale.scaling(rank), rel=1e-12), name
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.parameters
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found_and_built_as_planned(family):
    model = tiny(family)
    modules = inventory(model)
    by_name = dict(model.named_modules())
    assert modules.layers == 2
    assert [m.part for m in modules if m.layer == 1] == FAMILIES[family][1]
    assert all(m.kind == ("attention" if m.part in ATTENTION_PARTS else "mlp") for m in modules)
    assert modules.base_parameters == model.num_parameters()
    assert modules.unreachable == () and modules.notices == () and modules.unreachable_share == 0
    for module in modules:
        weight = by_name[module.name].weight
        shape = (module.in_features, module.out_features)
        assert tuple(weight.shape) == (shape if module.conv1d else shape[::-1])
        assert module.name.endswith("." + module.path) and f".{module.layer}." in module.name
    assert_built_as_planned(model, custom_plan(modules))


@pytest.mark.parametrize("rule", [("constant", 2), ("rslora", 16), ("alpha", 32)])
def test_scale_rules_reach_the_built_model(rule):
    scale = {"rule": rule[0], "value": rule[1]}
    model = tiny("gpt2", n_layer=12)  # h.1 must not take what is meant for h.11
    plan = custom_plan(inventory(model), scale)
    adapted = assert_built_as_planned(model, plan)
    assert adapted(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 96)


def test_gpt2_same_suffix_two_kinds():
    modules = inventory(tiny("gpt2"))
    assert modules["transformer.h.0.attn.c_proj"].kind == "attention"
    assert modules["transformer.h.0.mlp.c_proj"].kind == "mlp"
    assert modules["transformer.h.0.mlp.c_proj"].in_features == 128
    assert all(m.conv1d for m in modules)


def test_smollm2_shapes_and_costs():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True,
            )
        )  # fmt: skip
    modules = inventory(model)
    assert modules.base_parameters == 134_515_008  # facts: tied embedding counted once
    assert modules.layers == 30 and len(modules) == 210
    cost = {m.part: m.cost for m in modules}
    assert cost == {"q": 1152, "k": 768, "v": 768, "o": 1152, "gate": 2112, "up": 2112, "down": 2112}
    assert [c // 192 for c in (768, 1152, 2112)] == [4, 6, 11]


def test_dialogpt_medium_counts():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16, vocab_size=50257))
    modules = inventory(model)
    assert modules.base_parameters == 354_823_168
    assert modules.cost(16) == 6_291_456 and modules.cost(8) == 3_145_728
    plan = allocate(modules, strategy="uniform", budget="r=16", model="DialoGPT-medium")
    assert plan.parameters == plan.budget == 6_291_456 and set(plan.ranks.values()) == {16}
    adapted = assert_built_as_planned(model, plan)
    assert sum(p.numel() for p in adapted.parameters()) == 361_114_624
    adapted.unload()
    assert_built_as_planned(model, allocate(modules, strategy="uniform", budget="r=8"))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
    ],
)
def test_experts_are_unreachable_and_said_so(family, changes):
    model = tiny(family, **changes)
    with pytest.raises(RankwiseError, match=r"reaches \d+\.\d% of.*`accept_unreachable: true`"):
        inventory(model)
    modules = inventory(model, accept_unreachable=True)
    blocks = {n: p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1}
    missed = {n: size for n, size in blocks.items() if ".experts." in n or n.endswith("mlp.gate.weight")}
    assert dict(modules.unreachable) == missed
    assert modules.unreachable_share == pytest.approx(sum(missed.values()) / sum(blocks.values()))
    assert "No adapter reaches" in modules.notices[0]
    assert_built_as_planned(model, custom_plan(modules))


class Odd(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.selfattn = nn.ModuleDict({"mix_a": nn.Linear(width, width)})
        self.mixer = nn.ModuleDict({"in_proj": nn.Linear(width, 4 * width)})
        self.fused_things = nn.Linear(width, 3 * width)
        self.swell = nn.Linear(width, 4 * width)
        self.square = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, 2 * width)


class OddModel(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.trunk = nn.ModuleList([Odd() for _ in range(blocks)])
        self.head = nn.Linear(8, 10)


def test_unknown_architecture_is_guessed_with_one_notice():
    modules = inventory(OddModel())
    assert modules.layers == 3 and len(modules) == 18 and modules.architecture == "OddModel"
    kinds = {m.part: m.kind for m in modules}
    assert kinds == {
        "mix_a": "attention", "fused_things": "attention", "swell": "mlp", "square": "other", "up": "mlp",
        "in_proj": "other",
    }  # fmt: skip
    assert (
        len(modules.notices) == 1 and "guessed" in modules.notices[0] and "swell as mlp" in modules.notices[0]
    )
    assert "up as" not in modules.notices[0]


def test_single_layer_and_sequential_blocks():
    assert inventory(OddModel(1)).layers == 1
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)])
    assert [m.name for m in inventory(nn.ModuleDict({"stack": blocks}))][:2] == ["stack.0.0", "stack.0.2"]
    with pytest.raises(RankwiseError, match="No decoder blocks"):
        inventory(nn.Linear(3, 3))


def test_language_model_inside_a_wrapper():
    wrapper = nn.Module()
    wrapper.config = CONFIG_MAPPING["llama"](**SIZES)
    wrapper.vision_tower = nn.ModuleList([nn.Linear(300, 300) for _ in range(2)])  # as deep, and larger
    wrapper.language_model = tiny("llama")
    modules = inventory(wrapper)
    assert modules.names[0] == "language_model.model.layers.0.self_attn.q_proj" and len(modules) == 14


def test_names_that_peft_would_confuse_are_excluded():
    model = OddModel()
    model.draft = nn.Module()
    model.draft.trunk = nn.ModuleList([Odd()])
    modules = inventory(model)
    assert "draft.trunk.0.square" in modules.lookalikes
    assert_built_as_planned(model, custom_plan(modules), task_type=None)


def test_attention_that_never_calls_its_output_map_is_unreachable():
    layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, dim_feedforward=32) for _ in range(2)])
    model = nn.ModuleDict({"layers": layers})
    with pytest.raises(RankwiseError, match="accept_unreachable"):
        inventory(model)
    modules = inventory(model, accept_unreachable=True)
    assert set(modules.suffixes) == {"linear1", "linear2"}
    assert modules.unreachable_share == pytest.approx(4 * 64 / (4 * 64 + 2 * 8 * 32))


def test_config_that_contradicts_the_blocks_is_noticed():
    model = OddModel()
    model.config = CONFIG_MAPPING["llama"](num_hidden_layers=7)
    assert "states 7 layers" in inventory(model).notices[0]


def test_adapters_already_there():
    from peft import get_peft_model

    model = tiny("llama")
    adapted = get_peft_model(model, custom_plan(inventory(model)).lora_config())
    for carrier in (adapted, model):
        with pytest.raises(RankwiseError, match="already carries adapters"):
            inventory(carrier)
    assert len(inventory(adapted.unload())) == 14


class Packed(nn.Linear):
    """Two weights a byte, as bitsandbytes stores NF4."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        packed = torch.zeros((n_in * n_out // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_packed_weights_count_at_their_true_shape():
    block = nn.ModuleDict({"q_proj": Packed(16, 24), "o_proj": Packed(24, 16)})
    modules = inventory(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    assert modules.base_parameters == 2 * 16 * 24 and modules.unreachable == ()
    assert modules.costs == {"layers.0.q_proj": 40, "layers.0.o_proj": 40}
    assert modules["layers.0.q_proj"].max_rank == 16


def test_bitsandbytes_classes():
    bnb = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is optional; Packed stands in for it above"
    )
    block = nn.ModuleDict({"q_proj": bnb.nn.Linear4bit(16, 24), "up_proj": bnb.nn.Linear8bitLt(16, 24)})
    modules = inventory(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    assert [m.cost for m in modules] == [40, 40]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all", 8), ("attention", 4), ("mlp", 4), ("c_proj", 4), ("mlp.c_proj", 2), ("c_attn", 2),
        (["c_attn", "c_fc"], 4), (["attention", "c_proj"], 6),
        (r".*\.h\.1\..*", 4), (r".*\.(c_attn|c_fc)", 4),
        ("transformer.h.0.mlp.c_fc", 1), ([r".*0\.attn.*", "c_fc"], 4),
    ],
)  # fmt: skip
def test_targets(targets, count):
    modules = inventory(tiny("gpt2"))
    chosen = modules.select(targets)
    assert len(chosen) == count and chosen.layers == 2
    assert list(chosen.names) == [n for n in modules.names if n in set(chosen.names)]
    assert chosen.base_parameters == modules.base_parameters


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj", "suffixes here are c_attn, c_proj, c_fc"),
        ("c_attm", "Did you mean 'c_attn'"),
        ("atention", "Did you mean 'attention'"),
        (["c_attn", "gate_proj"], "'gate_proj' matches no"),
        (".*(c_attn", "unterminated subpattern at position 2"),
        (r"h\.\d+\.attn.*", "must match a full name"),
        ("other", "matches no adaptable module"),
        ("", "must be a kind"),
        ([], "names no module"),
        ([3], "got 3"),
    ],
)
def test_targets_that_match_nothing(targets, message):
    with pytest.raises(RankwiseError) as error:
        inventory(tiny("gpt2")).select(targets)
    assert message in str(error.value)


def test_lookup_and_table_of_names():
    modules = inventory(tiny("llama"))
    with pytest.raises(RankwiseError, match=r"Did you mean 'model.layers.0.self_attn.q_proj'"):
        modules["model.layers.0.self_atn.q_proj"]
    assert modules.costs[modules.names[0]] == modules[modules.names[0]].cost
    assert {kind for kind, _ in KNOWN.values()} == {"attention", "mlp"}
