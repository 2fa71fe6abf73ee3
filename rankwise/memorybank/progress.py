"""What ran, study by study, how long it took and where; what failed, with the reasons that records give."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from rankwise.memorybank.cases import ROLES, Case, machines, newest
from rankwise.memorybank.focus import case_state
from rankwise.memorybank.ground import Ground
from rankwise.memorybank.text import Marked, code, md, table
from rankwise.report.opening import count


def progress(ground: Ground) -> dict[str, Any]:
    """Return what the template of the page needs."""
    return {
        "newest": newest(ground.cases),
        "machines": _machines(ground),
        "studies": [_study(ground, case) for case in ground.begun],
        "idle": [ground.study(case) for case in ground.cases if case.results is None],
        "failures": [line for case in ground.begun for line in _failures(ground, case)],
    }


def _machines(ground: Ground) -> Marked | None:
    found = machines(ground.cases)
    rows = [[device, processor, cores or "", f"{runs:,}"] for device, processor, cores, runs in found]
    return table(["device", "processor", "cores", "runs"], rows, [False, False, True, True]) if rows else None


def _study(ground: Ground, case: Case) -> dict[str, Any]:
    about = next(one.about for one in ground.asked if case in one.cases)
    missing, wanted = case.runs
    times = case.seconds()
    told = [f"{case_state(case)}: {wanted - missing:,} of {count(wanted, 'run')} done or failed"]
    if times:
        median = statistics.median(times)
        told.append(f"{sum(times) / 3600:.1f} h in all, {median:.0f} s a run in the median")
    return {
        "name": case.name, "study": ground.study(case, "study"), "records": ground.records(case),
        "about": about, "told": "; ".join(told) + ".", "table": _arms(case),
    }  # fmt: skip


def _arms(case: Case) -> Marked:
    """Return the arms with their runs by role, and the rate that was chosen for each."""
    assert case.results is not None
    done: Counter[tuple[str, str]] = Counter()
    failed: Counter[str] = Counter()
    listed: Counter[tuple[str, str]] = Counter()
    for run in case.results.index["runs"]:
        listed[run["arm"], run["role"]] += 1
        record = case.results.records.get(run["run_id"])
        done[run["arm"], run["role"]] += record is not None and record["status"] == "done"
        failed[run["arm"]] += record is not None and record["status"] == "failed"
    rows = []
    for arm in ["untouched", *case.results.config.arms]:
        choice = case.results.index["rates"].get(arm, {})
        wanted = {role: listed[arm, role] for role in ROLES}
        if arm != "untouched":
            wanted["reporting"] = max(wanted["reporting"], case.results.config.seeds.reporting)
        parts = [f"{done[arm, role]}/{wanted[role]}" if wanted[role] else "" for role in ROLES[1:]]
        if arm == "untouched":
            parts = ["", f"{done[arm, arm]}/{listed[arm, arm]}"]
        rate = choice.get("rate")
        edge = ", at the grid's edge" if choice.get("at_edge") else ""
        said = "" if rate is None else f"{rate:g} {choice.get('how', '')}{edge}"
        name: Any = "untouched model" if arm == "untouched" else code(arm)
        rows.append([name, parts[0], parts[1], str(failed[arm] or ""), said])
    headings = ["arm", "tuning runs", "reporting runs", "failed", "learning rate"]
    return table(headings, rows, [False, True, True, True, False])


def _failures(ground: Ground, case: Case) -> list[Marked]:
    """Return one sentence for every failed run: which, where it stopped, why, and its record."""
    lines = []
    for run, record in [*case.failed, *case.diverged]:
        why = record.get("failure") or {}
        kind = "" if run["role"] != "tuning" else " (a rate that diverges in tuning is a finding, not a loss)"
        lines.append(md(
            "{study}, {arm}, {role} seed {seed}{rate}: failed at step {step}: {reason}{kind} ({record})",
            study=ground.study(case), arm=code(run["arm"]), role=run["role"], seed=run["seed"],
            rate="" if run["rate"] is None else f", rate {run['rate']:g}", step=why.get("step", "?"),
            reason=why.get("reason", "no reason is recorded"), kind=kind,
            record=ground.run(case, run["run_id"]),
        ))  # fmt: skip
    return lines
