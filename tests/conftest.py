"""Shared parts: a tiny random Llama with a byte-level tokenizer, rows, and a study that uses them.

The byte-level tokenizer has a chat template, so that the tests see the same path as a real model.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.forked import Forked

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "red green blue fast slow tall short river stone cloud bread lamp music paper winter garden".split()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, two chat markers, an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<|im_start|>", "<|im_end|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT
    return fast


def tiny_llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama with grouped key/value heads and tied embeddings, as SmolLM2 has."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def alpaca_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of instruction, input and output; every instruction is distinct."""
    draw = random.Random(seed)
    return [
        {
            "instruction": f"Write number {i} with {draw.choice(WORDS)}",
            "input": draw.choice(WORDS) if i % 3 == 0 else "",
            "output": " ".join(draw.choices(WORDS, k=draw.randint(2, 5))),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def study_dict(tiny_model: Path) -> dict:
    """A study that runs in seconds: 2 arms, 2 seeds, one rate. Tests change what they need."""
    data = {"source": "file:rows.json", "train": 8, "validation": 4, "test": 6, "reserved": 4}
    train = {"step_tokens": 200, "micro_tokens": 300, "learning_rates": [1e-2]}
    return {
        "name": "tiny",
        "model": f"file:{tiny_model}",
        "data": data | {"max_length": 128},
        "train": train | {"dtype": "fp32", "device": "cpu", "threads": 1},
        "seeds": {"tuning": 0, "reporting": 2},
        "baseline": "uniform",
        "arms": {
            "uniform": {"strategy": "uniform", "budget": "r=2"},
            "decay": {"strategy": "linear_decay", "base": 4, "min": 1, "budget": "r=2"},
        },
    }


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with 60 rows in rows.json."""
    (tmp_path / "rows.json").write_text(json.dumps(alpaca_rows(60)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_study(folder: Path, study: dict, name: str = "study.yaml") -> Path:
    """Write a study file and return its path."""
    path = folder / name
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def rankwise(
    *arguments: object, cwd: Path, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process, forked unless it gets variables that are read by an import."""
    words = list(map(str, arguments))
    whole = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **env}
    if all(name.startswith("RANKWISE_") for name in env):
        process = Forked(words, cwd, whole)
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(words, process.returncode, out, err)
    return subprocess.run(
        [sys.executable, "-m", "rankwise", *words],
        cwd=cwd, text=True, capture_output=True, timeout=timeout, env=whole,
    )  # fmt: skip
