"""`export_trainer`: what each trainer makes of the written lines builds the plan's ranks and scales."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from rankwise.adapters import detach, read_back, trainable_parameters
from rankwise.config import ScaleRule
from rankwise.errors import RankwiseError
from rankwise.exports.trainers import TRAINERS, export_trainer
from rankwise.plans import PlanModule, RankPlan
from tests.conftest import byte_tokenizer, tiny_llama
from tests.parts import MODELS, mixed_ranks, plan_of
from tests.refusals import files
from tests.test_programs import made

RULES = {"constant": 2.0, "alpha": 16.0, "rslora": 8.0}


def plan_for(family: str, rule: str = "constant", value: float = 2.0) -> RankPlan:
    """Ranks 0 to 8 on every linear map."""
    model = MODELS[family]()
    changes = {"ranks": mixed_ranks(model), "match": "none", "budget": None}
    scale = ScaleRule.model_validate({"rule": rule, "value": value})
    return plan_of(model, budget="r=8").model_copy(update={**changes, "scale": scale})


def source_of(kind: str, plan: RankPlan, family: str, folder: Path) -> Path:
    """Write the plan as a plan file, or as an adapter of its ranks and scales that PEFT saves."""
    if kind == "plan":
        return plan.save(folder / "plan.json")
    get_peft_model(MODELS[family](), plan.lora_config()).save_pretrained(folder / "adapter")
    return folder / "adapter"


def by_hand(folder: Path, ranks: dict[str, int], **changes: Any) -> Path:
    """Write a plan of these ranks on modules from 8 to 8."""
    modules = tuple(
        PlanModule(name=name, layer=i, part="p", kind="attention", in_features=8, out_features=8)
        for i, name in enumerate(ranks)
    )
    fields = {"model": "m", "strategy": "uniform", "match": "none", "ranks": ranks, "modules": modules}
    return RankPlan.model_validate({**fields, **changes}).save(folder / "plan.json")


# --- each trainer, as it reads ---------------------------------------------------------------------


def axolotl_config(path: Path) -> LoraConfig:
    """Do what axolotl 0.19.0 does: utils/schemas/peft.py's kinds, loaders/adapter.py lines 140 to 202."""
    cfg = yaml.safe_load(path.read_text())
    whole = [cfg["lora_r"], cfg["lora_alpha"]]
    assert all(isinstance(value, int) for value in whole)
    for pattern in (cfg["lora_rank_pattern"], cfg["lora_alpha_pattern"]):
        assert all(isinstance(value, int) and value > 0 for value in pattern.values())
    given = {"use_rslora": "peft_use_rslora"}
    given |= {"rank_pattern": "lora_rank_pattern", "alpha_pattern": "lora_alpha_pattern"}
    assert (cfg["adapter"], cfg["lora_target_linear"]) == ("lora", False)
    return LoraConfig(
        r=cfg["lora_r"], lora_alpha=cfg["lora_alpha"], target_modules=cfg["lora_target_modules"],
        lora_dropout=cfg["lora_dropout"], fan_in_fan_out=cfg["lora_fan_in_fan_out"], bias="none",
        task_type="CAUSAL_LM", **{field: cfg[name] for field, name in given.items() if cfg.get(name)},
    )  # fmt: skip


def run(path: Path) -> dict[str, Any]:
    """Execute a file of Python lines."""
    found: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), found)
    return found


def stub(monkeypatch: pytest.MonkeyPatch, trainer: str, **forgotten: Any) -> list[dict[str, Any]]:
    """Put a module in the trainer's place that builds with PEFT; return the list of what it was given.

    `forgotten` are arguments of `LoraConfig` that it overwrites, as a trainer might that drops some.
    """
    seen: list[dict[str, Any]] = []
    module = ModuleType(trainer)

    class SFTTrainer:
        def __init__(self, model: Any, peft_config: LoraConfig, **arguments: Any) -> None:
            seen.append(arguments)
            for name, value in forgotten.items():
                setattr(peft_config, name, value)
            self.model = get_peft_model(model, peft_config)

    class FastLanguageModel:
        @staticmethod
        def get_peft_model(model: Any, use_gradient_checkpointing: Any = None, **arguments: Any) -> Any:
            seen.append(arguments)
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**arguments, **forgotten}))

    module.SFTTrainer, module.FastLanguageModel = SFTTrainer, FastLanguageModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, trainer, module)
    return seen


def built(trainer: str, path: Path, model: Any) -> Any:
    """Return the model with its adapters, as the trainer (or its stub) builds it from the written file."""
    if trainer == "axolotl":
        return get_peft_model(model, axolotl_config(path))
    if trainer == "trl":
        return run(path)["sft_trainer"](model, args="mine").model
    return run(path)["adapted"](model, use_gradient_checkpointing="unsloth")


def need_plan(adapted: Any, plan: RankPlan) -> None:
    wanted = {n: (rank, plan.scale.scaling(rank)) for n, rank in plan.ranks.items() if rank}
    found = read_back(adapted)
    assert {n: rank for n, (rank, _) in found.items()} == {n: rank for n, (rank, _) in wanted.items()}
    assert all(math.isclose(found[n][1], wanted[n][1], rel_tol=1e-9) for n in wanted)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["plan", "adapter"])
def test_every_trainer_builds_the_plan(
    kind: str, family: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan, model = plan_for(family, rule, RULES[rule]), MODELS[family]()
    source = source_of(kind, plan, family, tmp_path)
    for name, trainer in TRAINERS.items():
        out = tmp_path / f"{name}{trainer.suffix}"
        exported = export_trainer(name, source, out, dropout=0.25)
        stub(monkeypatch, name)
        adapted = built(name, out, model)
        need_plan(adapted, plan)
        config = adapted.peft_config["default"]
        assert (config.lora_dropout, config.fan_in_fan_out) == (0.25, family == "gpt2")
        assert exported.parameters == plan.parameters == trainable_parameters(adapted)
        assert json.loads(json.dumps(exported.as_dict()))["ranks"] == {
            n: r for n, r in plan.ranks.items() if r
        }
        versions = [f"{package} {version} or newer" for package, version in exported.needs.items()]
        assert all(said in exported.summary() and said in out.read_text() for said in versions)
        model = detach(adapted)


@pytest.mark.parametrize("trainer", ["trl", "unsloth"])
@pytest.mark.parametrize(
    "forgotten", [{"rank_pattern": {}}, {"alpha_pattern": {}}, {"target_modules": ["q_proj"]}]
)
def test_a_trainer_that_drops_a_setting_is_found_out(
    trainer: str, forgotten: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export_trainer(trainer, source_of("plan", plan_for("llama"), "llama", tmp_path), tmp_path / "out.py")
    stub(monkeypatch, trainer, **forgotten)
    with pytest.raises(ValueError, match=r"'model\.layers\..*built \(rank, scale\).*planned"):
        built(trainer, tmp_path / "out.py", tiny_llama())


def test_what_the_caller_gives_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = source_of("plan", plan_for("llama"), "llama", tmp_path)
    export_trainer("trl", source, tmp_path / "trl.py")
    seen = stub(monkeypatch, "trl")
    built("trl", tmp_path / "trl.py", tiny_llama())
    assert seen == [{"args": "mine"}]
    export_trainer("unsloth", source, tmp_path / "unsloth.py")
    seen = stub(monkeypatch, "unsloth")
    built("unsloth", tmp_path / "unsloth.py", tiny_llama())
    # a list would be read as ends of names, and Unsloth itself names the kind of task
    assert isinstance(seen[0]["target_modules"], str)
    assert "task_type" not in seen[0]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_modules_whose_names_end_alike_stay_bare(trainer: str, tmp_path: Path):
    """A second tower holds every planned name as the end of one of its own; layer 1 is no end of layer 11."""
    plan, out = plan_for("llama"), tmp_path / f"out{TRAINERS[trainer].suffix}"
    export_trainer(trainer, plan.save(tmp_path / "plan.json"), out)
    model = torch.nn.Module()
    model.model, model.vision = tiny_llama(layers=12).model, torch.nn.Module()
    model.vision.model = tiny_llama().model
    config = axolotl_config(out) if trainer == "axolotl" else LoraConfig(**run(out)["SETTINGS"])
    config.task_type = None
    need_plan(inject_adapter_in_model(config, model), plan)


def test_adapted_embedding_and_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], rank_pattern={"embed_tokens": 2},
        modules_to_save=["norm"], task_type="SEQ_CLS",
    )  # fmt: skip
    get_peft_model(tiny_llama(), LoraConfig(**{**config.to_dict(), "task_type": None})).save_pretrained(
        tmp_path / "a"
    )
    exported = export_trainer("trl", tmp_path / "a", tmp_path / "out.py")
    assert exported.ranks["model.embed_tokens"] == 2
    assert any("trained whole" in notice for notice in exported.notices)
    stub(monkeypatch, "trl")
    layer = built("trl", tmp_path / "out.py", tiny_llama()).get_base_model().model.embed_tokens
    assert (layer.r["default"], layer.scaling["default"]) == (2, 3.0)
    for name in ("lm_head", "model.embed_tokens"):
        made(tmp_path / name, {name: 2, "model.layers.0.self_attn.q_proj": 2}, r=2)
        with pytest.raises(RankwiseError, match=f"whole or not at all; the source adapts '{name}'"):
            export_trainer("unsloth", tmp_path / name, tmp_path / "unsloth.py")
    assert not (tmp_path / "unsloth.py").exists()


def test_axolotl_gets_whole_alphas(tmp_path: Path):
    """rsLoRA's alpha of 8 times the root of the rank is a fraction; 8 under peft_use_rslora is not."""
    export_trainer(
        "axolotl",
        by_hand(tmp_path, {"a": 2, "b": 3}, scale={"rule": "rslora", "value": 8}),
        tmp_path / "r.yaml",
    )
    fields = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert (fields["lora_alpha"], fields["peft_use_rslora"], fields["lora_alpha_pattern"]) == (8, True, {})
    export_trainer("axolotl", by_hand(tmp_path, {"a": 2, "b": 4}, scale={"value": 0.5}), tmp_path / "c.yaml")
    fields = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert (fields["lora_alpha"], fields["peft_use_rslora"], fields["lora_alpha_pattern"]) == (
        1,
        False,
        {"^b": 2},
    )


@pytest.mark.parametrize(
    ("model", "base", "revision"),
    [
        ("hf:org/name@v1", "org/name", "v1"),
        ("org/name", "org/name", None),
        ("hf:org/name/file.gguf", None, None),
        ("pypi:some==1.0/weights.gguf", None, None),
        ("file:/tmp/model", None, None),
        ("LlamaForCausalLM", None, None),
    ],
)
def test_base_model(model: str, base: str | None, revision: str | None, tmp_path: Path):
    exported = export_trainer("axolotl", by_hand(tmp_path, {"a": 2}, model=model), tmp_path / "out.yaml")
    fields = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert (fields.get("base_model"), fields.get("revision_of_model")) == (base, revision)
    assert exported.base == base
    assert f"# base model: {model}\n" in (tmp_path / "out.yaml").read_text()


# --- hostile texts ---------------------------------------------------------------------------------

EVIL = "import pathlib; pathlib.Path('owned').touch()"
HOSTILE = [
    f"x\n{EVIL}\n#", f"x'\n{EVIL}\n'", f'x"""\n{EVIL}\n"""', f"x\r{EVIL}", f"x\u2028{EVIL}", f"x\x85{EVIL}",
    "x: !!python/object/apply:os.system ['touch owned']", "x\n!!python/object/apply:os.system ['touch o']",
    "- x\n...\n--- {a: b}", "{x}{0}%s\\", "x\\", "*.(", "base_model: evil",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", ["plan", "adapter"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_text_becomes_code(
    trainer: str, kind: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names = [text, f"model.0.{text}", "model.1.q"]
    if kind == "plan":
        source = by_hand(tmp_path, {name: 2 + i for i, name in enumerate(names)}, model=text, strategy=text)
    else:
        source = tmp_path / "a"
        ranks = {name.replace("\n", " "): 2 + i for i, name in enumerate(names)}  # else it is not read
        made(source, ranks, base_model_name_or_path=text, task_type=text, revision=text, lora_alpha=24)
        names = list(ranks)
    out = tmp_path / f"out{TRAINERS[trainer].suffix}"
    export_trainer(trainer, source, out)
    before = files(tmp_path)
    if trainer == "axolotl":
        fields = yaml.safe_load(out.read_text())
        assert set(fields) <= {
            "adapter", "lora_r", "lora_alpha", "lora_dropout", "peft_use_rslora", "lora_fan_in_fan_out",
            "lora_target_linear", "lora_target_modules", "lora_rank_pattern", "lora_alpha_pattern",
        }  # fmt: skip
        assert fields["adapter"] == "lora"
    else:
        kinds = [
            type(node) for node in ast.parse(out.read_text()).body if not isinstance(node, ast.ImportFrom)
        ]
        calls = [ast.Assign] * (trainer == "trl")
        assert kinds == [ast.Assign, ast.Assign, ast.FunctionDef, *calls, ast.FunctionDef]
        assert set(run(out)["PLAN"]) == set(names)
    assert files(tmp_path) == before


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"trainer": "axolotol"}, "Did you mean 'axolotl'"),
        ({"out": "out.yml"}, r"called NAME\.yaml; got .*out\.yml"),
        ({"trainer": "trl"}, r"called NAME\.py"),
        ({"out": "taken.yaml"}, "is there already"),
        ({"out": "taken.yaml/out.yaml"}, "cannot be written to .*: (File exists|Not a directory)"),
        ({"out": "new/folder/out.yaml", "source": "absent"}, "cannot be read: No such file"),
        ({"source": "absent"}, "cannot be read: No such file"),
        ({"source": "empty"}, "adapter_config.json"),
        ({"source": "taken.yaml"}, "not valid JSON"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1; got 1.0"),
        ({"dropout": math.nan}, "got nan"),
        ({"ranks": {"a": 0}}, "Every rank of this plan is 0"),
        (
            {"ranks": {"a": 3, "b": 2}, "scale": {"value": 0.5}},
            "'a' has rank 3 and scale 0.5, an alpha of 1.5",
        ),
        ({"ranks": {"a\n": 3, "b": 3, "a": 2}}, r"cannot tell the module 'a\\n'"),
    ],
)
def test_refusals_leave_nothing_behind(arguments: dict[str, Any], says: str, tmp_path: Path):
    (tmp_path / "taken.yaml").write_text("mine: [")
    (tmp_path / "empty").mkdir()
    plan = by_hand(tmp_path, arguments.pop("ranks", {"a": 2}), scale=arguments.pop("scale", {}))
    settings = {"trainer": "axolotl", "source": plan.name, "out": "out.yaml", **arguments}
    source, out = tmp_path / settings.pop("source"), tmp_path / settings.pop("out")
    before = files(tmp_path)
    with pytest.raises(RankwiseError, match=says):
        export_trainer(source=source, out=out, **settings)
    assert files(tmp_path) == before


# --- TRL itself ------------------------------------------------------------------------------------


def test_one_step_of_trl(tmp_path: Path):
    trl = pytest.importorskip("trl", reason="TRL is not installed; `make .venv/bench` installs it")
    datasets = pytest.importorskip("datasets", reason="TRL needs it")
    plan = plan_for("llama")
    export_trainer("trl", source_of("plan", plan, "llama", tmp_path), tmp_path / "out.py")
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=1, use_cpu=True,
        report_to="none", save_strategy="no", max_length=16, bf16=False,
    )  # fmt: skip
    trainer = run(tmp_path / "out.py")["sft_trainer"](
        tiny_llama(), args=settings, processing_class=byte_tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"text": "one row of text"}] * 2),
    )  # fmt: skip
    trainer.train()
    need_plan(trainer.accelerator.unwrap_model(trainer.model), plan)
