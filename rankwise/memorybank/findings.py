"""What a study found: its recommendation, its contrasts' verdicts, or its numbers, a sentence each."""

from __future__ import annotations

from rankwise.memorybank.cases import Case
from rankwise.memorybank.ground import Ground, against
from rankwise.memorybank.text import Marked, code, md
from rankwise.tables import count_of_seeds


def findings(ground: Ground, case: Case) -> list[Marked]:
    """Return a reported study's findings, the one that its design was made for first."""
    assert case.results is not None
    found = []
    if case.name in ground.advice:
        found.append(case.told(ground.advice[case.name].sentence()))
    if case.results.config.contrasts and not case.screens:
        found.append(case.told(case.said))
    return found or [_numbers(case) or case.told(case.said)]


def _numbers(case: Case) -> Marked | None:
    """Return how far the arms lie from the baseline; None where there is nothing to compare it with."""
    assert case.results is not None
    config, before = case.results.config, case.results.untouched()
    baseline = config.baseline
    own = next((row for row in case.arms if row.arm == baseline), None)
    if baseline is None or before is None or own is None or own.gain is None:
        return None
    pairs = {arm: against(case, arm, baseline) for arm in config.arms if arm != baseline}
    apart = sorted((pair[0], pair[1], arm) for arm, pair in pairs.items() if pair)
    if len(apart) < 2:
        return None
    (low, n, lowest), (high, m, highest) = apart[0], apart[-1]
    return md(
        "{base} is {gain} nats a token below the untouched model's {before} ({seeds}), and {others} other "
        "arms lie between {low} ({lowest}, {n}) and {high} ({highest}, {m}) of it; {said}",
        said=case.told(case.said[0].lower() + case.said[1:]), base=code(baseline), gain=f"{own.gain:.4f}",
        before=f"{before:.4f}", seeds=count_of_seeds(own.done), others=f"{len(apart):,}",
        low=f"{low:+.4f}", lowest=code(lowest), n=count_of_seeds(n),
        high=f"{high:+.4f}", highest=code(highest), m=count_of_seeds(m),
    )  # fmt: skip
