"""Whether the fast paths teach the same: two arms, one epoch, on every path and precision.

Prints the test loss of each path beside the plain fp32 one, and the paired difference between the arms. One
process; on a machine without bf16 instructions the bf16 rows are slow, not different.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rankwise import adapters, machine, models
from rankwise.config import TrainConfig
from rankwise.data import training_rows
from rankwise.engine import proof
from rankwise.engine.batches import optimizer_steps
from rankwise.evaluate import evaluate
from rankwise.inventory import inventory
from rankwise.strategies import allocate
from rankwise.studydata import prepare_data, read_data
from rankwise.studyfile import read_study
from rankwise.train import train_adapters

STUDY = Path(__file__).parent.parent / "studies" / "quickstart.yaml"
ARMS = {"uniform r=8": "r=8", "uniform r=16": "r=16"}
PATHS = {"plain fp32": ("fp32", "plain"), "packed fp32": ("fp32", "auto"), "packed bf16": ("bf16", "auto")}


def losses(dtype: str, engine_name: str, rows: int, test: int) -> dict[str, float]:
    """Train every arm once and return its test loss, in nats per response token."""
    file = read_study(STUDY, (f"data.test={test}",))
    base = models.load(file.config.model, dtype, "cpu", STUDY.parent)
    prepared = prepare_data(file, read_data(file), base.tokenizer)
    engine = proof.choose(base.model, engine_name)
    wanted = "plain" if engine_name == "plain" else "packed"
    if engine.name != wanted:
        sys.exit(f"this was to measure the {wanted} path, but: {engine.notice}")
    config = TrainConfig(step_tokens=512, learning_rates=(1e-3,), dtype=dtype)
    steps = optimizer_steps(training_rows(prepared, 0, rows), config, 0)
    found = {}
    for arm, budget in ARMS.items():
        plan = allocate(inventory(base.model), strategy="uniform", budget=budget)
        adapted = adapters.attach(base.model, plan, seed=0)
        with engine.installed(adapted), tempfile.TemporaryDirectory() as folder:
            train_adapters(adapted, steps, config, rate=1e-3, seed=0, folder=Path(folder), engine=engine)
            scored: Any = evaluate(adapted, prepared.splits.test, micro_tokens=1024, engine=engine)
        found[arm] = scored.metrics["loss"]
        adapters.detach(adapted)
    return found


def main() -> None:
    """Print a line per path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="training rows (default 32)")
    parser.add_argument("--test", type=int, default=64, help="test rows (default 64)")
    given = parser.parse_args()
    machine.keep_freed_memory()
    reference: dict[str, float] = {}
    for name, (dtype, engine) in PATHS.items():
        found = losses(dtype, engine, given.rows, given.test)
        reference = reference or found
        low, high = found.values()
        far = max(abs(found[arm] - reference[arm]) for arm in found)
        drift = abs((low - high) - (reference["uniform r=8"] - reference["uniform r=16"]))
        print(
            f"{name:12s}  r=8 {low:.6f}  r=16 {high:.6f}  largest difference to plain fp32 {far:.6f}  "
            f"change of the paired difference {drift:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
