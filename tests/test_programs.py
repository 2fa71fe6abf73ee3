"""The programs' scale rules, by hand, on adapters where they disagree; PEFT's own against PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from rankwise.exports.adapter_files import Adapter, read_adapter
from rankwise.exports.programs import (
    PROGRAMS,
    energies,
    judge,
    llama_cpp,
    peft,
    sglang,
    tgi,
    tgi_rank,
    vllm,
    vllm_before_patterns,
    vllm_rank,
)
from tests.conftest import tiny_llama
from tests.test_shrink_adapter import layers

ATTENTION = "model.layers.0.self_attn."
Q, K, V, OUT = (f"{ATTENTION}{part}_proj" for part in "qkvo")


def made(
    folder: Path, ranks: dict[str, int], extra: dict[str, torch.Tensor] | None = None, **config: Any
) -> Adapter:
    """Write an adapter by hand: every module maps 64 to 64, and |B A| is the root of its rank."""
    folder.mkdir(parents=True)
    tensors = dict(extra or {})
    for name, rank in ranks.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.eye(rank, 64)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.eye(64, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "target_modules": sorted({n.rpartition(".")[2] for n in ranks}), **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return read_adapter(folder)


def layer(number: int, *parts: str) -> list[str]:
    """Names of modules of a Llama's layer."""
    mlp = ("gate", "up", "down")
    return [f"model.layers.{number}.{'mlp' if part in mlp else 'self_attn'}.{part}_proj" for part in parts]


MIXED = {Q: 4, K: 8, V: 16}
CONSTANT_ALPHA = {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4, "v_proj": 16}}
CONSTANT_SCALE = CONSTANT_ALPHA | {"alpha_pattern": {"q_proj": 8, "v_proj": 32}}
RSLORA = {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4, "v_proj": 16}, "use_rslora": True}


@pytest.mark.parametrize(
    ("config", "program", "scales"),
    [
        (CONSTANT_ALPHA, peft, (4, 2, 1)),
        (CONSTANT_ALPHA, vllm, (4, 2, 1)),
        (CONSTANT_ALPHA, vllm_before_patterns, (2, 2, 2)),
        (CONSTANT_ALPHA, tgi, (2, 2, 2)),
        (CONSTANT_ALPHA, llama_cpp, (4, 2, 1)),
        (CONSTANT_SCALE, peft, (2, 2, 2)),
        (CONSTANT_SCALE, vllm, (2, 2, 2)),
        (CONSTANT_SCALE, vllm_before_patterns, (2, 2, 2)),
        (CONSTANT_SCALE, llama_cpp, (4, 2, 1)),
        (RSLORA, peft, (8, 16 / math.sqrt(8), 4)),
        (RSLORA, vllm, (8, 16 / math.sqrt(8), 4)),
        (RSLORA, vllm_before_patterns, (16 / math.sqrt(8),) * 3),
        (RSLORA, llama_cpp, (4, 2, 1)),
    ],
)
def test_rules_on_mixed_ranks(config: dict, program: Any, scales: tuple[float, ...], tmp_path: Path):
    applied = program(made(tmp_path / "a", MIXED, **config))
    assert applied.refusal is None
    assert [applied.scales[name] for name in MIXED] == pytest.approx(scales)


def test_rslora_of_one_rank(tmp_path: Path):
    """alpha/sqrt(r) is 2 and alpha/r is 1/2: SGLang and llama.cpp take the second."""
    adapter = made(tmp_path / "a", dict.fromkeys((Q, K, V), 16), r=16, lora_alpha=8, use_rslora=True)
    found = {name: program.apply(adapter).scales[Q] for name, program in PROGRAMS.items()}
    assert found == {"peft": 2, "vllm": 2, "vllm-0.31": 2, "tgi": 2, "sglang": 0.5, "llama.cpp": 0.5}


def test_patterns_as_peft_reads_them(tmp_path: Path):
    """Suffixes from a dot on, regular expressions, the first match: the built layers are the measure."""
    config: dict[str, Any] = {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\..*_proj": 2, "q_proj": 8, "0.mlp.down_proj": 3, "own_proj": 7},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, "q_proj": 9, "^mlp.down_proj": 1},
    }  # fmt: skip
    model = get_peft_model(tiny_llama(), LoraConfig(**config))
    model.save_pretrained(tmp_path / "a")
    built = {name: module.scaling["default"] for name, module in layers(model).items()}
    assert len(set(built.values())) == 5
    adapter = read_adapter(tmp_path / "a")
    assert peft(adapter).scales == pytest.approx(built)
    assert vllm(adapter).scales == pytest.approx(built)


def test_peft_refuses_what_is_not_declared(tmp_path: Path):
    adapter = made(tmp_path / "a", {Q: 4, K: 8}, r=8, lora_alpha=16)
    assert f"{Q} has rank 4 in its tensors and 8" in str(peft(adapter).refusal)
    assert vllm(adapter).scales == {Q: 2, K: 2}, "vLLM divides by the declared rank"
    assert judge(PROGRAMS["vllm"], adapter).wrong == 1


# --- vLLM ------------------------------------------------------------------------------------------


def test_vllm_allows_these_ranks(tmp_path: Path):
    assert [vllm_rank(rank) for rank in (1, 2, 8, 9, 33, 257, 320, 321, 512)] == [
        1, 8, 8, 16, 64, 320, 320, 512, 512,
    ]  # fmt: skip
    assert vllm_rank(513) is None
    adapter = made(tmp_path / "a", {Q: 24, V: 8}, r=8, lora_alpha=8, rank_pattern={"q_proj": 24})
    for program in (vllm, vllm_before_patterns):
        assert program(adapter).refusal is None
        assert "24 is greater than max_lora_rank 16" in str(program(adapter, max_lora_rank=16).refusal)
    high = made(tmp_path / "b", {Q: 8}, r=8, lora_alpha=8, rank_pattern={"no_such": 600})
    assert "600 is greater than max_lora_rank 512" in str(vllm(high).refusal)
    assert vllm_before_patterns(high).refusal is None


def test_vllm_takes_no_other_tensors(tmp_path: Path):
    norm = {"base_model.model.model.norm.weight": torch.ones(6)}
    saved = made(tmp_path / "a", {Q: 8}, norm, r=8, lora_alpha=8, modules_to_save=["norm"])
    assert "modules_to_save must be none; got norm" in str(vllm(saved).refusal)
    stray = made(tmp_path / "b", {Q: 8}, norm, r=8, lora_alpha=8)
    assert "unsupported LoRA weight" in str(vllm(stray).refusal)
    head = {"base_model.model.score.weight": torch.ones(2, 6)}
    assert vllm(made(tmp_path / "c", {Q: 8}, head, modules_to_save=["score"])).refusal is None
    copied = {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(6, 6)}
    assert vllm(made(tmp_path / "d", {Q: 8}, copied)).refusal is None


def test_vllm_and_missing_siblings(tmp_path: Path):
    adapter = made(tmp_path / "a", dict.fromkeys(layer(0, "k", "up"), 8), r=8, lora_alpha=16)
    assert set(vllm(adapter).scales.values()) == {2}


# --- TGI -------------------------------------------------------------------------------------------


def test_tgi_scales_later_kinds_by_the_padded_rank(tmp_path: Path):
    assert [tgi_rank(rank) for rank in (1, 8, 9, 16, 17, 48)] == [8, 8, 16, 16, 32, 48]
    adapter = made(tmp_path / "a", dict.fromkeys((Q, K, OUT), 4), r=4, lora_alpha=16)
    assert tgi(adapter).scales == {Q: 4, K: 2, OUT: 2}
    even = made(tmp_path / "b", dict.fromkeys((Q, K, OUT), 8), r=8, lora_alpha=16)
    assert judge(PROGRAMS["tgi"], even).verdict == "right"


def test_tgi_leaves_out_what_one_layer_lacks(tmp_path: Path):
    names = [*layer(0, "q", "v"), *layer(1, "q"), "lm_head"]
    adapter = made(tmp_path / "a", dict.fromkeys(names, 8), r=8, lora_alpha=8)
    assert tgi(adapter).scales == {names[0]: 1, names[1]: 0, names[2]: 1, "lm_head": 0}
    assert set(tgi(adapter, layers=3).scales.values()) == {0}


def test_tgi_stacks_the_ranks_of_a_kind(tmp_path: Path):
    first, second = layer(0, "q") + layer(1, "q")
    pattern = {r"layers\.1\.self_attn\.q_proj": 16}
    adapter = made(tmp_path / "a", {first: 4, second: 16}, r=4, lora_alpha=8, rank_pattern=pattern)
    assert "q_proj has ranks 8, 16" in str(tgi(adapter).refusal)


# --- SGLang ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ("qkv", None), ("qv", None), ("o", None), ("gate up", None), ("gate", None),
        ("kv", "q_proj, with which"), ("q", "v_proj, with which"), ("qk", "v_proj, with which"),
        ("k", "q_proj, with which"), ("up", "gate_proj, with which"),
    ],
)  # fmt: skip
def test_sglang_and_missing_siblings(parts: str, says: str | None, tmp_path: Path):
    names = layer(0, *(parts.split() if parts in ("gate up", "gate", "up") else parts))
    refusal = sglang(made(tmp_path / "a", dict.fromkeys(names, 8), r=8, lora_alpha=8)).refusal
    assert refusal is None if says is None else says in str(refusal)


def test_sglang_refuses_other_ranks_and_regular_expressions(tmp_path: Path):
    adapter = made(tmp_path / "a", MIXED, **CONSTANT_SCALE)
    assert "LoRA buffer shape" in str(sglang(adapter).refusal)
    pattern = made(tmp_path / "b", {OUT: 8}, r=8, target_modules=".*o_proj")
    assert "must be a list" in str(sglang(pattern).refusal)
    assert sglang(made(tmp_path / "c", {OUT: 8}, r=8, target_modules="all-linear")).refusal is None


# --- llama.cpp -------------------------------------------------------------------------------------


def test_llama_cpp_takes_no_alpha_for_one(tmp_path: Path):
    assert llama_cpp(made(tmp_path / "a", {Q: 4}, r=4, lora_alpha=0)).scales == {Q: 1}


def test_llama_cpp_and_other_tensors(tmp_path: Path):
    norm = {"base_model.model.model.norm.weight": torch.ones(6)}
    dropped = made(tmp_path / "a", {Q: 8}, norm, r=8, lora_alpha=8)
    assert llama_cpp(dropped).dropped == tuple(norm)
    assert judge(PROGRAMS["llama.cpp"], dropped).verdict == "wrong"
    head = made(tmp_path / "b", {Q: 8}, {"base_model.model.lm_head.weight": torch.ones(6, 6)}, r=8)
    assert "its converter stops at base_model.model.lm_head.weight" in str(llama_cpp(head).refusal)


def test_gpt2_is_told_apart(tmp_path: Path):
    adapter = made(tmp_path / "a", {"transformer.h.0.attn.c_attn": 8}, r=8, lora_alpha=8)
    assert "turns GPT-2's A and B" in llama_cpp(adapter).notices[0]
    assert "no LoRA for GPT-2" in vllm(adapter).notices[0]
    other = made(tmp_path / "b", {"model.layers.0.mlp.c_fc": 8}, r=8, lora_alpha=8)
    assert not llama_cpp(other).notices


# --- judging ---------------------------------------------------------------------------------------


def test_error_by_hand(tmp_path: Path):
    """|B A|^2 is the rank, so the truth weighs 4, 8, 16 by its squared scales 16, 4, 1: 64 + 32 + 16."""
    adapter = made(tmp_path / "a", MIXED, **CONSTANT_ALPHA)
    assert list(energies(adapter.updates).values()) == pytest.approx([8, 4, 16])
    verdict = judge(PROGRAMS["vllm-0.31"], adapter)
    assert verdict.verdict == "wrong"
    assert (verdict.wrong, verdict.modules) == (2, 3)
    assert (verdict.smallest, verdict.largest, verdict.mean) == pytest.approx((0.5, 2, 3.5 / 3))
    assert verdict.worst in (Q, V)
    assert verdict.error == pytest.approx(math.sqrt((4 * (2 - 4) ** 2 + 16 * (2 - 1) ** 2) / 112))
    assert judge(PROGRAMS["peft"], adapter).verdict == "right"


def test_an_update_of_zero_cannot_be_wrong(tmp_path: Path):
    names = [*layer(0, "q", "v"), *layer(1, "q")]
    made(tmp_path / "a", dict.fromkeys(names, 8), r=8, lora_alpha=8)
    adapter = read_adapter(tmp_path / "a")
    assert judge(PROGRAMS["tgi"], adapter).wrong == 1
    adapter.updates[1].b.zero_()
    assert adapter.updates[1].name == names[1]
    assert judge(PROGRAMS["tgi"], adapter).verdict == "right"
