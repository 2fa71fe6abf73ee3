"""The page that a newcomer opens: status, what was learnt, what is next, what is in the way."""

from __future__ import annotations

from typing import Any

from rankwise import datasizes, power
from rankwise.config import SCREENING_BELOW
from rankwise.contrasts import contrast_rows
from rankwise.memorybank.cases import Asked, Case, machines, newest, opened_by
from rankwise.memorybank.findings import findings
from rankwise.memorybank.ground import Ground
from rankwise.memorybank.text import Marked, code, joined, listed, md, table
from rankwise.report.opening import NONE_SHOWN, count, state
from rankwise.tables import count_of_seeds

STATES = {
    "not begun": "not begun", "tuning": "learning rates are being tuned", "unfinished": "unfinished",
    "whole": "whole",
}  # fmt: skip


def focus(ground: Ground) -> dict[str, Any]:
    """Return what the template of the page needs."""
    done = sum(len(case.records) for case in ground.begun)
    return {
        "done": f"{count(done, 'run')} in {len(ground.begun):,} of {len(ground.asked):,} studies",
        "newest": newest(ground.cases),
        "status": _status(ground),
        "learnt": [_learnt(ground, one) for one in _reported(ground)],
        "steps": steps(ground),
        "blockers": blockers(ground),
    }


def _status(ground: Ground) -> Marked:
    rows = []
    for case in ground.cases:
        missing, wanted = case.runs
        known = "" if case.state in ("unfinished", "whole") else "at least "
        rows.append([
            ground.study(case), case_state(case), f"{wanted - missing:,} of {known}{wanted:,}",
            f"{len(case.failed):,}", f"{case.config.seeds.reporting:,}", ground.records(case),
        ])  # fmt: skip
    headings = ["study", "state", "runs ended", "of them failed", "seeds", "records"]
    return table(headings, rows, [False, False, True, True, True, False])


def case_state(case: Case) -> str:
    """Return how far a study is, and what must be known with it."""
    words = [STATES[case.state]]
    words += ["confirmatory"] * case.config.confirmatory
    words += ["exploratory"] * bool(case.results and case.results.index["exploratory"])
    words += ["its file has changed since the last run"] * case.changed
    return ", ".join(words)


# --- what was learnt --------------------------------------------------------------------------------


def _reported(ground: Ground) -> list[Asked]:
    """Return the studies with a finished reporting run, in the order of `Ground.reported`."""
    order = [case.path for case in ground.reported]
    found = [one for one in ground.asked if one.path in order]
    return sorted(found, key=lambda one: order.index(one.path))


def _learnt(ground: Ground, one: Asked) -> Marked:
    case = next(case for case in reversed(one.cases) if case.reported)  # the most rows
    assert case.results is not None
    parts: list[Any] = [*findings(ground, case)]
    parts += datasizes.told(one.by_size) if one.config.train_examples else []
    parts += [line for line in state(case.results) if not line.startswith("Failed:")]
    return md(
        "**{name}** ({study}, {records}): {text}",
        name=one.config.name,
        study=ground.study(one, "study"),
        records=ground.records(case),
        text=joined(parts),
    )


# --- what is next -----------------------------------------------------------------------------------


def steps(ground: Ground) -> list[Marked]:
    """Return what is next, the first thing first; the page says by which rule."""
    begun = [case for case in ground.begun if case.state != "whole"]
    fresh = [case for case in ground.cases if case.results is None and not case.config.confirmatory]
    return [
        *(_failed(ground, case) for case in ground.begun if case.failed),
        *(_unfinished(ground, case) for case in sorted(begun, key=lambda case: (case.runs[0], case.name))),
        *(_begin(ground, case) for case in sorted(fresh, key=lambda c: (bool(c.hub), c.runs[0], c.name))),
        *(line for case in ground.reported if case.state == "whole" for line in _open(ground, case)),
        *_confirm(ground),
    ]


def _failed(ground: Ground, case: Case) -> Marked:
    return md(
        "Look at {runs} of {study} ([progress](progress.md) has the reasons); {command} does them again.",
        runs=count(len(case.failed), "failed run"), study=ground.study(case),
        command=ground.command("study run", case, "--retry-failed"),
    )  # fmt: skip


def _unfinished(ground: Ground, case: Case) -> Marked:
    missing, _ = case.runs
    hours = case.hours_left
    took = (
        "" if hours is None else f", about {_time(hours)} of one process at the median of its finished runs"
    )
    more = "; tuning may add some" if case.state == "tuning" else ""
    return md(
        "Finish {study}: {runs} missing{took}{more}. {command}", study=ground.study(case),
        runs=f"{count(missing, 'run')} {'is' if missing == 1 else 'are'}", took=took, more=more,
        command=ground.command("study run", case),
    )  # fmt: skip


def _begin(ground: Ground, case: Case) -> Marked:
    where = ", where a hub can be reached" if case.hub else ""
    at = "" if case.rows is None else f" at {count(case.rows, 'row')}"
    return md(
        "Begin {study}{at}{where}: {arms}, {seeds}, at least {runs}. {command}", study=ground.study(case),
        at=at, where=where, arms=count(len(case.config.arms), "arm"),
        seeds=count_of_seeds(case.config.seeds.reporting), runs=count(case.runs[1], "run"),
        command=ground.command("study run", case),
    )  # fmt: skip


def _open(ground: Ground, case: Case) -> list[Marked]:
    """Return what a whole study leaves open, and the seeds that may settle it."""
    assert case.results is not None
    if case.config.seeds.reporting < 2:  # a look at rates, not at arms
        return []
    if case.screens:
        return [md(
            "Take what {study} puts lowest ([knowledge](knowledge.md)) to a study with {enough} seeds or "
            "more and declared contrasts: a study of {seeds} screens.",
            study=ground.study(case), enough=SCREENING_BELOW,
            seeds=count_of_seeds(case.config.seeds.reporting),
        )]  # fmt: skip
    lines: list[Marked] = []
    if case.name in ground.advice and (best := ground.advice[case.name].best) and best.settling:
        lines.append(md("{study}: {outlook}.", study=ground.study(case), outlook=best.outlook()))
    rows = contrast_rows(case.results) if case.results.config.contrasts else []
    for row in rows:
        needed = _needed(row.margin, row.paired.sd, len(rows)) if row.paired and row.margin else None
        if row.verdict.startswith(NONE_SHOWN) and needed:
            lines.append(md(
                "{study} shows no difference between {arm} and {other}; to show that they lie within its "
                "margin of {margin} takes about {seeds} in a new study, if they do.",
                study=ground.study(case), arm=code(row.arm), other=code(row.against),
                margin=f"{row.margin:.4f}", seeds=count_of_seeds(needed),
            ))  # fmt: skip
    return lines


def _needed(margin: float, sd: float, contrasts: int) -> int | None:
    return power.seeds_for_equivalent(margin, sd, alpha=0.05 / contrasts) if margin > 0 and sd > 0 else None


def _confirm(ground: Ground) -> list[Marked]:
    """Return the confirmatory study's turn, which is the last."""
    mine = [case for case in ground.cases if case.config.confirmatory]
    if not mine:
        closed = not opened_by(ground.results)
        return [md(
            "Write the confirmatory study: the contrasts that the studies above suggest, declared before it "
            "runs{rows}. No study file is marked {mark}.",
            rows="; it opens the reserved rows, once, and they are still closed" if closed else "",
            mark=code("confirmatory: true"),
        )]  # fmt: skip
    return [
        md("Last, run the confirmatory study {study}, which opens the reserved rows, once. {command}",
           study=ground.study(case), command=ground.command("study run", case))
        for case in mine if case.results is None
    ]  # fmt: skip


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


# --- what stands in the way -------------------------------------------------------------------------


def blockers(ground: Ground) -> list[Marked]:
    """Return what stands in the way, as far as records and study files know."""
    lines = [*_accelerator(ground)]
    for case in ground.cases:
        if case.results is None and case.hub:
            lines.append(md(
                "{study} takes {sources} from a hub; {command} says whether it can be reached.",
                study=ground.study(case), sources=listed(case.hub),
                command=ground.command("doctor --study", case),
            ))  # fmt: skip
        if any(run["role"] == "untouched" for run, _ in case.failed):
            lines.append(md("{study}: the untouched model's run failed, so there is no gain and no margin.",
                            study=ground.study(case)))  # fmt: skip
    opened = opened_by(ground.results)
    waiting = [case for case in ground.cases if case.config.confirmatory and case.name not in opened]
    for case in waiting if opened else ():
        lines.append(md("Reserved rows were opened by {opened}; {study} may open them no second time.",
                        opened=listed(opened), study=ground.study(case)))  # fmt: skip
    return lines


def _accelerator(ground: Ground) -> list[Marked]:
    found = machines(ground.cases)
    wanted = [case for case in ground.cases if case.config.train.device == "cuda" and case.state != "whole"]
    lines = [
        md("{study} asks for {device}, which no run has had so far.", study=ground.study(case),
           device=code("cuda"))
        for case in wanted if all(device == "cpu" for device, *_ in found)
    ]  # fmt: skip
    if found and all(device == "cpu" for device, *_ in found):
        runs = sum(one[3] for one in found)
        lines.insert(0, md(
            "No accelerator: {runs} so far ran on the CPU ([progress](progress.md) names the machines). What "
            "the machine at hand has, {memory} and {doctor} print; this page is made from records alone.",
            runs="the one run" if runs == 1 else f"all {runs:,} runs",
            memory=code("rankwise memory"), doctor=code("rankwise doctor"),
        ))  # fmt: skip
    return lines
