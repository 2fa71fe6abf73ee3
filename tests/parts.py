"""More shared parts: token rows made by hand, a tiny GPT-2, plans, and a study opened in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from rankwise.config import TrainConfig
from rankwise.data import NO_LOSS, Example
from rankwise.grid import Study
from rankwise.inventory import inventory
from rankwise.plans import RankPlan
from rankwise.store import Store
from rankwise.strategies import allocate
from rankwise.study import open_study
from tests.conftest import tiny_llama, write_study

LOSS_FILES = {"validation.parquet", "examples.parquet"}
RECORD = {
    "untouched": {"config.json", "env.json", "result.json"} | LOSS_FILES,
    "tuning": {"config.json", "env.json", "result.json", "plan.json", "metrics.jsonl", "validation.parquet"},
    "reporting": {"config.json", "env.json", "result.json", "plan.json", "metrics.jsonl", "examples.parquet"},
}
ADAPTER = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2 (Conv1D layers, learned positions) without dropout of its own."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=512,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=257, eos_token_id=257,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def hand_rows(count: int, *, seed: int = 0, shortest: int = 6, longest: int = 40) -> list[Example]:
    """Rows of random bytes, all of different make: lengths, prompts, and a gap between two answers."""
    draw = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for i in range(count):
        length = int(draw.integers(shortest, longest + 1))
        ids = draw.integers(0, 256, length).astype(np.int32)
        labels = ids.copy()
        labels[: int(draw.integers(1, length // 2 + 1))] = NO_LOSS
        if length > 20 and i % 2:
            labels[length - 8 : length - 4] = NO_LOSS
        answers = int((labels != NO_LOSS).sum())
        rows.append(Example(f"{i:064x}", ids, labels, length - answers, answers, 0, answers))
    return rows


def train_config(**changes: Any) -> TrainConfig:
    """Settings in which every part of a step does something: warm-up, decay, clipping, several rows."""
    settings = {
        "step_examples": 4, "micro_tokens": 10_000, "learning_rates": [1e-2], "warmup": 0.2,
        "weight_decay": 0.1, "clip": 0.3, "dtype": "fp32", "device": "cpu", "threads": 1,
    }  # fmt: skip
    return TrainConfig.model_validate({**settings, **changes})


def plan_of(model: Any, strategy: str = "uniform", **settings: Any) -> RankPlan:
    """The plan of a strategy on all linear maps of a model."""
    return allocate(inventory(model), strategy=strategy, **settings)


def mixed_ranks(model: Any) -> dict[str, int]:
    """Ranks 0, 1, 2, 3, 5, 8 in turn over the modules, by name."""
    return {name: (3, 0, 8, 1, 5, 2)[i % 6] for i, name in enumerate(inventory(model).names)}


def opened(folder: Path, study: dict, name: str = "study.yaml", results: str = "results") -> Study:
    """Write a study file and open it in this process."""
    return open_study(write_study(folder, study, name), folder / results)


def record_of(folder: Path) -> dict[str, Any]:
    """Everything of a run's record that a rerun must repeat bit for bit (not time, memory or place)."""
    result = json.loads((folder / "result.json").read_text())
    found: dict[str, Any] = {
        "status": result["status"],
        "failure": result["failure"],
        "metrics": result["train_info"]["metrics"],
        "train_loss": result["train_info"].get("train_loss"),
        "config": json.loads((folder / "config.json").read_text()),
    }
    for name in sorted(LOSS_FILES):
        if (folder / name).exists():
            found[name] = pyarrow.parquet.read_table(folder / name).to_pydict()
    if (folder / "plan.json").exists():
        found["plan"] = (folder / "plan.json").read_text()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found["steps"] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    weights = folder / "adapter" / "adapter_model.safetensors"
    if weights.exists():
        found["adapter"] = {name: t.numpy().tobytes() for name, t in load_file(weights).items()}
    return found


def records_of(store: Store) -> dict[str, dict[str, Any]]:
    """Run name -> record of every finished run of a study."""
    return {folder.name: record_of(folder) for folder in sorted(store.runs.iterdir())}
