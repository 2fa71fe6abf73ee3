"""vLLM itself, on a CPU: what its engine makes of mixed ranks and of the `uniform` export of them.

Skipped where vLLM cannot be imported. It needs a CPU build and another Transformers than ours, so it has an
environment of its own, in which this file is run. Seen with 0.32.0; of what is followed here
(`lora/peft_helper.py`, `lora_model.py`, `lora_weights.py`, `layers/column_parallel_linear.py`) 0.33.0 has
the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.adapters import lora_layers
from rankwise.config import ScaleRule
from rankwise.exports.adapter_files import read_adapter
from rankwise.exports.programs import PROGRAMS, judge, vllm
from rankwise.exports.uniform import export_uniform
from rankwise.inventory import inventory
from tests.parts import plan_of

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
worker_manager = pytest.importorskip("vllm.lora.worker_manager", exc_type=ImportError)

VOCABULARY = 264
RANK = 8  # what the engine is started with; vLLM's next larger one is 16
TOKENS = [(7 * i + 3) % 250 for i in range(24)]
PACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}
# Of layer 0: q without k and v, gate without up. Of layer 1: v and up alone, no o.
RANKS = {
    "0.self_attn.q_proj": 3, "0.self_attn.o_proj": 8, "0.mlp.gate_proj": 1, "0.mlp.down_proj": 5,
    "1.self_attn.v_proj": 8, "1.mlp.up_proj": 2, "1.mlp.down_proj": 3,
}  # fmt: skip
PATTERNS: dict[str, Any] = {  # keys that overlap (the first match wins), r and alpha of the rest, rsLoRA
    "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"],
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 8, "q_proj": 2, "up_proj": 1},
    "alpha_pattern": {"v_proj": 40, r".*\.0\..*": 3, "o_proj": 1},
}  # fmt: skip
CASES = ("constant", "alpha", "rslora", "patterns")


def tiny() -> LlamaForCausalLM:
    """A random Llama with heads of 32, the smallest that vLLM's attention has on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=257, pad_token_id=258, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def config_of(case: str) -> LoraConfig:
    if case == "patterns":
        return LoraConfig(**PATTERNS)
    model = tiny()
    ranks = {name: RANKS.get(name.removeprefix("model.layers."), 0) for name in inventory(model).names}
    rule = ScaleRule.model_validate({"rule": case, "value": 3.0})
    changes = {"ranks": ranks, "match": "none", "budget": None, "scale": rule}
    return plan_of(model, budget="r=1").model_copy(update=changes).lora_config()


def made(folder: Path, config: LoraConfig) -> Path:
    """Save an adapter whose B is not zero."""
    adapted: Any = get_peft_model(tiny(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters as PEFT writes them, by case."""
    folder = tmp_path_factory.mktemp("mixed")
    return {case: made(folder / case, config_of(case)) for case in CASES}


@pytest.fixture(scope="module")
def uniform(mixed: dict[str, Path], base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their uniform exports."""
    folder = tmp_path_factory.mktemp("uniform")
    for case, adapter in mixed.items():
        assert export_uniform(adapter, folder / case, model=str(base)).rank == RANK
    return {case: folder / case for case in mixed}


class Engine:
    """A whole vLLM engine in this process, on one CPU thread."""

    def __init__(self, base: Path):
        from vllm import LLM

        self.llm = LLM(
            model=str(base), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, seed=0,
            enable_lora=True, max_loras=1, max_lora_rank=RANK, max_model_len=64, max_num_seqs=2,
            max_num_batched_tokens=64, kv_cache_memory_bytes=2**25, max_logprobs=VOCABULARY,
        )  # fmt: skip
        self.seen: dict[str, Any] = {}

    @property
    def manager(self) -> Any:
        """What reads and holds adapters (`WorkerLoRAManager`)."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager

    def request(self, folder: Path) -> Any:
        """A request for the adapter of a folder, under a number of its own."""
        from vllm.lora.request import LoRARequest

        new = LoRARequest(str(folder), len(self.seen) + 1, str(folder))
        return self.seen.setdefault(str(folder), new)

    def logprobs(self, folder: Path | None) -> torch.Tensor:
        """Log-probabilities (positions - 1, vocabulary) of TOKENS' successors."""
        from vllm import SamplingParams

        settings = SamplingParams(max_tokens=1, prompt_logprobs=VOCABULARY, detokenize=False)
        request = None if folder is None else self.request(folder)
        prompts = [{"prompt_token_ids": TOKENS}]
        answer = self.llm.generate(prompts, settings, lora_request=request, use_tqdm=False)[0]
        rows = answer.prompt_logprobs[1:]
        return torch.tensor([[row[i].logprob for i in range(VOCABULARY)] for row in rows])

    def buffers(self) -> dict[str, torch.Tensor]:
        """Module -> b @ a of what lies in the slot that the last request was computed with."""
        found = {}
        for name, module in self.manager._adapter_manager.modules.items():
            if not name.startswith("model.layers."):  # the embedding and the head, which nothing adapts here
                continue
            layer, _, kind = name.removeprefix("model.layers.").partition(".")
            for part, a, b in zip(PACKED[kind], module.lora_a_stacked, module.lora_b_stacked, strict=True):
                found[f"model.layers.{layer}.{part}"] = b[0, 0] @ a[0, 0]
        return found


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # which vLLM replaces
        yield Engine(base)


@torch.no_grad()
def expected(folder: Path | None, scales: dict[str, float] | None = None) -> torch.Tensor:
    """What PEFT gives, with other scales if they are named."""
    model: Any = tiny()
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        for name, module in lora_layers(model).items() if scales else ():
            module.scaling["default"] = (scales or {})[name]
    logits = model(input_ids=torch.tensor([TOKENS])).logits[0, :-1]
    return logits.log_softmax(-1)


def updates(folder: Path, scales: dict[str, float] | None = None) -> dict[str, torch.Tensor]:
    """Module -> scale * b @ a as stored, or with other scales."""
    stored = read_adapter(folder).updates
    return {u.name: (scales[u.name] if scales else u.scale) * (u.b @ u.a) for u in stored}


def need_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Compare the updates of all modules; those that are not wanted must be zero."""
    assert set(wanted) <= set(found)
    for name, update in found.items():
        if name in wanted:
            assert (update - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
        else:
            assert not update.any(), name


def held(engine: Engine, folder: Path) -> dict[str, torch.Tensor]:
    """Module -> scaling * lora_b @ lora_a, as vLLM's loader returns them."""
    model = engine.manager._load_adapter(engine.request(folder))
    return {name: lora.scaling * (lora.lora_b @ lora.lora_a) for name, lora in model.loras.items()}


def test_without_an_adapter(engine: Engine):
    assert (engine.logprobs(None) - expected(None)).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_the_export_is_served_as_trained(
    engine: Engine, mixed: dict[str, Path], uniform: dict[str, Path], case: str
):
    trained = updates(mixed[case])
    loaded = held(engine, uniform[case])
    assert "model.layers.0.self_attn.k_proj" in loaded  # filled with zeros, for its siblings
    need_same(loaded, trained)
    wanted, untouched = expected(mixed[case]), expected(None)
    assert (wanted - untouched).abs().max() > 0.5
    assert (engine.logprobs(uniform[case]) - wanted).abs().max() < 1e-4
    need_same(engine.buffers(), trained)


@pytest.mark.parametrize("case", CASES)
def test_mixed_ranks_are_served_as_the_emulator_says(engine: Engine, mixed: dict[str, Path], case: str):
    applied = PROGRAMS["vllm"].apply(read_adapter(mixed[case]))
    assert applied.refusal is None
    scaled = updates(mixed[case], dict(applied.scales))
    need_same(held(engine, mixed[case]), scaled)
    assert (engine.logprobs(mixed[case]) - expected(mixed[case])).abs().max() < 1e-4
    need_same(engine.buffers(), scaled)


@pytest.mark.parametrize("case", CASES)
def test_without_patterns_the_older_rule_holds(
    engine: Engine, mixed: dict[str, Path], tmp_path: Path, case: str
):
    """What vLLM to 0.31 does with the original, seen in a later one that finds no patterns.

    It is wrong but for one scale on all modules.
    """
    adapter = read_adapter(mixed[case])
    before = dict(PROGRAMS["vllm-0.31"].apply(adapter).scales)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in mixed[case].iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {}, "alpha_pattern": {}}))
    found = engine.logprobs(bare)
    assert (found - expected(mixed[case], before)).abs().max() < 1e-4
    need_same(engine.buffers(), updates(mixed[case], before))
    wrong = judge(PROGRAMS["vllm-0.31"], adapter).verdict == "wrong"
    assert wrong == (case != "constant")
    assert ((found - expected(mixed[case])).abs().max() > 0.05) == wrong


REFUSED: dict[str, dict[str, Any]] = {
    "rank": {"r": 16},
    "rank of a pattern": {"r": 4, "rank_pattern": {"q_proj": 9}},
    "rank that no module has": {"r": 16, "rank_pattern": {"q_proj": 4}},
    "modules to save": {"r": 4, "modules_to_save": ["model.norm"]},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_as_the_emulator_says(engine: Engine, tmp_path: Path, kind: str):
    folder = made(tmp_path / "a", LoraConfig(target_modules=["q_proj"], **REFUSED[kind]))
    refusal = vllm(read_adapter(folder), max_lora_rank=RANK).refusal
    assert refusal is not None
    said = {"modules to save": r"Unsupported modules_to_save: \['model.norm'\]"}.get(kind, refusal)
    with pytest.raises(ValueError, match=said):
        engine.manager._load_adapter(engine.request(folder))


def test_a_rank_that_no_module_has_is_mended(engine: Engine, tmp_path: Path):
    """The refused adapter of above loads once it is exported: its r is that of its tensors."""
    folder = made(tmp_path / "a", LoraConfig(target_modules=["q_proj"], **REFUSED["rank that no module has"]))
    export_uniform(folder, tmp_path / "out")
    need_same(held(engine, tmp_path / "out"), updates(folder))
