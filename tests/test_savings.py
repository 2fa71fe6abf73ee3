"""What must be read with recorded times: whether runs shared the machine, in any sitting."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rankwise.observer import Observer
from rankwise.savings import timing_cautions
from rankwise.study import run_study
from rankwise.tables import Results
from tests.parts import opened
from tests.test_execution import ready, settle, unwanted


def test_times_are_cautioned_by_the_most_processes_of_any_sitting(workdir: Path, study_dict: dict):
    study = ready(workdir, study_dict)
    file = workdir / "results" / "tiny" / "execution.json"
    results: Any = SimpleNamespace(store=study.store, of=lambda arm: {})

    def cautions() -> str:
        return " ".join(timing_cautions(results, ["uniform"]))

    settle(study, 1, unwanted)
    assert cautions() == ""
    alone = json.loads(file.read_text())
    settle(study, 2, unwanted)
    assert "Up to 2 runs at a time shared this machine" in cautions()
    assert json.loads(file.read_text()) == alone | {"most_processes": 2}, "what decides the threads stays"
    settle(study, 1, unwanted)
    assert "Up to 2 runs at a time" in cautions(), "some runs were timed beside others"
    study_dict["train"]["threads"] = 2
    settle(ready(workdir, study_dict), 1, unwanted)
    now = json.loads(file.read_text())
    assert (now["threads"], now["processes"], now["most_processes"]) == (2, 1, 2), "a new choice is kept"


def test_a_sitting_that_finds_nothing_to_do_shares_nothing(workdir: Path, study_dict: dict):
    study = opened(workdir, study_dict)
    run_study(study, Observer())
    settle(study, 2, unwanted)
    assert timing_cautions(Results(study.store), ["uniform"]) == []
