"""A whole study in one process leaves the base model as it was: weights, flags, modes, hooks, modules."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer

from rankwise.observer import Observer
from rankwise.study import run_study
from tests.conftest import byte_tokenizer
from tests.parts import MODELS, opened


def state_of(model: Any) -> dict[str, Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = list(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "sha256": {n: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for n, t in tensors},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name for name, p in model.named_parameters() if p.grad is not None},
        "training": {name: module.training for name, module in modules},
        "hooks": {(name, kind): list(getattr(module, kind)) for name, module in modules for kind in hooks},
        "types": {name: type(module) for name, module in modules},
        "checkpointing": {n: getattr(module, "gradient_checkpointing", None) for n, module in modules},
        "peft": [name for name in ("peft_config", "_hf_peft_config_loaded") if getattr(model, name, False)],
    }


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_study_leaves_the_base_untouched(kind, checkpointing, workdir: Path, study_dict: dict):
    MODELS[kind]().save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    target = {"llama": "q_proj", "gpt2": "c_attn"}[kind]
    study_dict["model"] = f"file:{workdir / 'model'}"
    study_dict["train"] |= {
        "learning_rates": [3e-2, 3e38],  # the second overflows: its adapters must come off too
        "dropout": 0.2,
        "gradient_checkpointing": checkpointing,
    }
    study_dict["seeds"] = {"tuning": 1, "reporting": 1}
    study_dict["arms"]["few"] = {"strategy": "uniform", "budget": "r=2", "targets": target}
    study = opened(workdir, study_dict)
    base = study.context.base.model
    before = state_of(base)
    index = run_study(study, Observer())

    states = [study.store.record(run["run_id"])["status"] for run in index["runs"]]
    assert states.count("failed") == 3 and states.count("done") == len(states) - 3 > 6
    after = state_of(base)
    assert before.keys() == after.keys()
    for what, value in before.items():
        assert after[what] == value, what
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert not any("lora" in name for name, _ in base.named_parameters())
    losses = [r for r in study.store.runs.glob("*/examples.parquet")]
    assert len(losses) == 1 + 3, "the study must have scored something"
