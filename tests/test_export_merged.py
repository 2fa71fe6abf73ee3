"""`export_merged` against the adapter on its base, both loaded with Transformers and PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.errors import RankwiseError
from rankwise.exports import merged
from rankwise.exports.merged import export_merged
from tests.conftest import byte_tokenizer
from tests.parts import MODELS
from tests.refusals import files
from tests.test_export_uniform import distance, logits, randomised
from tests.test_shrink_adapter import BAD, LLAMA, edited, spoil, trained

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": ("llama", {"target_modules": LLAMA, "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "tied head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D and embedding": ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama (tied, grouped heads) and the tiny GPT-2 (Conv1D, two of them square)."""
    folder = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


def made(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Save a random adapter; return its logits."""
    config = LoraConfig(**{"r": 6, "lora_alpha": 3, "task_type": "CAUSAL_LM", **settings})
    adapted = randomised(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    adapted.save_pretrained(folder)
    return logits(adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_gives_the_adapters_logits(bases: dict[str, Path], kind: str, tmp_path: Path):
    family, settings = KINDS[kind]
    wanted = made(bases[family], tmp_path / "a", **settings)
    before = files(bases[family])
    done = export_merged(tmp_path / "a", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert distance(logits(model), wanted) < 1e-5
    assert distance(logits(AutoModelForCausalLM.from_pretrained(bases[family]).eval()), wanted) > 1e-3
    assert done.untied == ("tied" in kind or "saved" in kind or "embedding" in kind)
    assert done.effect > 100 * done.logit_error
    assert files(bases[family]) == before, "the base was changed"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("rank")["input_ids"] == byte_tokenizer()("rank")["input_ids"]


@pytest.mark.parametrize(("dtype", "within"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_half_precision_rounds_and_says_by_how_much(
    bases: dict[str, Path], dtype: str, within: float, tmp_path: Path
):
    wanted = made(bases["llama"], tmp_path / "a", target_modules=LLAMA)
    done = export_merged(tmp_path / "a", tmp_path / "out", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert 0 < distance(logits(model), wanted) < within
    assert done.bytes < 0.6 * sum(p.stat().st_size for p in bases["llama"].glob("*.safetensors"))
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(next(stored.parameters()).dtype) == f"torch.{done.dtype}"
    assert "of the adapter's effect" in done.summary()


def test_what_peft_does_not_load_as_declared_is_mended(bases: dict[str, Path], tmp_path: Path):
    """A declared rank that the tensors do not have: the tensors count, as `inspect` says."""
    wanted = made(bases["llama"], tmp_path / "a", target_modules=["q_proj", "v_proj"])
    folder = edited(tmp_path / "a", tmp_path / "b", r=12, lora_alpha=3)
    done = export_merged(folder, tmp_path / "out")
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), wanted) < 1e-5
    assert any("which PEFT refuses to load" in notice for notice in done.notices)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_that_went_wrong_leaves_nothing(
    bases: dict[str, Path], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One weight of one module off by a ten-thousandth of its largest, far below what bf16 rounds."""
    made(bases["llama"], tmp_path / "a", target_modules=LLAMA)
    merge = merged._merge

    def faulty(model: Any, adapter: Any) -> torch.Tensor:
        meant = merge(model, adapter)
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[3, 3] += 1e-4 * weight.abs().max()
        return meant

    monkeypatch.setattr(merged, "_merge", faulty)
    with pytest.raises(RankwiseError, match=r"layers.1.mlp.up_proj' of the merged model differs"):
        export_merged(tmp_path / "a", tmp_path / "new" / "out", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_stored_otherwise_leaves_nothing(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A saved head that is not the adapter's; and a file that does not hold what was written to it."""
    made(bases["llama"], tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    merge = merged._merge

    def faulty(model: Any, adapter: Any) -> torch.Tensor:
        meant = merge(model, adapter)
        model.lm_head.weight[0, 0] += 1e-3
        return meant

    with monkeypatch.context() as patch:
        patch.setattr(merged, "_merge", faulty)
        with pytest.raises(RankwiseError, match=r"lm_head.weight' of the merged model is not the tensor"):
            export_merged(tmp_path / "a", tmp_path / "new" / "out")
    load = AutoModelForCausalLM.from_pretrained

    def spoilt(folder: Any, **settings: Any) -> Any:
        model = load(folder, **settings)
        if "partial" in str(folder):
            model.model.norm.weight.data[0] += 1
        return model

    monkeypatch.setattr(merged.AutoModelForCausalLM, "from_pretrained", spoilt)
    with pytest.raises(RankwiseError, match=r"norm.weight' of the merged model reads back otherwise"):
        export_merged(tmp_path / "a", tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tokenizer_and_settings(bases: dict[str, Path], tmp_path: Path):
    """The adapter's own tokenizer is written where it has one; of the config only the dtype changes."""
    made(bases["llama"], tmp_path / "a", target_modules=["q_proj"])
    own = byte_tokenizer()
    own.chat_template = "trained with this"
    own.save_pretrained(tmp_path / "a")
    done = export_merged(tmp_path / "a", tmp_path / "out", dtype="bf16")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "trained with this"
    assert "the tokenizer is the adapter's own" in done.notices
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (bases["llama"], tmp_path / "out")
    )
    assert {key for key in before | after if before.get(key) != after.get(key)} == {"dtype"}
    assert after["use_cache"]


@pytest.mark.parametrize(
    ("fields", "arguments", "says"),
    [
        ({"base_model_name_or_path": None}, {}, "name it with --model"),
        ({"task_type": "SEQ_CLS"}, {}, "only causal language models"),
        ({}, {"model": "{gpt2}"}, "has no module"),
        ({"base_model_name_or_path": "~nobody/x"}, {}, "cannot be had"),
        ({"base_model_name_or_path": "x" * 5000}, {}, "cannot be had"),
        ({}, {"dtype": "int4"}, "dtype must be one of fp32, bf16, fp16"),
        ({"base_model_name_or_path": "/nowhere"}, {}, "cannot be had"),
    ],
)
def test_refusals_leave_nothing_behind(
    bases: dict[str, Path], fields: dict, arguments: dict, says: str, tmp_path: Path
):
    made(bases["llama"], tmp_path / "a", target_modules=["q_proj"])
    folder = edited(tmp_path / "a", tmp_path / "b", **fields)
    before = files(tmp_path)
    with pytest.raises(RankwiseError, match=says):
        export_merged(folder, tmp_path / "out", **{k: v.format(**bases) for k, v in arguments.items()})
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", ["half", "shapes", "nan", "pickle", "dora"])
def test_bad_adapters_leave_nothing_behind(bases: dict[str, Path], kind: str, tmp_path: Path):
    good = trained(
        bases["llama"], tmp_path / "a", steps=1, r=16, lora_alpha=8, target_modules=LLAMA,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    folder = spoil(kind, good, tmp_path / "bad")
    before = files(tmp_path)
    with pytest.raises(RankwiseError, match=BAD[kind].replace("(", r"\(").replace(")", r"\)")):
        export_merged(folder, tmp_path / "out")
    assert files(tmp_path) == before


def test_the_result_is_told_as_json(bases: dict[str, Path], tmp_path: Path):
    made(bases["gpt2"], tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    told = json.loads(json.dumps(export_merged(tmp_path / "a", tmp_path / "out").as_dict()))
    assert (told["modules"], told["dtype"], told["untied"]) == (2, "float32", False)
