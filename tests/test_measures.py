"""What runs are measured by beyond their loss: forgetting, answers, and how much of a rank is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rankwise import adapters, generation, rankuse
from rankwise.data import NO_LOSS, Example
from rankwise.errors import RankwiseError
from rankwise.grid import grid
from rankwise.observer import Observer
from rankwise.study import run_study
from tests.conftest import byte_tokenizer, tiny_llama
from tests.parts import mixed_ranks, opened, plan_of

MEASURE = {"general_text": "file:general.txt", "general_rows": 3, "generate": 4, "generate_tokens": 12}


def general_text(folder: Path) -> None:
    paragraphs = (f"Paragraph {i} tells of rivers, stones and the weather of day {i}." for i in range(9))
    (folder / "general.txt").write_text("\n\n".join(paragraphs))


@pytest.fixture
def measured(workdir: Path, study_dict: dict):
    """A finished study that measures everything."""
    general_text(workdir)
    study = opened(workdir, study_dict | {"measure": MEASURE})
    run_study(study, Observer())
    return study


def test_the_untouched_model_and_reporting_runs_are_measured(measured):
    for planned in grid(measured).runs:
        metrics = measured.store.record(planned.run_id)["train_info"]["metrics"]
        assert 0 < metrics["general_loss"] < 20
        assert metrics["general_examples"] == 3
        assert 0 <= metrics["generation_rouge_l"] <= 1
        assert 0 <= metrics["generation_chrf"] <= 100
        folder = measured.store.path(planned.run_id)
        assert pq.read_table(folder / "answers.parquet").column_names == ["row_hash", "rouge_l", "chrf"]
        assert pq.read_table(folder / "general.parquet").num_rows == 3


def test_tuning_runs_are_not_measured_and_the_names_of_others_do_not_change(workdir, study_dict):
    general_text(workdir)
    study_dict["train"]["learning_rates"] = [1e-2, 1e-1]
    study_dict["seeds"] = {"tuning": 1, "reporting": 2}
    plain = opened(workdir, study_dict)
    more = opened(workdir, study_dict | {"measure": MEASURE})
    before, after = grid(plain).runs, grid(more).runs
    assert [p.run_id for p in before if p.role == "tuning"] == [p.run_id for p in after if p.role == "tuning"]
    assert before[0].run_id != after[0].run_id  # the untouched model is measured
    assert "measure" not in before[0].run.model_dump(mode="json")


def test_the_general_text_is_named_by_its_content(workdir, study_dict):
    general_text(workdir)
    first = grid(opened(workdir, study_dict | {"measure": MEASURE})).runs[0].run_id
    (workdir / "other.txt").write_text((workdir / "general.txt").read_text())
    moved = MEASURE | {"general_text": "file:other.txt"}
    assert grid(opened(workdir, study_dict | {"measure": moved})).runs[0].run_id == first
    (workdir / "general.txt").write_text("One paragraph.\n\nAnother paragraph.\n\nA third.")
    assert grid(opened(workdir, study_dict | {"measure": MEASURE})).runs[0].run_id != first


def test_rank_use_of_a_record_is_that_of_its_adapter(measured):
    planned = next(p for p in grid(measured).runs if p.arm == "decay")
    folder = measured.store.path(planned.run_id)
    rows = pq.read_table(folder / "rank_use.parquet").to_pylist()
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    ranks = json.loads((folder / "plan.json").read_text())["ranks"]
    assert {row["module"]: row["rank"] for row in rows} == {n: r for n, r in ranks.items() if r}
    for row in rows:
        a, b = (tensors[f"base_model.model.{row['module']}.lora_{x}.weight"] for x in "AB")
        values = np.linalg.svd(2 * (b.double() @ a.double()).numpy(), compute_uv=False)[: row["rank"]]
        np.testing.assert_allclose(row["singular_values"], values, rtol=1e-6, atol=1e-12)
        energy = values**2
        assert row["stable_rank"] == pytest.approx(energy.sum() / energy.max())
        short = energy[: row["units"] - 1].sum() / energy.sum()
        assert short < 0.9 <= energy[: row["units"]].sum() / energy.sum() + 1e-12
    summary = measured.store.record(planned.run_id)["train_info"]["rank_use"]
    assert summary["stable_rank"] == pytest.approx(np.mean([row["stable_rank"] for row in rows]))
    assert summary["units_share"] == pytest.approx(np.mean([row["units"] / row["rank"] for row in rows]))


def test_rank_use_knows_an_update_of_lower_rank_and_one_that_is_zero():
    model = tiny_llama()
    adapted = adapters.attach(
        model, plan_of(model, "custom", options={"ranks": mixed_ranks(model)}, match="none"), seed=0
    )
    layers = adapters.lora_layers(adapted)
    wide = [name for name, (rank, _) in adapters.read_back(adapted).items() if rank == 8]
    with torch.no_grad():
        layers[wide[0]].lora_B["default"].weight[:, :2] = 1.0  # two equal columns: a product of rank 1
        layers[wide[0]].lora_A["default"].weight[2:] = 0
    columns = rankuse.rank_use(adapted)
    found = dict(
        zip(columns["module"], zip(columns["stable_rank"], columns["units"], strict=True), strict=True)
    )
    assert found[wide[0]] == (pytest.approx(1.0), 1)
    assert found[wide[1]] == (0.0, 0)


def test_answers_are_greedy_and_those_of_the_saved_adapter(measured):
    """A batch of left-padded prompts with a cache against one row at a time, without either."""
    planned = next(p for p in grid(measured).runs if p.arm == "uniform")
    context = measured.context
    rows = generation.askable(context.prepared.splits.test, 4)
    adapted = PeftModel.from_pretrained(
        tiny_reload(context), str(measured.store.path(planned.run_id) / "adapter")
    )
    base = adapted.get_base_model()
    base.generation_config.repetition_penalty = 1.9  # as some models ship; greedy answers know of none
    base.generation_config.no_repeat_ngram_size = 1
    found = generation.answers(adapted, context.base.tokenizer, rows, tokens=12)
    assert base.generation_config.repetition_penalty == 1.9
    assert found == [one_by_one(adapted, context.base.tokenizer, row, 12) for row in rows]
    wanted = generation.references(context.base.tokenizer, rows, tokens=12)
    metrics, _ = generation.quality(found, wanted)
    recorded = measured.store.record(planned.run_id)["train_info"]["metrics"]
    assert recorded["generation_chrf"] == pytest.approx(metrics["chrf"])


def tiny_reload(context):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(context.base.folder)


def one_by_one(model, tokenizer, row: Example, tokens: int) -> str:
    ids = row.input_ids[: (row.labels != NO_LOSS).tolist().index(True)].tolist()
    made: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + made]), use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
        if made[-1] in {tokenizer.eos_token_id, 257}:
            break
    return tokenizer.decode(made, skip_special_tokens=True).strip()


def test_quality_knows_every_script():
    metrics, each = generation.quality(["红色的河流", "a red stone"], ["红色的河流", "nothing alike"])
    assert each["rouge_l"] == [1.0, 0.0]
    assert each["chrf"][0] == 100.0
    assert metrics["rouge_l"] == 0.5
    # a vowel sign is part of its word
    assert generation.quality(["का"], ["की"])[0]["rouge_l"] == 0.0
    # the longest common subsequence of "the cat sat" and "the cat is sat down" is 3 words: P 1, R 3/5
    assert generation.quality(["the cat sat"], ["the cat is sat down"])[0]["rouge_l"] == pytest.approx(0.75)


def test_references_are_the_first_answers_cut_like_the_models():
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer("ask:yes indeed;more").input_ids, dtype=np.int32)
    labels = ids.copy()
    labels[:4] = NO_LOSS
    labels[14:] = NO_LOSS
    row = Example("0" * 64, ids, labels, 9, 10, 0, 10)
    assert generation.references(tokenizer, [row], tokens=64) == ["yes indeed"]
    assert generation.references(tokenizer, [row], tokens=3) == ["yes"]


def test_plain_text_cannot_be_answered(workdir, study_dict):
    (workdir / "rows.json").write_text(
        json.dumps([{"text": f"Number {i} and some words"} for i in range(60)])
    )
    with pytest.raises(RankwiseError, match=r"measure\.generate needs test rows with a prompt"):
        opened(workdir, study_dict | {"measure": {"generate": 2}})
