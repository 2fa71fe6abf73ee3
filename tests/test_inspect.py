"""`inspect_adapter` on adapters made by plain PEFT: what it finds, how it says it, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from rankwise.errors import RankwiseError
from rankwise.exports.inspecting import Inspection, inspect_adapter
from tests.parts import tiny_gpt2
from tests.refusals import files
from tests.test_shrink_adapter import BAD, LLAMA, Q, edited, full_updates, retensored, spoil, trained

RANKS = {"q_proj": 2, "v_proj": 16}


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One rank; mixed ranks under one alpha; mixed ranks under one scale; rsLoRA of mixed ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    kind: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": LLAMA, "r": 8, "lora_alpha": 16}
    alphas = {"alpha_pattern": {"q_proj": 4, "v_proj": 32}}
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "alpha": {"rank_pattern": RANKS},
        "scale": {"rank_pattern": RANKS, **alphas},
        "rslora": {"rank_pattern": RANKS, "use_rslora": True},
    }
    return {name: trained(tiny_model, folder / name, **kind, **more) for name, more in settings.items()}


def shown(inspection: Inspection) -> str:
    """Both tables as a terminal would show them."""
    console = Console(file=io.StringIO(), width=200)
    console.print(inspection.table(), inspection.ranks())
    return console.file.getvalue()  # type: ignore[attr-defined]


def verdicts(inspection: Inspection) -> dict[str, str]:
    """Program -> verdict."""
    return {name: verdict.verdict for name, verdict in inspection.verdicts.items()}


def test_one_rank_is_right_everywhere(adapters: dict[str, Path]):
    assert set(verdicts(inspect_adapter(adapters["plain"])).values()) == {"right"}


def test_mixed_ranks_under_one_alpha(adapters: dict[str, Path]):
    """The true scales are 8, 2 and 1; vLLM to 0.31 gives 2 to all."""
    found = inspect_adapter(adapters["alpha"])
    assert verdicts(found) == {
        "peft": "right", "vllm": "right", "vllm-0.31": "wrong", "tgi": "wrong", "sglang": "refused",
        "llama.cpp": "right",
    }  # fmt: skip
    wrong = found.verdicts["vllm-0.31"]
    assert (wrong.smallest, wrong.largest, wrong.wrong, wrong.modules) == (0.25, 2, 4, 14)
    assert wrong.worst is not None
    assert wrong.worst.endswith("q_proj")
    truth, applied = full_updates(adapters["alpha"]), {}
    for name, update in truth.items():
        applied[name] = update * {"q_proj": 0.25, "v_proj": 2}.get(name.rpartition(".")[2], 1)
    missed = sum(((applied[name] - truth[name]) ** 2).sum() for name in truth)
    assert wrong.error == pytest.approx(np.sqrt(missed / sum((t**2).sum() for t in truth.values())), rel=1e-6)
    said = found.summary()
    assert "vLLM (to 0.31) serves it wrongly: another scale for 4 of 14 modules (0.25 to 2 times" in said
    assert f"an error of {wrong.error:.1%} of the whole update" in said


def test_mixed_ranks_under_one_scale(adapters: dict[str, Path]):
    """The true scale is 2; llama.cpp gives 8 to rank 2 and 1 to rank 16."""
    found = inspect_adapter(adapters["scale"])
    assert verdicts(found) == {
        "peft": "right", "vllm": "right", "vllm-0.31": "right", "tgi": "wrong", "sglang": "refused",
        "llama.cpp": "wrong",
    }  # fmt: skip
    wrong = found.verdicts["llama.cpp"]
    assert (wrong.smallest, wrong.largest, wrong.wrong) == (0.5, 4, 4)


def test_rslora(adapters: dict[str, Path]):
    """The true scales are 16/sqrt(2, 8, 16)."""
    found = inspect_adapter(adapters["rslora"])
    assert verdicts(found)["vllm"] == "right"
    assert found.verdicts["llama.cpp"].smallest == pytest.approx(1 / 4)
    assert found.verdicts["llama.cpp"].largest == pytest.approx(1 / np.sqrt(2))
    assert found.verdicts["vllm-0.31"].smallest == pytest.approx(np.sqrt(2 / 8))


def test_patterns_that_match_nothing(adapters: dict[str, Path], tmp_path: Path):
    """What the first study's table came from: ranks that were declared and never built."""
    pattern = {"layers.0.attn.q_proj": 2, "h.1": 4}
    found = inspect_adapter(edited(adapters["plain"], tmp_path / "a", rank_pattern=pattern))
    assert found.idle["rank_pattern"] == tuple(pattern)
    assert {module.rank for module in found.modules} == {8}
    said = found.summary()
    assert "rank_pattern sets h.1, layers.0.attn.q_proj, which the adapter has no module for" in said
    assert "every module has rank 8: the patterns that match nothing changed nothing" in said
    assert inspect_adapter(adapters["alpha"]).idle == {"rank_pattern": (), "alpha_pattern": ()}


def test_ranks_that_the_tensors_do_not_have(adapters: dict[str, Path], tmp_path: Path):
    found = inspect_adapter(edited(adapters["plain"], tmp_path / "a", rank_pattern={"q_proj": 4}))
    q = next(module for module in found.modules if module.name.endswith("0.self_attn.q_proj"))
    assert (q.rank, q.declared_rank) == (8, 4)
    assert verdicts(found)["peft"] == "refused"
    assert "PEFT (0.21.2) does not load it: size mismatch" in found.summary()
    assert any("which PEFT refuses to load" in notice for notice in found.notices)


def test_energy_in_use(adapters: dict[str, Path]):
    found = inspect_adapter(adapters["scale"])
    truth = full_updates(adapters["scale"])
    for module in found.modules:
        energy = np.linalg.svd(truth[module.name], compute_uv=False) ** 2
        assert module.energy == pytest.approx(energy.sum(), rel=1e-5)
        assert module.units == int((energy.cumsum() / energy.sum() < 0.9).sum()) + 1
        assert module.stable_rank == pytest.approx(energy.sum() / energy[0], rel=1e-5)
    assert found.parameters == sum(m.rank * (m.in_features + m.out_features) for m in found.modules)


def test_zero_updates(adapters: dict[str, Path], tmp_path: Path):
    found = inspect_adapter(spoil("zero", adapters["scale"], tmp_path / "a"))
    assert {module.units for module in found.modules} == {0}
    assert found.verdicts["llama.cpp"].error is None
    assert verdicts(found)["llama.cpp"] == "wrong", "trained on from here, its scales would matter"
    json.dumps(found.as_dict(), allow_nan=False)


def test_other_tensors_and_embeddings(tiny_model: Path, tmp_path: Path):
    trained(
        tiny_model, tmp_path / "a", r=8, modules_to_save=["norm"],
        target_modules=["q_proj", "v_proj", "embed_tokens"],
    )  # fmt: skip
    found = inspect_adapter(tmp_path / "a")
    assert [module.name for module in found.modules if module.embedding] == ["model.embed_tokens"]
    assert verdicts(found)["vllm"] == verdicts(found)["vllm-0.31"] == "refused"
    assert "it leaves out base_model.model.model." in found.verdicts["sglang"].why
    json.dumps(found.as_dict(), allow_nan=False)


def test_dictionary_and_tables(adapters: dict[str, Path], tmp_path: Path):
    found = inspect_adapter(adapters["alpha"])
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert read["parameters"] == found.parameters
    assert read["verdicts"]["vllm-0.31"]["verdict"] == "wrong"
    assert len(read["modules"]) == 14
    text = shown(found)
    assert "vLLM" in text
    assert "4/14" in text
    nasty = edited(adapters["plain"], tmp_path / "[red]a", base_model_name_or_path="\x1b[2J[bold]x[/bold]")
    text = shown(inspect_adapter(nasty))
    assert "[red]a" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("kind", sorted(set(BAD) - {"zero"}))
def test_bad_adapters_are_refused(adapters: dict[str, Path], kind: str, tmp_path: Path):
    with pytest.raises(RankwiseError) as refused:
        inspect_adapter(spoil(kind, adapters["plain"], tmp_path / "bad"))
    assert BAD[kind].replace("16", "8") in str(refused.value).replace("16", "8")


def renamed(tensors: dict[str, torch.Tensor], name: str) -> None:
    for side in "AB":
        tensors[f"base_model.model.{name}.lora_{side}.weight"] = tensors.pop(f"{Q}.lora_{side}.weight")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "model..q_proj", "/model.q_proj", "model.\x1b[2Jq", "a\\b", "a b", ".q", "ü"]
)
def test_names_with_tricks_are_refused(adapters: dict[str, Path], name: str, tmp_path: Path):
    folder = retensored(adapters["plain"], tmp_path / "a", lambda tensors: renamed(tensors, name))
    with pytest.raises(RankwiseError, match="a dotted name of letters") as refused:
        inspect_adapter(folder)
    assert str(refused.value).isprintable()
    extra = retensored(adapters["plain"], tmp_path / "b", lambda t: t.update({"../x": torch.ones(1)}))
    with pytest.raises(RankwiseError, match="a dotted name of letters"):
        inspect_adapter(extra)


def test_a_base_that_does_not_fit(adapters: dict[str, Path], tmp_path: Path):
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(RankwiseError, match=r"has no module 'model.layers.0.mlp.down_proj'. Is it the right"):
        inspect_adapter(adapters["plain"], model=str(tmp_path / "gpt2"))
    config = json.loads((Path(json.loads((adapters["plain"] / "adapter_config.json").read_text())[
        "base_model_name_or_path"]) / "config.json").read_text())  # fmt: skip
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    other = edited(adapters["plain"], tmp_path / "a", base_model_name_or_path=str(tmp_path / "wide"))
    with pytest.raises(RankwiseError, match="maps 48 to 32 in the adapter and 64 to 32 there"):
        inspect_adapter(other)
    lost = edited(adapters["plain"], tmp_path / "b", base_model_name_or_path=str(tmp_path / "gpt2"))
    assert any("has no module" in notice for notice in inspect_adapter(lost).notices)


def test_an_activated_lora_is_refused(adapters: dict[str, Path], tmp_path: Path):
    folder = edited(adapters["plain"], tmp_path / "a", alora_invocation_tokens=[1, 2])
    before = files(tmp_path)
    with pytest.raises(RankwiseError, match="activated LoRA is more than a sum of s B A"):
        inspect_adapter(folder)
    assert files(tmp_path) == before
