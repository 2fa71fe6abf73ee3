"""`export_uniform` against real PEFT: the same logits from one rank and scale, under every program's rule."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from rankwise.adapters import lora_layers
from rankwise.config import ScaleRule
from rankwise.errors import RankwiseError
from rankwise.exports import uniform
from rankwise.exports.adapter_files import Update, read_adapter
from rankwise.exports.inspecting import inspect_adapter
from rankwise.exports.programs import PROGRAMS
from rankwise.exports.uniform import Exported, export_uniform
from rankwise.inventory import inventory
from tests.parts import MODELS, plan_of
from tests.refusals import files
from tests.test_programs import layer, made
from tests.test_shrink_adapter import (
    BAD,
    LLAMA,
    WEIGHTS,
    Q,
    best,
    edited,
    full_updates,
    retensored,
    spoil,
    trained,
)

TOKENS = torch.arange(2, 26).reshape(2, 12) * 7 % 250
RULES = ("peft", "vllm", "vllm-0.31", "sglang", "llama.cpp")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny Llama (tied, grouped heads) and the tiny GPT-2 (Conv1D)."""
    folder = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


def randomised(adapted: Any, seed: int = 0) -> Any:
    """Give B values, so that the adapter matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_" in name:
                parameter.normal_(0, 0.1)
    return adapted.eval()


def planned(family: str, ranks: dict[str, int], scale: ScaleRule, folder: Path) -> torch.Tensor:
    """Save an adapter of these ranks; return its logits."""
    model = MODELS[family]()
    changes = {"ranks": ranks, "match": "none", "budget": None, "scale": scale}
    plan = plan_of(model, budget="r=1").model_copy(update=changes)
    adapted = randomised(get_peft_model(model, plan.lora_config()))
    adapted.save_pretrained(folder)
    return logits(adapted)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def loaded(family: str, folder: Path, scales: dict[str, float] | None = None) -> Any:
    """Load a folder in plain PEFT, where a warning is a failure; then put a program's scales in."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        adapted = PeftModel.from_pretrained(MODELS[family](), str(folder)).eval()
    for name, module in lora_layers(adapted).items():
        if scales is not None:
            module.scaling["default"] = scales[name]
    return adapted


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def need_same_everywhere(family: str, folder: Path, wanted: torch.Tensor) -> None:
    """Compare the logits of an exported folder, under the scales that each program applies."""
    adapter = read_adapter(folder)
    assert distance(logits(loaded(family, folder)), wanted) < 1e-5
    for name in RULES:
        applied = PROGRAMS[name].apply(adapter)
        assert applied.refusal is None, (name, applied.refusal)
        assert distance(logits(loaded(family, folder, dict(applied.scales))), wanted) < 1e-5, name


def random_plans(families: Iterable[str], modules: int) -> Any:
    """A decorator that draws a family, a scale rule with its value, and a rank for each module."""
    return given(
        family=st.sampled_from(sorted(families)),
        rule=st.sampled_from(["constant", "alpha", "rslora"]),
        value=st.sampled_from([0.3, 2.0, 16.0]),
        draw=st.lists(st.sampled_from([0, 0, 1, 2, 3, 5, 8]), min_size=modules, max_size=modules),
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@random_plans(MODELS, 14)
def test_logits_are_the_same_under_every_rule(
    bases: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    rule: Any,
    value: float,
    draw: list[int],
):
    assume(any(draw))
    tmp_path = tmp_path_factory.mktemp("uniform")
    names = inventory(MODELS[family]()).names
    ranks = dict(zip(names, draw, strict=False))
    assume(any(ranks.values()))
    wanted = planned(family, ranks, ScaleRule(rule=rule, value=value), tmp_path / "a")
    exported = export_uniform(tmp_path / "a", tmp_path / "out", model=str(bases[family]))
    assert exported.rank == max(ranks.values())
    assert {exported.verdicts[name].verdict for name in RULES} == {"right"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (exported.rank, exported.rank)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    need_same_everywhere(family, tmp_path / "out", wanted)


@pytest.mark.parametrize(
    ("family", "rule", "program"),
    [("llama", "constant", "llama.cpp"), ("llama", "alpha", "vllm-0.31"), ("gpt2", "rslora", "llama.cpp")],
)
def test_unexported_the_rules_disagree(family: str, rule: Any, program: str, tmp_path: Path):
    names = inventory(MODELS[family]()).names
    ranks = {name: (2, 8)[i % 2] for i, name in enumerate(names)}
    wanted = planned(family, ranks, ScaleRule(rule=rule, value=4), tmp_path / "a")
    effect = distance(logits(MODELS[family]()), wanted)
    applied = PROGRAMS[program].apply(read_adapter(tmp_path / "a"))
    assert distance(logits(loaded(family, tmp_path / "a", dict(applied.scales))), wanted) > 0.1 * effect
    assert PROGRAMS["sglang"].apply(read_adapter(tmp_path / "a")).refusal


def test_head_tied_to_the_embedding(bases: dict[str, Path], tmp_path: Path):
    """The adapted head of a tied model, with the embedding adapted too, under rsLoRA and patterns."""
    config = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "lm_head", "embed_tokens"],
        rank_pattern={"lm_head": 6, "embed_tokens": 2}, alpha_pattern={"q_proj": 5},
    )  # fmt: skip
    adapted = randomised(get_peft_model(MODELS["llama"](), config))
    adapted.save_pretrained(tmp_path / "a")
    exported = export_uniform(tmp_path / "a", tmp_path / "out", model=str(bases["llama"]))
    assert exported.rank == 6
    need_same_everywhere("llama", tmp_path / "out", logits(adapted))


# --- zeros -----------------------------------------------------------------------------------------


def names_of(exported: Exported) -> set[str]:
    return {name.removeprefix("model.layers.") for name in exported.filled}


def test_fused_siblings_hold_zeros(bases: dict[str, Path], tmp_path: Path):
    """Grouped heads: k and v are half as wide as q, which the base's configuration tells."""
    ranks = dict.fromkeys(inventory(MODELS["llama"]()).names, 0)
    ranks |= {"model.layers.0.self_attn.k_proj": 3, "model.layers.1.mlp.up_proj": 2}
    wanted = planned("llama", ranks, ScaleRule(), tmp_path / "a")
    exported = export_uniform(tmp_path / "a", tmp_path / "out", model=str(bases["llama"]))
    assert names_of(exported) == {"0.self_attn.q_proj", "0.self_attn.v_proj", "1.mlp.gate_proj"}
    stored = {update.name: update for update in read_adapter(tmp_path / "out").updates}
    assert stored["model.layers.0.self_attn.q_proj"].b.shape == (32, 3)
    assert stored["model.layers.0.self_attn.v_proj"].b.shape == (16, 3)
    assert not stored["model.layers.1.mlp.gate_proj"].b.any()
    need_same_everywhere("llama", tmp_path / "out", wanted)


@pytest.mark.parametrize(
    ("given_", "filled", "unknown"),
    [
        (layer(0, "q", "v"), {"0.self_attn.k_proj"}, set()),
        (layer(0, "gate"), {"0.mlp.up_proj"}, set()),
        (layer(0, "up"), set(), {"0.mlp.gate_proj"}),
        (layer(0, "q"), set(), {"0.self_attn.k_proj", "0.self_attn.v_proj"}),
        (
            layer(0, "q", "v") + layer(1, "v"),
            {"0.self_attn.k_proj", "1.self_attn.k_proj", "1.self_attn.q_proj"},
            set(),
        ),
        (layer(0, "o", "down"), set(), set()),
    ],
)
def test_shapes_without_the_base(given_: list[str], filled: set[str], unknown: set[str], tmp_path: Path):
    made(tmp_path / "a", dict.fromkeys(given_, 4), r=4, lora_alpha=8)
    exported = export_uniform(tmp_path / "a", tmp_path / "out")
    assert names_of(exported) == filled
    said = " ".join(notice for notice in exported.notices if "not filled" in notice)
    assert all(name in said for name in unknown)
    assert bool(said) == bool(unknown)


def test_modules_that_were_excluded_are_filled_all_the_same(bases: dict[str, Path], tmp_path: Path):
    """PEFT must build what is filled: neither a pattern of targets nor an exclusion stands in its way."""
    config = LoraConfig(r=4, target_modules=r".*\.(q|v|k)_proj", exclude_modules=r".*0\.self_attn\.k_proj")
    adapted = randomised(get_peft_model(MODELS["llama"](), config))
    adapted.save_pretrained(tmp_path / "a")
    exported = export_uniform(tmp_path / "a", tmp_path / "out", model=str(bases["llama"]))
    assert names_of(exported) == {"0.self_attn.k_proj"}
    assert len(lora_layers(loaded("llama", tmp_path / "out"))) == 6
    need_same_everywhere("llama", tmp_path / "out", logits(adapted))


def test_what_tgi_needs(bases: dict[str, Path], tmp_path: Path):
    ranks = {name: 3 for name in inventory(MODELS["llama"]()).names if "layers.1.mlp" not in name}
    ranks |= {name: 0 for name in inventory(MODELS["llama"]()).names if name not in ranks}
    planned("llama", ranks, ScaleRule(), tmp_path / "a")
    plain = export_uniform(tmp_path / "a", tmp_path / "plain", model=str(bases["llama"]))
    assert plain.verdicts["tgi"].verdict == "wrong"
    assert any("--tgi" in notice for notice in plain.notices)
    for source in ({}, {"model": str(bases["llama"])}):
        exported = export_uniform(tmp_path / "a", tmp_path / f"out{len(source)}", tgi=True, **source)
        assert (exported.rank, exported.verdicts["tgi"].verdict) == (8, "right")
        assert names_of(exported) == {f"1.mlp.{part}_proj" for part in ("gate", "up", "down")}


# --- cutting, precision, sizes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter of ranks 2, 8 and 16 with odd scales."""
    return trained(
        tiny_model, tmp_path_factory.mktemp("mixed") / "a", r=8, lora_alpha=6, target_modules=LLAMA,
        rank_pattern={"q_proj": 2, "v_proj": 16}, alpha_pattern={"v_proj": 40}, task_type="CAUSAL_LM",
    )  # fmt: skip


def test_cut_to_a_rank(mixed: Path, tmp_path: Path):
    truth = full_updates(mixed)
    exported = export_uniform(mixed, tmp_path / "out", max_rank=4)
    assert exported.rank == 4
    after = full_updates(tmp_path / "out")
    for module in exported.modules:
        kept = best(truth[module.name], 4)
        assert np.abs(after[module.name] - kept).max() <= 1e-6 * np.abs(kept).max()
        missed = np.linalg.norm(truth[module.name] - kept) / np.linalg.norm(truth[module.name])
        assert module.error == pytest.approx(missed, rel=1e-4, abs=1e-7)
        assert module.lost == pytest.approx(missed**2, rel=1e-4, abs=1e-12)
    assert {m.rank_after for m in exported.modules} == {2, 4}
    assert "cut to rank 4: 12 modules" in exported.summary()


@pytest.mark.parametrize(("dtype", "within"), [("fp32", 1e-6), ("bf16", 1e-2), ("fp16", 2e-3), (None, 1e-6)])
def test_precision(mixed: Path, dtype: str | None, within: float, tmp_path: Path):
    exported = export_uniform(mixed, tmp_path / "out", dtype=dtype)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {kinds[dtype]}
    assert 0 <= max(exported.differences.values()) < within
    assert set(exported.differences) == set(RULES)


def test_precision_that_loses_the_update_is_refused(mixed: Path, tmp_path: Path):
    """B of 1e-7 is 2 or 3 steps of fp16's smallest number; B of 1e5 is above its largest."""
    for factor in (1e-7, 1e7):
        small = retensored(
            mixed,
            tmp_path / f"a{factor}",
            lambda t, by=factor: [x.mul_(by) for n, x in t.items() if "lora_B" in n],
        )
        before = files(tmp_path)
        with pytest.raises(
            RankwiseError, match=r"from the original's.*Choose another dtype|above the largest"
        ):
            export_uniform(small, tmp_path / "out", dtype="fp16")
        assert files(tmp_path) == before
        export_uniform(small, tmp_path / f"out{factor}", dtype="bf16")


def test_sizes_and_flags(mixed: Path, tmp_path: Path):
    exported = export_uniform(mixed, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert exported.parameters_after == sum(tensor.numel() for tensor in tensors.values())
    assert exported.parameters_before == sum(tensor.numel() for tensor in load_file(mixed / WEIGHTS).values())
    assert exported.bytes_after == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert "--max-lora-rank 16 " in exported.flags["vLLM"]
    assert f"written to {tmp_path / 'out'}" in exported.summary()
    json.dumps(exported.as_dict(), allow_nan=False)
    assert {v.verdict for v in inspect_adapter(tmp_path / "out").verdicts.values()} == {"right"}


def test_a_rank_above_what_vllm_allows(tmp_path: Path):
    made(tmp_path / "a", {"model.layers.0.self_attn.o_proj": 513}, r=513)
    exported = export_uniform(tmp_path / "a", tmp_path / "out")
    assert "none: its largest --max-lora-rank is below 513" in exported.flags["vLLM"]
    assert any("vLLM (0.32 to 0.33.0) refused" in notice for notice in exported.notices)


def test_other_tensors_are_kept_and_told(tiny_model: Path, tmp_path: Path):
    trained(tiny_model, tmp_path / "a", r=8, modules_to_save=["model.norm"], target_modules=["o_proj"])
    exported = export_uniform(tmp_path / "a", tmp_path / "out")
    name = "base_model.model.model.norm.weight"
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[name], load_file(tmp_path / "a" / WEIGHTS)[name])
    assert any("modules_to_save must be none" in notice for notice in exported.notices)


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(set(BAD) - {"zero"}))
def test_bad_adapters_leave_nothing_behind(mixed: Path, kind: str, tmp_path: Path):
    folder = spoil(kind, mixed, tmp_path / "bad")
    before = files(tmp_path)
    with pytest.raises(RankwiseError):
        export_uniform(folder, tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_rank": 0}, "max_rank must be 1 or more; got 0"),
        ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16; got 'int8'"),
        ({"dtype": torch.int8}, "got 'torch.int8'"),
        ({"model": "{gpt2}"}, "has no module"),
        ({"out": "taken"}, "is there already"),
    ],
)
def test_bad_arguments_leave_nothing_behind(
    mixed: Path, bases: dict[str, Path], arguments: dict[str, Any], says: str, tmp_path: Path
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    before = files(tmp_path)
    settings_ = {k: v.format(**bases) if isinstance(v, str) else v for k, v in arguments.items()}
    out = tmp_path / settings_.pop("out", "out")
    with pytest.raises(RankwiseError, match=says):
        export_uniform(mixed, out, **settings_)
    assert files(tmp_path) == before


def test_what_is_written_is_proved(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """B written 1 % too large, as a fault in this program would: nothing is left of the export."""

    padded = uniform._padded

    def faulty(update: Update, *arguments: Any) -> Update:
        right = padded(update, *arguments)
        return replace(right, b=1.01 * right.b)

    monkeypatch.setattr(uniform, "_padded", faulty)
    with pytest.raises(RankwiseError, match=r"PEFT would add to .* from the original's update by 1.0e-02"):
        export_uniform(mixed, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_when_the_disk_fails(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*arguments: Any, **given_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankwise.exports.adapter_files.save_file", fails)
    with pytest.raises(RankwiseError, match=r"cannot be written to .*out: No space left on device"):
        export_uniform(mixed, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_names_with_tricks_leave_nothing_behind(mixed: Path, tmp_path: Path):
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            tensors[f"base_model.model.../../x.lora_{side}.weight"] = tensors.pop(f"{Q}.lora_{side}.weight")

    folder = retensored(mixed, tmp_path / "a", rename)
    before = files(tmp_path)
    with pytest.raises(RankwiseError, match="a dotted name of letters"):
        export_uniform(folder, tmp_path / "out")
    assert files(tmp_path) == before


def test_what_peft_would_not_load_is_mended(mixed: Path, tmp_path: Path):
    """Tensors of another rank than declared: PEFT refuses the original and loads the export."""
    folder = edited(mixed, tmp_path / "a", rank_pattern={"v_proj": 16})
    assert inspect_adapter(folder).verdicts["peft"].verdict == "refused"
    exported = export_uniform(folder, tmp_path / "out")
    assert exported.verdicts["peft"].verdict == "right"
    assert any("which PEFT refuses to load" in notice for notice in exported.notices)
