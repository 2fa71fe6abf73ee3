"""README's "Use it in production": its commands, run as processes on a mixed-rank adapter."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import rankwise
from rankwise.errors import RankwiseError
from rankwise.planning import plan_from_source
from tests.conftest import rankwise as command
from tests.refusals import files, refused
from tests.test_export_uniform import distance, logits, randomised

SECTION = (Path(__file__).parent.parent / "README.md").read_text("utf-8").split("## Use it in production")[1]
SECTION = SECTION.split("\n## ")[0]
LINES = re.findall(r"^(rankwise .+?)(?:\s{2,}#.*)?$", SECTION, re.MULTILINE)
FOLDERS = ["served", "served-r8", "anchored"]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my-adapter` (ranks 2 to 16, one alpha) of the tiny Llama, and its plan."""
    folder = tmp_path_factory.mktemp("production")
    plan = plan_from_source(
        f"file:{tiny_model}", "linear_decay", match="none", scale="alpha:8", options=["base=16", "min=2"],
        budget=None, targets=None,
    ).plan  # fmt: skip
    plan.save(folder / "plan.json")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    randomised(get_peft_model(model, plan.lora_config())).save_pretrained(folder / "my-adapter")
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    """What every command of the section printed, run in its order."""
    told = {}
    for line in LINES:
        done = command(*shlex.split(line)[1:], cwd=folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}{done.stdout}"
        told[line] = done.stdout
    return told


def test_inspect_finds_who_serves_it_wrongly(said: dict[str, str]):
    first = said[LINES[0]]
    assert "vLLM (to 0.31) serves it wrongly" in first
    assert "SGLang (0.5.23) does not load it" in first


def test_what_was_exported_is_the_adapter(folder: Path, said: dict[str, str], tiny_model: Path):
    """Each folder in plain PEFT, and the merged model alone, give the adapter's logits."""
    assert [line for line in LINES if "export" in line] == LINES[1:]

    def of(place: str) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        return logits(PeftModel.from_pretrained(base, str(folder / place)).eval())

    wanted = of("my-adapter")
    assert distance(of("served"), wanted) < 1e-5
    assert distance(of("anchored"), wanted) < 1e-5
    assert distance(logits(AutoModelForCausalLM.from_pretrained(folder / "my-model").eval()), wanted) < 1e-5
    assert 1e-3 < distance(of("served-r8"), wanted)
    assert "cut to rank 8" in said[LINES[2]]
    assert (folder / "my-adapter.gguf").read_bytes()[:4] == b"GGUF"
    assert "lora_rank_pattern" in (folder / "axolotl.yaml").read_text()
    for place in [*FOLDERS, "my-model"]:
        assert (folder / place / "README.md").read_text().startswith("---\n")


def test_the_servers_lines_are_those_that_export_prints(said: dict[str, str]):
    served = said[LINES[1]]
    lines = re.findall(r"^(?:vllm|python -m sglang).*$", SECTION, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        flags = line[line.index("--enable-lora") :].rpartition(" ")
        assert flags[0] in served, flags
        assert flags[2].startswith("mine=served")
    assert "--lora my-adapter.gguf" in said[LINES[4]]
    assert "--lora my-adapter.gguf" in SECTION


def test_the_same_from_python(folder: Path, said: dict[str, str], tmp_path: Path):
    for _ in range(2):  # a package's room of that name would hide the function after its first use
        done = rankwise.export(folder / "my-adapter", tmp_path / f"again{_}")
        assert files(tmp_path / f"again{_}") == files(folder / "served")
    assert done.as_dict()["rank"] == 16


def test_without_out_it_stands_beside_its_source(folder: Path, tmp_path: Path):
    (tmp_path / "mine").symlink_to(folder / "my-adapter")
    (tmp_path / "plan.json").write_bytes((folder / "plan.json").read_bytes())
    assert rankwise.export(tmp_path / "plan.json", format="trl").out == tmp_path / "plan_trl.py"
    assert json.loads(json.dumps(rankwise.export(tmp_path / "plan.json", format="unsloth").as_dict()))
    assert rankwise.export(tmp_path / "mine").out == tmp_path / "mine-uniform"  # beside the link
    names = {"mine", "mine-uniform", "plan.json", "plan_trl.py", "plan_unsloth.py"}
    assert {path.name for path in tmp_path.iterdir()} == names
    spec = importlib.util.spec_from_file_location("plan_trl", tmp_path / "plan_trl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.peft_config.r == 16 or 16 in module.peft_config.rank_pattern.values()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["my-adapter", "--format", "ggufs"],
            ["format must be one of uniform, peft", "Did you mean 'gguf'?"],
        ),
        (["my-adapter", "--format", "merged", "--max-rank", 4], ["max_rank is no option of format merged"]),
        (["my-adapter", "--out", "my-adapter"], ["is there already"]),
        (["plan.json"], ["An adapter is a folder"]),
    ],
)
def test_refusals(folder: Path, arguments: list, says: list[str]):
    refused("export", *arguments, cwd=folder, says=says)


def test_an_option_names_the_formats_that_take_it(folder: Path):
    with pytest.raises(RankwiseError, match=r"tgi is no option of format gguf.* It belongs to uniform"):
        rankwise.export(folder / "my-adapter", format="gguf", tgi=True)
