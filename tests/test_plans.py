import io
import json
import re

import pytest
from pydantic import ValidationError
from rich.console import Console

from rankwise.errors import RankwiseError
from rankwise.plans import FORMAT, PlanModule, RankPlan, ScaleRule

PARTS = {"attn.c_attn": ("qkv", "attention", 8, 24), "mlp.c_fc": ("fc_in", "mlp", 8, 32)}


def make(rule=lambda layer, part: layer + 1, layers=3, **changes):
    modules = [
        PlanModule(
            name=f"h.{i}.{p}", layer=i, part=part, kind=kind, in_features=a, out_features=b, conv1d=True
        )
        for i in range(layers)
        for p, (part, kind, a, b) in PARTS.items()
    ]
    changes["ranks"] = changes.get("ranks") or {m.name: rule(m.layer, m.part) for m in modules}
    fields = {
        "model": "tiny", "strategy": "uniform", "match": "none", "modules": modules
    }  # fmt: skip
    return RankPlan(**{**fields, **changes})


def shown(plan):
    console = Console(file=io.StringIO(), width=120)
    console.print(plan.table())
    return console.file.getvalue()


def peft_match(pattern, name):
    """PEFT's own rule (peft.utils.other.get_pattern_key)."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)


def test_parameters_and_leftover():
    plan = make()
    assert plan.parameters == (1 + 2 + 3) * (32 + 40) and plan.leftover is None
    assert make(match="budget", budget=500).leftover == 500 - 432


def test_lora_config_names_exactly_the_planned_modules():
    plan = make(lambda layer, part: 0 if layer == 1 else 2 if layer < 5 else layer % 4, layers=12)
    config = plan.lora_config(dropout=0.1, bias="none")
    assert set(config.target_modules) == {n for n, r in plan.ranks.items() if r}
    assert config.r == 2 and config.lora_alpha == 4 and isinstance(config.lora_alpha, int)
    assert config.task_type == "CAUSAL_LM" and config.lora_dropout == 0.1 and config.use_rslora is False
    assert config.fan_in_fan_out is True and config.exclude_modules is None
    for name, rank in plan.ranks.items():
        if rank:
            assert config.rank_pattern.get(peft_match(config.rank_pattern, name), config.r) == rank
            assert (
                config.alpha_pattern.get(peft_match(config.alpha_pattern, name), config.lora_alpha)
                == 2 * rank
            )


def test_pattern_keys_capture_nothing_else():
    config = make(lambda layer, part: 3 if layer == 1 else 2).lora_config()
    assert list(config.rank_pattern) == [r"^h\.1\.attn\.c_attn", r"^h\.1\.mlp\.c_fc"]
    for other in (
        "h.11.attn.c_attn",
        "x.h.1.attn.c_attn",
        "hx1.attn.c_attn",
        "h.1.attn.c_attn.extra",
        "c_attn",
    ):
        assert peft_match(config.rank_pattern, other) is None


def test_scale_rules():
    constant, rslora, alpha = (
        ScaleRule(), ScaleRule(rule="rslora", value=16), ScaleRule(rule="alpha", value=32)
    )  # fmt: skip
    assert (constant.alpha(8), constant.scaling(8)) == (16, 2)
    assert (alpha.alpha(8), alpha.scaling(8)) == (32, 4)
    assert rslora.scaling(4) == 8 and rslora.alpha(4) / 4 == 8
    assert make(scale=alpha).lora_config().alpha_pattern == {}
    patterns = make(scale=rslora).lora_config()
    assert patterns.alpha_pattern[r"^h\.2\.mlp\.c_fc"] == pytest.approx(16 * 3**0.5)
    with pytest.raises(ValidationError):
        ScaleRule(value=0)


def test_all_zero_and_contradicting_settings():
    with pytest.raises(RankwiseError, match="Every rank of this plan is 0"):
        make(lambda layer, part: 0).lora_config()
    with pytest.raises(RankwiseError, match="The plan decides rank_pattern"):
        make().lora_config(rank_pattern={})


def test_excluded_names_reach_peft():
    assert make(exclude=("v.h.0.mlp.c_fc",)).lora_config().exclude_modules == {"v.h.0.mlp.c_fc"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {"h.0.attn.c_attn": 1}}, "same modules"),
        ({"budget": 5}, "budget exactly when"),
        ({"match": "budget"}, "budget exactly when"),
        ({"match": "budget", "budget": 5}, "over the budget of 5"),
        ({"options": {"x": {1, 2}}}, "not writable as JSON"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_inconsistent_plans_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        make(**changes)
    with pytest.raises(ValidationError, match="full rank 8"):
        make(lambda layer, part: 9)


def test_round_trip(tmp_path):
    plan = make(options={"ranks": {0: 8}}, targets=("c_attn", "c_fc"), provenance={"seed": 3}, model="modèle")
    path = plan.save(tmp_path / "plan.json")
    assert RankPlan.load(path) == plan and plan.options == {"ranks": {"0": 8}}
    assert list(RankPlan.load(path).ranks) == list(plan.ranks)
    assert RankPlan.load(path).to_json() == plan.to_json() == path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    plan.save(path)  # over an old one


def test_save_where_nothing_can_be_written(tmp_path):
    with pytest.raises(RankwiseError, match="cannot be written"):
        make().save(tmp_path / "absent" / "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON: .* at line 1, column 2"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"[1]", "without the mark"),
        (b'{"peft_type": "LORA"}', "PEFT adapter configuration"),
        (b'{"rankwise_plan": 99}', f"reads format {FORMAT}"),
        (b'{"rankwise_plan": 1, "model": 3}', "not a sound rank plan: model: "),
        (b"[" * 100_000, "nested too deep|not valid JSON"),
    ],
)
def test_files_that_are_no_plans(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(RankwiseError, match=message):
        RankPlan.load(path)


def test_edited_plan_with_an_impossible_rank(tmp_path):
    path = make().save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    content["ranks"]["h.0.mlp.c_fc"] = 400
    path.write_text(json.dumps(content))
    with pytest.raises(RankwiseError, match=r"the rank of h\.0\.mlp\.c_fc must be from 0 to its full rank 8"):
        RankPlan.load(path)
    with pytest.raises(RankwiseError, match="cannot be read"):
        RankPlan.load(tmp_path / "none.json")


def test_table_shows_ranks_and_sums():
    text = shown(make(match="budget", budget=500))
    assert "uniform on tiny" in text and "432 of 500 parameters" in text
    assert "68 left; scale constant 2" in " ".join(text.split())
    assert re.search(r"\n\s+2\s+3\s+3\s+216\s*\n", text)  # layer, qkv, fc_in, parameters
    assert re.search(r"all\s+192\s+240\s+432", text)
    assert "the formula's own ranks" in " ".join(shown(make()).split())


def test_table_escapes_markup_and_joins_experts():
    modules = [
        PlanModule(name=f"l.0.e.{i}.w1", layer=0, part="[bold]w1", kind="mlp", in_features=4, out_features=4)
        for i in range(3)
    ]
    text = shown(
        RankPlan(
            model="[red]x[/nonsense]", strategy="custom", match="none", modules=modules,
            ranks={m.name: i for i, m in enumerate(modules)},
        )
    )  # fmt: skip
    assert "[red]x[/nonsense]" in text and "[bold]w1" in text and "3x 0-2" in text
