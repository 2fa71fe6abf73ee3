"""A plan for a model that someone loaded: it comes back as it was, the plan goes into any trainer."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

import rankwise
from rankwise import adapters, probes
from rankwise.errors import RankwiseError
from rankwise.evidence import Evidence
from rankwise.plans import RankPlan
from tests.conftest import alpaca_rows, byte_tokenizer, tiny_llama
from tests.conftest import rankwise as command
from tests.parts import MODELS
from tests.refusals import refused

ROWS = alpaca_rows(40)
DATA: dict[str, Any] = {"data": ROWS, "tokenizer": byte_tokenizer(), "calibration": 8}
LOOKING = ["spectral", "eva", "fisher", "gora", "weight_spectrum", "lora_drop"]
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


def state_of(model: Any) -> dict[str, Any]:
    """Everything about a model that its owner could miss, and the generators."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    tensors = parameters | dict(model.named_buffers())
    return {
        "bytes": {n: t.detach().view(torch.uint8).numpy().tobytes() for n, t in tensors.items()},
        "memory": {n: t.data_ptr() for n, t in tensors.items()},
        "dtype": {n: (t.dtype, t.device, t.shape) for n, t in tensors.items()},
        "objects": {n: id(one) for n, one in (modules | parameters).items()},
        "requires_grad": {n: p.requires_grad for n, p in parameters.items()},
        "grad": {n: None if p.grad is None else (id(p.grad), p.grad.tolist()) for n, p in parameters.items()},
        "classes": {n: type(one) for n, one in modules.items()},
        "training": {n: one.training for n, one in modules.items()},
        "hooks": {(n, h): list(getattr(one, h).items()) for n, one in modules.items() for h in HOOKS},
        "attributes": {n: {k: id(v) for k, v in vars(one).items()} for n, one in modules.items()},
        "config": json.dumps(model.config.to_dict(), default=str),
        "attention": (model.config._attn_implementation, model.config.use_cache),
        "generation": json.dumps(model.generation_config.to_dict(), default=str),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "random": random.getstate(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
    }


def in_use(kind: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, list[str], Any]:
    """A model in the middle of its owner's work, what its hooks noted, and the handle of one of them."""
    model = MODELS[kind]().to(dtype)
    model.train()
    blocks = model.base_model.layers if kind == "llama" else model.base_model.h
    blocks[0].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 1)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    noted: list[str] = []

    def step(parameter: torch.Tensor) -> None:
        parameter.data.zero_()

    handle = blocks[1].register_forward_hook(lambda *_: noted.append("forward"))
    first.register_hook(lambda gradient: noted.append("tensor"))
    # an optimizer that steps in backward would change weights if the probe's gradients reached it
    first.register_post_accumulate_grad_hook(step)
    model.config.use_cache = True
    return model, noted, handle


def unchanged(model: Any, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert before.keys() == after.keys()
    for what, value in before.items():
        assert after[what] == value, what


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
@pytest.mark.parametrize("strategy", LOOKING)
def test_the_users_model_comes_back_as_it_was(strategy: str, kind: str, dtype: torch.dtype):
    model, noted, handle = in_use(kind, dtype)
    before = state_of(model)
    plan = rankwise.plan(model, strategy, "r=2", **DATA)
    unchanged(model, before)
    assert 0 < plan.parameters <= plan.budget and len(set(plan.ranks.values())) > 1
    assert set(noted) <= {"forward"}

    noted.clear()
    handle.remove()  # a handle must still find its hook
    assert not model.get_submodule("model.layers" if kind == "llama" else "transformer.h")[1]._forward_hooks
    model(input_ids=torch.arange(6)[None]).logits.float().sum().backward()
    assert noted == ["tensor"], "the parameter's own hook is at work again, the removed one is not"
    assert not next(model.parameters()).any(), "as is the one that steps in backward"


@pytest.mark.parametrize("strategy", ["spectral", "eva", "weight_spectrum"])
def test_a_quantised_model_comes_back_as_it_was(strategy: str, tiny_model: Path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional: .ci/run installs it")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings)
    assert "4bit" in type(model.model.layers[0].mlp.up_proj).__name__
    before = state_of(model)
    plan = rankwise.plan(model, strategy, "r=2", **DATA)
    unchanged(model, before)
    assert 0 < plan.parameters <= plan.budget == rankwise.plan(tiny_llama(), "uniform", "r=2").budget


@pytest.mark.parametrize("strategy", ["spectral", "lora_drop"])
def test_the_users_model_comes_back_from_an_error(strategy: str):
    model, _, _ = in_use()
    calls, limit = [0], [-1]

    def late(module: Any, inputs: Any, output: Any) -> None:
        calls[0] += 1
        if calls == limit:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(late)
    before = state_of(model)
    rankwise.plan(model, strategy, "r=2", **DATA)
    for where in sorted({2, calls[0] // 2, calls[0]}):  # in the proof, in the middle, in the last pass
        calls[0], limit[0] = 0, where
        with pytest.raises(KeyboardInterrupt):
            rankwise.plan(model, strategy, "r=2", **DATA)
        unchanged(model, before)
    handle.remove()


def test_whatever_a_probe_does_is_undone(monkeypatch: pytest.MonkeyPatch):
    model, _, _ = in_use()

    def careless(kind: Any, lent: Any, *rest: Any, **settings: Any) -> Evidence:
        assert not lent.training and not any(p.requires_grad for p in lent.parameters())
        assert not any(getattr(m, "gradient_checkpointing", False) for m in lent.modules())
        plan = rankwise.plan(lent, "uniform", "r=1")
        get_peft_model(lent, plan.lora_config()).train()
        lent.config._attn_implementation = "eager"
        lent.generation_config.max_length = 3
        lent.lm_head.weight.data = lent.lm_head.weight.data.clone()
        torch.rand(3)
        raise ZeroDivisionError

    before = state_of(model)
    monkeypatch.setattr(probes, "evidence", careless)
    with pytest.raises(ZeroDivisionError):
        rankwise.plan(model, "spectral", "r=2", **DATA)
    unchanged(model, before)


def test_a_plan_does_not_depend_on_the_mode_that_it_is_asked_in():
    wanted = rankwise.plan(tiny_llama().eval().requires_grad_(False), "spectral", "r=2", **DATA)
    model, _, _ = in_use()
    assert rankwise.plan(model, "spectral", "r=2", **DATA).ranks == wanted.ranks
    with torch.no_grad():
        assert rankwise.plan(model, "spectral", "r=2", **DATA).ranks == wanted.ranks
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert rankwise.plan(model, "spectral", "r=2", **DATA).ranks == wanted.ranks
        assert torch.is_inference_mode_enabled()


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]}


def test_rows_come_from_anywhere(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    model, settings = tiny_llama(), {**DATA, "calibration": 40}
    plans = [
        rankwise.plan(model, "spectral", "r=2", **{**settings, "data": given})
        for given in (ROWS, iter(ROWS), path, str(path), f"file:{path}", map(as_messages, ROWS))
    ]
    assert len({plan.to_json() for plan in plans[:5]}) == 1
    assert plans[5].ranks == plans[0].ranks, "the same rows in another form, so in another order"
    fewer = rankwise.plan(
        model, "spectral", "r=2", **{**settings, "data": [*ROWS[:5], ROWS[0], {"text": ""}]}
    )
    assert fewer.provenance["notices"] == ["measured on 5 rows, all that there are; 40 were asked for"]
    cut = rankwise.plan(model, "spectral", "r=2", **DATA | {"max_length": 60})
    assert cut.provenance["notices"][0].endswith("of 8 rows are cut at max_length."), "of those measured on"
    assert plans[0].provenance["notices"] == [] and fewer.provenance["probe"]["rows"] == 5


def test_rows_of_datasets():
    datasets = pytest.importorskip("datasets", reason="the bench extra is not installed: make .venv/bench")
    model, rows = tiny_llama(), datasets.Dataset.from_list(list(map(as_messages, ROWS)))
    wanted = rankwise.plan(model, "gora", "r=2", **DATA | {"data": list(map(as_messages, ROWS))})
    assert rankwise.plan(model, "gora", "r=2", **DATA | {"data": rows}) == wanted
    with pytest.raises(RankwiseError, match=r"got a DatasetDict of train.*data\['train'\]"):
        rankwise.plan(model, "gora", "r=2", **DATA | {"data": datasets.DatasetDict(train=rows)})


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"data": None}, "Strategy spectral looks at data: it needs calibration rows"),
    "no tokenizer": ({"tokenizer": None}, "give the model's tokenizer as well"),
    "no file": ({"data": "rows.jsn"}, "there is no file 'rows.jsn'"),
    "a number": ({"data": 3}, "Calibration data is a list of dicts, .* got int"),
    "texts": ({"data": ["a", "b"]}, "row must be an object with fields; found a string"),
    "tokens": ({"data": [{"input_ids": [1]}]}, "no known fields; found: 'input_ids'"),
    "empty": ({"data": []}, "at least one row; this list is empty"),
    "too long": ({"max_length": 8}, "no token of the response is left"),
    "count": ({"calibration": 0}, "calibration must be a whole number of 1 or more; got 0"),
    "budget": ({"budget": "r=99"}, "rank 32 at most"),
    "match": ({"match": "none"}, "wants no number of its own"),
    "scale": ({"scale": {"rule": "rslora"}}, "scale must be a rule .* needs its alpha"),
    "option": ({"options": {"bsae": 3}}, "has no option 'bsae'"),
    "target": ({"targets": "c_attn"}, "matches no adaptable module"),
    "trained": ({"strategy": "adalora"}, "chooses its ranks while the adapters train.*rankwise train"),
    "model": ({"model": "HuggingFaceTB/SmolLM2"}, "a Transformers model that you loaded; got str"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_told_before_anything_is_measured(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probes, "evidence", lambda *_, **__: pytest.fail("measured"))
    given, says = FAULTS[case]
    with pytest.raises(RankwiseError, match=says):
        rankwise.plan(**{"model": tiny_llama(), "strategy": "spectral", "budget": "r=2", **DATA, **given})


def test_weights_on_the_meta_device_are_refused_where_they_are_needed():
    with torch.device("meta"):
        model = tiny_llama()
    assert set(rankwise.plan(model, "uniform", "r=2").ranks.values()) == {2}
    with pytest.raises(RankwiseError, match="meta device"):
        rankwise.plan(model, "weight_spectrum", "r=2")


def test_import_is_cheap():
    heavy = {"torch", "scipy", "transformers", "peft", "pyarrow"}
    code = f"import sys, rankwise; print(rankwise.plan.__name__, {heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "plan set()\n"


def test_the_plan_trains_in_transformers_trainer(tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    plan = rankwise.plan(model, "spectral", "r=2", **DATA)
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": list(range(i, i + 9)), "labels": list(range(i, i + 9))} for i in range(8)]
    adapted = get_peft_model(model, plan.lora_config())
    trained = Trainer(adapted, settings, train_dataset=rows).train()  # type: ignore[arg-type]
    assert trained.global_step == 2
    adapters.verify(adapted, plan)
    assert any(layer.lora_B["default"].weight.any() for layer in adapters.lora_layers(adapted).values())


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="the bench extra is not installed: make .venv/bench"
)
def test_the_example_trains_with_trl(tiny_model: Path, workdir: Path):
    script = Path(__file__).parent.parent / "examples" / "train_with_trl.py"
    done = subprocess.run(
        [sys.executable, script, "--model", tiny_model, "--data", "file:rows.json", "--budget", "r=2",
         "--steps", "2"],
        cwd=workdir, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = RankPlan.load(workdir / "adapter" / "plan.json")
    saved = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert set(saved["target_modules"]) == {name for name, rank in plan.ranks.items() if rank}
    assert "read back from adapter: " in done.stdout and "at or above the cut-off" in done.stdout


def test_the_command_measures_keeps_and_explains(tiny_model: Path, workdir: Path):
    usual = ["plan", "--model", f"file:{tiny_model}", "--strategy", "spectral", "--budget", "r=2"]
    usual += ["--data", "rows.json", "--calibration", "8"]
    cache = {"RANKWISE_CACHE": str(workdir / "cache")}
    first = command(*usual, "--stability", "3", "--out", "a.json", cwd=workdir, **cache)
    assert first.returncode == 0, first.stderr
    costs = [line for line in first.stdout.splitlines() if line.startswith("gradients probe of 8 rows: ")]
    assert len(costs) == 3 and all("tokens forward" in c and "cache" not in c for c in costs), first.stdout
    assert "3 plans on disjoint calibration rows" in first.stdout and "rank correlation" in first.stdout
    again = command(*usual, "--explain", "--out", "b.json", cwd=workdir, **cache)
    assert again.returncode == 0 and f"{costs[0]}; from the cache" in again.stdout, (
        again.stdout + again.stderr
    )
    assert "at or above the cut-off" in again.stdout and "gain/param" in again.stdout
    assert (workdir / "a.json").read_text() == (workdir / "b.json").read_text()
    plan = RankPlan.load("b.json")
    model = tiny_llama().from_pretrained(tiny_model)
    assert plan.ranks == rankwise.plan(model, "spectral", "r=2", **{**DATA, "data": "rows.json"}).ranks
    weights = [*usual[:4], "weight_spectrum", *usual[5:7], "--out", "c.json"]
    other = command(*weights, cwd=workdir, **cache)
    assert other.returncode == 0 and "weights probe: 0 passes" in other.stdout, other.stderr


REFUSALS: dict[str, tuple[list[str], str]] = {
    "no data": (["--strategy", "eva"], "Strategy eva looks at data: it needs calibration rows (`--data`"),
    "idle data": (["--strategy", "uniform", "--data", "x.json"], "--data x.json would be ignored"),
    "no file": (["--strategy", "eva", "--data", "x.json"], "there is no file 'x.json'"),
    "one set": (["--strategy", "eva", "--data", "rows.json", "--stability", "1"], "--stability"),
    "few rows": (
        ["--strategy", "eva", "--data", "rows.json", "--stability", "2"],
        "2 disjoint sets of 32 calibration rows need 64 rows, near-duplicates counted once; 60 of 60",
    ),
    "idle sets": (["--strategy", "weight_spectrum", "--stability", "3"], "looks at no data"),
    "trained": (["--strategy", "grow_prune"], "so it has no plan before that"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_command_refuses_at_once(case: str, workdir: Path):
    (workdir / "torch.py").write_text("raise SystemExit('PyTorch was loaded')")
    arguments, says = REFUSALS[case]
    refused("plan", "--model", "file:m", "--budget", "r=2", *arguments, cwd=workdir, says=[says])
