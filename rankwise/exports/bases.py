"""The base model of an adapter, as far as it can be had: its source, its shapes, whether the adapter fits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from rankwise import models, sources
from rankwise.errors import RankwiseError
from rankwise.exports.adapter_files import Adapter
from rankwise.exports.programs import every

Shapes = Mapping[str, tuple[int, int]]
"""Module -> (in_features, out_features); of an embedding (tokens, width)."""


def base_source(adapter: Adapter, model: str | None) -> str:
    """Return the source of an adapter's base model: as given, or as the adapter names it.

    Raises:
        RankwiseError: neither names one.
    """
    if model is not None:
        return model
    named = adapter.declared.base_model_name_or_path
    if not named:
        raise RankwiseError(f"{adapter.folder} does not name its base model; name it with --model.")
    if _local(named) is not None or named.startswith(("/", ".", "~")):
        source = f"file:{named}"
    else:
        source = f"hf:{named}" + (f"@{adapter.declared.revision}" if adapter.declared.revision else "")
    try:
        sources.fetch(source, kind="model")
    except RankwiseError as error:
        raise RankwiseError(
            f"The adapter's base model {named!r} cannot be had ({error}) Name it with --model."
        ) from None
    return source


def skeleton(adapter: Adapter, model: str | None) -> Any | None:
    """Return the base without its weights (meta device): of `model`, or of a folder that the adapter names.

    None where the adapter names no folder on this machine that holds a causal language model.

    Raises:
        RankwiseError: `model` cannot be had, or is no causal language model.
    """
    if model is not None:
        return models.skeleton(model)
    named = _local(adapter.declared.base_model_name_or_path or "")
    if adapter.declared.task_type not in (None, "CAUSAL_LM") or named is None:
        return None
    if not (named / "config.json").is_file():
        return None
    try:
        return models.skeleton_of(named, str(named))
    except RankwiseError:
        return None


def _local(name: str) -> Path | None:
    """Return the file or folder of that name on this machine, if there is one."""
    try:
        place = Path(os.path.expanduser(name))  # noqa: PTH111 - a Path raises for ~nobody
        return place if name and place.exists() else None
    except (OSError, ValueError):  # too long for a path, or a character that no path has
        return None


def shapes_of(model: Any) -> Shapes:
    """Return the shapes of all modules that LoRA can adapt."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            shapes[name] = module.nx, module.nf
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = module.num_embeddings, module.embedding_dim
    return shapes


def fit(adapter: Adapter, shapes: Shapes, model: str | None) -> tuple[str, ...]:
    """Refuse a base of other shapes; one without a module only where a person named it (`model`).

    Returns:
        What a reader must know.
    """
    base = model or adapter.declared.base_model_name_or_path
    missing = [update.name for update in every(adapter) if update.name not in shapes]
    if missing and model is not None:
        raise RankwiseError(
            f"{adapter.folder} does not fit {base}, which has no module {missing[0]!r}. Is it the right base?"
        )
    for update in every(adapter):
        wanted, there = (update.a.shape[1], update.b.shape[0]), shapes.get(update.name)
        if there is not None and there != wanted:
            raise RankwiseError(
                f"{adapter.folder} does not fit {base}: {update.name!r} maps {wanted[0]} to {wanted[1]} in "
                f"the adapter and {there[0]} to {there[1]} there. Is it the right base?"
            )
    return (f"{base} has no module {missing[0]!r} as a causal language model",) if missing else ()
