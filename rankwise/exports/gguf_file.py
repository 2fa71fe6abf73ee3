"""An adapter as one GGUF file that llama.cpp adds to its GGUF of the base model.

llama.cpp knows one alpha a file and multiplies b @ a of every tensor by alpha over that tensor's own rank.
Any ranks and scales fit into that without padding: with alpha fixed, b is multiplied by s * r / alpha, and
alpha / r * b @ a is the trained update again. alpha is the s * r that most modules share, so that their b is
stored bit for bit as it was; were it 1, every b would be multiplied, and in half precision rounded once more.
(alpha = 0 would mean scale 1 for every rank. That reads like an adapter that is off, so it is not used.)

Followed from the sources in the package llama-cpp-python 0.3.36 (llama.cpp 0.5.0-dev):

- `src/llama-adapter.cpp` and `.h`: names, shapes and the scale; `src/llama-graph.cpp`: where it is applied.
  A linear map's a is (rank, in) and its b (out, rank), as PEFT stores them, for Conv1D as well: the
  converter turns the weight of a Conv1D into a linear map's (`conversion/gpt2.py`), and so a and b stay.
  Of `token_embd` alone a is turned, to (tokens, rank).
- `conversion/llama.py`: the rows of q and k change their order within each head of the llama architecture,
  whose rotation takes neighbours (2i, 2i+1) for a pair where Transformers takes (i, i + d/2). The rows of
  their b follow. Qwen, Gemma and GPT-2 keep the order.
- `src/models/*.cpp`: a tied head is `token_embd` by another use. An update of either would be looked up for
  both, in the wrong layout for one of them (the program aborts), so neither is written.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from rankwise.errors import RankwiseError, visible
from rankwise.exports.adapter_files import Adapter, Update
from rankwise.exports.bases import Shapes
from rankwise.exports.cuts import (
    TOLERANCE,
    ExportedModule,
    costs_of,
    cut,
    cut_lines,
    difference,
    dtype_of,
    need_rank,
    stored,
)
from rankwise.exports.inspecting import read_checked
from rankwise.exports.places import need_new_file, new_file
from rankwise.exports.programs import every, extras

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2, "gemma3_text": gguf.MODEL_ARCH.GEMMA3, "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3, "gpt2": gguf.MODEL_ARCH.GPT2,
}  # fmt: skip
"""Transformers' model_type (of the text model) -> llama.cpp's architecture, as its converter maps them."""

APPLIED = frozenset({
    gguf.MODEL_TENSOR.ATTN_Q, gguf.MODEL_TENSOR.ATTN_K, gguf.MODEL_TENSOR.ATTN_V, gguf.MODEL_TENSOR.ATTN_QKV,
    gguf.MODEL_TENSOR.ATTN_OUT, gguf.MODEL_TENSOR.FFN_GATE, gguf.MODEL_TENSOR.FFN_UP,
    gguf.MODEL_TENSOR.FFN_DOWN, gguf.MODEL_TENSOR.OUTPUT, gguf.MODEL_TENSOR.TOKEN_EMBD,
})  # fmt: skip
"""Weights that llama.cpp applies an adapter to (`build_lora_mm`, `build_inp_embd`). It loads one of learned
positions or norms without a word, and leaves it out."""

_KINDS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.bfloat16: GGMLQuantizationType.BF16,
    torch.float16: GGMLQuantizationType.F16,
}
_TORCH = {kind: dtype for dtype, kind in _KINDS.items()}
# As llama.cpp's converter strips them: multimodal models hold their language model under one of these.
_PREFIXES = {"model.language_model.": "model.", "language_model.": ""}


@dataclass(frozen=True)
class GgufExported:
    """What a GGUF export did.

    Attributes:
        adapter: the folder that was read.
        out: the file that was written.
        architecture: of the base, by llama.cpp's name.
        alpha: of the file.
        dtype: of the factors.
        tensors: module -> the base's tensor in llama.cpp; the file has a lora_a and a lora_b of each.
        reordered: modules whose rows of b are in llama.cpp's rotary order.
        modules: what truncation cost, in the order of their names.
        parameters_before: of A and B.
        parameters_after: the same afterwards.
        bytes_before: size of the weights file.
        bytes_after: size of the GGUF file.
        difference: largest relative difference of a module's update, as read back, from the trained one.
        notices: what a reader must know.
    """

    adapter: Path
    out: Path
    architecture: str
    alpha: float
    dtype: str
    tensors: Mapping[str, str]
    reordered: tuple[str, ...]
    modules: tuple[ExportedModule, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    difference: float
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))

    def summary(self) -> str:
        """Return what was done as sentences, one a line."""
        low, high = (f(m.rank_after for m in self.modules) for f in (min, max))
        file = visible(str(self.out))
        lines = [
            f"rank {low if low == high else f'{low} to {high}'} on {len(self.modules)} modules of a "
            f"{self.architecture} model, {self.dtype}, one alpha of {self.alpha:g}; scales are inside lora_b",
            f"parameters: {self.parameters_before:,} before, {self.parameters_after:,} after; "
            f"weights file {self.bytes_before / 1e6:,.2f} MB before, {self.bytes_after / 1e6:,.2f} MB after",
        ]
        if self.reordered:
            lines.append(f"rows of {len(self.reordered)} q and k modules are in llama.cpp's rotary order")
        lines += cut_lines(self.modules)
        lines += [
            f"checked: read back under llama.cpp's rule, updates within {self.difference:.1e}",
            f"llama.cpp: llama-cli -m BASE.gguf --lora {shlex.quote(file)} (llama-server: the same --lora)",
            f"llama-cpp-python: Llama(model_path='BASE.gguf', lora_path={file!r})",
        ]
        return "\n".join([*lines, *self.notices, f"written to {file}"])


class _Place(NamedTuple):
    """Where an update goes: the base's tensor in llama.cpp, and the order of b's rows there if another."""

    tensor: str
    order: torch.Tensor | None


Places = Mapping[str, _Place]


def export_gguf(
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_rank: int | None = None,
) -> GgufExported:
    """Write a LoRA file for llama.cpp that adds to every weight what the given adapter adds.

    Args:
        adapter: folder of adapter_config.json and adapter_model.safetensors.
        out: a new file, `.gguf`.
        model: source of the base model, of which the configuration alone is read; None takes the local folder
            that the adapter names.
        dtype: fp32, bf16 or fp16; None keeps that of each tensor (fp64 becomes fp32).
        max_rank: updates of a larger rank are cut to it by SVD, each to its best approximation.

    Raises:
        RankwiseError: an adapter that `read_checked` refuses, or that holds what llama.cpp does not apply (a
            tied head or embedding, trained norms, other tensors); a base that is not known, or of no family
            here; a rank or dtype that makes no sense; a file that is there already; a result that, read back,
            is not the trained update. Nothing is left.

    Cost: per module an SVD of (r, 2r); no base weights are read.
    """
    target = Path(out)
    kind = dtype_of(dtype)
    need_rank(max_rank)
    need_new_file(target, ".gguf", "A GGUF file")
    source, base, shapes, notices = read_checked(adapter, model)
    config = _base_config(source, base, shapes)
    architecture = _architecture(config)
    places = _places(source, config, architecture)
    cuts = [cut(update, max_rank) for update in every(source)]
    alpha = _common_alpha(cuts)
    written = [_written(c, alpha, _kind(kind, u)) for c, u in zip(cuts, every(source), strict=True)]
    with new_file(target) as aside:
        _write(aside, written, places, architecture, alpha)
        size = aside.stat().st_size
        worst = _prove(aside, cuts, places, architecture)
    return GgufExported(
        adapter=source.folder,
        out=target,
        architecture=gguf.MODEL_ARCH_NAMES[architecture],
        alpha=alpha,
        dtype=", ".join(sorted({str(u.b.dtype).removeprefix("torch.") for u in written})),
        tensors={name: place.tensor for name, place in sorted(places.items())},
        reordered=tuple(sorted(name for name, place in places.items() if place.order is not None)),
        modules=costs_of(source, cuts, ()),
        parameters_before=sum(update.parameters for update in every(source)),
        parameters_after=sum(update.parameters for update in written),
        bytes_before=source.size,
        bytes_after=size,
        difference=worst,
        notices=notices,
    )


# --- the base --------------------------------------------------------------------------------------


def _base_config(source: Adapter, base: Any | None, shapes: Shapes | None) -> Any:
    """Return the configuration of the base's text model, of which every adapted module must be a part."""
    if base is None or shapes is None:
        named = source.declared.base_model_name_or_path
        why = "names none" if not named else f"names {visible(named)!r}, which is no folder of one here"
        hint = f", such as --model hf:{visible(named)}" if named and not Path(named).is_absolute() else ""
        raise RankwiseError(
            "A GGUF file's tensor names and layout follow from the base model's configuration; "
            f"{source.folder} {why}. Name the base with --model{hint}."
        )
    if strange := [update.name for update in every(source) if update.name not in shapes]:
        raise RankwiseError(f"{source.folder} does not fit its base, which has no module {strange[0]!r}.")
    return base.config.get_text_config()


def _architecture(config: Any) -> gguf.MODEL_ARCH:
    """Return llama.cpp's architecture of a base by its text model's configuration, or refuse it."""
    if config.model_type not in ARCHITECTURES:
        raise RankwiseError(
            "GGUF adapters are written for the Llama (SmolLM2 and Mistral among them), Gemma (1, 2, 3), Qwen "
            f"(2, 3) and GPT-2 families: model_type must be one of {', '.join(ARCHITECTURES)}; the base has "
            f"{visible(str(config.model_type))!r}."
        )
    return ARCHITECTURES[config.model_type]


def _places(source: Adapter, config: Any, architecture: gguf.MODEL_ARCH) -> Places:
    """Return module -> its place, by gguf's name map; refuse what llama.cpp would leave out or stop at."""
    if alien := extras(source):
        raise RankwiseError(
            f"{source.folder} holds {alien[0]!r} beside A and B; llama.cpp would leave it out. Merge the "
            "adapter into the base instead (--format merged)."
        )
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings or gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[architecture]
    places: dict[str, _Place] = {}
    for update in every(source):
        found = names.get_type_and_name(f"{_plain(update.name)}.weight", (".weight",))
        if found is None or found[0] not in APPLIED:
            raise RankwiseError(
                f"llama.cpp applies no adapter to {update.name!r} of the "
                f"{gguf.MODEL_ARCH_NAMES[architecture]} architecture."
            )
        which, tensor = found
        if tied and which in (gguf.MODEL_TENSOR.OUTPUT, gguf.MODEL_TENSOR.TOKEN_EMBD):
            raise RankwiseError(
                f"{update.name!r} is adapted, and this base ties its head to its embedding: llama.cpp holds "
                "one tensor for both and cannot adapt one of them. Train without it, or merge the adapter "
                "into an untied base."
            )
        places[update.name] = _Place(tensor, _order(which, config, architecture, update.b.shape[0]))
    assert len({place.tensor for place in places.values()}) == len(places)
    return places


def _plain(name: str) -> str:
    """Return a module's name as a model of text alone has it."""
    for prefix, instead in _PREFIXES.items():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name


def _order(
    which: gguf.MODEL_TENSOR, config: Any, architecture: gguf.MODEL_ARCH, rows: int
) -> torch.Tensor | None:
    """Return which row of a q or k projection stands where in llama.cpp, (rows,); None for the same order.

    Within a head of d rows, row i of the first half and row i of the second (a pair to Transformers) become
    rows 2i and 2i + 1 (`LlamaModel.permute`).
    """
    heads = {
        gguf.MODEL_TENSOR.ATTN_Q: config.num_attention_heads,
        gguf.MODEL_TENSOR.ATTN_K: getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }
    if architecture is not gguf.MODEL_ARCH.LLAMA or which not in heads:
        return None
    return torch.arange(rows).reshape(heads[which], 2, -1).swapaxes(1, 2).flatten()


# --- the tensors -----------------------------------------------------------------------------------


def _common_alpha(updates: Sequence[Update]) -> float:
    """Return the alpha (scale * rank) that most updates have, as a 32-bit float; 1 where none is of use."""
    with np.errstate(over="ignore"):
        alphas = [float(np.float32(update.scale * update.rank)) for update in updates]
    usable = Counter(a for a in alphas if math.isfinite(a) and abs(a) >= np.finfo(np.float32).tiny)
    return usable.most_common(1)[0][0] if usable else 1.0


def _kind(wanted: torch.dtype | None, update: Update) -> torch.dtype:
    kind = wanted or update.b.dtype
    return kind if kind in _KINDS else torch.float32  # llama.cpp multiplies by no 64-bit factors


def _written(update: Update, alpha: float, kind: torch.dtype) -> Update:
    """Return the update with b such that alpha / rank * b @ a is what it adds, in the precision stored."""
    scale = alpha / update.rank
    return stored(replace(update, b=update.b * (update.scale / scale), scale=scale), kind)


# --- writing and proving ---------------------------------------------------------------------------


def _write(
    path: Path, updates: Sequence[Update], places: Places, architecture: gguf.MODEL_ARCH, alpha: float
) -> None:
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for update in updates:
            place, kind = places[update.name], _KINDS[update.b.dtype]
            a = update.a.t() if update.embedding else update.a
            b = update.b if place.order is None else update.b[place.order]
            for side, factor in (("a", a), ("b", b)):
                values = gguf.quantize(factor.float().contiguous().numpy(), kind)
                writer.add_tensor(f"{place.tensor}.lora_{side}", values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _prove(path: Path, wanted: Sequence[Update], places: Places, architecture: gguf.MODEL_ARCH) -> float:
    """Read a file as llama.cpp does; return by how much it misses an update at most, or refuse it."""
    reader = GGUFReader(path)
    heads = {key: field.contents() for key, field in reader.fields.items()}
    assert (heads["general.type"], heads["adapter.type"]) == ("adapter", "lora")
    assert heads["general.architecture"] == gguf.MODEL_ARCH_NAMES[architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(wanted)
    worst = 0.0
    for update in wanted:
        place, factors = places[update.name], []
        for side in "ab":
            tensor = tensors[f"{place.tensor}.lora_{side}"]
            factors.append(torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)))
        a, b = factors
        if place.order is not None:
            b = torch.empty_like(b).index_copy_(0, place.order, b)
        a = a.t() if update.embedding else a
        alpha = heads["adapter.lora.alpha"]
        found = difference(replace(update, a=a, b=b), alpha / b.shape[1], update)
        allowed = TOLERANCE[_TORCH[tensor.tensor_type]]
        if not found <= allowed:
            raise RankwiseError(
                f"llama.cpp would add to {update.name!r} what differs from the original's update by "
                f"{found:.1e}; rounding to {tensor.tensor_type.name} explains {allowed:.0e}. Choose another "
                "dtype, fp32 at best."
            )
        worst = max(worst, found)
    return worst
