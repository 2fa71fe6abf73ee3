"""The sentences that a report opens with. Words of a verdict come from `tables.contrast_rows` alone."""

from __future__ import annotations

from rankwise.config import SCREENING_BELOW
from rankwise.contrasts import ContrastRow, contrast_rows
from rankwise.tables import Results, arm_rows, captions, design_warnings, hopeless

UNDECIDED = ("no verdict", "screening")
NONE_SHOWN = "no difference shown"


def count(number: int, what: str) -> str:
    """Return "1 arm" or "3 arms"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def opening(results: Results) -> str:
    """Return what the study says so far, in one sentence; that it is exploratory comes first."""
    if results.index["exploratory"]:
        text = _opening(results)
        return f"Exploratory: {text[0].lower()}{text[1:]}"
    return _opening(results)


def _opening(results: Results) -> str:
    config = results.config
    size = f"{count(len(config.arms), 'arm')} with {count(config.seeds.reporting, 'seed')}"
    if not any(row.done for row in arm_rows(results)):
        return f"No reporting run of {size} has finished: there are no results yet."
    if config.seeds.reporting < SCREENING_BELOW:
        return f"Screening of {size}: numbers and no verdict."
    if not config.contrasts:
        return f"Comparison of {size}: no contrasts are declared, so there are numbers and no verdict."
    return _of_contrasts(contrast_rows(results))


def _of_contrasts(rows: list[ContrastRow]) -> str:
    decided = [row for row in rows if not row.verdict.startswith(UNDECIDED)]
    left = [row for row in rows if row not in decided]
    if not decided:
        return f"There is no verdict on {_declared(len(rows))}{_reasons(rows)}."
    parts = []
    if not any(row.verdict.startswith("differs") for row in decided):
        parts.append(f"no {'decided' if left else 'declared'} contrast differs")
    for words in sorted(dict.fromkeys(map(_short, decided)), key=lambda text: not text.startswith("differs")):
        of_it = [row for row in decided if _short(row) == words]
        pairs = [_pair(row, whole=len(of_it) <= 2) for row in of_it]
        parts.append(f"{words} ({len(pairs)} of {_declared(len(rows))}): {', '.join(pairs)}")
    if left:
        parts.append(f"without a verdict: {len(left)} of {_declared(len(rows))}{_reasons(left)}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _declared(number: int) -> str:
    return count(number, "declared contrast")


def _pair(row: ContrastRow, whole: bool) -> str:
    """Return "a against b", with its numbers where they differ; the `whole` has the interval too."""
    pair, p = f"{row.arm} against {row.against}", row.paired
    if p is None or not row.verdict.startswith("differs"):
        return pair
    return f"{pair} ({p.mean:+.4f}{f', 95 % interval {p.low:+.4f} to {p.high:+.4f}' if whole else ''})"


def _short(row: ContrastRow) -> str:
    """Return the verdict without the number that differs from contrast to contrast."""
    if row.verdict.startswith(NONE_SHOWN):
        return NONE_SHOWN
    within = row.verdict.endswith("the margin") and row.margin is not None
    return f"{row.verdict} of {row.margin:.4f}" if within else row.verdict


def _reasons(rows: list[ContrastRow]) -> str:
    found = dict.fromkeys(row.verdict.partition(": ")[2] for row in rows)
    return f" ({'; '.join(reason for reason in found if reason)})" if any(found) else ""


def missing_runs(results: Results) -> tuple[int, int]:
    """Return how many runs are missing and how many the study wants, as far as that is known.

    An arm's reporting runs enter the index once its rate is chosen; before that they are counted from the
    number of seeds. An arm of which every rate diverged has none to come.
    """
    arms = [arm for arm, choice in results.index["rates"].items() if not hopeless(choice)]
    listed = {(run["arm"], run["seed"]) for run in results.index["runs"] if run["role"] == "reporting"}
    seeds = results.config.seeds.reported
    to_come = sum((arm, seed) not in listed for arm in arms for seed in seeds)
    wanted = len({run["run_id"] for run in results.index["runs"]}) + to_come  # arms may share a run
    return wanted - len(results.records), wanted


def state(results: Results) -> list[str]:
    """Return what a reader must know before the numbers: what is missing, what failed, what was changed."""
    found = []
    missing, wanted = missing_runs(results)
    if missing:
        tuning = "; learning rates are still being tuned" if results.index["tuning_unfinished"] else ""
        found.append(f"Unfinished: {missing:,} of {count(wanted, 'run')} are missing{tuning}.")
    untouched = results.of("untouched", "untouched")
    if results.untouched() is None and untouched:
        found.append("The untouched model's run failed, so there is no gain and no margin.")
    failures = len(results.failures())
    if failures:
        found.append(f"Failed: {count(failures, 'run')}, told under Warnings.")
    if results.index["exploratory"]:
        found.append("Exploratory: the study was changed after its first run.")
    return found


def warnings(results: Results) -> list[str]:
    """Return every warning: the design's, exploratory, rates at an edge, failures, notices of the index."""
    config = results.config
    found = [*design_warnings(config)]
    if results.index["exploratory"]:
        found.append("exploratory: the study was changed after its first run")
    found += [
        f"{arm}: the chosen rate lies at the edge of the grid"
        for arm, choice in results.index["rates"].items()
        if choice.get("at_edge")
    ]
    found += [
        f"{arm}: every rate diverged" for arm, choice in results.index["rates"].items() if hopeless(choice)
    ]
    return [*found, *results.failures(), *results.index["resolved"]["notices"]]


def notes(results: Results) -> list[str]:
    """Return what must be read with the table and is no warning."""
    told = set(warnings(results))
    return [
        line
        for line in captions(results)
        if line not in told and "at the edge of the grid" not in line and not line.startswith("unfinished:")
    ]
