"""A fixed model, fixed rows, a fixed plan, five steps: the losses that NUMERICS stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankwise import adapters
from rankwise.config import NUMERICS
from rankwise.engine import proof
from rankwise.engine.batches import optimizer_steps
from rankwise.evaluate import evaluate
from rankwise.seeds import generator
from rankwise.train import train_adapters
from tests.conftest import tiny_llama
from tests.parts import hand_rows, mixed_ranks, plan_of, train_config

GOLDEN = {
    1: [
        5.6258463859558105,
        5.61190402507782,
        5.537082314491272,
        5.60701847076416,
        5.648127555847168,
        5.598139396080604,
    ],
    2: [
        5.6258463859558105,
        5.611903786659241,
        5.537082314491272,
        5.60701847076416,
        5.648127555847168,
        5.598139249361479,
    ],
}
"""NUMERICS -> the loss of each step, then the test loss."""


@pytest.mark.parametrize("path", ["plain", "auto"])
def test_golden_run(path: str, tmp_path: Path):
    torch.set_num_threads(1)
    model = tiny_llama()
    with torch.no_grad():  # weights by formula, so that no generator of PyTorch's matters
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.from_numpy(generator(11, name).uniform(-0.1, 0.1, parameter.shape)))
    plan = plan_of(model, "custom", match="none", options={"ranks": mixed_ranks(model)})
    engine = proof.choose(model.requires_grad_(False), path)
    assert engine.name == ("plain" if path == "plain" else "packed")
    adapted = adapters.attach(model, plan, seed=11)
    config, entries = train_config(micro_tokens=90), []
    steps = optimizer_steps(hand_rows(20), config, seed=11)
    with engine.installed(adapted):
        train_adapters(
            adapted, steps, config, rate=3e-2, seed=11, folder=tmp_path, engine=engine, on_step=entries.append
        )
        test = evaluate(adapted, hand_rows(6, seed=1), micro_tokens=90, engine=engine)
    found = [*(entry["loss"] for entry in entries), test.metrics["loss"]]
    assert NUMERICS in GOLDEN, f"NUMERICS is {NUMERICS}: write its golden losses {found} into this test."
    assert found == pytest.approx(GOLDEN[NUMERICS], rel=1e-5), (
        f"The numbers of a run have changed: now {found}. If that is wanted, raise config.NUMERICS by one "
        "(old records then stay as they are, and every run is done anew) and write these losses here. "
        "If it is not wanted, something in plans, adapters, batches, loss or optimizer has broken."
    )
