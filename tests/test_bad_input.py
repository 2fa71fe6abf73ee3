"""Faults of study files and of command lines, through the real command line.

Each ends in exit code 2 and one message with place and remedy (`refused` checks what all have in common).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import rankwise, write_study
from tests.refusals import one_message, refused

MANY = """\
name: tiny
modle: file:model
data: {source: rows, train: -8, validation: true, test: 6, reserved: 4}
train:
  step_tokens: 200
  learning_rate: [1e-3]
  schedule: cosinus
  dtype: 32
sede: {tuning: 2, reporting: 6}
baseline: uniform
contrasts: [decay, mpl vs uniform]
arms:
  uniform: {strategy: unifrom, budget: r=2}
  decay:
    strategy: linear_decay
    bass: 4
    budget: 0
  mlp: {strategy: mlp_only, budget: r=-2}
  mine: {strategy: custom, ranks: nix.json, budget: r=2}
  mirror: {strategy: reversed, of: upside_down, budget: lots}
  plain: {strategy: uniform}
  plain: {strategy: uniform}
"""
MANY_FAULTS = [
    (2, "modle: unknown key; the keys here are name, model, data", "Did you mean 'model'?"),
    (3, "data.source: 'rows' is no path here.", "Did you mean 'file:rows'?"),
    (3, "data.train: must be greater than or equal to 1; got -8."),
    (3, "data.validation: must be a whole number; got True."),
    (6, "train.learning_rate: unknown key", "Did you mean 'learning_rates'?"),
    (7, "train.schedule: must be 'cosine', 'linear' or 'constant'; got 'cosinus'.", "mean 'cosine'?"),
    (8, "train.dtype: must be 'auto', 'fp32' or 'bf16'; got 32."),
    (9, "sede: unknown key", "Did you mean 'seeds'?"),
    (11, "contrasts.1: no arm is called 'mpl'; the arms are uniform, decay", "Did you mean 'mlp'?"),
    (13, "arms.uniform.strategy: the strategy must be one of uniform", "Did you mean 'uniform'?"),
    (16, "arms.decay.bass: unknown key; the keys here are strategy, budget", "Did you mean 'base'?"),
    (17, "arms.decay.budget: A budget must be above zero; got 0 parameters.", "'r=8'"),
    (18, "arms.mlp.budget: A budget must be above zero; got 'r=-2'.", "'r=8'"),
    (19, "arms.mine.ranks: the rank file nix.json cannot be read: No such file or directory."),
    (20, "arms.mirror: Option of must be one of uniform", "got 'upside_down'"),
    (20, "arms.mirror.budget: A budget is 'r=8'", "got 'lots'."),
    (21, "arms.plain: an arm needs a budget, such as `budget: r=8`, or `match: none`"),
    (21, "arms.plain: this key stands twice, again on line 22; keep one of them."),
]


def test_all_faults_of_a_file_are_told_at_once(workdir: Path):
    (workdir / "study.yaml").write_text(MANY)
    said = refused("study", "validate", "study.yaml", cwd=workdir)
    first, *lines = said.splitlines()
    assert first == f"rankwise: {len(MANY_FAULTS)} faults in study.yaml"
    assert len(lines) == len(MANY_FAULTS), said
    for line, (number, *parts) in zip(lines, MANY_FAULTS, strict=True):
        assert line.startswith(f"  study.yaml:{number}: {parts[0]}"), line
        assert all(part in line for part in parts), line


TYPES = """\
name: a/b
model: 7
data: [rows.json]
targets: 7
scale: {rule: alpha}
train: {step_tokens: 200, step_examples: 2, learning_rates: [true, 1e-3], betas: [2, 0.9], warmup: a lot}
seeds: {tuning: 1.5, reporting: "8"}
margin: 5
contrasts: one
confirmatory: perhaps
arms:
  8: {strategy: uniform, budget: [1], learning_rate: .inf}
  b: 5
  c: {strategy: custom, ranks: {q_proj: many}, budget: true, match: all}
"""
TYPE_FAULTS = [
    (1, "name: must match pattern", "got 'a/b'"),
    (2, "model: must be text; got 7."),
    (3, "data: must be a group of keys; got ['rows.json']."),
    (4, "targets: must be text or a list; got 7."),
    (5, "scale: the rule alpha needs its alpha as value, such as 16 or 32"),
    (6, "train.betas.0: must be less than 1; got 2."),
    (6, "train.learning_rates.0: must be a number; got True."),
    (6, "train.warmup: must be a number; got 'a lot'."),
    (6, "train: give exactly one of step_tokens and step_examples."),
    (7, "seeds.reporting: must be a whole number; got '8'."),
    (7, "seeds.tuning: must be a whole number; got 1.5."),
    (8, "margin: must be less than 1; got 5."),
    (9, "contrasts: must be a list; got 'one'."),
    (10, "confirmatory: must be true or false; got 'perhaps'."),
    (12, "arms.8.budget: must be text or a whole number; got [1]."),
    (12, "arms.8.learning_rate: must be a finite number; got inf."),
    (13, "arms.b: must be a group of keys; got 5."),
    (14, "arms.c.budget: must be a number; got True."),
    (14, "arms.c.match: must be 'budget' or 'none'; got 'all'."),
    (14, "arms.c.ranks.q_proj: must be a whole number; got 'many'."),
]


def test_values_of_a_wrong_type_are_refused_by_their_rule(workdir: Path):
    (workdir / "study.yaml").write_text(TYPES)
    said = refused("study", "run", "study.yaml", cwd=workdir)
    for number, *parts in TYPE_FAULTS:
        line = next((one for one in said.splitlines() if f"study.yaml:{number}: {parts[0]}" in one), said)
        assert all(part in line for part in parts), line
    assert said.startswith(f"rankwise: {len(TYPE_FAULTS)} faults in study.yaml\n"), said


def test_budgets_targets_and_ranks_that_the_model_cannot_hold_are_told_together(
    workdir: Path, study_dict: dict
):
    study_dict["arms"] = {
        "uniform": {"strategy": "uniform", "budget": "r=2"},
        "above-full-rank": {"strategy": "uniform", "budget": "r=33"},
        "above-every-rank": {"strategy": "uniform", "budget": "900%"},
        "below-one-rank": {"strategy": "uniform", "budget": 47},
        "below-its-own": {"strategy": "mlp_only", "budget": 60},
        "unknown-kind": {"strategy": "uniform", "budget": "r=2", "targets": "atention"},
        "no-expression": {"strategy": "uniform", "budget": "r=2", "targets": "q_proj("},
        "unknown-layer": {"strategy": "custom", "ranks": {7: 3}, "match": "none"},
        "unknown-module": {"strategy": "custom", "ranks": [{"q_prj": 3}, 1], "match": "none"},
        "upside-down": {"strategy": "linear_decay", "base": 2, "min": 4, "budget": "r=2"},
    }
    study_dict["arms"]["unknown-module"]["ranks"] = {"q_prj": 3}
    text = write_study(workdir, study_dict).read_text().splitlines()
    said = refused("study", "validate", "study.yaml", cwd=workdir)
    expected = {
        "above-full-rank": "'r=33' is above full rank: the widest target module takes rank 32 at most.",
        "above-every-rank": "'900%' (215,712 parameters) is above full rank on every target module,",
        "below-one-rank": "47 parameters is too small for one unit of rank anywhere: the cheapest costs 48.",
        "below-its-own": "60 parameters buys no rank on the modules that mlp_only uses: the cheapest unit",
        "unknown-kind": "Did you mean 'attention'?",
        "no-expression": "q_proj(",
        "unknown-layer": "names layers 7; the model's are 0 to 1.",
        "unknown-module": "Did you mean 'q_proj'?",
        "upside-down": "must keep min <= base; got min 4, base 2.",
    }
    assert said.startswith(f"rankwise: {len(expected)} faults in study.yaml\n"), said
    for arm, rule in expected.items():
        place = f"study.yaml:{text.index(f'  {arm}:') + 1}: arms.{arm}: "
        line = next((one for one in said.splitlines() if place in one), f"{place} is not in {said}")
        assert rule in line, line


UNREADABLE = {
    "empty": (b"", "study.yaml:1: a study file is a mapping of keys (name, model", "it is empty"),
    "comment": (b"# to do\n", "study.yaml:1:", "it is empty"),
    "list": (b"- name: tiny\n", "study.yaml:1:", "`rankwise study schema` prints the keys"),
    "binary": (b"name: tiny\n\x80\x00\x02\xff" * 99, "study.yaml:2: ", "UTF-8; byte 11 is not text."),
    "control": (b"name: tiny\nmodel: \x1b[31mred\n", "study.yaml:2: not text: it holds '\\x1b'."),
    "tab": (b"name: tiny\n\tmodel: x\n", "study.yaml:2: not valid YAML: found character '\\t'"),
    "open": (b"name: tiny\ndata: {train: 8\n", "study.yaml:3: not valid YAML: expected ',' or '}'"),
    "alias": (b"name: tiny\nmodel: *base\n", "study.yaml:2: not valid YAML: found undefined alias 'base'"),
    "key": (b"name: tiny\n? [a]\n: b\n", "study.yaml:2: not valid YAML: found unhashable key"),
    "date": (b"name: tiny\nmodel: 2020-13-45\n", "study.yaml:2: ", "month must be in 1..12; quotes make it"),
    "code": (b"name: !!python/object/apply:os.system [ls]\n", "study.yaml:1: not valid YAML: could not"),
    "deep": (b"name: " + b"[" * 9000, "study.yaml: nested too deep, or within itself"),
    "circle": (
        b"name: &a [*a]\nmodel: x\n",
        "study.yaml:1: name: must be text; got [[",
        "train: this key is",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_study(workdir: Path, case: str):
    content, *says = UNREADABLE[case]
    (workdir / "study.yaml").write_bytes(content)
    refused("study", "validate", "study.yaml", cwd=workdir, says=says)


def test_a_study_file_that_is_not_there(workdir: Path):
    (workdir / "quickstart.yaml").write_text("name: tiny\n")
    refused("study", "run", "quikstart.yaml", cwd=workdir, says=["Did you mean 'quickstart.yaml'?"])
    refused("study", "status", ".", cwd=workdir, says=["a study is a YAML file; . is a folder."])
    refused("data", "quickstart.yaml/x", cwd=workdir, says=["quickstart.yaml/x cannot be read"])


OVERRIDES = {
    "data.train": "--set takes key=value, such as data.train=100; got 'data.train'.",
    "=5": "--set takes key=value",
    "data..train=5": "--set takes key=value",
    "data.train.rows=5": "--set data.train.rows: 'train' is not a group of keys; it is 8.",
    "data.train=[5": "--set data.train: the value '[5' is not valid YAML",
    "data.trian=5": "rankwise: --set data.trian: unknown key; the keys here are source, train",
    "data.train=0": "rankwise: --set data.train: must be greater than or equal to 1; got 0.",
    "train.learning_rates=[1e-2, 0.01]": "--set train.learning_rates: a rate stands here twice",
    "contrasts=[decay, decay vs uniform]": "rankwise: --set contrasts: a contrast stands here twice",
    "model=ftp:x": "rankwise: --set model: The scheme of a source must be one of hf, pypi, file; got 'ftp'.",
}


@pytest.mark.parametrize("text", OVERRIDES)
def test_an_override_that_does_not_fit(workdir: Path, study_dict: dict, text: str):
    write_study(workdir, study_dict)
    refused("study", "validate", "study.yaml", "--set", text, cwd=workdir, says=[OVERRIDES[text]])


PLANS = {
    "strategy": (["--strategy", "unifrom"], "got 'unifrom'. Did you mean 'uniform'?"),
    "option": (["--option", "bse=3"], "has no option 'bse'; it takes base. Did you mean 'base'?"),
    "no option": (["--option", "base"], "--option takes key=value, such as base=16; got 'base'."),
    "option value": (["--option", "base=[1"], "--option base: the value '[1' is not valid YAML"),
    "of": (["--strategy", "reversed", "--option", "of=[a]"], "Option of must be one of uniform", "got ['a']"),
    "rule": (["--scale", "linear:2"], "--scale is rule:value", "constant, rslora or alpha", "got 'linear:2'"),
    "value": (["--scale", "constant:two"], "--scale is rule:value", "got 'constant:two'"),
    "empty": (["--scale", "constant:"], "--scale is rule:value", "got 'constant:'"),
    "zero": (["--scale", "constant:0"], "a value above 0", "got 'constant:0'"),
    "no alpha": (["--scale", "rslora"], "the rule rslora needs its alpha as value"),
    "budget 0": (["--budget", "0"], "A budget must be above zero; got 0 parameters.", "'r=8'"),
    "budget r=0": (["--budget", "r=0"], "A budget must be above zero; got 'r=0'"),
    "budget -1": (["--budget", "-1"], "A budget must be above zero; got '-1'."),
    "budget ?": (["--budget", "[red]8"], "A budget is 'r=8'", "got '[red]8'."),
    "match": (["--match", "none"], "--match none keeps the formula's own ranks, so --budget r=2 would be"),
    "no file": (["--strategy", "custom", "--option", "ranks=nix.json"], "rank file nix.json cannot be read"),
    "no JSON": (["--strategy", "custom", "--option", "ranks=bad.json"], "bad.json is not JSON: Expecting"),
    "no ranks": (["--strategy", "custom", "--option", "ranks=five.json"], "five.json must hold a mapping or"),
}


@pytest.mark.parametrize("case", PLANS)
def test_arguments_of_plan_that_break_their_rule(workdir: Path, case: str):
    arguments, *says = PLANS[case]
    (workdir / "bad.json").write_text("{'0': 8}")
    (workdir / "five.json").write_text("5")
    (workdir / "plan.json").write_text("precious")
    usual = ["--model", "file:m", "--strategy", "uniform", "--budget", "r=2"]
    refused("plan", *usual, *arguments, cwd=workdir, says=says)


USAGE = {
    "command": (["sudy"], "No such command 'sudy'", "See `"),
    "option": (["plan", "--modle", "x"], "No such option: --modle", "--model", "plan --help`."),
    "missing": (["train", "study.yaml", "--arm", "a"], "Missing option '--seed'", "train --help`."),
    "number": (["train", "study.yaml", "--arm", "a", "--seed", "\x1b[31m"], "Invalid value for '--seed'"),
    "arm": (
        ["train", "study.yaml", "--arm", "unifrom", "--seed", "0"],
        "--arm must be one of uniform, decay",
    ),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_command_line_that_does_not_parse(workdir: Path, study_dict: dict, case: str):
    arguments, *says = USAGE[case]
    write_study(workdir, study_dict)
    refused(*arguments, cwd=workdir, says=says)


def test_control_characters_and_markup_in_names_are_shown_and_not_obeyed(workdir: Path, study_dict: dict):
    study_dict["arms"] = {"[red]x[/red] \x1b[31m:smile:": {"strategy": "\x1b]0;title\x07"}}
    study_dict["base\x1b[2Jline\nrankwise: all is well"] = "\u202eevil"
    study_dict["baseline"] = "\x9b31m[bold]"
    write_study(workdir, study_dict)
    says = [
        r"arms.[red]x[/red] \x1b[31m:smile:.strategy",
        r"'\x1b]0;title\x07'",
        r"\nrankwise: all is well: unk",
    ]
    said = refused("study", "validate", "study.yaml", cwd=workdir, says=[*says, r"'\x9b31m[bold]'"])
    assert len(said.splitlines()) == 5


def test_what_is_fine_stays_fine(workdir: Path, study_dict: dict):
    """The rules above refuse nothing that is meant: shares, numbers as text, merges, keys like 8 or yes."""
    study_dict["train"] |= {"learning_rates": ["1e-3"], "warmup": "10%"}
    arms = {"8": study_dict.pop("arms")["uniform"] | {"budget": "0.5 %"}}
    write_study(workdir, study_dict | {"margin": "5%", "baseline": "8", "arms": arms})
    with (workdir / "study.yaml").open("a") as more:
        more.write("  yes: &common {strategy: uniform, budget: 300k, scale: {rule: alpha, value: 32}}\n")
        more.write("  merged: {<<: *common, budget: 2_000}\n")
    result = rankwise("study", "validate", "study.yaml", "--set", "arms.yes.budget=1.5e3", cwd=workdir)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "runs: 7 known" in result.stdout


def test_nothing_asked_prints_the_help(workdir: Path):
    result = rankwise("study", cwd=workdir)
    assert result.returncode == 2
    assert "validate" in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_a_refusal_needs_no_pytorch(workdir: Path):
    """A misspelt key is told in a fraction of the seconds that loading PyTorch takes."""
    (workdir / "study.yaml").write_text("nmae: tiny\n")
    (workdir / "torch.py").write_text("raise SystemExit('PyTorch was loaded')")
    for command in (["study", "run"], ["study", "status"], ["data"]):
        one_message(rankwise(*command, "study.yaml", cwd=workdir), "Did you mean 'name'?")


def test_the_schema_is_json_and_names_every_key(workdir: Path):
    schema = json.loads(rankwise("study", "schema", cwd=workdir).stdout)
    assert {"name", "model", "data", "arms"} <= schema["properties"].keys()
    assert not re.search("Traceback", str(schema))
