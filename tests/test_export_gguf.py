"""`export_gguf` against PEFT's own updates: what llama.cpp would add, as the file read with gguf says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume, settings
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from rankwise.adapters import lora_layers
from rankwise.config import ScaleRule
from rankwise.errors import RankwiseError
from rankwise.exports import gguf_file
from rankwise.exports.gguf_file import export_gguf
from rankwise.inventory import inventory
from tests import zoo
from tests.conftest import tiny_llama
from tests.parts import plan_of, tiny_gpt2
from tests.refusals import files
from tests.test_export_uniform import random_plans
from tests.test_shrink_adapter import BAD, LLAMA, best, edited, retensored, spoil

SIZES = {**zoo.GLU, "num_hidden_layers": 2, "head_dim": 8}
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("llama", tiny_llama),
    "mistral": ("llama", zoo.mistral),
    "gemma": ("gemma", lambda: GemmaForCausalLM(GemmaConfig(**SIZES))),
    "gemma2": ("gemma2", zoo.gemma),
    "gemma3": ("gemma3", zoo.gemma3),
    "qwen2": ("qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "qwen3": ("qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES))),
    "gpt2": ("gpt2", tiny_gpt2),
}
"""Family -> llama.cpp's architecture, and a tiny model: 4 heads of 8, grouped ones have 2 for k and v."""

TENSORS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
"""As llama.cpp's source has them (src/llama-arch.cpp), by hand."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the configurations alone: no weights are needed."""
    folder = tmp_path_factory.mktemp("bases")
    for family, (_, make) in FAMILIES.items():
        make().config.save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


def saved(model: Any, config: LoraConfig, base: Path, folder: Path) -> dict[str, np.ndarray]:
    """Save an adapter with random factors; return what PEFT adds to each weight, as a linear map's."""
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    found = {}
    for name, layer in lora_layers(adapted).items():
        update = layer.get_delta_weight("default").detach()
        found[name] = (update.t() if isinstance(layer.base_layer, Conv1D) else update).double().numpy()
    return found


def planned(
    family: str, ranks: dict[str, int], scale: ScaleRule, base: Path, folder: Path
) -> dict[str, np.ndarray]:
    """The same by a rank plan, which leaves modules of rank 0 out."""
    model = FAMILIES[family][1]()
    changes = {"ranks": ranks, "match": "none", "budget": None, "scale": scale}
    plan = plan_of(model, budget="r=1").model_copy(update=changes)
    return saved(model, plan.lora_config(), base, folder)


def header(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def factors(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor of the base -> (a, b), in double precision."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        name, _, side = tensor.name.rpartition(".lora_")
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        found.setdefault(name, {})[side] = values
    assert all(set(pair) == {"a", "b"} for pair in found.values())
    return {name: (pair["a"], pair["b"]) for name, pair in found.items()}


def added(file: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each tensor: alpha over b's own rank, times b @ a (src/llama-adapter.h)."""
    alpha = header(file)["adapter.lora.alpha"]
    return {name: alpha / b.shape[1] * b @ a for name, (a, b) in factors(file).items()}


def tensor_of(module: str) -> str:
    """`model.layers.1.mlp.up_proj` is `blk.1.ffn_up.weight`."""
    layer, _, part = module.partition("layers." if "layers." in module else "h.")[2].partition(".")
    return f"blk.{layer}.{TENSORS[part]}.weight"


def neighbours(update: np.ndarray, head: int = 8) -> np.ndarray:
    """Rows (first half, second half) of each head as (pair, pair, ...): one row after another."""
    rows = []
    for start in range(0, len(update), head):
        for i in range(head // 2):
            rows += [update[start + i], update[start + head // 2 + i]]
    return np.array(rows)


def converted(family: str, updates: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Updates as llama.cpp's converter turns the weights that they belong to."""
    turned = family in ("llama", "mistral")
    return {
        tensor_of(name): neighbours(u) if turned and name.endswith(("q_proj", "k_proj")) else u
        for name, u in updates.items()
    }


def need_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], within: float = 1e-6) -> None:
    assert set(found) == set(wanted)
    for name, update in wanted.items():
        assert np.abs(found[name] - update).max() <= within * np.abs(update).max(), name


@settings(max_examples=24, deadline=None)
@random_plans(FAMILIES, 21)
def test_llama_cpp_adds_what_was_trained(
    bases: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    rule: Any,
    value: float,
    draw: list[int],
):
    architecture, make = FAMILIES[family]
    folder = tmp_path_factory.mktemp("gguf")
    ranks = dict(zip(inventory(make()).names, draw, strict=False))
    assume(any(ranks.values()))
    scale = ScaleRule(rule=rule, value=value)
    wanted = planned(family, ranks, scale, bases[family], folder / "a")
    exported = export_gguf(folder / "a", folder / "new" / "a.gguf")
    need_same(added(exported.out), converted(family, wanted))
    said = header(exported.out)
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    assert said["general.architecture"] == exported.architecture == architecture
    assert {name: tensor_of(name) for name in wanted} == exported.tensors
    for name, (a, b) in factors(exported.out).items():
        module = next(module for module in wanted if tensor_of(module) == name)
        assert a.shape[0] == b.shape[1] == ranks[module], "nothing is padded"


def test_every_family_has_every_module(bases: dict[str, Path], tmp_path: Path):
    for family, (_, make) in FAMILIES.items():
        names = inventory(make()).names
        wanted = planned(
            family, {name: 1 + i % 4 for i, name in enumerate(names)}, ScaleRule(),
            bases[family], tmp_path / family,
        )  # fmt: skip
        exported = export_gguf(tmp_path / family, tmp_path / f"{family}.gguf", model=str(bases[family]))
        need_same(added(exported.out), converted(family, wanted))
        reordered = [n for n in wanted if n.endswith(("q_proj", "k_proj"))] if exported.reordered else []
        assert bool(exported.reordered) == (family in ("llama", "mistral"))
        assert sorted(reordered) == list(exported.reordered)


# --- the rotation ----------------------------------------------------------------------------------


def turned_by_halves(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Transformers' rotation of one head, (d,): element i with element i + d/2."""
    first, second = np.split(x, 2)
    return np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ]
    )


def turned_by_neighbours(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """llama.cpp's rotation of one head (ggml's mode 0): element 2i with element 2i + 1, as complex."""
    turned = (x[::2] + 1j * x[1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=1).ravel()


def test_attention_scores_are_the_same_under_llama_cpps_rotation(bases: dict[str, Path], tmp_path: Path):
    """Scores of q and k at two positions, head by head; k's two heads serve two of q's four each."""
    ranks = dict.fromkeys(inventory(tiny_llama()).names, 0)
    ranks |= {f"model.layers.0.self_attn.{part}_proj": 3 for part in "qk"}
    wanted = planned("llama", ranks, ScaleRule(), bases["llama"], tmp_path / "a")
    there = added(export_gguf(tmp_path / "a", tmp_path / "a.gguf").out)
    x, y = np.random.Generator(np.random.PCG64(0)).normal(size=(2, 32))
    here_, there_ = (
        [(u["q"] @ x).reshape(4, 8), (u["k"] @ y).reshape(2, 8).repeat(2, axis=0)]
        for u in (
            {part: wanted[f"model.layers.0.self_attn.{part}_proj"] for part in "qk"},
            {part: there[f"blk.0.attn_{part}.weight"] for part in "qk"},
        )
    )
    speeds = 10_000.0 ** (-np.arange(4) / 4)
    for head in range(4):
        trained = turned_by_halves(here_[0][head], 7 * speeds) @ turned_by_halves(here_[1][head], 3 * speeds)
        served = turned_by_neighbours(there_[0][head], 7 * speeds) @ turned_by_neighbours(
            there_[1][head], 3 * speeds
        )
        assert served == pytest.approx(trained, rel=1e-5)
        asis = turned_by_neighbours(here_[0][head], 7 * speeds) @ turned_by_neighbours(
            here_[1][head], 3 * speeds
        )
        assert asis != pytest.approx(trained, rel=1e-2), "the order matters here"


# --- alpha, precision, cutting ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Ranks 2, 8 and 16 of a Llama, one alpha of 6 for all but v; and its updates."""
    folder = tmp_path_factory.mktemp("mixed") / "a"
    config = LoraConfig(
        r=8, lora_alpha=6, target_modules=LLAMA, rank_pattern={"q_proj": 2, "v_proj": 16},
        alpha_pattern={"v_proj": 40}, task_type="CAUSAL_LM",
    )  # fmt: skip
    return folder, saved(tiny_llama(), config, bases["llama"], folder)


def test_the_commonest_alpha_leaves_b_untouched(mixed: tuple[Path, dict], tmp_path: Path):
    """6 = scale * rank of all modules but v, whose b is multiplied by 40/6."""
    exported = export_gguf(mixed[0], tmp_path / "a.gguf")
    assert exported.alpha == header(exported.out)["adapter.lora.alpha"] == 6
    stored, there = load_file(mixed[0] / "adapter_model.safetensors"), factors(exported.out)
    before = {
        part: stored[f"base_model.model.model.layers.1.{part}.lora_B.weight"].numpy()
        for part in ("mlp.up_proj", "self_attn.v_proj")
    }
    assert (there["blk.1.ffn_up.weight"][1] == before["mlp.up_proj"]).all()
    ratio = there["blk.1.attn_v.weight"][1] / before["self_attn.v_proj"]
    assert ratio == pytest.approx(40 / 6, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1e-44, -3.0, 1e300])
def test_odd_alphas(mixed: tuple[Path, dict], alpha: float, tmp_path: Path):
    """A scale of 0 must not become llama.cpp's alpha of 0, which it takes for a scale of 1."""
    folder = edited(mixed[0], tmp_path / "a", lora_alpha=alpha, alpha_pattern={})
    if says := {1e300: "above the largest of", 1e-44: "rounding to F32"}.get(alpha):
        refused(folder, says, tmp_path / "a.gguf")
        return
    exported = export_gguf(folder, tmp_path / "a.gguf")
    assert exported.alpha == (-3 if alpha == -3 else 1)
    sizes = {name: np.abs(update).max() for name, update in added(exported.out).items()}
    assert (max(sizes.values()) > 1e-3) == (alpha == -3)


KINDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", None: "F32"}


@pytest.mark.parametrize(("dtype", "within"), [("fp32", 1e-6), ("bf16", 2e-2), ("fp16", 2e-3), (None, 1e-6)])
def test_precision(mixed: tuple[Path, dict], dtype: str | None, within: float, tmp_path: Path):
    exported = export_gguf(mixed[0], tmp_path / "a.gguf", dtype=dtype)
    assert {t.tensor_type.name for t in gguf.GGUFReader(exported.out).tensors} == {KINDS[dtype]}
    need_same(added(exported.out), converted("llama", mixed[1]), within)
    assert 0 < exported.difference < within
    assert exported.bytes_after == exported.out.stat().st_size
    held = sum(a.size + b.size for a, b in factors(exported.out).values())
    assert exported.parameters_after == exported.parameters_before == held


def test_half_precision_stays_as_it_was(mixed: tuple[Path, dict], tmp_path: Path):
    """Where b is not multiplied, not one bit changes."""
    half = retensored(
        mixed[0], tmp_path / "a", lambda t: t.update({n: x.to(torch.bfloat16) for n, x in t.items()})
    )
    there = factors(export_gguf(half, tmp_path / "a.gguf").out)
    stored = load_file(half / "adapter_model.safetensors")
    for side, values in zip("AB", there["blk.0.ffn_down.weight"], strict=True):
        before = stored[f"base_model.model.model.layers.0.mlp.down_proj.lora_{side}.weight"]
        assert (values == before.double().numpy()).all()


def test_cut_to_a_rank(mixed: tuple[Path, dict], tmp_path: Path):
    exported = export_gguf(mixed[0], tmp_path / "a.gguf", max_rank=4)
    need_same(
        added(exported.out), converted("llama", {n: best(u, 4) for n, u in mixed[1].items()}), within=1e-5
    )
    assert {m.rank_after for m in exported.modules} == {2, 4}
    for module in exported.modules:
        update = mixed[1][module.name]
        missed = np.linalg.norm(update - best(update, 4)) / np.linalg.norm(update)
        assert module.error == pytest.approx(missed, rel=1e-4, abs=1e-7)
    assert exported.parameters_after < exported.parameters_before
    assert "cut to rank 4: 12 modules" in exported.summary()


def test_what_it_says(mixed: tuple[Path, dict], tmp_path: Path):
    exported = export_gguf(mixed[0], tmp_path / "my adapter.gguf")
    said = exported.summary()
    assert f"llama-cli -m BASE.gguf --lora '{exported.out}'" in said
    assert f"lora_path='{exported.out}'" in said
    assert "rank 2 to 16 on 14 modules of a llama model, float32, one alpha of 6" in said
    assert "rows of 4 q and k modules" in said
    read = json.loads(json.dumps(exported.as_dict(), allow_nan=False))
    assert read["tensors"]["model.layers.0.self_attn.q_proj"] == "blk.0.attn_q.weight"


# --- embeddings, heads, multimodal names -----------------------------------------------------------


def test_an_untied_head_and_embedding(tmp_path: Path):
    """token_embd is looked up: a row of a for the token, then b (`build_inp_embd`); the head is linear."""
    model = LlamaForCausalLM(LlamaConfig(**zoo.GLU, tie_word_embeddings=False))
    model.config.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "lm_head", "embed_tokens"],
        rank_pattern={"lm_head": 6, "embed_tokens": 2}, alpha_pattern={"q_proj": 5},
    )  # fmt: skip
    wanted = saved(model, config, tmp_path / "base", tmp_path / "a")
    exported = export_gguf(tmp_path / "a", tmp_path / "a.gguf")
    alpha, there = exported.alpha, factors(exported.out)
    a, b = there["token_embd.weight"]
    assert (a.shape, b.shape) == ((264, 2), (32, 2))
    for token in (0, 7, 263):
        row = alpha / 2 * b @ a[token]
        assert row == pytest.approx(wanted["model.embed_tokens"][token], rel=1e-4, abs=1e-6)
    a, b = there["output.weight"]
    assert np.abs(alpha / 6 * b @ a - wanted["lm_head"]).max() < 1e-5
    assert len(there) == 5


def test_names_of_a_multimodal_gemma(tmp_path: Path):
    text = {**SIZES, "num_hidden_layers": 1}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    config.save_pretrained(tmp_path / "base")
    model = Gemma3ForConditionalGeneration(config)
    lora = LoraConfig(target_modules=r".*language_model.*\.(q_proj|down_proj)")
    wanted = saved(model, lora, tmp_path / "base", tmp_path / "a")
    exported = export_gguf(tmp_path / "a", tmp_path / "a.gguf")
    assert exported.architecture == "gemma3"
    need_same(added(exported.out), {tensor_of(name): update for name, update in wanted.items()})
    lora = LoraConfig(target_modules=r".*vision_tower.*\.q_proj")
    saved(Gemma3ForConditionalGeneration(config), lora, tmp_path / "base", tmp_path / "b")
    with pytest.raises(RankwiseError, match=r"applies no adapter to 'model.vision_tower.*of the gemma3"):
        export_gguf(tmp_path / "b", tmp_path / "b.gguf")


# --- refusals --------------------------------------------------------------------------------------


def refused(folder: Path, match: str, out: Path, **arguments: Any) -> None:
    """Check that an export is refused and that every file below `out`'s folder stays as it was."""
    before = files(out.parent)
    with pytest.raises(RankwiseError, match=match) as found:
        export_gguf(folder, out, **arguments)
    assert str(found.value).isprintable()
    assert files(out.parent) == before


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is adapted, and this base ties"),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "'model.embed_tokens' is adapted, and"),
        ("gemma", {"target_modules": ["q_proj", "embed_tokens"]}, "'model.embed_tokens' is adapted, and"),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}, "'transformer.wte' is adapted, and this base ties"),
        ("gpt2", {"target_modules": ["c_attn", "wpe"]}, "no adapter to 'transformer.wpe' of the gpt2"),
        (
            "llama",
            {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
            "holds 'base_model.model.model.norm.weight' beside A and B",
        ),
    ],
)
def test_what_llama_cpp_does_not_apply(
    bases: dict[str, Path], family: str, config: dict[str, Any], says: str, tmp_path: Path
):
    adapted = get_peft_model(FAMILIES[family][1](), LoraConfig(**config))
    adapted.peft_config["default"].base_model_name_or_path = str(bases[family])
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    refused(tmp_path / "a", says, tmp_path / "a.gguf")


def test_another_family(tmp_path: Path):
    model = zoo.neox()
    model.config.save_pretrained(tmp_path / "base")
    saved(model, LoraConfig(target_modules=["query_key_value"]), tmp_path / "base", tmp_path / "a")
    refused(tmp_path / "a", r"Gemma \(1, 2, 3\).*GPT-2 famil.*the base has 'gpt_neox'", tmp_path / "a.gguf")


def test_no_base(mixed: tuple[Path, dict], tmp_path: Path):
    for named, says in [
        (None, "names none. Name the base with --model"),
        ("HuggingFaceTB/SmolLM2-135M", "such as --model hf:HuggingFaceTB/SmolLM2-135M"),
        ("/nowhere/\x1b[2Jbase", r"which is no folder of one here. Name the base with --model"),
    ]:
        folder = edited(mixed[0], tmp_path / str(named)[-4:], base_model_name_or_path=named)
        refused(folder, says, tmp_path / "a.gguf")


def test_a_base_that_does_not_fit(mixed: tuple[Path, dict], bases: dict[str, Path], tmp_path: Path):
    refused(mixed[0], "Is it the right base", tmp_path / "a.gguf", model=str(bases["gpt2"]))
    other = edited(mixed[0], tmp_path / "a", base_model_name_or_path=str(bases["gpt2"]))
    refused(other, "does not fit its base, which has no module", tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16"),
        ({"max_rank": 0}, "max_rank must be 1 or more; got 0"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_senseless_arguments(mixed: tuple[Path, dict], arguments: dict[str, Any], says: str, tmp_path: Path):
    refused(mixed[0], says, tmp_path / "a.gguf", **arguments)


def test_places_where_nothing_can_be_written(mixed: tuple[Path, dict], tmp_path: Path):
    (tmp_path / "there.gguf").write_text("mine")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.gguf").mkdir()
    for name, says in [
        ("there.gguf", "is there already"),
        ("link.gguf", "is there already"),
        ("folder.gguf", "is there already"),
        ("a.safetensors", "is called NAME.gguf"),
        ("a", "is called NAME.gguf"),
    ]:
        refused(mixed[0], says, tmp_path / name)
    before = files(tmp_path)
    with pytest.raises(RankwiseError, match="cannot be written"):
        export_gguf(mixed[0], tmp_path / "there.gguf" / "a.gguf")
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", sorted(set(BAD) - {"zero"}))
def test_bad_adapters_leave_nothing_behind(mixed: tuple[Path, dict], kind: str, tmp_path: Path):
    refused(spoil(kind, mixed[0], tmp_path / "bad"), "", tmp_path / "a.gguf")


def test_precision_that_loses_the_update(mixed: tuple[Path, dict], tmp_path: Path):
    """B of 1e-8 is less than fp16's smallest number; B of 1e7 is above its largest."""
    for factor in (1e-8, 1e7):
        odd = retensored(
            mixed[0],
            tmp_path / f"a{factor}",
            lambda t, by=factor: [x.mul_(by) for n, x in t.items() if "lora_B" in n],
        )
        says = "rounding to F16 explains 2e-03. Choose another dtype|above the largest of torch.float16"
        refused(odd, says, tmp_path / "a.gguf", dtype="fp16")
        export_gguf(odd, tmp_path / f"{factor}.gguf", dtype="bf16")


def test_a_file_that_does_not_read_back(
    mixed: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The check reads the file: whatever goes wrong on the way there is found, and the file is gone."""
    (tmp_path / "kept").touch()
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file.gguf, "quantize", lambda values, kind: values * np.float32(1.01))
        with pytest.raises(RankwiseError, match=r"differs from the original's update by 2.0e-02"):
            export_gguf(mixed[0], tmp_path / "new" / "a.gguf")
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file.GGUFWriter, "write_tensors_to_file", lambda self: (_ for _ in ()).throw(full))
        with pytest.raises(RankwiseError, match=r"cannot be written to .*: No space left on device"):
            export_gguf(mixed[0], tmp_path / "new" / "deep" / "a.gguf")
    assert set(files(tmp_path)) == {"kept"}


def test_a_file_that_came_into_being_meanwhile(
    mixed: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prove = gguf_file._prove

    def slow(*arguments: Any) -> float:
        (tmp_path / "a.gguf").write_text("another's")
        return prove(*arguments)

    monkeypatch.setattr(gguf_file, "_prove", slow)
    with pytest.raises(RankwiseError, match="is there already"):
        export_gguf(mixed[0], tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "another's"
    assert set(files(tmp_path)) == {"a.gguf"}
