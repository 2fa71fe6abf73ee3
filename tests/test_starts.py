"""Where A starts and how fast B learns: options beside the ranks, for any allocation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer

from rankwise import adapters
from rankwise.engine.batches import label_count, optimizer_steps
from rankwise.engine.plain import score
from rankwise.errors import RankwiseError
from rankwise.evidence import Evidence
from rankwise.grid import run_config
from rankwise.inventory import inventory
from rankwise.run import evidence_for, execute, plan_for, probe_work, session_for, work_of
from rankwise.seeds import generator
from rankwise.train import rate_factor, train_adapters
from tests.conftest import tiny_llama
from tests.parts import hand_rows, opened, plan_of, train_config

DATA_ARMS = {
    "spectral": {"strategy": "spectral", "budget": "r=2"},
    "spectral-start": {"strategy": "uniform", "budget": "r=2", "init": "gradient"},
    "eva-start": {"strategy": "linear_decay", "base": 4, "min": 1, "match": "none", "init": "eva"},
    "plus": {"strategy": "uniform", "budget": "r=2", "loraplus_lr_ratio": 8},
    "uniform": {"strategy": "uniform", "budget": "r=2"},
}


def test_a_starts_along_the_directions_and_the_model_is_unchanged():
    model = tiny_llama().requires_grad_(False)
    plan = plan_of(model, "uniform", budget="r=3")
    rows = hand_rows(4)
    with torch.no_grad():
        before = score(model, rows).nll
    given = {
        m.name: generator(0, m.name).normal(size=(2, m.in_features)).astype(np.float32)
        for m in inventory(model)
    }
    adapted = adapters.attach(model, plan, seed=0, directions=given)
    starts = {
        name: layer.lora_A["default"].weight.detach() for name, layer in adapters.lora_layers(adapted).items()
    }
    with torch.no_grad():
        assert torch.equal(score(adapted, rows).nll, before)
    adapters.detach(adapted)
    plain = adapters.attach(model, plan, seed=0)
    for name, layer in adapters.lora_layers(plain).items():
        a, drawn = starts[name], layer.lora_A["default"].weight.detach()
        along = torch.from_numpy(given[name] / np.linalg.norm(given[name], axis=1, keepdims=True))
        torch.testing.assert_close(a[:2], along / 3**0.5)  # as long as a drawn row is on average
        assert torch.equal(a[2:], drawn[2:]) and not torch.equal(a[:2], drawn[:2])
        lengths = drawn.norm(dim=1)
        assert 0.7 < (lengths * 3**0.5).mean() < 1.3
    adapters.detach(plain)


def test_learning_rate_of_b_equals_pefts_loraplus(tmp_path: Path):
    config = train_config(weight_decay=0.0, clip=None)
    steps = optimizer_steps(hand_rows(12), config, seed=1)
    model = tiny_llama().requires_grad_(False)
    plan = plan_of(model, "uniform", budget="r=3")
    ours = adapters.attach(model, plan, seed=1)
    start = {name: p.detach().clone() for name, p in adapters.adapter_tensors(ours).items()}
    train_adapters(ours, steps, config, rate=1e-3, seed=1, folder=tmp_path, b_ratio=16)
    found = {name: p.detach().clone() for name, p in adapters.adapter_tensors(ours).items()}
    adapters.detach(ours)

    theirs = get_peft_model(tiny_llama().requires_grad_(False), plan.lora_config())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, betas=config.betas, weight_decay=0.0
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, rows in enumerate(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(config, step, len(steps))
        optimizer.zero_grad()
        (score(theirs, rows).nll.sum() / label_count(rows)).backward()
        optimizer.step()
    expected = adapters.adapter_tensors(theirs)
    assert found.keys() == expected.keys() and any("lora_B" in name for name in found)
    for name, value in found.items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-4, atol=1e-6)


@pytest.fixture
def study(study_dict: dict, workdir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(workdir / "cache"))
    study_dict |= {"arms": DATA_ARMS, "baseline": "uniform", "contrasts": []}
    study_dict["data"] = study_dict["data"] | {"calibration": 3}
    return opened(workdir, study_dict)


def test_arms_share_what_a_seed_measured_and_records_tell_it(study, workdir: Path):
    store = study.store
    store.open()
    records = {}
    for arm in DATA_ARMS:
        run = run_config(study, arm, "reporting", 0, 1e-3)
        with store.claim(run.run_id):
            assert execute(run, study.context, store, arm=arm) == "done"
        records[arm] = store.record(run.run_id)["train_info"], store.plan(run.run_id)
    kinds = {arm: [probe["kind"] for probe in info["probes"]] for arm, (info, _) in records.items()}
    assert kinds == {
        "spectral": ["gradients"], "spectral-start": ["gradients"], "eva-start": ["inputs"], "plus": [],
        "uniform": [],
    }  # fmt: skip
    shared = [records[arm][0]["probes"][0]["cost"] for arm in ("spectral", "spectral-start")]
    assert shared[0] == shared[1] and shared[0]["passes"] >= 1  # to the microsecond: measured once
    assert len(list((workdir / "cache" / "probes").glob("*.safetensors"))) == 2
    losses = {arm: info["metrics"]["test_loss"] for arm, (info, _) in records.items()}
    assert (
        len({losses[arm] for arm in ("spectral-start", "plus", "uniform")}) == 3
    )  # same ranks, other starts
    assert records["spectral"][1]["provenance"]["probe"]["kind"] == "gradients"
    assert "seconds" not in json.dumps(records["spectral"][1])


def test_the_start_is_the_probes_leading_directions(study, workdir: Path):
    run = run_config(study, "spectral-start", "reporting", 0, 1e-3)
    evidence = evidence_for(run, study.context)
    session = session_for(run, study.context, workdir, evidence)
    assert session.plan == plan_for(run, study.context.inventory, study.context.base.source, evidence)
    adapted = adapters.attach(session.model, session.plan, seed=0, directions=session.directions)
    for name, layer in adapters.lora_layers(adapted).items():
        a, leading = (
            layer.lora_A["default"].weight.detach().numpy(),
            evidence["gradients"].of("right_vectors")[name],
        )
        cosines = (a * leading[:2]).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(leading[:2], axis=1)
        assert cosines == pytest.approx(1, abs=1e-5)
    adapters.detach(adapted)


def test_only_runs_that_look_at_data_depend_on_the_calibration_rows(study_dict: dict, workdir: Path):
    study_dict |= {"arms": DATA_ARMS, "baseline": "uniform", "contrasts": []}
    names = []
    for count in (3, 4):
        study_dict["data"] = study_dict["data"] | {"calibration": count}
        one = opened(workdir, study_dict, f"{count}.yaml")
        names.append({arm: run_config(one, arm, "reporting", 0, 1e-3).run_id for arm in DATA_ARMS})
    same = {arm for arm in DATA_ARMS if names[0][arm] == names[1][arm]}
    assert same == {"plus", "uniform"}


def test_adalora_refuses_a_start_that_it_would_not_use(study_dict: dict, workdir: Path):
    study_dict["arms"] = {"a": {"strategy": "adalora", "budget": "r=2", "init": "eva"}}
    study_dict |= {"baseline": "a", "contrasts": []}
    with pytest.raises(RankwiseError, match="leave `init` out"):
        opened(workdir, study_dict)


def test_a_probe_that_overflows_fails_its_run_and_not_the_study(
    study, workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    def overflowing(setting):
        values = {m.name: np.float32(np.inf) * np.ones((), np.float32) for m in setting.inventory}
        return Evidence("fisher", {"mean_square": values})

    monkeypatch.setattr("rankwise.probes.squares.measure_fisher", overflowing)
    run = run_config(study, "uniform", "reporting", 0, 1e-3).model_copy(
        update={"strategy": "fisher", "calibration": 3}
    )
    study.store.open()
    told: list[int] = []
    with study.store.claim(run.run_id):
        assert execute(run, study.context, study.store, arm="fisher", on_work=told.append) == "failed"
    record = study.store.record(run.run_id)
    assert (
        "mean_square of model.layers.0" in record["failure"]["reason"]
        and record["train_info"]["metrics"] == {}
    )
    assert not list((workdir / "cache").rglob("probes/*.safetensors"))  # nothing bad is kept


def test_the_progress_of_a_run_counts_its_probe(study):
    run = run_config(study, "spectral", "reporting", 0, 1e-3)
    study.store.open()
    told: list[int] = []
    with study.store.claim(run.run_id):
        execute(run, study.context, study.store, arm="spectral", on_work=told.append)
    without = work_of(run.model_copy(update={"strategy": "uniform"}), study.context)
    assert probe_work(run, study.context) > 0
    assert work_of(run, study.context) == without + probe_work(run, study.context)
    assert min(told) >= 0 and sum(told) == pytest.approx(work_of(run, study.context), rel=0.2)
