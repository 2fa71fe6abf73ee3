"""The base model with an adapter's update folded into its weights: one model, which every program loads.

PEFT does the folding, in fp32. The result is compared weight by weight with W + s B A, computed here in
double precision, and by its logits with the adapter on its base; then it is rounded, written, read back, and
every tensor compared with what was to be written.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from rankwise import adapters, models
from rankwise.errors import RankwiseError, visible
from rankwise.exports.adapter_files import PREFIX, Adapter
from rankwise.exports.bases import base_source, fit, shapes_of
from rankwise.exports.card import write_card
from rankwise.exports.cuts import DTYPES, dtype_of
from rankwise.exports.inspecting import read_checked
from rankwise.exports.patterned import why, write_patterned
from rankwise.exports.places import need_new, written_aside
from rankwise.exports.programs import every

ROUNDING = 2.0**-22
"""Allowed difference of a weight in fp32, relative to its matrix's largest: s B A and the sum are rounded."""
LOGITS = 1e-5
"""Allowed RMS difference of logits in fp32, relative to their own RMS."""
ROWS, TOKENS = 4, 32


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        adapter: the folder that was read.
        out: the folder that was written: model, tokenizer, card.
        base: source of the base model.
        dtype: of the weights.
        modules: that were changed.
        untied: whether head and embedding, one in the base, are two now.
        bytes: size of the weights.
        weight_error: largest difference of a weight from W + s B A, over the largest of its matrix, before it
            was rounded to the dtype.
        logit_error: of what was written: RMS difference of logits from the adapter's on its base, over
            random tokens.
        effect: RMS difference that the adapter makes to the base's logits there; the same unit.
        notices: what a reader must know.
    """

    adapter: Path
    out: Path
    base: str
    dtype: str
    modules: int
    untied: bool
    bytes: int
    weight_error: float
    logit_error: float
    effect: float
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))

    def findings(self) -> list[str]:
        """Return what the checks found, and what changed besides weights."""
        share = f" ({self.logit_error / self.effect:.1%} of the adapter's effect)" if self.effect else ""
        found = [
            f"checked: weights within {self.weight_error:.1e} of W + s B A before they were stored as "
            f"{self.dtype}; logits of what was written within {self.logit_error:.1e} RMS of the adapter on "
            f"its base{share}"
        ]
        if self.untied:
            found.append(
                "head and embedding share their weights in the base and no longer do: tie_word_embeddings is "
                "off, and the model is larger by one of them"
            )
        return found

    def summary(self) -> str:
        """Return what was done as sentences, one a line."""
        first = f"{self.modules} modules of {self.base} changed; {self.dtype}, {self.bytes / 1e6:,.1f} MB"
        return "\n".join([first, *self.findings(), *self.notices, f"written to {self.out}"])


def export_merged(
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> Merged:
    """Write the base model with the adapter's update in its weights, and a tokenizer.

    The tokenizer is the adapter's own where its folder has one, as trainers save it; else the base's.

    Args:
        adapter: folder of adapter_config.json and adapter_model.safetensors.
        out: a new or empty folder.
        model: source of the base model; None takes what the adapter names.
        dtype: fp32, bf16 or fp16 of the weights; None takes what the base's config says.

    Raises:
        RankwiseError: an adapter that `read_checked` refuses, a base that cannot be had or does not fit, or
            a result that is not W + s B A to rounding. Nothing is left.

    Cost: the base in fp32 and the weights that change once more in memory, then twice the result; a forward
    pass over 128 tokens, four times.
    """
    target = Path(out)
    kind = dtype_of(dtype)
    need_new(target)
    source, seen, _, notices = read_checked(adapter, model)
    if source.declared.task_type not in (None, "CAUSAL_LM"):
        raise RankwiseError(
            f"{source.folder}: only causal language models are merged; task_type is "
            f"{visible(source.declared.task_type)!r}."
        )
    base = _base(source, model, seen)
    config = _config_of(base.folder)
    kind = kind or _dtype_of_base(config)
    tokenizer, said = _tokenizer(source, base)
    before = _logits(base.model)
    untied = _untie(base.model, source)
    weights = _weights(base.model, source)
    meant = _merge(base.model, source)
    off = _prove(base.model, weights, source, meant)
    del weights
    base.model.config.use_cache = config.get("use_cache", True)  # loading for training has turned it off
    with written_aside(target) as aside:
        base.model.to(kind).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        error = _rms(_logits(_read_back(aside, base.model)) - meant)
        done = Merged(
            adapter=source.folder,
            out=target,
            base=base.source,
            dtype=str(kind).removeprefix("torch."),
            modules=len(every(source)),
            untied=untied,
            bytes=sum(file.stat().st_size for file in aside.glob("*.safetensors")),
            weight_error=off,
            logit_error=error,
            effect=_rms(meant - before),
            notices=(*notices, *base.notices, *said),
        )
        write_card(aside, source, format="merged", notes=[*done.findings(), *done.notices])
    return done


def _base(adapter: Adapter, model: str | None, seen: Any | None) -> models.Base:
    """Load the base in fp32, or refuse one that is quantised or that the adapter does not fit."""
    place = base_source(adapter, model)
    seen = models.skeleton(place) if seen is None else seen
    if getattr(seen.config, "quantization_config", None):
        raise RankwiseError(
            f"{place} is a quantised base, into whose weights nothing is folded. Name the base in full "
            "precision with --model."
        )
    base = models.load_anew(place, "fp32", "cpu")
    fit(adapter, shapes_of(base.model), place)
    return base


def _config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _dtype_of_base(config: Mapping[str, Any]) -> torch.dtype:
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return next((kind for kind in DTYPES.values() if str(kind) == f"torch.{named}"), torch.float32)


def _tokenizer(adapter: Adapter, base: models.Base) -> tuple[Any, tuple[str, ...]]:
    """Return the tokenizer to write, the adapter's own if it has one, and what a reader must know of it."""
    if not (adapter.folder / "tokenizer_config.json").is_file():
        return base.tokenizer, ()
    try:
        own = AutoTokenizer.from_pretrained(adapter.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        return base.tokenizer, (
            f"the adapter's tokenizer does not load ({why(error)}): the base's is written",
        )
    rows = base.model.get_input_embeddings().weight.shape[0]
    if len(own) > rows:
        return own, (f"the adapter's tokenizer has {len(own):,} tokens, the model {rows:,} rows for them",)
    return own, ("the tokenizer is the adapter's own",)


def _untie(model: Any, adapter: Adapter) -> bool:
    """Give a head of its own to a model whose head is its embedding, where an update is for one of them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    names = {id(module): name for name, module in model.named_modules()}
    touched = {update.name for update in every(adapter)} | {
        extra.removeprefix(PREFIX).rpartition(".")[0] for extra in adapter.extras
    }
    if not touched & {names[id(head)], names[id(embedding)]}:
        return False
    if adapter.config.get("ensure_weight_tying"):
        raise RankwiseError(
            f"{adapter.folder}: with ensure_weight_tying head and embedding are trained as one, which is not "
            "supported here."
        )
    head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return True


def _weights(model: Any, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return copies of the weights that will be changed, (out, in) whatever the module stores."""
    return {update.name: _weight(model.get_submodule(update.name)).clone() for update in every(adapter)}


def _weight(module: torch.nn.Module) -> torch.Tensor:
    """Return a weight as (out, in); Conv1D and embeddings store (in, out)."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.t() if isinstance(module, Conv1D | torch.nn.Embedding) else weight


def _merge(model: Any, adapter: Adapter) -> torch.Tensor:
    """Fold the update into the model's weights with PEFT; return the adapter's logits before that."""
    with tempfile.TemporaryDirectory() as aside:  # with patterns that PEFT reads as the tensors say
        write_patterned(Path(aside), adapter, every(adapter))
        try:
            adapted = PeftModel.from_pretrained(model, aside, autocast_adapter_dtype=False).eval()
        except Exception as error:  # PEFT raises many kinds, each of which means the same here
            raise RankwiseError(f"PEFT does not load the adapter onto its base: {why(error)}") from error
    meant = _logits(adapted)
    adapted.merge_and_unload(safe_merge=True)
    assert not adapters.lora_layers(model)
    return meant


def _prove(merged: Any, weights: Mapping[str, torch.Tensor], adapter: Adapter, meant: torch.Tensor) -> float:
    """Compare weights with W + s B A, saved modules with the file, and logits with the adapter's, in fp32.

    Returns:
        The largest difference of a weight over the largest of its matrix.

    Raises:
        RankwiseError: one of them differs by more than rounding.
    """
    worst = 0.0
    for update in every(adapter):
        wanted = weights[update.name].double() + update.scale * update.b.double() @ update.a.double()
        found = _weight(merged.get_submodule(update.name)).double()
        off = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not off <= ROUNDING:
            raise RankwiseError(
                f"{update.name!r} of the merged model differs from W + s B A by {off:.1e} of its largest; "
                f"rounding explains {ROUNDING:.0e}."
            )
        worst = max(worst, off)
    parameters = dict(merged.named_parameters(remove_duplicate=False))
    for name, tensor in adapter.extras.items():
        there = parameters.get(name.removeprefix(PREFIX))
        if there is not None and not torch.equal(there, tensor.float()):
            raise RankwiseError(f"{name!r} of the merged model is not the tensor that the adapter holds.")
    error, size = _rms(_logits(merged) - meant), _rms(meant)
    if not error <= LOGITS * size:
        raise RankwiseError(
            f"The merged model's logits differ from the adapter's by {error:.1e}, their RMS is {size:.1e}."
        )
    return worst


def _read_back(folder: Path, written: Any) -> Any:
    """Return the model as others will load it, in fp32, once every tensor is what was written."""
    again = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    stored = again.state_dict()
    for name, tensor in written.state_dict().items():
        if name not in stored or not torch.equal(stored[name], tensor):
            raise RankwiseError(f"{name!r} of the merged model reads back otherwise than it was written.")
    return again.float()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Return logits over random tokens, the same ones every time, (rows, tokens, vocabulary)."""
    draw = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    return model(input_ids=torch.randint(0, size, (ROWS, TOKENS), generator=draw)).logits.float()


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())
