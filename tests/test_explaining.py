"""Why a module got its rank, and how far plans on different rows agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rankwise
from rankwise import probes
from rankwise.agreement import agreement
from rankwise.errors import RankwiseError
from rankwise.evidence import Cost, Evidence
from rankwise.plans import RankPlan
from tests.conftest import alpaca_rows, byte_tokenizer, tiny_llama

ROWS = alpaca_rows(40)
DATA: dict[str, Any] = {"data": ROWS, "tokenizer": byte_tokenizer(), "calibration": 8}


def by_hand(monkeypatch: pytest.MonkeyPatch, kind: str, values: Any) -> None:
    """Let the probe find these values: (modules, rows) -> quantity -> name -> array."""

    def evidence(asked: str, model: Any, modules: Any, rows: Any, **settings: Any) -> Evidence:
        assert asked == kind
        found = {
            q: {n: np.asarray(v, np.float32) for n, v in of.items()}
            for q, of in values(modules, rows).items()
        }
        settings["on_progress"](1, 1)
        return Evidence(kind, found, Cost(10, 20, 1, 3.5), {"rows": len(rows)})  # type: ignore[arg-type]

    monkeypatch.setattr(probes, "evidence", evidence)


def test_explain_gains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    sigma = {"q_proj": [40, 10, 1], "k_proj": [30, 0.5, 0.25], "v_proj": [3, 2, 1]}

    def values(modules: Any, rows: Any) -> Any:
        return {"singular_values": {m.name: sigma[m.suffix] for m in modules}}

    by_hand(monkeypatch, "gradients", values)
    model = tiny_llama(layers=1)  # q costs 64, k and v 48
    plan = rankwise.plan(model, "spectral", 64 + 48 + 64 + 20, targets=["q_proj", "k_proj", "v_proj"], **DATA)
    names = {m.part: m.name for m in plan.modules}
    assert [plan.ranks[names[part]] for part in "qkv"] == [2, 1, 0]
    path = plan.save(tmp_path / "plan.json")
    told = rankwise.explain(RankPlan.load(path))
    assert str(told) == str(rankwise.explain(plan))
    q, k, v = (told[names[part]] for part in "qkv")
    assert (q.rank, q.value) == (2, pytest.approx(100 / 64)) and q.share == pytest.approx(128 / 196)
    assert k.value == pytest.approx(900 / 48) and v.value == pytest.approx(9 / 48)
    assert (
        "unit 2, its last, gains 1.56 per parameter, at or above the cut-off; unit 3 would gain 0.0156"
        in q.text
    )
    assert v.text == (
        "its first unit would gain 0.188 per parameter, the cut-off: the best that the budget did not reach"
    )
    said = str(told)
    assert (
        "cut-off: 0.188 per parameter" in said
        and "20 parameters are left and the cheapest such unit costs 48" in said
    )
    assert "10 forward tokens, 20 backward tokens" in said and "3.5" not in path.read_text(), (
        "seconds are no part"
    )
    columns = [column.header for column in told.table().columns]
    assert columns == ["module", "rank", "share", "gain/param", "why"] and told.table().row_count == 3

    changed = plan.model_copy(update={"ranks": plan.ranks | {names["q"]: 0}})
    assert "changed after it was allocated" in rankwise.explain(changed)[names["q"]].text


def test_explain_targets(monkeypatch: pytest.MonkeyPatch):
    wanted = {"q_proj": 10.0, "k_proj": 3.0, "v_proj": 1.0}
    by_hand(monkeypatch, "fisher", lambda mods, _: {"mean_square": {m.name: wanted[m.suffix] for m in mods}})
    model = tiny_llama(layers=1)
    # mean 14/3, so base 14 wants 30, 9 and 3; they cost 30*64 + 12*48 = 2496, the budget is a third of that
    plan = rankwise.plan(
        model, "fisher", 832, targets=["q_proj", "k_proj", "v_proj"], options={"base": 14}, **DATA
    )
    told = {m.part: rankwise.explain(plan)[m.name] for m in plan.modules}
    assert [told[part].rank for part in "qkv"] == [10, 3, 1]
    assert [told[part].value for part in "qkv"] == pytest.approx([30, 9, 3])
    assert told["q"].text == "wants 30, 76.92% of all that is wanted; scaled to the budget 10"
    assert "multiplied by 0.3333 to fit" in str(rankwise.explain(plan))
    more = rankwise.plan(
        model, "fisher", 2740, targets=["q_proj", "k_proj", "v_proj"], options={"base": 14}, **DATA
    )
    reason = rankwise.explain(more)[next(m.name for m in more.modules if m.part == "q")]
    assert reason.rank == 32 and "scaled to the budget" in reason.text
    assert reason.text.endswith("held at full rank, 32")


def test_explain_formulas_and_plans_that_say_nothing(tmp_path: Path):
    plan = rankwise.plan(tiny_llama(), "linear_decay", None, match="none", options={"base": 6, "min": 3})
    told = rankwise.explain(plan)
    assert "linear_decay: from base at the input to min at the output (base 6, min 3)" in str(told)
    assert told.reasons[0].text.startswith("wants 6, ") and told.reasons[-1].value == 3
    assert "wants 3 (the least that the formula gives)" in told.reasons[-1].text
    old = json.loads(plan.to_json())
    for key in ("values", "valued_as"):
        del old["provenance"][key]
    (tmp_path / "old.json").write_text(json.dumps(old))
    quiet = rankwise.explain(RankPlan.load(tmp_path / "old.json"))
    assert [reason.rank for reason in quiet.reasons] == list(plan.ranks.values())
    assert (
        "does not say what modules were valued at" in str(quiet) and quiet.reasons[0].text == "not recorded"
    )


# ---- stability


def hand_plan(ranks: list[int], budget: int | None = 1000) -> RankPlan:
    shape = {"layer": 0, "part": "q", "kind": "attention", "in_features": 10}
    modules = [
        {"name": f"m{i}", "out_features": 10 * (i + 1), **shape} for i in range(4)
    ]  # cost 20, 30, 40, 50
    return RankPlan.model_validate(
        {
            "model": "m", "strategy": "spectral", "budget": budget,
            "match": "none" if budget is None else "budget",
            "ranks": {f"m{i}": rank for i, rank in enumerate(ranks)}, "modules": modules,
        }
    )  # fmt: skip


def test_agreement_of_plans_with_known_numbers():
    found = agreement([hand_plan([1, 2, 3, 4]), hand_plan([1, 2, 4, 3]), hand_plan([4, 3, 2, 1])])
    # Spearman without ties: 1 - 6 sum d^2 / (4 * 15); d^2 sums to 2, 20 and 18
    assert [pair.correlation for pair in found.pairs] == pytest.approx([0.8, -1.0, -0.8])
    assert [pair.difference for pair in found.pairs] == pytest.approx([0.5, 2.0, 2.0])
    # apart 0,0,1,1: 90; 3,1,1,3: 280; 3,1,2,2: 60 + 30 + 80 + 100; half of it, of 1000
    assert [pair.moved for pair in found.pairs] == pytest.approx([0.045, 0.14, 0.135])
    assert found.mean("correlation") == pytest.approx(-1 / 3) and found.range("moved") == (0.045, 0.14)
    assert "parameters that move, share of the budget: 10.7% (4.5% to 14.0%)" in str(found)
    assert found.table().row_count == 3

    flat = agreement([hand_plan([2, 2, 2, 2]), hand_plan([1, 2, 3, 4], None), hand_plan([2, 2, 2, 2])])
    assert np.isnan([pair.correlation for pair in flat.pairs]).tolist() == [True, False, True]
    assert flat.mean("correlation") == 1 and flat.pairs[1].moved == 0
    assert "no rank correlation in 2 of 3 pairs" in flat.table().caption
    with pytest.raises(RankwiseError, match="two plans or more; got 1"):
        agreement([hand_plan([1, 2, 3, 4])])


def test_stability_measures_on_disjoint_rows(monkeypatch: pytest.MonkeyPatch):
    seen: list[set[str]] = []

    def values(modules: Any, rows: Any) -> Any:
        seen.append({row.row_hash for row in rows})
        shift = len(seen) % 2  # every second set of rows shows the modules in another order
        return {"mean_square": {m.name: (i + shift) % len(modules) + 1 for i, m in enumerate(modules)}}

    by_hand(monkeypatch, "fisher", values)
    settings = {"targets": "attention", "match": "none", "options": {"base": 5}, **DATA}
    found = rankwise.stability(tiny_llama(), "fisher", None, sets=4, **settings)
    assert [len(rows) for rows in seen] == [8] * 4 and len(set.union(*seen)) == 32
    # 8 modules, ranks floor(5 v / 4.5): 1 .. 8 as they are, or as 2, 3, .. 8, 1: d^2 sums to 7 + 49
    one, other = 1.0, 1 - 6 * 56 / (8 * 63)
    assert [pair.correlation for pair in found.pairs] == pytest.approx([other, one, other, other, one, other])
    assert found.pairs[0].difference == pytest.approx((7 + 7) / 8) and found.pairs[1].moved == 0
    seen.append(set())  # so that the next set counts as the first did
    seen.append(seen[0])
    assert rankwise.plan(tiny_llama(), "fisher", None, seed=0, **settings) != found.plans[1]
    assert seen[-1] == seen[0], "the first plan is measured on the rows of `plan`"
    with pytest.raises(RankwiseError, match=r"6 disjoint sets of 8 .* need 48 rows.* 40 of 40 can be used"):
        rankwise.stability(tiny_llama(), "fisher", None, sets=6, **settings)
    for strategy in ("uniform", "weight_spectrum"):
        with pytest.raises(RankwiseError, match=f"{strategy} looks at no data"):
            rankwise.stability(tiny_llama(), strategy, "r=2", **DATA)
    with pytest.raises(RankwiseError, match="2 sets of calibration rows or more; got 1"):
        rankwise.stability(tiny_llama(), "fisher", None, sets=1, **settings)
