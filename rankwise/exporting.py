"""`rankwise.export`: an adapter for the program that serves it, or a plan for the trainer that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.exports.formats import Written


def export(
    source: str | Path, out: str | Path | None = None, *, format: str = "uniform", **options: Any
) -> Written:
    """Write anyone's PEFT LoRA adapter so that a program serves it as it was trained, or as a trainer's plan.

    `uniform` (scales folded into B, one rank, no patterns) is right in every server; `peft` gives every
    module its own rank and scale by anchored patterns; `merged` is the base model with the update in its
    weights; `gguf` is a file for llama.cpp; `axolotl`, `trl` and `unsloth` are lines of configuration that
    make that trainer build the same ranks and scales. Each is checked on what was written, by the rules of
    the programs that will read it.

    Args:
        source: folder with adapter_config.json and adapter_model.safetensors; for a trainer also a plan.json.
        out: a new folder, or a new file with the format's suffix; None puts it beside the source.
        format: one of those above.
        options: max_rank (uniform, peft, gguf): cut every update to this rank by SVD;
            dtype (uniform, peft, merged, gguf): fp32, bf16 or fp16;
            model (the same): source of the base model, where the adapter does not name a folder here;
            tgi (uniform): also pad and fill as TGI needs it;
            dropout (trainers): on the inputs of A.

    Returns:
        What was done: `.out`, `.summary()`, `.as_dict()`, and the format's own figures.

    Raises:
        RankwiseError: an adapter or a base that is not sound or does not fit, an option that the format
            does not take, a place that is taken, or a result that its program would serve wrongly. Nothing is
            left behind.

    Cost: seconds, and an SVD of (r, 2r) per module; `merged` also loads the base in fp32, twice.
    """
    from rankwise.exports import formats  # loads PyTorch

    return formats.export(source, out, format=format, **options)
