"""What only a GPU can show: the same numbers as on the CPU, every strategy, resuming. Skipped without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise import adapters
from rankwise.engine import attention, packing, proof
from rankwise.engine.batches import label_count, optimizer_steps
from rankwise.engine.paths import Packed, Plain
from rankwise.observer import Observer
from rankwise.strategies import STRATEGIES
from rankwise.study import run_study
from rankwise.train import train_adapters
from tests.conftest import tiny_llama
from tests.parts import hand_rows, opened, plan_of, train_config
from tests.zoo import PACKABLE, gemma3, mistral

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")


def alike(count: int, beginning: int = 10) -> list:
    """Rows of 30 to 70 tokens that begin alike."""
    rows = hand_rows(count, shortest=30, longest=70)
    head = rows[0].input_ids[:beginning]
    return [
        dataclasses.replace(r, input_ids=np.r_[head, r.input_ids[beginning:]].astype(np.int32)) for r in rows
    ]


def learned(path: Any, model: Any, rows: list, place: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's loss, and the adapters' gradients in one vector."""
    adapted = adapters.attach(model.to(place), plan_of(model, budget="r=4"), seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    for layer in adapters.lora_layers(adapted).values():
        weight: Any = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=draw) * 0.1)
    parameters = list(adapters.adapter_tensors(adapted).values())
    with path.installed(adapted):
        nll = path.score(adapted, rows).nll
        slopes = torch.autograd.grad(nll.sum() / label_count(rows), parameters)
    adapters.detach(adapted)
    return nll.detach().cpu(), torch.cat([s.flatten().cpu() for s in slopes])


@pytest.mark.parametrize("family", PACKABLE)
def test_a_packed_step_on_the_gpu_is_a_padded_one_on_the_cpu(family):
    rows = alike(5)
    assert isinstance(proof.choose(PACKABLE[family]().cuda()), Packed)
    found = learned(proof.choose(PACKABLE[family]().cuda()), PACKABLE[family](), rows, "cuda")
    wanted = learned(Plain(), PACKABLE[family](), rows, "cpu")
    for a, b, near in zip(found, wanted, (proof.NEAR, proof.NEAR_SLOPE), strict=True):
        assert (a - b).norm() <= near * b.norm()


@pytest.mark.parametrize("made", [mistral, gemma3])
def test_bf16_is_packed_too(made):
    assert isinstance(proof.choose(made().to(torch.bfloat16).cuda()), Packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("beginning", [0, 20])
def test_one_call_for_all_rows_is_one_for_each(dtype, window, beginning):
    pack = packing.pack(alike(6, beginning), "cuda")
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, pack.tokens, 64, generator=draw).to("cuda", dtype).requires_grad_()
        for h in (9, 3, 3)
    )
    slope = torch.randn(1, pack.tokens, 9, 64, generator=draw).to("cuda", dtype)
    results = []
    for way in (attention.at_once, attention.by_rows):
        out = way(q, k, v, pack, 0.125, 0.0, window)
        results.append((out, *torch.autograd.grad(out, (q, k, v), slope)))
    for a, b in zip(*results, strict=True):
        assert (a - b).float().norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.float().norm()


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path):
    steps = optimizer_steps(hand_rows(24), train_config(epochs=2), 0)
    ends = {}
    for name, stops in (("whole", [None]), ("cut", [5, None])):
        for stop in stops:
            model = tiny_llama().requires_grad_(False).cuda()
            adapted = adapters.attach(model, plan_of(model, budget="r=4"), seed=0)
            (tmp_path / name).mkdir(exist_ok=True)
            engine = Packed()
            with engine.installed(adapted):
                train_adapters(
                    adapted, steps, train_config(epochs=2), rate=1e-2, seed=0, folder=tmp_path / name,
                    engine=engine, until=stop,
                )  # fmt: skip
            ends[name] = torch.cat([p.detach().flatten() for p in adapters.adapter_tensors(adapted).values()])
    # sums of many threads: the last bits may differ
    assert (ends["whole"] - ends["cut"]).norm() <= 1e-5 * ends["whole"].norm()


def losses_of(workdir: Path, study_dict: dict, device: str) -> dict[str, float]:
    """Each arm's test loss in a study that runs every strategy on a device."""
    own = {
        "custom": {"ranks": {"attention": 3, "mlp": 2}, "match": "none"},
        "reversed": {"of": "linear_decay"},
    }
    arms = {
        name: {"strategy": name, **({} if name == "custom" else {"budget": "r=3"}), **own.get(name, {})}
        for name in STRATEGIES
    }
    train = study_dict["train"] | {"device": device, "step_tokens": 100, "epochs": 3}
    changes = {"arms": arms, "train": train, "seeds": {"tuning": 0, "reporting": 1}, "name": device}
    study = opened(workdir, study_dict | changes, f"{device}.yaml")
    assert isinstance(study.context.engine, Packed)
    index = run_study(study, Observer())
    losses = {}
    for run in index["runs"]:
        record = study.store.record(run["run_id"])
        assert record["status"] == "done", (run["arm"], record["failure"])
        card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        assert record["meta_info"]["system_info"]["device"] == card
        assert ("device_peak_bytes" in record["train_info"]) == (device == "cuda")
        losses[run["arm"]] = record["train_info"]["metrics"]["test_loss"]
    assert set(losses) == {*arms, "untouched"}
    return losses


def test_every_strategy_runs_as_on_the_cpu(workdir: Path, study_dict: dict):
    found, wanted = (losses_of(workdir, study_dict, device) for device in ("cuda", "cpu"))
    for arm, loss in wanted.items():
        assert found[arm] == pytest.approx(loss, abs=5e-3), arm
