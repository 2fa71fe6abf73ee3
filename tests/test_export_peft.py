"""`export_peft` against plain PEFT: the same logits from anchored patterns, or nothing at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from rankwise.errors import RankwiseError
from rankwise.exports import patterned
from rankwise.exports.patterned import export_peft
from tests.parts import MODELS, tiny_gpt2
from tests.refusals import files
from tests.test_export_uniform import distance, loaded, logits, randomised
from tests.test_shrink_adapter import BAD, LLAMA, edited, spoil, trained

SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 16}},
    "alphas": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 7, "o_proj": 0.5}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 2}},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("named", [True, False], ids=["with its base", "without"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_plain_peft_gives_the_same_logits(tiny_model: Path, kind: str, named: bool, tmp_path: Path):
    config = LoraConfig(
        **{"r": 8, "lora_alpha": 4, "target_modules": LLAMA, "task_type": "CAUSAL_LM", **SETTINGS[kind]}
    )
    adapted = randomised(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config))
    adapted.save_pretrained(tmp_path / "a")
    folder = tmp_path / "a" if named else edited(tmp_path / "a", tmp_path / "b", base_model_name_or_path=None)
    done = export_peft(folder, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        again = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "out")
        ).eval()
    assert distance(logits(again), logits(adapted)) < 1e-6
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    keys = [*written["rank_pattern"], *written["alpha_pattern"]]
    assert all(key.startswith("^") for key in keys)
    assert done.patterns == len(keys)
    assert not written["use_rslora"]
    assert ("the base" if named else "a stand-in") in done.loaded_on


def test_conv1d_cut_to_a_rank(tmp_path: Path):
    """GPT-2, every rank cut to 2: what is lost per module is what the logits lose, and is said."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, rank_pattern={"c_fc": 1}
    )
    adapted = randomised(get_peft_model(tiny_gpt2(), config))
    adapted.save_pretrained(tmp_path / "a")
    done = export_peft(tmp_path / "a", tmp_path / "out", max_rank=2)
    assert set(done.ranks.values()) == {1, 2}
    lost = {module.name: module.lost for module in done.modules}
    assert all((value > 0) == ("c_attn" in name) for name, value in lost.items())
    assert "cut to rank 2: 2 modules" in done.summary()
    effect = distance(logits(MODELS["gpt2"]()), logits(adapted))
    assert 0 < distance(logits(loaded("gpt2", tmp_path / "out")), logits(adapted)) < effect


def test_says_who_serves_it_wrongly(tiny_model: Path, tmp_path: Path):
    folder = trained(
        tiny_model, tmp_path / "a", steps=1, r=4, lora_alpha=8, target_modules=LLAMA,
        rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM",
    )  # fmt: skip
    done = export_peft(folder, tmp_path / "out")
    assert done.verdicts["peft"].verdict == done.verdicts["vllm"].verdict == "right"
    assert "not served rightly by vLLM to 0.31" in done.summary()
    assert json.loads(json.dumps(done.as_dict()))["verdicts"]["vllm-0.31"]["verdict"] == "wrong"


def test_what_peft_builds_otherwise_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Keys that match nothing, as a fault in this program could write them: nothing is left."""
    folder = trained(
        tiny_model, tmp_path / "a", steps=1, r=4, lora_alpha=8, target_modules=LLAMA,
        rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM",
    )  # fmt: skip
    write = patterned.write_patterned

    def faulty(aside: Path, *rest: Any) -> int:
        size = write(aside, *rest)
        config = json.loads((aside / "adapter_config.json").read_text())
        config["rank_pattern"] = {key.replace("q_proj", "x_proj"): 2 for key in config["rank_pattern"]}
        (aside / "adapter_config.json").write_text(json.dumps(config))
        return size

    monkeypatch.setattr(patterned, "write_patterned", faulty)
    with pytest.raises(RankwiseError, match=r"not load the result: Error.* size mismatch for .*q_proj"):
        export_peft(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["half", "nan", "pickle", "names"])
def test_bad_adapters_leave_nothing_behind(tiny_model: Path, kind: str, tmp_path: Path):
    good = trained(
        tiny_model, tmp_path / "a", steps=1, r=16, lora_alpha=8, target_modules=LLAMA, task_type="CAUSAL_LM"
    )
    folder = spoil(kind, good, tmp_path / "bad")
    before = files(tmp_path)
    with pytest.raises(RankwiseError, match=BAD[kind].replace("(", r"\(").replace(")", r"\)")):
        export_peft(folder, tmp_path / "out")
    assert files(tmp_path) == before
