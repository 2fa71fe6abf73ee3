"""`rankwise shrink` on adapters made by plain PEFT, checked with PEFT, numpy and Transformers alone."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankwise import cli
from rankwise.data import prepare
from rankwise.errors import RankwiseError
from rankwise.exports.adapter_files import read_adapter
from rankwise.exports.shrink import shrink_adapter
from rankwise.rows import read_rows
from tests.conftest import byte_tokenizer, rankwise
from tests.parts import tiny_gpt2
from tests.refusals import files, refused

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"


def trained(base: Path, folder: Path, steps: int = 12, **settings: Any) -> Path:
    """Train a LoRA adapter with PEFT and a plain loop, so that B is far from zero, and save it."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        ids = torch.randint(32, 122, (4, 24))
        ids[:, 1::2] = ids[:, ::2]  # something to learn
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_conv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    tiny_gpt2().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tiny_conv: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters as anyone makes them: one rank and one alpha; patterns and rsLoRA; Conv1D."""
    folder = tmp_path_factory.mktemp("adapters")
    patterns = {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 24}, "alpha_pattern": {"v_proj": 40}}
    kind = {"task_type": "CAUSAL_LM"}
    return {
        "plain": trained(tiny_model, folder / "plain", r=16, lora_alpha=32, target_modules=LLAMA, **kind),
        "mixed": trained(
            tiny_model, folder / "mixed", r=16, lora_alpha=6, use_rslora=True, target_modules=LLAMA,
            lora_dropout=0.1, init_lora_weights="orthogonal", **patterns, **kind,
        ),
        "conv": trained(
            tiny_conv, folder / "conv", r=16, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True, **kind,
        ),
    }  # fmt: skip


def loaded(folder: Path) -> PeftModel:
    """Load an adapter in plain PEFT onto the base that it names; any warning is a failure."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()


def layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers by name."""
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def full_updates(folder: Path) -> dict[str, np.ndarray]:
    """s B A of every module, whole, in float64: factors from the file, scales from PEFT's layers."""
    tensors = load_numpy(folder / WEIGHTS)
    found = {}
    for name, layer in layers(loaded(folder)).items():
        a, b = (
            tensors[f"base_model.model.{name}.lora_{side}.weight"].astype(np.float64) for side in ("A", "B")
        )
        found[name] = layer.scaling["default"] * b @ a
    return found


def best(update: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of that rank."""
    u, s, v = np.linalg.svd(update)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def walk(updates: dict[str, np.ndarray], budget: int) -> dict[str, int]:
    """Ranks by one sorted list of all units; a module is closed by its first unit that does not fit."""
    units = []
    for name, update in updates.items():
        energies = np.linalg.svd(update, compute_uv=False)[: min(update.shape)] ** 2
        units += [(energy / sum(update.shape), name) for energy in energies]
    ranks, closed = dict.fromkeys(updates, 0), set()
    for _, name in sorted(units, reverse=True):
        cost = sum(updates[name].shape)
        if cost > budget:
            closed.add(name)
        elif name not in closed:
            ranks[name] += 1
            budget -= cost
    return ranks


@pytest.mark.parametrize(("which", "budget"), [("plain", "r=2"), ("mixed", "1.5k"), ("conv", "r=1")])
def test_keeps_the_best_of_the_update_and_plain_peft_loads_it(
    adapters: dict[str, Path], which: str, budget: str, tmp_path: Path
):
    wanted = full_updates(adapters[which])
    shrunk = shrink_adapter(adapters[which], budget, tmp_path / "out")
    model = loaded(tmp_path / "out")

    costs = {name: sum(update.shape) for name, update in wanted.items()}
    limit = {"r=2": 2 * sum(costs.values()), "1.5k": 1500, "r=1": sum(costs.values())}[budget]
    counted = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert limit - min(costs.values()) < counted <= limit == shrunk.budget
    assert counted == shrunk.parameters_after

    ranks = {module.name: module.rank_after for module in shrunk.modules}
    assert ranks == walk(wanted, limit)
    built = layers(model)
    assert set(built) == {name for name, rank in ranks.items() if rank}
    assert len(set(ranks.values())) > 2, "a budget under which nothing is chosen tests nothing"
    for name, layer in built.items():
        assert layer.r["default"] == ranks[name]
        assert layer.scaling["default"] == 1
        delta = layer.get_delta_weight("default").double().numpy()
        delta = delta.T if layer.fan_in_fan_out else delta
        np.testing.assert_allclose(delta, best(wanted[name], ranks[name]), atol=2e-6 * np.abs(delta).max())


@pytest.mark.parametrize("which", ["plain", "mixed", "conv"])
def test_tells_the_energy_that_is_lost(adapters: dict[str, Path], which: str, tmp_path: Path):
    updates = full_updates(adapters[which])
    shrunk = shrink_adapter(adapters[which], "r=1", tmp_path / "out")
    energy = {name: float((update**2).sum()) for name, update in updates.items()}
    distance = {
        module.name: float(
            ((updates[module.name] - best(updates[module.name], module.rank_after)) ** 2).sum()
        )
        for module in shrunk.modules
    }
    assert shrunk.energy_lost == pytest.approx(sum(distance.values()) / sum(energy.values()), rel=1e-9)
    assert 0.001 < shrunk.energy_lost < 1
    said = {module["name"]: module["energy_lost"] for module in shrunk.as_dict()["modules"]}
    assert said == pytest.approx({name: distance[name] / energy[name] for name in energy}, abs=1e-12)


def test_keeps_the_settings_that_are_not_ranks(adapters: dict[str, Path], tmp_path: Path):
    shrink_adapter(adapters["mixed"], "r=1", tmp_path / "out")
    before, after = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (adapters["mixed"], tmp_path / "out")
    )
    decided = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"}
    decided |= {"init_lora_weights"}
    assert {k: v for k, v in after.items() if k not in decided} == {
        k: v for k, v in before.items() if k not in decided
    }
    assert after["lora_dropout"] == 0.1


def loss_of(model: Any, rows: list[Any]) -> float:
    """Mean loss per response token by Transformers' own loss, row by row."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor(x.astype(np.int64))[None] for x in (row.input_ids, row.labels))
            tokens = int((labels[:, 1:] != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * tokens
            count += tokens
    return total / count


def test_command_measures_the_loss(adapters: dict[str, Path], workdir: Path):
    shutil.copytree(adapters["plain"], workdir / "mine")
    done = rankwise(
        "shrink", "mine", "--budget", "r=1", "--data", "rows.json", "--rows", "7", "--json", cwd=workdir
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["out"]) == workdir / "mine-r1"

    read, sizes = read_rows(workdir / "rows.json"), {"train": 0, "validation": 0, "test": 7, "reserved": 0}
    rows = list(prepare(read, byte_tokenizer(), **sizes, max_length=512).splits.test)
    before, after = loaded(adapters["plain"]), loaded(workdir / "mine-r1")
    with before.disable_adapter():
        assert found["losses"]["base"] == pytest.approx(loss_of(before, rows), rel=1e-5)
    assert found["losses"]["before"] == pytest.approx(loss_of(before, rows), rel=1e-5)
    assert found["losses"]["after"] == pytest.approx(loss_of(after, rows), rel=1e-5)
    assert len({round(found["losses"][k], 3) for k in ("base", "before", "after")}) == 3
    assert (found["losses"]["rows"], found["losses"]["tokens"]) == (7, sum(r.response_tokens for r in rows))


def test_command_shows_ranks_and_totals(
    adapters: dict[str, Path],
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    said, _ = command(monkeypatch, capsys, "shrink", adapters["mixed"], "--budget", "r=1", "--out", "x/small")
    again = read_adapter(workdir / "x/small")
    assert f"{read_adapter(adapters['mixed']).parameters:,} before, {again.parameters:,} after" in said
    table = [line.split() for line in said.splitlines()]
    assert ["layer", "down", "gate", "up", "k", "o", "q", "v", "params", "lost"] in table
    down = again_rank(again, "model.layers.1.mlp.down_proj")
    q = again_rank(again, "model.layers.1.self_attn.q_proj")
    row = next(line for line in table if line and line[0] == "1")
    assert (row[1], row[6]) == (f"24>{down}", f"4>{q}")
    assert "written to x/small" in said


def again_rank(adapter: Any, name: str) -> int:
    """The rank of a module, 0 if it is not in the adapter."""
    return next((update.rank for update in adapter.updates if update.name == name), 0)


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0
) -> tuple[str, str]:
    """Run the command line in this process, which spares its start; return what it printed."""
    monkeypatch.setattr(sys, "argv", ["rankwise", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert (ended.value.code or 0) == code, printed.err
    return printed


@pytest.mark.parametrize("budget", ["r=16", "20k"])
def test_nothing_to_do_within_the_budget(
    adapters: dict[str, Path],
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    budget: str,
):
    said, _ = command(monkeypatch, capsys, "shrink", adapters["plain"], "--budget", budget)
    assert "nothing to do" in said
    assert "nothing is written" in said
    assert not list(adapters["plain"].parent.glob("plain-*"))
    command(monkeypatch, capsys, "shrink", adapters["plain"], "--budget", budget, "--out", "same")
    assert files(workdir / "same") == {
        k: v for k, v in files(adapters["plain"]).items() if k != "README.md"
    }  # fmt: skip


def edited(source: Path, folder: Path, **fields: Any) -> Path:
    """Copy an adapter with other fields in its configuration."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


def retensored(source: Path, folder: Path, change: Any) -> Path:
    """Copy an adapter with its tensors changed by a function of their dict."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def spoil(kind: str, source: Path, folder: Path) -> Path:
    """Make a bad adapter."""
    fields = {
        "dora": {"use_dora": True},
        "vera": {"peft_type": "VERA"},
        "adalora": {"peft_type": "ADALORA"},
        "lora bias": {"lora_bias": True},
        "bias": {"bias": "lora_only"},
        "pissa": {"init_lora_weights": "pissa_niter_4"},
        "rank": {"r": -1},
        "pattern": {"rank_pattern": {"(": 4}},
        "experts": {"target_parameters": ["experts.gate_up_proj"]},
    }
    changes = {
        "magnitude": lambda t: t.update({Q + ".lora_magnitude_vector": torch.ones(32)}),
        "half": lambda t: t.pop(Q + ".lora_B.weight"),
        "shapes": lambda t: t.update({Q + ".lora_B.weight": torch.ones(32, 3)}),
        "nan": lambda t: t[Q + ".lora_A.weight"][0].fill_(float("nan")),
        "zero": lambda t: [tensor.zero_() for name, tensor in t.items() if "lora_B" in name],
        "names": lambda t: [t.update({n.removeprefix("base_model.model."): t.pop(n)}) for n in list(t)],
        "empty": lambda t: [t.pop(n) for n in list(t)],
    }
    if kind in fields:
        return edited(source, folder, **fields[kind])
    if kind in changes:
        return retensored(source, folder, changes[kind])
    shutil.copytree(source, folder)
    if kind == "pickle":
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    elif kind == "no weights":
        (folder / WEIGHTS).unlink()
    elif kind == "no config":
        (folder / "adapter_config.json").unlink()
    elif kind == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    elif kind == "json":
        (folder / "adapter_config.json").write_text("{")
    elif kind == "not peft":
        (folder / "adapter_config.json").write_text("{}")
    return folder


BAD = {
    "dora": "DoRA", "vera": "must be LORA", "adalora": "got 'ADALORA'", "lora bias": "a bias on lora_B",
    "bias": "bias must be none", "pissa": "path_initial_model_for_weight_conversion", "rank": "r: Input",
    "pattern": "no regular expression", "experts": "bare parameters", "magnitude": "lora_magnitude_vector",
    "half": "lora_B of 'model.layers.0.self_attn.q_proj' is missing", "shapes": "A (16, 32), B (32, 3)",
    "nan": "not finite", "zero": "nothing to keep", "names": "another tool's names", "empty": "no lora_A",
    "pickle": "a pickle", "no weights": "has none", "no config": "has none", "cut": "damaged",
    "json": "not valid JSON", "not peft": "names no peft_type",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_adapters_are_refused(
    adapters: dict[str, Path],
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = spoil(kind, adapters["plain"], tmp_path / "bad")
    before = files(tmp_path)
    _, said = command(monkeypatch, capsys, "shrink", folder, "--budget", "r=2", code=2)
    assert said.startswith("rankwise: ")
    assert BAD[kind] in said
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "3"], "too small for one unit"),
        (["--budget", "r=1000"], "above full rank"),
        (["--budget", "lots"], "A budget is"),
        (["--budget", "1%"], "name the base with --model"),
        (["--budget", "r=2", "--out", "taken"], "is there already"),
        (["--budget", "r=2", "--data", "gone.json"], "did you mean"),
        (["--budget", "r=2", "--data", "rows.json", "--model", "{conv}"], "Is it the right base?"),
        (["--budget", "r=2", "--data", "rows.json", "--max-length", "2"], "no row that can be scored"),
    ],
)
def test_bad_arguments_are_refused(
    adapters: dict[str, Path],
    tiny_conv: Path,
    workdir: Path,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (workdir / "taken").mkdir()
    (workdir / "taken" / "notes.txt").write_text("mine")
    shutil.copytree(adapters["plain"], workdir / "mine")
    before = files(workdir)
    given = [text.format(conv=tiny_conv) for text in arguments]
    _, said = command(monkeypatch, capsys, "shrink", "mine", *given, code=2)
    assert says.lower() in said.lower()
    assert files(workdir) == before


def test_the_process_itself_refuses(adapters: dict[str, Path], tmp_path: Path):
    refused("shrink", "nowhere", "--budget", "r=2", cwd=tmp_path, says=["nowhere does not exist"])


def test_share_of_the_base(adapters: dict[str, Path], tiny_model: Path, tmp_path: Path):
    parameters = AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    shrunk = shrink_adapter(adapters["plain"], "5%", tmp_path / "out", model=str(tiny_model))
    assert shrunk.budget == int(parameters * 0.05)


def test_other_tensors_are_carried_over(tiny_model: Path, tmp_path: Path):
    trained(
        tiny_model, tmp_path / "a", r=8, lora_alpha=6, use_rslora=True, modules_to_save=["norm"],
        target_modules=["q_proj", "v_proj", "embed_tokens"],
    )  # fmt: skip
    source = load_file(tmp_path / "a" / WEIGHTS)
    shrunk = shrink_adapter(tmp_path / "a", "200", tmp_path / "out")
    assert any("embeddings" in notice and f"{8 * (264 + 32):,}" in notice for notice in shrunk.notices)
    assert any("modules_to_save" in notice for notice in shrunk.notices)
    carried = load_file(tmp_path / "out" / WEIGHTS)
    others = [name for name in source if "q_proj" not in name and "v_proj" not in name]
    assert len(others) >= 3
    assert all(torch.equal(carried[name], source[name]) for name in others)

    before, after = loaded(tmp_path / "a"), loaded(tmp_path / "out")
    embedding = "model.embed_tokens"
    deltas = [layers(model)[embedding].get_delta_weight("default") for model in (before, after)]
    assert torch.allclose(*deltas, rtol=1e-6)
    assert deltas[0].abs().max() > 0
    norms = [model.get_base_model().model.norm.modules_to_save["default"].weight for model in (before, after)]
    assert torch.equal(*norms)
    assert not torch.equal(norms[0], torch.ones(32)), "it was trained"


def test_a_head_tied_to_an_adapted_embedding_is_refused(tiny_model: Path, tmp_path: Path):
    trained(
        tiny_model, tmp_path / "a", r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    )
    with pytest.raises(RankwiseError, match="ensure_weight_tying"):
        shrink_adapter(tmp_path / "a", "r=1")


def test_precision_is_kept(adapters: dict[str, Path], tmp_path: Path):
    folder = retensored(
        adapters["plain"], tmp_path / "a", lambda t: t.update({n: x.bfloat16() for n, x in t.items()})
    )
    shrunk = shrink_adapter(folder, "r=4", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert shrunk.bytes_after < 0.5 * shrunk.bytes_before


def test_ranks_are_those_of_the_tensors(adapters: dict[str, Path], tmp_path: Path):
    folder = edited(adapters["plain"], tmp_path / "a", r=8, lora_alpha=16, alpha_pattern={"no_such": 4})
    shrunk = shrink_adapter(folder, "r=1")
    assert {module.rank_before for module in shrunk.modules} == {16}
    assert any("(model.layers.0.mlp.down_proj: 8, not 16)" in notice for notice in shrunk.notices)
    assert any("alpha_pattern sets no_such" in notice for notice in shrunk.notices)
    assert shrunk.out == tmp_path / "a-r1"


def test_padding_costs_nothing(adapters: dict[str, Path], tmp_path: Path):
    """An adapter of rank 2 stored with rank 16 comes out whole under the budget of rank 2."""

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor[:, 2:] = 0

    folder = retensored(adapters["plain"], tmp_path / "a", pad)
    shrunk = shrink_adapter(folder, "r=3")
    assert {module.rank_after for module in shrunk.modules} == {2}
    assert shrunk.energy_lost < 1e-12


@pytest.mark.parametrize(("small", "ranks"), [(1e-6, [0, 4]), (0.3, [1, 3])])
def test_names_that_end_alike_stay_apart(small: float, ranks: list[int], tmp_path: Path):
    """A module is neither adapted nor given a rank because its name ends in the name of another."""

    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})})
            self.block["proj"] = torch.nn.Linear(8, 8)

    model = get_peft_model(Nested(), LoraConfig(r=4, lora_alpha=4, target_modules=["proj"]))
    found, names = layers(model), ["block.block.proj", "block.proj"]
    assert sorted(found) == names
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in found.values():
            torch.nn.init.orthogonal_(layer.lora_A["default"].weight)
        found["block.block.proj"].lora_A["default"].weight.mul_(torch.tensor([4, 1, 1, 1])[:, None])
        found["block.proj"].lora_B["default"].weight.copy_(torch.eye(8, 4))
        found["block.block.proj"].lora_B["default"].weight.copy_(torch.eye(8, 4) * small)
    model.save_pretrained(tmp_path / "a")
    shrunk = shrink_adapter(tmp_path / "a", "r=2", tmp_path / "out")
    assert {m.name: m.rank_after for m in shrunk.modules} == dict(zip(names, ranks, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(Nested(), str(tmp_path / "out"))
    built = {name: layer.r["default"] for name, layer in layers(again).items()}
    assert built == {name: rank for name, rank in zip(names, ranks, strict=True) if rank}


def test_nothing_is_left_behind_when_the_disk_fails(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*arguments: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankwise.exports.adapter_files.save_file", fails)
    with pytest.raises(RankwiseError, match=r"cannot be written to .*out: No space left on device"):
        shrink_adapter(adapters["plain"], "r=1", tmp_path / "out")
    assert not list(tmp_path.iterdir())
